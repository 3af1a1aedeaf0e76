"""Kernels on a GPU: the checks, views that start anywhere, and bits that do not depend on the batch."""

from __future__ import annotations

import pytest
import torch
from helpers_backward import BACKWARD, SUMS, take, take_tokens
from helpers_gpu import CUDA, shifted

import mhc_tilelang as mhc
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.checking.run import CHECKS, cases, check_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_kernel_agrees_with_float64(case: Case) -> None:
    inputs = Inputs.of(case, CUDA)
    rows = [check_case(kernel, case, inputs) for kernel in CHECKS]
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]


def test_views_that_start_anywhere_give_the_same_bits() -> None:
    """A 16-byte access to a misaligned address would fault; a narrower kernel may not change a bit."""
    case = Case(4, 192, torch.bfloat16, 33)
    inputs = Inputs.of(case, CUDA)
    moved = Inputs(**{name: shifted(tensor) for name, tensor in vars(inputs).items()})
    results = []
    for given in (inputs, moved):
        with torch.no_grad():
            layer_input, h_post, h_res = mhc.pre(given.x, given.phi, given.alpha, given.bias, case.spec)
            x_next = mhc.post(given.x, given.layer_output, given.h_post, given.h_res)
            results.append((layer_input, h_post, h_res, x_next, mhc.sinkhorn(given.logits)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_token_does_not_depend_on_its_batch() -> None:
    """Across the split counts that small and large batches take."""
    case = Case(4, 1280, torch.bfloat16, 4097)
    inputs = Inputs.of(case, CUDA)

    def pre(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return mhc.pre(x, inputs.phi, inputs.alpha, inputs.bias, case.spec)

    whole = pre(inputs.x)
    for first, last in ((0, 1), (7, 8), (0, 63), (1000, 1129), (4096, 4097)):
        part = pre(inputs.x[first:last].clone())
        assert all(torch.equal(a[first:last], b) for a, b in zip(whole, part, strict=True))


every_backward = pytest.mark.parametrize("function", BACKWARD.values(), ids=BACKWARD)


def on_gpu(function, case: Case) -> dict:
    """The arguments of a backward function."""
    return {n: a.to(CUDA) if isinstance(a, torch.Tensor) else a for n, a in function.arguments(case).items()}


@every_backward
def test_a_backward_of_views_that_start_anywhere_gives_the_same_bits(function) -> None:
    arguments = on_gpu(function, Case(4, 192, torch.bfloat16, 33))
    moved = {n: shifted(a) if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
    for got, expected in zip(function(moved).values(), function(arguments).values(), strict=True):
        assert torch.equal(got, expected)


@every_backward
def test_the_same_backward_gives_the_same_bits(function) -> None:
    """Sums over tokens included: catches an atomic addition. 4097 tokens are eight ranges and 129 blocks."""
    arguments = on_gpu(function, Case(4, 1280, torch.bfloat16, 4097))
    first = function(arguments)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(function(arguments).values(), first.values(), strict=True))


@every_backward
def test_a_backward_of_a_token_does_not_depend_on_its_batch(function) -> None:
    arguments = on_gpu(function, Case(4, 1280, torch.bfloat16, 4097))
    whole = function(arguments)
    for first, last in ((0, 1), (7, 8), (0, 63), (1000, 1129), (4096, 4097)):
        places = torch.arange(first, last, device=CUDA)
        for name, got in function(take_tokens(arguments, places)).items():
            assert name in SUMS or torch.equal(got, take(name, whole[name], places))


@pytest.mark.parametrize("case", [Case(8, 1280, torch.float32, 300), Case(4, 7168, torch.float16, 300)], ids=str)
def test_wider_streams_of_other_dtypes(case: Case) -> None:
    """Backward plans that `cases` does not reach: n = 8 at full width, and float16's TF32 halves."""
    inputs = Inputs.of(case, CUDA)
    rows = [check_case(kernel, case, inputs) for kernel in BACKWARD]
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]


def test_a_stream_that_is_not_the_default_one() -> None:
    """Kernels wait for what came before them on the current stream. Catches a launch on the default stream."""
    case = Case(4, 2560, torch.bfloat16, 4096)
    inputs = Inputs.of(case, CUDA)
    expected = mhc.post(inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res)
    late = torch.empty_like(inputs.x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(inputs.x)
        got = mhc.post(late, inputs.layer_output, inputs.h_post, inputs.h_res)
    stream.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one() -> None:
    """The kernel runs where its tensors are, and the current device stays what it was."""
    inputs = Inputs.of(Case(4, 192, torch.bfloat16, 33), torch.device("cuda", 1))
    got = mhc.post(inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res)
    assert got.device == inputs.x.device
    assert torch.cuda.current_device() == 0


def test_given_buffers_in_a_cuda_graph() -> None:
    """`out=` in fixed buffers, captured once and replayed on other values."""
    case = Case(4, 1280, torch.bfloat16, 64)
    inputs = Inputs.of(case, CUDA)
    arguments = (inputs.x.clone(), inputs.phi, inputs.alpha, inputs.bias, case.spec)
    with torch.no_grad():
        out = tuple(torch.empty_like(tensor) for tensor in mhc.pre(*arguments))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            mhc.pre(*arguments, out=out)
        arguments[0].copy_(inputs.x.flip(0))
        graph.replay()
        expected = mhc.pre(*arguments)
    assert all(torch.equal(got, wanted) for got, wanted in zip(out, expected, strict=True))
