"""`aggregate_backward` and `coefficients_backward` in one launch, executed as CUDA, against the two.

Would catch: a token's sum that another one takes, or that is taken before it is complete; a tail of channels or tokens
that leaks; denominators of another lane; rows of h_post or h_res among those of h_pre; sums of a block left out.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_same_bits

from mhc_tilelang import MHCSpec, launch
from mhc_tilelang.compiler.simt import executing
from mhc_tilelang.kernels import boundary_plans

BF16, FP16 = torch.bfloat16, torch.float16


class Drawn:
    """Arguments, and what comes out."""

    def __init__(self, num_streams, hidden_size, num_tokens, dtype, absent=(), **constants):
        n, generator = num_streams, torch.Generator().manual_seed(num_tokens)

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        rows = n * n + 2 * n
        self.spec = MHCSpec(hidden_size, num_streams=n, **constants)
        self.g_layer_input = normal(num_tokens, hidden_size).to(dtype)
        self.x = normal(num_tokens, n, hidden_size).to(dtype)
        self.g_h_post = None if "g_h_post" in absent else normal(num_tokens, n)
        self.g_h_res = None if "g_h_res" in absent else normal(num_tokens, n, n)
        self.projected = torch.cat([normal(rows, num_tokens), 0.5 + torch.rand(1, num_tokens, generator=generator)])
        self.alpha, self.bias = 1 + 0.1 * normal(3), 0.1 * normal(rows)

    def of(self, tokens):
        """Those tokens alone."""
        part = Drawn.__new__(Drawn)
        part.__dict__.update(self.__dict__)
        for name in ("g_layer_input", "x", "g_h_post", "g_h_res"):
            if getattr(self, name) is not None:
                setattr(part, name, getattr(self, name)[tokens].contiguous())
        part.projected = self.projected[:, tokens].contiguous()
        return part

    @property
    def parameters(self):
        return self.g_h_post, self.g_h_res, self.projected, self.alpha, self.bias, self.spec

    def run(self, parallel_blocks=2):
        """g_projected, and the gradients of alpha and bias: in one launch."""
        out = torch.full_like(self.projected, torch.nan)
        with executing("sm_90a", parallel_blocks=parallel_blocks) as launches:
            partial = launch.coefficients_aggregate_backward(self.g_layer_input, self.x, *self.parameters, out=out)
        assert [one.family for one in launches] == ["coefficients_aggregate_backward"]
        return out, partial

    def by_two(self):
        """The same by the CPU's two kernels; the sum over channels in float64, rounded once."""
        g_h_pre = torch.einsum("tc,tnc->tn", self.g_layer_input.double(), self.x.double()).float()
        out = torch.empty_like(self.projected)
        return out, launch.mappings_backward(g_h_pre, *self.parameters, out=out)


def assert_near(got, expected, hidden_size):
    """Sums over channels and over tokens, 32 lanes of both: √ of the terms in ULPs, of their root mean square; Sinkhorn
    and the gates are the same operations in another order, a few ULPs of the largest.
    """
    for one, other in zip(got, expected, strict=True):
        scale = other.double().square().mean().sqrt()
        assert (one.double() - other.double()).abs().max() <= 2.0**-24 * (hidden_size**0.5 + 32) * 8 * scale


FORMS = {
    "every-gradient": (4, 200, 37, BF16),
    "two-streams-and-no-g_h_post": (2, 40, 21, FP16, ("g_h_post",)),
    "no-g_h_res": (4, 200, 9, BF16, ("g_h_res",)),
    "a-real-width": (4, 2560, 9, BF16),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_is_near_the_two_kernels(form):
    """37 tokens leave a block with five; 200 channels a warp's second step with 25 of 32 vectors."""
    drawn = Drawn(*form)
    (g_projected, partial), (expected, sums) = drawn.run(), drawn.by_two()
    assert_near((g_projected, partial.sum(0)), (expected, sums.sum(0)), form[1])


@pytest.mark.parametrize("constants", [{"sinkhorn_iters": 1}, {"sinkhorn_eps": 0.0, "sinkhorn_iters": 3}])
def test_few_iterations_and_no_eps(constants):
    """Compiled for all: they are numbers of the launch."""
    drawn = Drawn(4, 200, 5, BF16, **constants)
    (g_projected, partial), (expected, sums) = drawn.run(), drawn.by_two()
    assert_near((g_projected, partial.sum(0)), (expected, sums.sum(0)), 200)


def test_a_tokens_gradients_depend_on_no_other_token():
    """Whatever the batch, a block's tokens and the device: the same bits; a NaN stays in its token."""
    drawn = Drawn(*FORMS["every-gradient"])
    whole, partial = drawn.run()
    assert_same_bits(drawn.run(), (whole, partial))
    again, _ = drawn.run(parallel_blocks=8)
    alone, _ = drawn.of(slice(3, 4)).run()
    assert_same_bits([again, alone], [whole, whole[:, 3:4].contiguous()])
    drawn.x[5, 0, 0] = torch.nan
    spoilt, _ = drawn.run()
    others = [t for t in range(37) if t != 5]
    assert_same_bits([spoilt[:, others]], [whole[:, others]])
    assert torch.isnan(spoilt[:4, 5]).any()


def test_tokens_of_a_block():
    """Each block's are at most a warp's, and few blocks a device leaves idle at its end."""
    plan = boundary_plans.CoefficientsAggregateBackwardPlan(20)
    for num_tokens in (1, 8, 512, 4096, 4097, 5000, 8192, 16384):
        tokens = boundary_plans.joined_tokens(num_tokens, plan, 132)
        waves = -(-num_tokens // (132 * tokens))
        assert tokens in (7, 14, 21, 28, 32)
        assert waves == max(1, -(-num_tokens // (132 * 32)))
    assert boundary_plans.joined_tokens(4096, plan, 132) == 32
    assert boundary_plans.joined_tokens(4096, replace(plan, summing_warps=4), 1000) == 8
