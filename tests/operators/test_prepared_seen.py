"""Observers of operators and launches see a call's, prepared or not.

Would catch: a mode, profiler, trace, transform, tracer of launches or emulator that a replay passes by; a tangent or a
second derivative that is lost in silence; a subclass whose class a replay changes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from differentiable import FUNCTIONS, requiring
from helpers import assert_same_bits
from test_prepared import POST, Marked, differentiate, drawn, nothing_prepared, ordinarily, replayed  # noqa: F401  # a fixture
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_tilelang import GradientError, compiler, ops
from mhc_tilelang.compiler import recording


class Operators(TorchDispatchMode):
    """Notes the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operator() -> None:
    tensors = replayed(drawn(POST, 0))
    with Operators() as operators:
        ops.post(**tensors)
    assert "mhc_tilelang.post.default" in operators.seen


def test_a_function_mode_sees_the_operator() -> None:
    tensors, seen = replayed(drawn(POST, 0)), []

    class Noting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Noting():
        ops.post(**tensors)
    assert any("post" in one for one in seen)


def test_a_profiler_sees_the_operator() -> None:
    tensors = replayed(drawn(POST, 0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.post(**tensors)
    assert any(event.name == "mhc_tilelang::post" for event in profile.events())


def test_a_trace_records_the_operator() -> None:
    tensors = replayed(drawn(POST, 0))
    traced = torch.jit.trace(ops.post, tuple(tensors.values()), check_trace=False)
    assert "mhc_tilelang::post" in str(traced.graph)


def test_transforms_are_not_passed_by() -> None:
    """torch.func sees the call: a tensor inside is of the plain type, and has a plain tensor's description."""
    tensors = replayed(drawn(FUNCTIONS["post"], 0))

    def total(x: torch.Tensor) -> torch.Tensor:
        return ops.post(**{**tensors, "x": x}).float().square().sum()

    leaf = tensors["x"].clone().requires_grad_()
    total(leaf).backward()
    assert_same_bits([torch.func.grad(total)(tensors["x"])], [leaf.grad])


def test_tangents_are_refused() -> None:
    tensors = replayed(drawn(POST, 0))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors["x"], tensors["x"])
        with pytest.raises(GradientError, match="tangent"):
            ops.post(**{**tensors, "x": dual})


def test_second_derivatives_are_refused() -> None:
    tensors = drawn(POST, 0)
    for _ in range(4):
        differentiate(POST, tensors)
    leaves = requiring(tensors)
    x_next = ops.post(**leaves)
    (g_x,) = torch.autograd.grad(x_next, leaves["x"], torch.randn_like(x_next).requires_grad_(), create_graph=True)
    with pytest.raises(GradientError, match="no second derivative"):
        g_x.float().sum().backward()


def test_other_kinds_of_tensors_take_the_ordinary_way() -> None:
    """A subclass, whose class an operator keeps or loses as it always did; meta tensors."""
    tensors = replayed(drawn(POST, 0))
    marked = {name: one.as_subclass(Marked) for name, one in tensors.items()}
    prepared_type = type(ops.post(**marked))
    assert prepared_type is type(ordinarily(lambda: (ops.post(**marked),))[0])
    assert ops.post(**{name: one.to("meta") for name, one in tensors.items()}).device.type == "meta"


def test_every_launch_is_noted() -> None:
    """A list of launches has those of every call, replayed or not."""
    tensors = replayed(drawn(POST, 0))
    found = recording.record_launches(lambda: [ops.post(**tensors) for _ in range(4)])
    assert [one.family for one in found] == ["post"] * 4


def test_an_emulator_takes_the_launches() -> None:
    tensors = replayed(drawn(POST, 0))
    asked = []

    def load(family: str, _parameters: object) -> Callable[..., None]:
        asked.append(family)
        return lambda **_: None

    with compiler.emulating(compiler.Emulator("another", load, 8)):
        ops.post(**tensors)
    assert asked == ["post"]
