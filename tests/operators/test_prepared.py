"""A call like one before it replays what that did, and gives what an ordinary call gives, to the bit, or its error.

Would catch: a fact that a check or a plan looks at and the key does not hold; a tape that reads a tensor of the call it
was recorded with, or writes into a result it gave before; a tape that outlives the plan it was recorded with; a cache
that keeps tensors, or grows.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from differentiable import FORMS, FUNCTIONS, NORMED, Function, gradients, requiring, upstream
from helpers import assert_same_bits

from mhc_tilelang import GradientError, MHCSpec, compiler, ops
from mhc_tilelang.checking.inputs import Case
from mhc_tilelang.compiler.tape import record
from mhc_tilelang.kernels import plans
from mhc_tilelang.operators import prepared

EVERY = {**FORMS, **NORMED}
CASE = Case(4, 64, torch.bfloat16, 6)
every_form = pytest.mark.parametrize("name", EVERY)
POST = FUNCTIONS["post"]


@pytest.fixture(autouse=True)
def nothing_prepared() -> Iterator[None]:
    prepared.forget()
    yield
    prepared.forget()


class Marked(torch.Tensor):
    """A subclass without any behaviour of its own."""


def tapes() -> list[object]:
    """Return the tapes of all remembered calls, None for one that was not recorded or not followed."""
    found = [(getattr(ready, "_compute", ready), getattr(ready, "_fill", None)) for ready in prepared._ready.values()]
    return [compute._tape or (fill and fill._tape) for compute, fill in found]


def drawn(function: Function, seed: int, leading: tuple[int, ...] = (2, 3)) -> dict[str, torch.Tensor]:
    tensors = function.tensors(replace(CASE, seed=seed), leading)
    return {key: tensor for key, tensor in tensors.items() if key != "norm_weight"}  # which makes another phi


def differentiate(function: Function, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Results and gradients."""
    leaves = requiring(tensors)
    outputs = function.call(leaves, CASE.spec)
    return (*outputs, *gradients(outputs, leaves, upstream(outputs)).values())


def ordinarily(run: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    prepared.forget()
    return run()


@every_form
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_replays_have_the_bits_of_ordinary_calls(name: str, grad: bool) -> None:
    """Values differ each time: recorded, replayed, replayed; none writes into what another returned."""
    function = EVERY[name]

    def run(seed: int) -> tuple[torch.Tensor, ...]:
        tensors = drawn(function, seed)
        return differentiate(function, tensors) if grad else function.call(tensors, CASE.spec)

    expected = [ordinarily(lambda seed=seed: run(seed)) for seed in range(4)]
    got = [run(seed) for seed in range(4)]
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)
        assert [t.shape for t in one] == [t.shape for t in other]
        assert [t._is_view() for t in one] == [t._is_view() for t in other]
        assert [t.requires_grad for t in one] == [t.requires_grad for t in other]
    assert tapes()
    assert all(tape is not None for tape in tapes())


@every_form
def test_replays_into_buffers(name: str) -> None:
    """They are written, to the bit, returned, and count the write."""
    function = EVERY[name]
    for seed in range(4):
        tensors = drawn(function, seed)
        results = function.call(tensors, CASE.spec)
        buffers = tuple(torch.full_like(one, torch.nan) for one in results)
        before = [one._version for one in buffers]
        returned = function.call(tensors, CASE.spec, out=buffers if len(buffers) > 1 else buffers[0])
        assert all(one is buffer for one, buffer in zip(returned, buffers, strict=True))
        assert_same_bits(buffers, results)
        assert all(one._version == was + 1 for one, was in zip(buffers, before, strict=True))
    assert any(hasattr(ready, "_fill") and ready._fill._tape is not None for ready in prepared._ready.values())


