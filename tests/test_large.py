"""Streams of more than 2³¹ elements: an index in 32 bits would wrap. Needs 10 GB; part of `make test-full`."""

from __future__ import annotations

import re

import pytest
import torch

import mhc_tilelang as mhc
from mhc_tilelang import tracing
from mhc_tilelang.kernels import plans


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


@pytest.mark.nvcc
@pytest.mark.parametrize("family", ["pre", "post", "expand", "project"])
def test_cuda_indexes_streams_in_64_bits(family: str) -> None:
    """The generated source multiplies the token by its stride in 64 bits, on a GPU that CI does not have."""
    from mhc_tilelang import cuda

    sizes = {"num_streams": 4, "hidden_size": 1280, "dtype": "bfloat16"}
    plan = plans.projection_plan(24, 1280, "bfloat16", "cuda")
    tile = plans.channel_tile(1280, 2, "cuda")
    parameters = {**sizes, **({"plan": plan} if family == "project" else {"tile": tile})}
    source = cuda.build(tracing.trace(family, parameters), "sm_90a", family, parameters).get_kernel_source()
    in_32_bits = [int(number) for number in re.findall(r"\(int\)blockIdx\.x\) \* (\d+)", source)]
    in_64_bits = [
        int(number) for number in re.findall(r"\(int64_t\)\(\(int\)blockIdx\.x\)\) \* \(int64_t\)(\d+)", source)
    ]
    token_strides = {4 * 1280, 64 * 4 * 1280}  # of one token, of the projection's tile
    assert token_strides & set(in_64_bits)
    assert not token_strides & set(in_32_bits)
