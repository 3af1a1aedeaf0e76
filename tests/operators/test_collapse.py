"""The mean of streams, `collapse(x, mean=True)` and `reduce("mean")`; views that go in as they are.

Would catch: a sum that overflows or is rounded before it is divided, a mean over tokens, a gradient of the sum, an
operator without a fake or that aliases its input.
"""

from __future__ import annotations

import pytest
import torch
from helpers import numpy64
from test_operators import check_operators

import mhc_tilelang as mhc
from mhc_tilelang import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rounded(values, dtype):
    return torch.from_numpy(values).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_is_rounded_once(dtype):
    """n = 4: products by 1/4 are exact, so a 16-bit result is float64's, rounded; the sum leaves float16's range."""
    x = (3e4 + 1e4 * torch.randn(2, 3, 4, 40, generator=torch.Generator().manual_seed(0))).to(dtype)
    x.requires_grad_()
    assert dtype != torch.float16 or mhc.collapse(x).isinf().any()
    stream = mhc.ResidualStream.from_streams(x)
    g = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = rounded(reference.collapse(numpy64(x.detach())) / 4, dtype)
    g_expected = rounded(reference.collapse_backward(numpy64(g) / 4, numpy64(x.detach())), dtype)
    for got in (mhc.collapse(x, mean=True), stream.reduce("mean")):
        (g_x,) = torch.autograd.grad(got, x, g)
        # Three float32 sums; before a 16-bit rounding they matter where a value lies next to a tie.
        torch.testing.assert_close(got, expected, rtol=2**-22 if dtype == torch.float32 else 2**-24, atol=0)
        assert torch.equal(g_x, g_expected)
    out = torch.full_like(expected, float("nan"))
    assert mhc.collapse(x.detach(), mean=True, out=out) is out
    assert torch.equal(out, got)


def test_operator_keeps_pytorchs_rules():
    """Schema, fake, autograd registration; under torch.compile and for meta tensors."""
    x = torch.randn(6, 4, 64, requires_grad=True)
    check_operators("collapse_mean", [x])
    assert mhc.collapse(x.detach().to("meta"), mean=True).shape == (6, 64)


def test_views_of_mappings_cost_no_copy():
    """h_post as [..., n, 1], comb.mT of a view of h_res; what would be copied is refused by name.

    Would catch: a column taken for a token, a transposed h_res that is read as it lies.
    """
    x, layer_output, h_post = torch.randn(6, 4, 64), torch.randn(6, 64), torch.rand(6, 4)
    h_res = torch.rand(6, 4, 4)
    expected = mhc.post(x, layer_output, h_post, h_res)
    comb = h_res.mT  # as DeepSeek's code has it
    assert torch.equal(mhc.post(x, layer_output, h_post.unsqueeze(-1), comb.mT), expected)
    with pytest.raises(ValueError, match=r"post: h_res: expected a contiguous tensor, got strides \(16, 1, 4\)"):
        mhc.post(x, layer_output, h_post, comb.contiguous().mT)
    with pytest.raises(ValueError, match=r"post: h_post: expected shape \[..., 4\], got \[6, 4, 2\]"):
        mhc.post(x, layer_output, h_post.unsqueeze(-1).expand(-1, -1, 2).contiguous(), h_res)
    h_pre = torch.rand(6, 4, 1, requires_grad=True)
    mhc.aggregate(x, h_pre).sum().backward()
    assert h_pre.grad.shape == (6, 4, 1)


def test_packed_streams_are_viewed():
    """[..., n·C] gives what [..., n, C] gives, and its gradient; what would be copied or guessed is refused by name.

    Would catch: streams and channels exchanged, a gradient in another shape, a copy of x, a token taken for a stream.
    """
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(size, generator=generator) for size in ((6, 4, 64), (6, 64), (6, 4), (6, 4, 4), (24, 256)))
    x, layer_output, h_post, h_res, phi = made
    projected = (phi, torch.ones(3), torch.zeros(24), mhc.MHCSpec(64))

    def step(stream):
        stream = stream.requires_grad_()
        x_next = mhc.post(stream, layer_output, h_post, h_res)
        layer_input, *_ = mhc.pre(stream, *projected)
        (g_x,) = torch.autograd.grad((x_next, layer_input), stream, (x, layer_output))
        return x_next, layer_input, g_x

    *expected, g_x = step(x.clone())
    *got, g_packed = step(x.flatten(-2))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert torch.equal(g_packed, g_x.flatten(-2))
    with pytest.raises(ValueError, match=r"post: x: expected a contiguous tensor, got strides \(1, 384, 6\)"):
        mhc.post(x.flatten(-2).t().contiguous().t(), layer_output, h_post, h_res)