@pytest.mark.parametrize("name", ["pre", "post_pre-delayed-normed", "expand_pre", "head"])
def test_tapes_of_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that take tensors, as those of a GPU: each view is made that a kernel reads, and nothing is mixed up."""
    function = EVERY[name]
    expected = ordinarily(lambda: differentiate(function, drawn(function, 3)))
    by_tensors = {key: replace(kernel, native=None) for key, kernel in compiler._kernels.items()}
    monkeypatch.setattr(compiler, "_kernels", by_tensors)
    for seed in (0, 1, 2, 3):
        got = differentiate(function, drawn(function, seed))
    assert_same_bits(got, expected)
    assert all(tape is not None for tape in tapes())


def test_one_tensor_given_twice() -> None:
    """A tape that was recorded so tells the two apart."""
    function = EVERY["post_pre-delayed"]
    for seed in range(3):
        tensors = drawn(function, seed)
        function.call({**tensors, "h_pre": tensors["h_post"]}, CASE.spec)
    assert all(tape is not None for tape in tapes())
    got = function.call(tensors, CASE.spec)
    assert_same_bits(got, ordinarily(lambda: function.call(tensors, CASE.spec)))


@pytest.mark.parametrize(
    ("wanted", "absent"), [(("x", "h_res"), (1, 2, 3)), (("phi",), (0,)), (("alpha", "layer_output"), (0,))], ids=str
)
def test_absent_gradients(wanted: tuple[str, ...], absent: tuple[int, ...]) -> None:
    """The key includes which gradients come and which are needed; a tape of all of them stands ready here."""
    function = FUNCTIONS["post_pre"]

    def run(wanted: tuple[str, ...] | None, absent: tuple[int, ...]) -> list[torch.Tensor | None]:
        leaves = requiring(drawn(function, 1), wanted)
        outputs = function.call(leaves, CASE.spec)
        pairs = [(o, g) for k, (o, g) in enumerate(zip(outputs, upstream(outputs), strict=True)) if k not in absent]
        differentiated, given = zip(*[(o, g) for o, g in pairs if o.requires_grad], strict=True)
        inputs = [leaf for leaf in leaves.values() if leaf.requires_grad]
        return list(torch.autograd.grad(differentiated, inputs, given, allow_unused=True))

    expected = run(wanted, absent)
    for _ in range(3):
        run(None, ())
    for _ in range(3):
        got = run(wanted, absent)
        assert [g is None for g in got] == [e is None for e in expected]
        assert_same_bits([g for g in got if g is not None], [e for e in expected if e is not None])


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "shape": lambda t: t[:1],
    "dtype": lambda t: t.double(),
    "strides": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "start": misaligned,
    "grad": lambda t: t.clone().requires_grad_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_describes_a_tensor_is_in_the_key(change: str) -> None:
    tensors = list(drawn(POST, 0).values())
    key = prepared.describe(("post",), tensors)
    assert key is not None
    for k in range(len(tensors)):
        other = [CHANGES[change](one) if k == at else one for at, one in enumerate(tensors)]
        assert prepared.describe(("post",), other) != key
    assert prepared.describe(("post",), [one.clone() for one in tensors]) == key


def test_what_else_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, a spec, a number's type; a tensor on another device."""
    (h,) = tensors = [torch.randn(3, 64)]
    keys = {prepared.describe(("f", *more), tensors) for more in ((1, int), (1, float), (CASE.spec,))}
    keys.add(prepared.describe(("f", replace(CASE.spec, sinkhorn_iters=7)), tensors))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    keys.add(prepared.describe(("f", 1, int), tensors))
    monkeypatch.setattr(torch.Tensor, "get_device", lambda _: 3)
    keys.add(prepared.describe(("f", 1, int), tensors))
    assert None not in keys
    assert len(keys) == 6
    assert prepared.describe(("f",), [h.to("meta")]) is None


