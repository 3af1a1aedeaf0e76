"""Arguments that launches hand to kernels, on both platforms: no kernel is built, and none runs.

Would catch: a constant of the spec in another's place, which equal defaults hide; a tensor that starts where a GPU's
vectors cannot, which only a GPU would notice; a buffer that overlaps an argument; a gradient that one combination of
arguments and results returns in another shape; a fake that does not lie as the result does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from differentiable import FORMS, NORMED, Function, gradients, requiring, upstream
from helpers import CPU
from test_operators import ADJOINT, backward_arguments, operator, operator_arguments
from torch._subclasses.fake_tensor import FakeTensorMode

from mhc_tilelang import MHCSpec, compiler, launch, operators
from mhc_tilelang.checking.families.aggregate_norm import EPS
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.compiler.kernel import Kernel
from mhc_tilelang.compiler.recording import Recorded
from mhc_tilelang.kernels.plans import MAX_ACCESS_BYTES

EVERY = FORMS | NORMED
every_form = pytest.mark.parametrize("name", EVERY)
CASE = Case(4, 64, torch.bfloat16, 6)
CONSTANTS = ("sinkhorn_eps", "pre_eps", "rms_eps", "post_scale")
# No two constants alike, so that each shows wherever it goes.
SPEC = MHCSpec(64, 4, sinkhorn_iters=3, sinkhorn_eps=0.01, pre_eps=0.02, rms_eps=0.03, post_scale=1.5)


@contextmanager
def recording(platform: str) -> Iterator[list[Recorded]]:
    """Record launches like `mhc_tilelang.recording`, on CPU tensors, which have addresses. Results have no values."""
    found: list[Recorded] = []

    def load(family: str, parameters: dict[str, Any]) -> Kernel:
        return cast(Kernel, lambda **arguments: found.append(Recorded(family, parameters, arguments)))

    with compiler.emulating(compiler.Emulator(platform, load, 264, platform, {})):
        yield found


def call(function: Function, tensors: dict[str, torch.Tensor], spec: MHCSpec = CASE.spec) -> None:
    """Forward and backward, with a gradient of every result."""
    tensors = requiring(tensors)
    outputs = function.call(tensors, spec)
    gradients(outputs, tensors, upstream(outputs))


@pytest.mark.parametrize("num_streams", [4, 8])  # a GPU's boundary backward has another form at 8
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_every_constant_goes_where_it_belongs(platform: str, num_streams: int) -> None:
    """Every function, forward and backward. Catches an eps in another's place: presets have them equal."""
    spec, case = replace(SPEC, num_streams=num_streams), replace(CASE, num_streams=num_streams)
    expected = {"iters": spec.sinkhorn_iters, **{name: getattr(spec, name) for name in CONSTANTS}}
    seen: dict[str, set[str]] = {}
    for name, function in EVERY.items():
        with recording(platform) as found:
            call(function, function.tensors(case), spec)
        for one in found:
            own = {"eps": EPS if "norm" in one.family else spec.sinkhorn_eps}
            given = {**one.parameters, **one.arguments}
            constants = {key: value for key, value in (own | expected).items() if key in given}
            assert constants == {key: given[key] for key in constants}, (name, one.family)
            seen.setdefault(one.family, set()).update(constants)
    assert seen["head_coefficients"] == {"pre_eps", "rms_eps"}
    assert {"iters", "sinkhorn_eps", "post_scale"} <= seen["coefficients_backward"]
    assert set(CONSTANTS) <= seen["coefficients"]


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor an element into its memory, contiguous."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def assert_starts_where_it_is_read(one: Recorded) -> None:
    """Every tensor of a launch starts on 16 bytes, or on the vectors that the kernel's tile has of it."""
    tile = getattr(one.parameters.get("plan"), "tile", one.parameters.get("tile"))
    width = tile.channels // tile.threads if hasattr(tile, "channels") else None
    for name, tensor in one.arguments.items():
        if isinstance(tensor, torch.Tensor):
            wide = width is not None and tensor.ndim > 1 and tensor.shape[-1] == CASE.hidden_size
            bytes_read = min(MAX_ACCESS_BYTES, width * tensor.element_size()) if wide else MAX_ACCESS_BYTES
            assert tensor.data_ptr() % bytes_read == 0, (one.family, name)


@every_form
def test_views_start_where_a_gpu_reads(name: str) -> None:
    """Each argument alone one element into its memory, then each gradient of a result, then all of them."""
    function = EVERY[name]
    tensors = function.tensors(CASE)
    for moved in (*tensors, None):
        views = {key: shifted(t) if moved in (key, None) else t for key, t in tensors.items()}
        with recording("cuda") as found:
            call(function, views)
            leaves = requiring(views)
            outputs = function.call(leaves, CASE.spec)
            gradients(outputs, leaves, [shifted(g) for g in upstream(outputs)])
        assert found
        for one in found:
            assert_starts_where_it_is_read(one)


