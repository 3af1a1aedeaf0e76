"""ResidualStream under activation checkpointing: layers and functions of x may run again, calls of a stream may not."""

from __future__ import annotations

import pytest
import torch
from models import assert_equal, gradients, normal
from test_residual_stream import DEPTH, TOKENS, C, Model, every_kind
from torch.utils.checkpoint import checkpoint

import mhc_tilelang as mhc
from mhc_tilelang import ops


def checkpointed_layer(stream, connection, layer):
    layer_input = stream.read(connection)
    stream.write(checkpoint(lambda u: torch.tanh(layer(u)), layer_input, use_reentrant=False))


def checkpointed_read_and_write(stream, connection, layer):
    checkpoint(Model.run_sublayer, stream, connection, layer, use_reentrant=False)


def checkpointed_read(stream, connection, layer):
    stream.write(checkpoint(lambda: torch.tanh(layer(stream.read(connection))), use_reentrant=False))


def checkpointed_look(stream, connection, layer):
    layer_input = stream.read(connection)
    stream.write(checkpoint(lambda: torch.tanh(layer(layer_input)) * stream.x.mean(), use_reentrant=False))


@every_kind
def test_checkpointed_layers(kind):
    """The pattern of the docstring; gradients to the bit."""
    model, h = Model(kind), normal(*TOKENS, C)
    expected = gradients(model, model, h)
    model.run_sublayer = checkpointed_layer
    assert_equal(gradients(model, model, h), expected)


@every_kind
def test_checkpointed_function_of_x(kind):
    """The other pattern of the docstring, and a region that makes its own stream."""
    model, h = Model(kind), normal(*TOKENS, C)
    expected = gradients(model, model, h)

    def sublayer(connection, layer, x):
        layer_input, *mappings = connection(x)
        return connection.merge(x, torch.tanh(layer(layer_input)), *mappings)

    def by_regions(h):
        x = mhc.ResidualStream(h, connection=kind).x
        for connection, layer in zip(model.connections, model.layers, strict=True):
            x = checkpoint(sublayer, connection, layer, x, use_reentrant=False)
        return x if kind == "residual" else ops.collapse(x)

    got = gradients(model, by_regions, h)
    if kind == "mhc":  # `expand`, `pre` and `post`, which round elsewhere than the boundaries
        assert all((got[k] - expected[k]).norm() <= 1e-5 * expected[k].norm() for k in expected)
    else:
        assert_equal(got, expected)
    assert_equal(gradients(model, lambda h: checkpoint(model, h, use_reentrant=False), h), expected)


@every_kind
@pytest.mark.parametrize("region", [checkpointed_read, checkpointed_read_and_write, checkpointed_look])
@pytest.mark.parametrize("sublayers", [1, DEPTH])
def test_recomputation_may_not_use_the_stream(kind, region, sublayers):
    """The stream has moved on by then.

    torch notices some such regions by the number of tensors that they save; of the first sublayer alone, gradients
    would be wrong by more than half in silence.
    """
    model = Model(kind)
    regions = [region] * sublayers + [Model.run_sublayer] * (DEPTH - sublayers)
    model.run_sublayer = lambda *arguments: regions.pop(0)(*arguments)
    with pytest.raises(RuntimeError, match="got one of the forward pass in an activation checkpoint's recomputation"):
        gradients(model, model, normal(*TOKENS, C))