@pytest.mark.parametrize(
    "odd",
    [
        torch.empty(0, 64),
        torch.eye(4).to_sparse(),
        torch.eye(4).to_mkldnn(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        torch.randn(1, dtype=torch.complex64).conj().imag,
        torch.randn(4, 4).t(),
        torch.ones(4).as_subclass(Marked),
    ],
    ids=["empty", "sparse", "mkldnn", "nested", "negated", "strided", "subclass"],
)
def test_what_has_no_key(odd: object) -> None:
    assert prepared.describe(("f",), [torch.ones(4), odd]) is None


def refusals() -> dict[str, tuple[type[Exception], Callable[[dict[str, torch.Tensor]], object]]]:
    """Calls of `post` that are refused, and how they differ from one that is prepared."""

    def without_grad(changed: Callable[[dict[str, torch.Tensor]], dict[str, object]]) -> Callable[..., object]:
        return lambda tensors: ops.post(**{**tensors, **changed(tensors)})

    return {
        "strides": (ValueError, without_grad(lambda t: {"h_res": t["h_res"].transpose(-1, -2)})),
        "shape": (ValueError, without_grad(lambda t: {"h_post": t["h_post"][..., :2].contiguous()})),
        "tokens": (ValueError, without_grad(lambda t: {"h_post": t["h_post"][:1]})),
        "dtype": (TypeError, without_grad(lambda t: {"h_post": t["h_post"].double()})),
        "device": (ValueError, without_grad(lambda t: {"h_post": t["h_post"].to("meta")})),
        "kind": (TypeError, without_grad(lambda t: {"h_post": t["h_post"].tolist()})),
        "sparse": (ValueError, without_grad(lambda t: {"h_post": t["h_post"].to_sparse()})),
        "buffer's dtype": (TypeError, without_grad(lambda t: {"out": t["x"].float()})),
        "buffer's kind": (TypeError, without_grad(lambda t: {"out": (torch.empty_like(t["x"]),)})),
        "overlap": (ValueError, without_grad(lambda t: {"out": t["x"]})),
        "gradient": (
            GradientError,
            without_grad(lambda t: {"x": t["x"].clone().requires_grad_(), "out": torch.empty_like(t["x"])}),
        ),
    }


@pytest.mark.parametrize("wrong", refusals())
def test_errors_are_word_for_word_those_of_an_ordinary_call(wrong: str) -> None:
    error, refused = refusals()[wrong]
    tensors = drawn(POST, 0)
    with pytest.raises(error) as first:
        refused(tensors)
    for _ in range(4):
        ops.post(**tensors)
        ops.post(**tensors, out=torch.empty_like(tensors["x"]))
    assert all(tape is not None for tape in tapes())
    with pytest.raises(error) as later:
        refused(tensors)
    assert str(first.value) == str(later.value)


def test_numbers_are_told_apart_by_their_type() -> None:
    logits = torch.randn(3, 4, 4)
    for _ in range(4):
        ops.sinkhorn(logits, 1)
    with pytest.raises(TypeError, match=r"sinkhorn: iters: expected int, got (True|1\.0)"):
        ops.sinkhorn(logits, True)
    assert_same_bits([ops.sinkhorn(logits, 2)], ordinarily(lambda: (ops.sinkhorn(logits, 2),)))
    assert not torch.equal(ops.sinkhorn(logits, 2), ops.sinkhorn(logits, 1))


def replayed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, of which `post` is prepared."""
    for _ in range(4):
        ops.post(**tensors)
    assert tapes()
    assert all(tape is not None for tape in tapes())
    return tensors


def test_a_plan_that_is_replaced_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = replayed(drawn(POST, 0))
    with monkeypatch.context() as patch:
        patch.setattr(plans, "channel_tile", lambda *_: pytest.fail("asked"))
        with pytest.raises(pytest.fail.Exception, match="asked"):
            ops.post(**tensors)
    replayed(tensors)


def test_inference_mode() -> None:
    """A call prepared outside gives inference tensors inside, and ordinary ones after it."""
    tensors = replayed(drawn(POST, 0))
    with torch.inference_mode():
        assert all(ops.post(**tensors).is_inference() for _ in range(4))
    assert not ops.post(**tensors).is_inference()


def test_saved_tensors_that_come_back_elsewhere() -> None:
    """Hooks, as of offloading, hand a backward other tensors than its forward had, of other strides or starts."""
    function = FUNCTIONS["post_pre"]
    tensors = drawn(function, 0)
    expected = [differentiate(function, tensors) for _ in range(4)][-1]
    for unpack in (
        misaligned,
        lambda t: t.clone(memory_format=torch.contiguous_format),
        lambda t: t.mT.contiguous().mT,
    ):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t, u=unpack: u(t) if t.ndim > 1 else t):
            assert_same_bits(differentiate(function, tensors), expected)


def test_threads_replay_side_by_side() -> None:
    function = FUNCTIONS["post_pre"]
    given = [drawn(function, seed) for seed in range(4)]
    expected = [differentiate(function, tensors) for tensors in given]
    failed = []

    def work(k: int) -> None:
        for _ in range(20):
            try:
                assert_same_bits(differentiate(function, given[k]), expected[k])
            except AssertionError as error:
                failed.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last keys stay; tensors do not."""
    monkeypatch.setattr(prepared, "MOST", 4)
    for num_tokens in range(1, 9):
        for _ in range(3):
            ops.expand(torch.randn(num_tokens, 64), 4)
    assert len(prepared._ready) == 4
    assert all(tape is not None for tape in tapes())
    x = torch.randn(3, 4, 64)
    gone = weakref.ref(x), weakref.ref(ops.collapse(x)), weakref.ref(ops.collapse(x)), weakref.ref(ops.collapse(x))
    del x
    gc.collect()
    assert all(reference() is None for reference in gone)


def test_what_cannot_be_followed_leaves_no_tape() -> None:
    """A tensor from elsewhere, a number read from a tensor, a result that is an argument, or a view of another one."""
    outside = torch.ones(3)
    for run in (
        lambda x: (x + outside,),
        lambda x: (torch.full_like(x, x.sum().item()),),
        lambda x: (x,),
        lambda x: (x.view(3, 1),),
        lambda x: (lambda y: (y, y.view(3, 1)))(x.clone()),
        lambda x: x.clone().split([1, 2]),
    ):
        results, tape = record(run, [torch.arange(3.0)])
        assert tape is None
        assert_same_bits(results, run(torch.arange(3.0)))


def test_operations_between_launches_are_taped() -> None:
    """Copies, sums in place on a view, several results at once, another dtype, another shape."""

    def run(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = x.clone()
        total[-1] *= 3
        total += y
        first, second = torch.split_with_sizes_copy(total, [1, 2])
        return first, second, total.to(torch.bfloat16), torch.ops.aten._unsafe_view(x * 2, [2, 3])

    given = [torch.randn(3, 2), torch.randn(3, 2)]
    _, tape = record(run, [torch.zeros(3, 2), torch.zeros(3, 2)])
    assert tape is not None
    kept = [one.clone() for one in given]
    assert_same_bits(tape.replay(given), run(*given))
    assert_same_bits(given, kept)


def test_specs_with_other_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    function = FUNCTIONS["coefficients"]
    tensors = drawn(function, 0)
    for spec in (CASE.spec, replace(CASE.spec, post_scale=1.0), MHCSpec(64, sinkhorn_iters=3)):
        got = [function.call(tensors, spec) for _ in range(4)][-1]
        assert_same_bits(got, ordinarily(lambda spec=spec: function.call(tensors, spec)))


def test_grad_mode_is_told_apart() -> None:
    leaves = requiring(drawn(POST, 0))
    for _ in range(3):
        with torch.no_grad():
            assert not ops.post(**leaves).requires_grad
        assert ops.post(**leaves).requires_grad


def test_an_operator_alone_is_prepared() -> None:
    """Compiled code calls it so, without our checks; strides that have no tape work as well."""
    tensors = list(drawn(POST, 0).values())
    expected = torch.ops.mhc_tilelang.post(*tensors)
    for _ in range(3):
        assert_same_bits([torch.ops.mhc_tilelang.post(*tensors)], [expected])
    assert [tape is not None for tape in tapes()] == [True]
    assert_same_bits([torch.ops.mhc_tilelang.post(*tensors[:3], tensors[3].mT.contiguous().mT)], [expected])
