"""Connections that give the layer's input in float8, in a stream and in one that recomputes.

Would catch: a read that quantises another stream or h_pre than a plain connection's, a gradient that passes by
layer_input, values and scales recomputed of another sublayer or kept all the same, an option that is ignored.
"""

import pytest
import torch
from helpers import assert_same_bits
from models import normal
from recomputed import DEPTH, TOKENS, C, Model, assert_same, saved

import mhc_tilelang as mhc

EPS = 1e-5


class Product(torch.autograd.Function):
    """u -> dequantised u · w, as an FP8 product: it saves values and scales, and returns layer_input's gradient."""

    @staticmethod
    def forward(ctx, values, scales, layer_input, weight):
        ctx.save_for_backward(values, scales, weight)
        return mhc.Quantized(values, scales).dequantize(layer_input.dtype) @ weight

    @staticmethod
    def backward(ctx, g):
        values, scales, weight = ctx.saved_tensors
        u = mhc.Quantized(values, scales).dequantize(g.dtype)
        return None, None, g @ weight.T, u.flatten(0, -2).T @ g.flatten(0, -2)


class Layer(torch.nn.Module):
    """Takes what a connection gives, in float8 or not; saves layer_input as well."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(normal(C, C, seed=3) / 8)

    def forward(self, u):
        return Product.apply(*u, self.weight) + u.layer_input.tanh() * u.layer_input


def model_of(ue8m0=False, **options):
    """A model whose connections are quantised."""
    model = Model(make_layer=Layer, eps=EPS, **options)
    for k, connection in enumerate(model.connections):
        connection.quantized, connection.ue8m0 = True, ue8m0
        torch.nn.init.normal_(connection.rms_norm_weight, 1.0, 0.1, generator=torch.Generator().manual_seed(k))
    return model


@pytest.mark.parametrize("ue8m0", [False, True])
def test_reads_of_a_stream(ue8m0):
    """All but values and scales have the bits of plain connections; those are the functions' of the same stream. The
    first read is `pre`, the second merges.
    """
    model, h = model_of(ue8m0, depth=2), normal(*TOKENS, C)
    for keeps in (False, True):
        stream, plain = (mhc.ResidualStream(h.clone().requires_grad_(keeps)) for _ in range(2))
        for connection in model.connections:
            with torch.set_grad_enabled(keeps):
                got = stream.read(connection)
                connection.quantized = False
                expected = plain.read(connection)
                connection.quantized = True
            parameters = (connection.phi, connection.alpha, connection.bias, connection.spec)
            norm = {"rms_norm_weight": connection.rms_norm_weight, "rms_norm_eps": EPS}
            with torch.no_grad():
                wanted, *_ = mhc.pre_quantized(stream.x.detach(), *parameters, ue8m0=ue8m0, **norm)
            assert_same_bits([got.values, got.scales], [wanted.values, wanted.scales])
            assert (got.layer_input is None) == (not keeps)
            if keeps:
                assert_same_bits([got.layer_input], [expected])
            for one in (stream, plain):
                one.write(expected.detach().sin())


@pytest.mark.parametrize("delayed", [False, True])
def test_what_is_recomputed(delayed):
    """Gradients to the bit; neither the streams nor any of the layers' inputs are kept, in float8 or not."""
    model, h = model_of(delayed=delayed), normal(*TOKENS, C)
    assert_same(model, h)
    kept = saved(model, h.requires_grad_(), None) - saved(model, h, 3)
    tokens = TOKENS[0] * TOKENS[1]
    assert kept == tokens * (4 * C * (DEPTH - 3) * 4 + DEPTH * (4 * C + C + 4))


def test_options():
    """Errors name the option."""
    spec = mhc.MHCSpec(C)
    with pytest.raises(ValueError, match="quantized: expected False without a rms_norm_eps, got True"):
        mhc.HyperConnection(spec, quantized=True)
    with pytest.raises(ValueError, match="ue8m0: expected False where quantized is, got True"):
        mhc.HyperConnection(spec, rms_norm_eps=EPS, ue8m0=True)
    connection = mhc.HyperConnection(spec, rms_norm_eps=EPS, quantized=True, ue8m0=True)
    assert "rms_norm_eps=1e-05, quantized=True, ue8m0=True" in repr(connection)
    with pytest.raises(TypeError, match="expands: expected an embedding alone, and no layer norm"):
        connection(normal(*TOKENS, C), expands=True)
