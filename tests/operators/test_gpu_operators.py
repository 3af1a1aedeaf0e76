"""Fused operators on a GPU: CUDA graphs, other streams and devices, the threads of a backward pass.

What a kernel computes is `test_gpu`'s; here is what only a device can get wrong: a launch on the default stream, a
buffer of a graph that is freed, a wait that the host makes, the current device left changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers_gpu import CUDA, shifted

import mhc_tilelang as mhc
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.perf.calls.cases import Shape
from mhc_tilelang.perf.calls.every_call import every_call
from mhc_tilelang.perf.calls.table import CALLS

pytestmark = pytest.mark.gpu

CASE = Case(4, 1280, torch.bfloat16, 200)
SPEC, N = CASE.spec, CASE.num_streams
LATE = 100_000_000  # cycles that a stream sleeps: longer than everything else of a test
Tensors = tuple[torch.Tensor, ...]


def calls(inputs: Inputs) -> dict[str, Callable[..., Tensors]]:
    """The fused functions, and those of a stream's ends, as functions of `out`."""
    parameters = (inputs.phi, inputs.alpha, inputs.bias, SPEC)
    head = (inputs.phi[:N], inputs.alpha[:1], inputs.bias[:N], SPEC)
    mixed = (inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res)
    return {
        "pre": lambda **out: mhc.pre(inputs.x, *parameters, **out),
        "post_pre": lambda **out: mhc.post_pre(*mixed, *parameters, **out),
        "post_pre delayed": lambda **out: mhc.post_pre(*mixed, *parameters, h_pre=inputs.h_pre, **out),
        "expand_pre": lambda **out: mhc.expand_pre(inputs.h, *parameters, **out),
        "post_head": lambda **out: mhc.post_head(*mixed, *head, **out),
    }


FUSED = ("pre", "post_pre", "post_pre delayed", "expand_pre", "post_head")
each_call = pytest.mark.parametrize("name", FUSED)


@each_call
def test_given_buffers_in_a_cuda_graph(name: str) -> None:
    """Captured once, replayed on other values of the stream and of phi. Catches a phi that is split when captured."""
    inputs = Inputs.of(CASE, CUDA)
    call = calls(inputs)[name]
    with torch.no_grad():
        out = tuple(torch.empty_like(tensor) for tensor in call())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(out=out)
        for tensor in (inputs.x, inputs.h, inputs.phi):
            tensor.mul_(-0.5)
        graph.replay()
        torch.cuda.synchronize()
        expected = calls(inputs)[name]()
    assert all(torch.equal(got, wanted) for got, wanted in zip(out, expected, strict=True))


@each_call
def test_a_stream_that_is_not_the_default_one(name: str) -> None:
    """Every kernel of a call waits for what came before it there, and for nothing else."""
    inputs = Inputs.of(CASE, CUDA)
    expected = calls(inputs)[name]()
    late = Inputs(**{key: torch.full_like(tensor, 0.25) for key, tensor in vars(inputs).items()})
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LATE)
        for key, tensor in vars(inputs).items():
            getattr(late, key).copy_(tensor)
        got = calls(late)[name]()
        assert not stream.query(), "the host waited for the device"
    stream.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@each_call
def test_views_that_start_anywhere_give_the_same_bits(name: str) -> None:
    """A 16-byte access to a misaligned address would fault."""
    inputs = Inputs.of(CASE, CUDA)
    moved = Inputs(**{key: shifted(tensor) for key, tensor in vars(inputs).items()})
    with torch.no_grad():
        pairs = zip(calls(moved)[name](), calls(inputs)[name](), strict=True)
    assert all(torch.equal(got, expected) for got, expected in pairs)


@each_call
def test_a_token_does_not_depend_on_its_batch(name: str) -> None:
    """Across the schedules of decoding and of thousands of tokens, whose splits and slabs differ."""
    whole = Inputs.of(replace(CASE, num_tokens=4097), CUDA)
    parameters = ("phi", "alpha", "bias")
    with torch.no_grad():
        expected = calls(whole)[name]()
        for first, last in ((0, 1), (7, 15), (1000, 1129), (4096, 4097)):
            kept = {key: t if key in parameters else t[first:last].clone() for key, t in vars(whole).items()}
            pairs = zip(calls(Inputs(**kept))[name](), expected, strict=True)
            assert all(torch.equal(got, wanted[first:last]) for got, wanted in pairs)


