"""coefficients: from the stream to h_pre, h_post and h_res, with every constant of the spec where it belongs.

Would catch: a bias scaled by s, an alpha of another group, an eps or post_scale left out, res rows as [in, out].
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers import (
    CPU,
    assert_matches_float64,
    assert_same_bits,
    verdicts,
)

from mhc_tilelang import MHCSpec, ops, reference
from mhc_tilelang.checking.comparison import compare, numpy64
from mhc_tilelang.checking.inputs import Case, Inputs

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 63)
CONSTANTS = {
    "pre_eps": 0.25,
    "rms_eps": 0.5,
    "post_scale": 3.0,
    "sinkhorn_eps": 0.01,
    "sinkhorn_iters": 3,
}


@dataclass(frozen=True)
class Changed(Case):
    """A case with other constants than DeepSeek's."""

    constants: tuple = ()

    @property
    def spec(self):
        return replace(super().spec, **dict(self.constants))


def arguments(inputs):
    return inputs.x, inputs.phi, inputs.alpha, inputs.bias


def call(inputs, case):
    return ops.coefficients(*arguments(inputs), case.spec)


@pytest.mark.parametrize("factor", [1e-3, 300.0])
def test_small_and_large_streams(factor):
    """Scale 1e-3 has a mean square of rms_eps, √2 off without it; scale 300 has Σx² above 65504."""
    case = Case(4, 333, torch.bfloat16, 127)
    inputs = Inputs.of(case, CPU)
    assert_matches_float64("coefficients", case, replace(inputs, x=inputs.x * factor))


@pytest.mark.parametrize("name", CONSTANTS)
def test_every_constant_of_the_spec(name):
    """One constant at a time far from its default, so that leaving it out or misplacing it is no rounding error.

    The result of the default is rejected, which says that this is far enough.
    """
    case = Changed(4, 192, torch.bfloat16, 127, constants=((name, CONSTANTS[name]),))
    assert_matches_float64("coefficients", case)
    default = call(Inputs.of(case, CPU), Case(4, 192, torch.bfloat16, 127))
    comparisons = [comparison for comparison, _ in verdicts("coefficients", case)]
    accepted = [compare(replace(c, got=numpy64(d))).passed for c, d in zip(comparisons, default, strict=True)]
    assert not all(accepted)


@pytest.mark.parametrize("preset", [MHCSpec.deepseek_v4, MHCSpec.paper])
def test_zero_stream_leaves_the_bias(preset):
    """s = 1/√rms_eps, 1e10 for the paper's: 0 · s is 0. Catches 0 · infinity, and a bias scaled by s."""
    spec, inputs = preset(192), Inputs.of(Case(4, 192, torch.bfloat16, 3), CPU)
    zero = torch.zeros_like(inputs.x)
    got = ops.coefficients(zero, inputs.phi, inputs.alpha, inputs.bias, spec)
    z_pre, z_post, z_res = inputs.bias.repeat(3, 1).split([4, 4, 16], dim=1)
    gates = torch.sigmoid(z_pre) + spec.pre_eps, spec.post_scale * torch.sigmoid(z_post)
    torch.testing.assert_close(got[:2], gates, rtol=4 * 2**-23, atol=0)
    z_res = z_res.reshape(3, 4, 4).contiguous()
    assert_same_bits(got[2:], [ops.sinkhorn(z_res, spec.sinkhorn_iters, spec.sinkhorn_eps)])


def test_saturated_gates():
    """Logits of ±200 and ±1e30: exp overflows and underflows, gates are 0 and 1 and not NaN."""
    inputs = Inputs.of(CASE, CPU)
    bias = inputs.bias.clone()
    bias[:8] = torch.tensor([-200.0, 200.0, -1e30, 1e30] * 2)
    h_pre, h_post, _ = call(replace(inputs, bias=bias), CASE)
    eps = np.float32(CASE.spec.pre_eps)
    np.testing.assert_array_equal(h_pre.numpy(), np.float32([[eps, 1 + eps, eps, 1 + eps]]).repeat(63, 0))
    np.testing.assert_array_equal(h_post.numpy(), np.float32([[0, 2, 0, 2]]).repeat(63, 0))


def test_norm_weight_is_multiplied_into_phi():
    """Catches a norm_weight that is accepted and ignored, or that has its streams and channels confused."""
    inputs = Inputs.of(CASE, CPU)
    weight = 0.5 + torch.rand(inputs.phi.shape[1])
    weighted = ops.coefficients(*arguments(inputs), CASE.spec, norm_weight=weight)
    assert_same_bits(weighted, call(replace(inputs, phi=inputs.phi * weight), CASE))
    expected = reference.coefficients(*map(numpy64, arguments(inputs)), CASE.spec, norm_weight=numpy64(weight))
    for got, exact in zip(weighted, expected, strict=True):
        np.testing.assert_allclose(numpy64(got), exact, atol=1e-4)


def test_phi_may_change_between_calls():
    """Optimizers change phi in place. Catches anything made of phi that outlives a call."""
    inputs = Inputs.of(CASE, CPU)
    before = call(inputs, CASE)
    inputs.phi.neg_()
    after = call(inputs, CASE)
    assert_same_bits(after, call(replace(inputs, phi=inputs.phi.clone()), CASE))
    assert (after[0] - before[0]).abs().max() > 0.1
