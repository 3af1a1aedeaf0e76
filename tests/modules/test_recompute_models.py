"""Recomputation in what models do: compiled, checkpointed and frozen layers, autocast, looks at the stream.

Would catch: a stream or layer input that is recomputed wrong, or kept, because a node or mode came between.
"""

from __future__ import annotations

from contextlib import nullcontext
from inspect import signature

import pytest
import torch
from models import normal, randomize
from recomputed import DEPTH, TOKENS, C, Model, assert_same, handles_of, kept_by, saved
from torch.utils.checkpoint import checkpoint

import mhc_tilelang as mhc

WIDE = (*TOKENS, 4, C)


def test_compiled_layers():
    """torch.compile around a layer: its graph is one node, which saves the input too."""
    torch.compiler.reset()
    model, h = Model(), normal(*TOKENS, C)
    model.layers = torch.nn.ModuleList(torch.compile(layer, backend="aot_eager") for layer in model.layers)
    assert_same(model, h)
    kept, unkept = saved(model, h.requires_grad_(), None), saved(model, h, 3)
    assert kept - unkept == 4 * 10 * C * ((DEPTH - 3) * 4 + DEPTH)


def test_autocast():
    """A float32 stream whose layers return bfloat16: their dtype is another one to the kernel."""

    class Mixed(torch.nn.Module):  # every other layer stays float32
        calls = 0

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(C, C)
            self.wide = Mixed.calls % 2
            Mixed.calls += 1

        def forward(self, u):
            with torch.autocast("cpu", enabled=not self.wide):
                return self.linear(u)

    def run(h):
        with torch.autocast("cpu", torch.bfloat16):
            return model(h)

    model = Model(make_layer=Mixed)
    assert_same(model, normal(*TOKENS, C), 4, run)


def replace_input(_module, _args, results):
    return tuple(one * 2 if one.shape == (*TOKENS, C) else one for one in results)


def change_input(_module, _args, results):
    with torch.no_grad():
        next(one for one in results if one.shape == (*TOKENS, C)).mul_(2)


def replace_stream(_module, _args, results):
    return tuple(one * 1.5 if one.shape == WIDE else one for one in results)


def replace_what_is_read(_module, args):
    return args[0] * 1.5, *args[1:]


def replace_what_was_written(_module, args):
    return tuple(one * 1.5 if one.shape == (*TOKENS, C) and len(args) > 1 else one for one in args)


def replace_given_pre(_module, args):
    return *args[:-1], args[-1] * 1.5


