"""Recomputation where something goes wrong or cannot be: exceptions, changes in place, and what is refused by name.

Would catch: a value that is recomputed although it was changed, hooks that stay behind, a stream that keeps everything
without a word.
"""

from __future__ import annotations

import pytest
import torch
from models import normal
from recomputed import TOKENS, C, Layer, Model, assert_same, gradients
from torch.utils.checkpoint import checkpoint

import mhc_tilelang as mhc


def test_a_layer_that_raises_leaves_nothing_behind():
    """An exception in mid-block leaves the stream where it was, and another stream undisturbed."""
    model, h = Model(), normal(*TOKENS, C)

    def run(h):
        stream = model.stream(h)
        for connection, layer in zip(model.connections, model.layers, strict=True):
            u = stream.read(connection)
            with pytest.raises(ZeroDivisionError):
                layer(u / (1 // 0))
            stream.write(layer(u))
        return stream.reduce()

    assert_same(model, h, 3, run)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # no hook of ours is in force
        assert (h.requires_grad_() * h).grad_fn._raw_saved_self.data is not None


def test_a_layer_may_change_its_input():
    """Before it saves it or after: what was changed is kept, what was saved before that is an error as ever."""
    model, h = Model(make_layer=lambda: torch.nn.Sequential(torch.nn.ReLU(inplace=True), Layer())), normal(*TOKENS, C)
    assert_same(model, h)
    for recompute in (None, 3):
        model = Model(make_layer=Layer)
        model.recompute = recompute
        stream = model.stream(h)
        u = stream.read(model.connections[0])
        layer_output = model.layers[0](u)
        with torch.no_grad():
            u.zero_()
        stream.write(layer_output)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stream.reduce().sum().backward()


@pytest.mark.parametrize("sublayer", [0, 1, 2])
def test_a_stream_that_was_changed_is_not_recomputed_wrong(sublayer):
    """x changed in place between two sublayers: the block ends there; what was saved before is as it was, or an error
    by name where that was the block's start.
    """
    model, h = Model(), normal(*TOKENS, C)

    def run(h, change):
        stream = model.stream(h)
        for k, (connection, layer) in enumerate(zip(model.connections, model.layers, strict=True)):
            stream.write(layer(stream.read(connection)))
            if k == sublayer:
                change(stream)
        return stream.reduce()

    def in_place(stream):
        stream.x.mul_(0.5)

    def out_of_place(stream):
        stream._x = stream.x * 0.5

    expected = gradients(model, h, None, lambda h: run(h, out_of_place))
    got = gradients(model, h, 3, lambda h: run(h, in_place))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("what", ["layer output of sublayer 1", "stream at the start"])
def test_what_the_replay_needs_must_not_change(what):
    model, h = Model(), normal(*TOKENS, C)
    model.recompute, kept = 3, []
    model.layers[1].register_forward_hook(lambda *called: kept.append(called[-1]))
    stream = model.stream(h)
    start = stream.x
    for connection, layer in zip(model.connections, model.layers, strict=True):
        stream.write(layer(stream.read(connection)))
    out = stream.reduce()
    with torch.no_grad():
        (start if "start" in what else kept[0]).zero_()
    with pytest.raises(RuntimeError, match=f"ResidualStream: recompute: expected the {what} of a block as it was"):
        out.sum().backward()


def test_what_cannot_be_is_refused_by_name():
    h = normal(*TOKENS, C)
    for kind in ("hc", "residual"):
        with pytest.raises(ValueError, match=f"recompute: expected None for connections of kind '{kind}', got 3"):
            mhc.ResidualStream(h, 4, kind, recompute=3)
    for recompute in (0, -1):
        with pytest.raises(ValueError, match=f"recompute: expected at least 1 sublayer a block, got {recompute}"):
            mhc.ResidualStream(h, recompute=recompute)
    for recompute in (True, 2.0, "auto"):
        with pytest.raises(TypeError, match=f"recompute: expected None or an int, got {type(recompute).__name__}"):
            mhc.ResidualStream(h, recompute=recompute)
    with pytest.raises(RuntimeError, match=r"recompute: expected None within torch\.func"):
        torch.func.grad(lambda h: mhc.ResidualStream(h, recompute=3).reduce().sum())(h)


class Own(mhc.HyperConnection):
    """A connection that reads in its own way."""

    def forward(self, x, *waiting):
        return super().forward(x.clone(), *waiting)


def test_connections_with_methods_of_their_own_are_refused():
    model = Model()
    stream = mhc.ResidualStream(normal(*TOKENS, C), recompute=3)
    with pytest.raises(TypeError, match="expected HyperConnection's own forward and merge for recompute, got Own"):
        stream.read(Own(model.spec))


def test_hooks_around_the_stream_are_refused():
    """Offloading, and a checkpoint of the region: they would have all that is not to be kept."""
    model, h = Model(), normal(*TOKENS, C).requires_grad_()
    model.recompute = 3
    with torch.autograd.graph.save_on_cpu(), pytest.raises(RuntimeError, match="no saved-tensor hooks around"):
        model(h)
    with pytest.raises(RuntimeError, match="no saved-tensor hooks around"):
        checkpoint(model, h, use_reentrant=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        out = h * h
    with pytest.raises(ValueError, match="saved_bytes: expected tensors without saved-tensor hooks, got one at Mul"):
        mhc.saved_bytes(out)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_model_is_refused_by_name(fullgraph):
    """It neither keeps everything without a word nor goes wrong."""
    torch.compiler.reset()
    model = Model()
    model.recompute = 3
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    with pytest.raises(Exception, match=r"outside of torch\.compile"):
        compiled(normal(*TOKENS, C))
