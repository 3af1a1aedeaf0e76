"""Streams of more than 2³¹ elements: an index in 32 bits would wrap. Needs 10 GB; part of `make test-full`."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

import mhc_tilelang as mhc
from mhc_tilelang import launch
from mhc_tilelang.compiler.cuda_source import generate
from mhc_tilelang.kernels import plans, projection_plans
from mhc_tilelang.perf.calls.cases import Shape
from mhc_tilelang.perf.inspect import matrix


@pytest.mark.full
def test_the_last_token_of_a_huge_stream() -> None:
    """expand, post and pre at 2³¹ + 8192 elements; the last tokens are computed again as a small batch."""
    n, hidden_size, num_tokens = 8, 1024, 2**18 + 1
    assert num_tokens * n * hidden_size > 2**31
    spec = mhc.MHCSpec(hidden_size, n)
    h = torch.randn(1, hidden_size).to(torch.bfloat16).expand(num_tokens, -1).contiguous()
    h[-3:] = torch.randn(3, hidden_size)
    phi = torch.randn(spec.num_coefficients, spec.stream_size) / spec.stream_size**0.5
    alpha, bias = torch.ones(3), torch.randn(spec.num_coefficients)

    def sublayer(embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            x = mhc.expand(embedding, n)
            layer_input, h_post, h_res = mhc.pre(x, phi, alpha, bias, spec)
            return layer_input[-3:].clone(), mhc.post(x, embedding, h_post, h_res)[-3:].clone()

    for huge, small in zip(sublayer(h), sublayer(h[-3:].clone()), strict=True):
        assert torch.equal(huge, small)


@pytest.mark.full
def test_the_backward_of_the_last_token_of_a_huge_stream() -> None:
    """Every backward kernel that reads or writes a stream reaches its last token; one of two equal streams is both.

    g_projected is zero but for the last three tokens, so that g_phi is theirs alone, to the bit.
    """
    n, hidden_size, num_tokens = 8, 1024, 2**18 + 1
    h = torch.randn(1, hidden_size).to(torch.bfloat16).expand(num_tokens, -1).contiguous()
    h[-3:] = torch.randn(3, hidden_size)
    phi, g_projected = torch.randn(80, n * hidden_size), torch.zeros(81, num_tokens)
    g_projected[:, -3:] = torch.randn(81, 3)
    h_post, h_res = torch.rand(num_tokens, n), torch.rand(num_tokens, n, n)

    def calls(last: slice) -> Iterator[torch.Tensor]:
        few, x = h[last].clone(), launch.expand(h[last], n)
        mixing = (h_post[last].clone(), h_res[last].clone())
        yield launch.expand_backward(x)
        yield launch.aggregate_backward(few, x)
        for needs in ((True, False, False), (False, True, True)):
            names = ("needs_g_x", "needs_g_layer_output", "needs_g_mappings")
            wanted = dict(zip(names, needs, strict=True))
            gradients = launch.post_backward(x, x, few, *mixing, **wanted)
            yield from (gradient for gradient in gradients if gradient is not None)
        columns = g_projected[:, last].contiguous()
        yield launch.project_backward(columns, x, phi, h_pre=mixing[0], g_layer_input=few, needs_g_phi=False)[0]
        yield launch.project_backward(columns, x, phi, needs_g_x=False)[1]

    small = list(calls(slice(-3, None)))
    for huge, expected in zip(calls(slice(None)), small, strict=True):
        assert torch.equal(huge[-len(expected) :], expected)


LONG = {
    family: pytest.param(family, marks=pytest.mark.full) for family in ("project", "project_backward")
}  # to generate


@pytest.mark.parametrize("family", ["aggregate_backward", "post_backward", "expand_backward", LONG["project_backward"]])
def test_cuda_indexes_streams_of_a_backward_in_64_bits(family: str) -> None:
    """Indices of backward kernels are 64-bit too; `project_backward` has a token's number in a variable."""
    *_, subject = matrix.subjects(Shape(4096, 4, 1280, "bfloat16"), [family])
    source = generate(family, subject.launch.parameters, "sm_90a").code
    token = 4 * 1280
    if family == "project_backward":
        assert re.search(rf"\(x\[.*\(\(int64_t\)token\w*\) \* \(int64_t\){token}\)", source)
        assert re.search(rf"\(g_x\[.*\(\(int64_t\)to\w*\) \* \(int64_t\){token}\)", source)
    else:
        assert f"((int64_t)((int)blockIdx.x)) * (int64_t){token})" in source
    streams = "".join(line for line in source.splitlines() if "(phi +" not in line)
    assert not re.findall(rf"\* {token}\)", streams)


@pytest.mark.parametrize("family", ["aggregate", "post", "expand", LONG["project"]])
def test_cuda_indexes_streams_in_64_bits(family: str) -> None:
    """The generated source multiplies the token by its stride in 64 bits, on a GPU that CI does not have."""
    sizes = {"num_streams": 4, "hidden_size": 1280, "dtype": "bfloat16"}
    plan = projection_plans.tile_projection_plan(24, 1280, "bfloat16", "cuda")
    tile = plans.channel_tile(1280, 2, "cuda")
    layer = {"layer_dtype": "bfloat16"} if family == "post" else {}
    parameters = {**sizes, **layer, **({"plan": plan} if family == "project" else {"tile": tile})}
    source = generate(family, parameters, "sm_90a").code
    in_32_bits = [int(number) for number in re.findall(r"\(int\)blockIdx\.x\) \* (\d+)", source)]
    in_64_bits = [
        int(number) for number in re.findall(r"\(int64_t\)\(\(int\)blockIdx\.x\)\) \* \(int64_t\)(\d+)", source)
    ]
    token_strides = {4 * 1280, 64 * 4 * 1280}  # of one token, of the projection's tile
    assert token_strides & set(in_64_bits)
    assert not token_strides & set(in_32_bits)