@pytest.mark.parametrize(
    ("hook", "delayed"),
    [
        (replace_input, False),
        (change_input, False),
        (replace_stream, False),
        (replace_what_is_read, False),
        (replace_what_was_written, False),
        pytest.param(replace_input, True, marks=pytest.mark.full),
        pytest.param(replace_given_pre, True, marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("looks", [False, True])
def test_hooks_of_connections_may_replace_what_goes_through(hook, delayed, looks):
    """A hook's tensor is no operator's result, or not of the stream, and is not recomputed as if it were.

    In fused boundaries, and with looks at the stream, which part them. Would catch gradients of values that no layer
    was given.
    """
    model = Model(delayed=delayed)
    model.look = (lambda stream, _: stream.x) if looks else None
    for connection in model.connections[1:]:  # the first has no other stream, h_pre or write
        add = connection.register_forward_hook if len(signature(hook).parameters) == 3 else None
        (add or connection.register_forward_pre_hook)(hook)
    assert_same(model, normal(*TOKENS, C))


def test_backward_hooks_of_connections():
    """They make views of what goes through, which is recomputed as ever."""
    model, h = Model(), normal(*TOKENS, C)
    for connection in model.connections:
        connection.register_full_backward_hook(lambda *_: None)
    assert_same(model, h)
    assert saved(model, h.requires_grad_(), None) - saved(model, h, 3) == 4 * 10 * C * ((DEPTH - 3) * 4 + DEPTH)


@pytest.mark.parametrize("sublayer", [0, 1, 2, 3])
def test_looks_and_reductions_between_sublayers(sublayer):
    """Reads at a block's start, inside and at its end have gradients of their own, of the stream and of a head."""
    model = Model()
    head, found = randomize(mhc.HyperHead(model.spec)), []

    def look(stream, at):
        if at == sublayer:
            found[:] = [(stream.x * stream.x).sum(), stream.reduce("mean").square().sum(), stream.reduce(head).sum()]

    def run(h):
        out = model(h)
        return out + sum(found)

    model.look = look
    assert_same(model, normal(*TOKENS, C), 3, run)


def test_a_layer_that_looks_at_the_stream():
    """x saved by a layer's graph is recomputed as well."""
    model, h = Model(), normal(*TOKENS, C)

    def run(h):
        stream = model.stream(h)
        for connection, layer in zip(model.connections, model.layers, strict=True):
            u = stream.read(connection)
            stream.write(layer(u) + 0.1 * torch.tanh(stream.x * stream.x).mean(-2))
        return stream.reduce()

    assert_same(model, h, 3, run)
    h.requires_grad_()
    model.recompute = 3
    kept = {tuple(one.shape) for one in kept_by(run(h)) if isinstance(one, torch.Tensor)}
    assert WIDE in kept  # the starts
    assert len([handle for handle in handles_of(run(h)) if handle.key[0] == "x"]) == 4 * (DEPTH - 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant):
    """A checkpointed layer runs again, as without recomputation. The reentrant kind saves its input for that, which is
    recomputed before; the other one keeps it, and the stream alone is recomputed.
    """
    model, h = Model(), normal(*TOKENS, C)
    plain = [layer.forward for layer in model.layers]
    for layer, forward in zip(model.layers, plain, strict=True):
        layer.forward = lambda u, forward=forward: checkpoint(forward, u, use_reentrant=reentrant)
    assert_same(model, h)
    inputs = [handle for handle in handles_of(model(h.requires_grad_())) if handle.key[0] == "u"]
    assert len(inputs) == DEPTH * reentrant


@pytest.mark.parametrize("frozen", ["layers", "connections", "all but the last"])
def test_frozen_parameters(frozen):
    """Graphs that begin late, or in which layers save nothing."""
    model, h = Model(), normal(*TOKENS, C)
    last = {*model.layers[-1].parameters(), *model.connections[-1].parameters()}
    for parameter in (model if frozen == "all but the last" else getattr(model, frozen)).parameters():
        parameter.requires_grad_(frozen == "all but the last" and parameter in last)
    assert_same(model, h)

    def run(h):
        return model(h.detach())

    if frozen != "connections":
        assert_same(model, h, 3, run)


@pytest.mark.parametrize("without", [{0}, {2}, {3, 4}])
def test_sublayers_without_grad(without):
    """Their streams are recomputed for those around them, or start a block."""
    model, h = Model(), normal(*TOKENS, C)

    def run(h):
        stream = model.stream(h)
        for k, (connection, layer) in enumerate(zip(model.connections, model.layers, strict=True)):
            with torch.no_grad() if k in without else nullcontext():
                stream.write(layer(stream.read(connection)))
        return stream.reduce()

    assert_same(model, h, 3, run)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_grad(mode):
    model, h = Model(), normal(*TOKENS, C)
    model.recompute = None
    expected = model(h)
    model.recompute = 3
    with mode():
        assert torch.equal(model(h), expected)


def test_a_second_backward():
    """The graph is kept: everything is made once more. Freed: PyTorch's error."""
    model, h = Model(), normal(*TOKENS, C).requires_grad_()
    model.recompute = 3
    out = model(h)
    g = normal(*out.shape)
    first = torch.autograd.grad(out, [h, *model.parameters()], g, retain_graph=True)
    part = torch.autograd.grad(out, [model.layers[4].linear.weight], g, retain_graph=True)
    second = torch.autograd.grad(out, [h, *model.parameters()], g)
    assert all(map(torch.equal, first, second))
    names = ["h", *dict(model.named_parameters())]
    assert torch.equal(part[0], first[names.index("layers.4.linear.weight")])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, [h], g)
