"""NeMo Automodel's connections on these kernels, against its own code in float32; skipped where it is not installed.

Would catch: comb taken for h_res, coefficients of another sublayer, a gradient that does not arrive at a parameter.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

import mhc_tilelang as mhc

theirs = pytest.importorskip("nemo_automodel.components.models.deepseek_v41.layers", reason="no nemo-automodel")
v4 = pytest.importorskip("nemo_automodel.components.models.deepseek_v4.layers")

# As many float32 roundings as in a connection and its backward: found 5e-7 of the norm.
TOLERANCE = 5e-6


def config():
    return SimpleNamespace(
        hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6, hidden_size=192, initializer_range=0.05
    )


class Two(torch.nn.Module):
    """Two sublayers as Automodel's block has them: the second collapses with the first one's coefficients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn_hc, self.ffn_hc = (theirs.DeepseekV41HyperConnection(config()) for _ in range(2))
        for module in (self.attn_hc, self.ffn_hc):
            torch.nn.init.normal_(module.base)

    def forward(self, x, pre_mix):
        for module in (self.attn_hc, self.ffn_hc):
            mix = module(x)
            x = module.expand(torch.tanh(module.collapse(x, pre_mix)), x, mix)
            pre_mix = mix.pre
        return x, pre_mix


def relative(got, expected):
    return float((got - expected).detach().norm() / expected.detach().norm())


def test_v4_1_values_and_gradients():
    """Differentiable from end to end; `restore` gives their bits back."""
    eager = Two()
    ours = copy.deepcopy(eager)
    assert mhc.integrations.nemo_automodel.replace(ours) == ("attn_hc", "ffn_hc")
    generator = torch.Generator().manual_seed(1)
    x, pre_mix = torch.randn(2, 5, 4, 192, generator=generator), torch.rand(2, 5, 4, generator=generator)
    upstream = [torch.randn(2, 5, 4, 192, generator=generator), torch.randn(2, 5, 4, generator=generator)]
    results = []
    for model in (eager, ours):
        given = [x.clone().requires_grad_(), pre_mix.clone().requires_grad_(), *model.parameters()]
        outputs = model(*given[:2])
        results.append([*outputs, *torch.autograd.grad(outputs, given, upstream)])
    assert all(relative(got, expected) < TOLERANCE for expected, got in zip(*results, strict=True))
    mhc.integrations.nemo_automodel.restore(ours)
    assert torch.equal(ours(x, pre_mix)[0], results[0][0])


def test_v4_coefficients():
    """The three mixers, and the gradient of every parameter."""
    torch.manual_seed(0)
    eager = v4.DeepseekV4HyperConnection(4, 192, 20, 1e-6, 1e-6)
    eager.init_weights(0.05)
    ours = copy.deepcopy(eager)
    mhc.integrations.nemo_automodel.replace(ours)
    x = torch.randn(2, 5, 4, 192)
    upstream = [torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 4, 4)]
    results = []
    for model in (eager, ours):
        outputs = model(x)
        results.append([*outputs, *torch.autograd.grad(outputs, list(model.parameters()), upstream)])
    assert all(relative(got, expected) < TOLERANCE for expected, got in zip(*results, strict=True))
    with pytest.raises(ValueError, match="expected a module with DeepseekV41HyperConnection"):
        mhc.integrations.nemo_automodel.replace(torch.nn.Linear(2, 2))
