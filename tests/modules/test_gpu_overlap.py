"""Writes merged on a CUDA stream of their own, on a GPU; tests/modules/test_overlap.py has the order of events."""

from __future__ import annotations

import pytest
import torch

import mhc_tilelang as mhc

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
SPEC = mhc.MHCSpec.deepseek_v4(1280)
TOKENS = 2048


def connections() -> list[mhc.HyperConnection]:
    torch.manual_seed(1)
    made = [mhc.HyperConnection(SPEC, k, CUDA) for k in range(4)]
    with torch.no_grad():
        for parameter in torch.nn.ModuleList(made).parameters():
            parameter.add_(torch.randn_like(parameter) / 32)
    return made


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(CUDA).manual_seed(2)
    h, g = (torch.randn(TOKENS, 1280, generator=generator, device=CUDA) for _ in range(2))
    return h.bfloat16().requires_grad_(), g.bfloat16()


def layer(u: torch.Tensor) -> torch.Tensor:
    """A layer that ends late: a merge that did not wait would read something else."""
    out = torch.empty_like(u)
    torch.cuda._sleep(2_000_000)
    return out.copy_(torch.tanh(u))


def other_work() -> None:
    """Run work between a write and the next read: it takes freed memory and overwrites it."""
    for _ in range(8):
        torch.empty(TOKENS, 4, 1280, dtype=torch.bfloat16, device=CUDA).fill_(float("nan"))


def through_stream(made: list[mhc.HyperConnection], h: torch.Tensor, overlap: torch.cuda.Stream | bool) -> torch.Tensor:
    """Run a ResidualStream; without overlap each write is merged at once too, on the one CUDA stream there is."""
    stream = mhc.ResidualStream(h, overlap=overlap)
    for connection in made:
        stream.write(layer(stream.read(connection)))
        if overlap is False:
            _ = stream.x
        other_work()
    return stream.reduce("sum")


def gradients(out: torch.Tensor, h: torch.Tensor, g: torch.Tensor, made: list[mhc.HyperConnection]) -> list:
    found = torch.autograd.grad((out * g).float().sum(), [h, *torch.nn.ModuleList(made).parameters()])
    other_work()
    return list(found)


@pytest.mark.parametrize("given", [True, False], ids=["its own stream", "a given stream"])
def test_writes_merged_beside_give_the_same_bits(given: bool) -> None:
    """Values and gradients; several times, since a race need not show at once."""
    made, (h, g) = connections(), tensors()
    expected = through_stream(made, h, False)
    wanted = gradients(expected, h, g, made)
    for _ in range(5):
        out = through_stream(made, h, given or torch.cuda.Stream(CUDA, priority=-1))
        got = gradients(out, h, g, made)
        assert torch.equal(out, expected)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_writes_merged_beside_in_a_cuda_graph() -> None:
    """The side stream is part of the graph: replayed on other values, it gives what a call gives."""
    made, (h, _) = connections(), tensors()
    with torch.no_grad():
        h = h.clone()
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            through_stream(made, h, True)
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = through_stream(made, h, True)
        h.copy_(h.flip(0).clone())
        graph.replay()
        assert torch.equal(out, through_stream(made, h, False))