def tensors_in(value: object) -> list[torch.Tensor]:
    """The tensors that a call returned, however deep."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


@pytest.mark.parametrize("name", CALLS)
def test_the_same_call_gives_the_same_bits(name: str, every: dict) -> None:
    """Every kernel of every call, with sums over 4097 tokens: catches an atomic addition, and a race."""
    first = tensors_in(every[name]())
    for _ in range(10):
        assert all(torch.equal(one, other) for one, other in zip(tensors_in(every[name]()), first, strict=True))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("poisoned")
def test_every_element_is_written(name: str, every: dict) -> None:
    """No NaN is left in outputs that start as NaN."""
    assert not any(tensor.isnan().any() for tensor in tensors_in(every[name]()))


@pytest.fixture(scope="module")
def every() -> dict:
    return every_call(Shape(4097, 4, 1280, "bfloat16"), CUDA)


def sublayers(device: torch.device) -> tuple[list[mhc.HyperConnection], mhc.HyperHead]:
    torch.manual_seed(3)
    connections = [mhc.HyperConnection(SPEC, sublayer).to(device) for sublayer in range(3)]
    head = mhc.HyperHead(SPEC).to(device)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in torch.nn.ModuleList([*connections, head]).parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(device) / 32)
    return connections, head


def gradients(device: torch.device, embedding: torch.Tensor, upstream: torch.Tensor) -> Tensors:
    """Return the gradients of the embedding and every parameter, through a stream with all of its fused ends."""
    connections, head = sublayers(device)
    h = embedding.clone().requires_grad_()
    stream = mhc.ResidualStream(h, N)
    for connection in connections:
        stream.write(torch.tanh(stream.read(connection)))
    stream.reduce(head).backward(upstream)
    parameters = torch.nn.ModuleList([*connections, head]).parameters()
    return (h.grad, *(parameter.grad for parameter in parameters))


def test_a_backward_runs_on_the_stream_of_its_forward() -> None:
    """Autograd's own thread launches the kernels: on the forward's stream, where the gradient that it starts from is
    written late. Catches a launch that takes the stream from the thread that loaded the kernel.
    """
    generator = torch.Generator().manual_seed(5)
    embedding, upstream = (
        torch.randn(CASE.num_tokens, CASE.hidden_size, generator=generator).to(CUDA, CASE.dtype) for _ in range(2)
    )
    expected = gradients(CUDA, embedding, upstream)
    torch.cuda.synchronize()
    stream, late = torch.cuda.Stream(), torch.zeros_like(upstream)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LATE)
        late.copy_(upstream)
        got = gradients(CUDA, embedding, late)
    stream.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_a_stream_of_sublayers_agrees_with_the_cpu() -> None:
    """Kernels of both targets, joined by the same operators: in float32 they differ by the order of sums alone."""
    generator = torch.Generator().manual_seed(6)
    embedding, upstream = (torch.randn(64, CASE.hidden_size, generator=generator) for _ in range(2))
    got = gradients(CUDA, embedding.to(CUDA), upstream.to(CUDA))
    expected = gradients(torch.device("cpu"), embedding, upstream)
    # Split products are good to 4e-6. Inputs that are off by as much move these gradients by 5e-6, those of alpha, one
    # or three numbers whose terms cancel, by 4e-5 (measured on a CPU): four times that is allowed.
    for one, other in zip(got, expected, strict=True):
        allowed = 2e-5 if other.numel() > 3 else 2e-4
        assert torch.linalg.vector_norm(one.cpu() - other) <= allowed * torch.linalg.vector_norm(other)


def test_a_whole_backward_in_a_cuda_graph() -> None:
    """Forward and backward captured together: no kernel, and nothing around one, may wait for the device."""
    connection = sublayers(CUDA)[0][0]
    x = Inputs.of(CASE, CUDA).x.requires_grad_()
    weights = (x, *connection.parameters())

    def step() -> Tensors:
        layer_input, *mappings = connection(x)
        x_next = connection.merge(x, torch.tanh(layer_input), *mappings)
        return torch.autograd.grad(x_next, weights, torch.ones_like(x_next) * x_next.detach())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    with torch.no_grad():
        x.mul_(-0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(got, step(), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_backward_on_a_device_that_is_not_the_current_one() -> None:
    """Every kernel runs where its tensors are, in autograd's thread too, and the current device stays what it was."""
    other = torch.device("cuda", 1)
    generator = torch.Generator().manual_seed(7)
    embedding, upstream = (
        torch.randn(CASE.num_tokens, CASE.hidden_size, generator=generator).to(CUDA, CASE.dtype) for _ in range(2)
    )
    expected = gradients(CUDA, embedding, upstream)
    got = gradients(other, embedding.to(other), upstream.to(other))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(one.to(CUDA), two) for one, two in zip(got, expected, strict=True))