@every_form
def test_buffers_start_where_a_gpu_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each buffer alone one element into its memory: refused on a GPU, or written by a kernel made for that.

    `check_buffers` refuses those that it is told are `whole`, on a GPU; here it is asked which.
    """
    function, refused = EVERY[name], set[str]()

    def noting(function: str, buffers: dict[str, torch.Tensor], inputs: object, whole: tuple[str, ...] = ()) -> None:
        refused.update(key for key in whole if buffers[key].data_ptr() % MAX_ACCESS_BYTES)

    for module in vars(operators).values():
        if hasattr(module, "check_buffers"):
            monkeypatch.setattr(module, "check_buffers", noting)
    tensors = function.tensors(CASE)
    with recording("cuda"):
        results = function.call(tensors, CASE.spec)
    for moved in range(len(results)):
        buffers = tuple(shifted(one) if k == moved else one.clone() for k, one in enumerate(results))
        refused.clear()
        with recording("cuda") as found:
            function.call(tensors, CASE.spec, out=buffers if len(buffers) > 1 else buffers[0])
        assert found
        if not refused:
            for one in found:
                assert_starts_where_it_is_read(one)


@every_form
def test_no_buffer_may_overlap_an_argument(name: str) -> None:
    """Every pair, of the delayed form and of a norm's weight too: a kernel would read what it has overwritten."""
    function = EVERY[name]
    tensors = {key: t for key, t in function.tensors(CASE).items() if key != "norm_weight"}  # that makes another phi
    with recording("cpu"):
        results = function.call(tensors, CASE.spec)
        for argument, tensor in tensors.items():
            for k, result in enumerate(results):
                memory = torch.zeros(max(tensor.nbytes, result.nbytes), dtype=torch.uint8)
                given, buffer = (memory[: t.nbytes].view(t.dtype).view(t.shape) for t in (tensor, result))
                buffers = tuple(buffer if k == other else one.clone() for other, one in enumerate(results))
                with pytest.raises(ValueError, match=f"expected memory of its own, .* overlaps {argument}$"):
                    function.call(
                        {**tensors, argument: given}, CASE.spec, out=buffers if len(buffers) > 1 else buffers[0]
                    )


@every_form
def test_every_buffer_counts_its_write(name: str) -> None:
    """Else a backward that still needs what was in it would go on with what is there now."""
    function = EVERY[name]
    tensors = function.tensors(CASE)
    with recording("cpu"):
        buffers = tuple(one.detach() for one in function.call(tensors, CASE.spec))
        before = [one._version for one in buffers]
        function.call(tensors, CASE.spec, out=buffers if len(buffers) > 1 else buffers[0])
    assert all(one._version > was for one, was in zip(buffers, before, strict=True))


@pytest.mark.parametrize("moved", ["x", "layer_output", "h_post", "h_res", "h_pre"])
def test_a_replay_starts_where_a_gpu_reads(moved: str) -> None:
    inputs = vars(Inputs.of(CASE, CPU))
    given = {key: shifted(t) if key == moved else t for key, t in inputs.items()}
    written = launch.Written(given["layer_output"], given["h_post"], given["h_res"])
    with recording("cuda") as found:
        launch.replay(given["x"], [written] * 2, dict.fromkeys(range(3), given["h_pre"]))
    (one,) = found
    assert_starts_where_it_is_read(one)


@every_form
def test_each_argument_with_each_result(name: str) -> None:
    """A gradient of one argument from one result has the argument's shape and dtype, and the others none.

    Catches shortcuts for what is not needed that leave out what is.
    """
    function = EVERY[name]
    tensors = function.tensors(CASE, (2, 3))
    with recording("cpu"):
        for wanted in tensors:
            leaves = requiring(tensors, (wanted,))
            outputs = function.call(leaves, CASE.spec)
            for output, g in zip(outputs, upstream(outputs), strict=True):
                if output.requires_grad:
                    output.backward(g, retain_graph=True)
            if any(output.requires_grad for output in outputs):
                assert {key for key, leaf in leaves.items() if leaf.grad is not None} <= {wanted}


def strided(value: object) -> object:
    """A tensor with the same values, its first two dimensions exchanged in memory."""
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    return value.transpose(0, 1).contiguous().transpose(0, 1)


def as_allocated(operator: torch._ops.OpOverload, arguments: list[object]) -> list[tuple[object, ...]]:
    """Shapes, dtypes and strides of what an operator returns."""
    results = operator(*arguments)
    results = results if isinstance(results, (tuple, list)) else (results,)
    return [(tuple(one.shape), one.dtype, one.stride()) for one in results]


@pytest.mark.parametrize("layer_dtype", [torch.bfloat16, torch.float32])
@every_form
def test_fakes_lie_as_results_do(name: str, layer_dtype: torch.dtype) -> None:
    """Fakes have the results' strides for strided arguments, forward and backward, and a layer of another dtype.

    Compilers hand operators what they like, and read the results as the fakes say. Catches an allocation that follows
    an argument's strides, or takes another's dtype.
    """
    function, case = EVERY[name], replace(CASE, layer_dtype=layer_dtype)
    with recording("cpu"):
        calls = {function.name: operator_arguments(function, case)}
        if function.name not in ADJOINT:
            calls[f"{function.name}_backward"] = backward_arguments(function, case)
        for called, arguments in calls.items():
            moved = [strided(one) for one in arguments]
            wanted = as_allocated(operator(called), moved)
            with FakeTensorMode() as mode:
                faked = [mode.from_tensor(one) if isinstance(one, torch.Tensor) else one for one in moved]
                assert as_allocated(operator(called), faked) == wanted, called
