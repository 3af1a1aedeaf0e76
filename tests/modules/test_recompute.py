"""A stream that keeps only the starts of its blocks: the same gradients to the bit, less kept, layers run once.

Would catch: a stream or layer input recomputed from another sublayer's coefficients, one that is kept all the same, a
graph that is never freed.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers import replace_launch
from models import normal, randomize
from recomputed import DEPTH, TOKENS, C, Model, assert_same, gradients, handles_of, saved

import mhc_tilelang as mhc
from mhc_tilelang import launch
from mhc_tilelang.modules import blocks
from mhc_tilelang.modules.blocks import Workspace

WIDE = (*TOKENS, 4, C)


@pytest.mark.parametrize("length", [1, 3, 10])
@pytest.mark.parametrize(
    ("n", "dtype"),
    [
        (4, torch.float32),
        (4, torch.bfloat16),
        pytest.param(2, torch.bfloat16, marks=pytest.mark.full),
        pytest.param(8, torch.float32, marks=pytest.mark.full),
    ],
)
def test_gradients_are_the_same_to_the_bit(n, dtype, length):
    """Blocks of one, blocks with a short one at the end, one block that is longer than a launch takes."""
    model = Model(n, dtype, depth=DEPTH if length < 10 else 11)
    assert_same(model, normal(*TOKENS, C, dtype=dtype), length)


@pytest.mark.parametrize("reduction", ["mean", "head"])
def test_other_reductions(reduction):
    """The head saves the last stream, which is then recomputed with its block."""
    model = Model()
    model.reduction = randomize(mhc.HyperHead(model.spec)) if reduction == "head" else reduction
    assert_same(model, normal(*TOKENS, C))


def test_a_heads_stream_is_not_kept():
    """`post_head` merges the last write itself; what it made and saved is the last block's like any other."""
    model, h = Model(), normal(*TOKENS, C).requires_grad_()
    model.reduction = randomize(mhc.HyperHead(model.spec))
    kept = saved(model, h, None) - saved(model, h, 3)
    assert kept == 4 * 10 * C * ((DEPTH - 3 + 1) * 4 + DEPTH)


def test_delayed_pre():
    """A layer's input is recomputed with the h_pre that the sublayer before left, across looks at the stream too."""
    model, h = Model(delayed=True), normal(*TOKENS, C)
    assert_same(model, h)
    kept = saved(model, h.requires_grad_(), None) - saved(model, h, 3)
    assert kept == 4 * 10 * C * ((DEPTH - 3) * 4 + DEPTH)
    model.look = lambda stream, sublayer: stream.x if sublayer % 2 else None
    assert_same(model, h)


@pytest.mark.parametrize("delayed", [False, True])
def test_normalised_layer_inputs(delayed):
    """Recomputed by the kernel that computed them first, from the streams of the replay."""
    model, h = Model(delayed=delayed, eps=1e-5), normal(*TOKENS, C)
    for k, connection in enumerate(model.connections):
        torch.nn.init.normal_(connection.rms_norm_weight, 1.0, 0.1, generator=torch.Generator().manual_seed(k))
    assert_same(model, h)
    kept = saved(model, h.requires_grad_(), None) - saved(model, h, 3)
    assert kept == 4 * 10 * C * ((DEPTH - 3) * 4 + DEPTH)


@pytest.mark.parametrize("delayed", [pytest.param(False, marks=pytest.mark.full), True])
def test_identity_connections(delayed):
    """Blocks without an h_res, to the last stream, which a head reads in an operator of its own.

    Would catch a replay that mixes streams, and one that stands for the h_pre that was given in the delayed form.
    """
    model, h = Model(delayed=delayed, identity=True, depth=4), normal(*TOKENS, C)
    model.reduction = randomize(mhc.HyperHead(model.spec))
    assert_same(model, h)
    kept = saved(model, h.requires_grad_(), None) - saved(model, h, 3)
    assert kept == 4 * 10 * C * ((4 - 2 + 1) * 4 + 4)


def test_a_stream_that_goes_on():
    """`from_streams` passes recompute on, as a stream from an embedding does; its first x is a block's start."""
    model, h = Model(), normal(*TOKENS, C)
    model.stream = lambda h: mhc.ResidualStream.from_streams(mhc.expand(h, 4), recompute=model.recompute)
    assert_same(model, h)
    kept = saved(model, h.requires_grad_(), None) - saved(model, h, 3)
    assert kept == 4 * 10 * C * ((DEPTH - 3) * 4 + DEPTH)


def test_no_tokens():
    assert_same(Model(), normal(0, C))


def test_layers_run_once_and_blocks_are_replayed_once(monkeypatch):
    """Whatever is recomputed is made by one replay a block."""
    calls, replay = [], launch.replay
    replace_launch(monkeypatch, "replay", lambda *a: calls.append(len(a[1])) or replay(*a))
    model = Model()
    gradients(model, normal(*TOKENS, C), 3)
    assert [layer.calls for layer in model.layers] == [1] * DEPTH
    assert calls == [0, 2, 2]  # of the last block, sublayer 6 alone; then of 3 … 5 and 0 … 2


@pytest.mark.parametrize("make_layer", [lambda: torch.nn.Linear(C, C), lambda: torch.sin], ids=["Linear", "sin"])
def test_saved_bytes_are_the_papers(make_layer):
    """32 sublayers at L_r*: x at every block's start, and every layer's output; coefficients are counted apart.

    Exactly n·C·⌈L/L_r⌉ + C·L numbers a token, and another C, the embedding, which the first read keeps: 1.6 % more.
    Would catch one stream or one layer input that is kept.
    """
    depth, n, tokens = 32, 4, 10
    length = mhc.recompute_length(depth, n)
    assert length == 4
    model = Model(n, depth=1)
    layers = [make_layer() for _ in range(depth)]
    connections = [randomize(mhc.HyperConnection(model.spec, i), i) for i in range(depth)]

    def run(recompute):
        stream = mhc.ResidualStream(normal(*TOKENS, C).requires_grad_(), n, recompute=recompute)
        for connection, layer in zip(connections, layers, strict=True):
            stream.write(layer(stream.read(connection)))
        return mhc.saved_bytes(stream.reduce())

    mappings = n * n + 2 * n
    weights = sum(C * C for layer in layers if isinstance(layer, torch.nn.Linear))
    parameters = depth * (mappings * n * C + 3 + mappings) + weights
    apart = parameters + depth * (2 * mappings + 1) * tokens  # h_*, and what is projected
    apart += tokens * C  # the embedding
    assert run(None) == 4 * (apart + tokens * C * depth * (n + 2))
    assert run(length) == 4 * (apart + tokens * C * (n * -(-depth // length) + depth))


def test_what_is_recomputed_is_not_kept():
    """No reference is left to any stream but the blocks' starts, nor to any layer's input; catches a cycle too."""
    streams, inputs = [], []
    model = Model()
    model.look = lambda stream, _: streams.append(weakref.ref(stream.x.untyped_storage()))
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    gc.disable()
    try:
        model.recompute = 3
        out = model(normal(*TOKENS, C).requires_grad_())
        assert [ref() is not None for ref in inputs] == [False] * DEPTH
        # streams[k] is x_{k+1}; blocks start at 0, 3 and 6
        assert [ref() is not None for ref in streams] == [k + 1 in (3, 6) for k in range(DEPTH)]
        del out
        assert [ref() is not None for ref in streams] == [False] * DEPTH
    finally:
        gc.enable()


def test_what_was_recomputed_is_dropped_with_its_last_user():
    """After a backward of everything, or of a part, and after a look from outside nothing is held."""
    model = Model()
    model.recompute = 4
    out = model(normal(*TOKENS, C).requires_grad_())
    assert len({handle.block for handle in handles_of(out)}) == 2
    (workspace,) = {handle.block.workspace for handle in handles_of(out)}
    torch.autograd.grad(out.sum(), model.layers[-1].linear.weight, retain_graph=True)
    assert workspace._made == {}
    for handle in handles_of(out):
        handle.unpack()
    assert workspace._made == {}
    out.backward(normal(*out.shape))
    assert workspace._made == {}


class Twice(torch.autograd.Function):
    """Asks for what it saved twice in one backward, as a function may."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return u * u

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0] + g * ctx.saved_tensors[0]


class Squaring(torch.nn.Module):
    def forward(self, u):
        return torch.tanh(Twice.apply(u))


def test_a_function_that_unpacks_twice(monkeypatch):
    """The second time everything is made once more; not more than one block is there at any time."""
    sizes, take = [], Workspace.take
    monkeypatch.setattr(Workspace, "take", lambda self, *a: (take(self, *a), sizes.append(len(self._made)))[0])
    assert_same(Model(make_layer=Squaring), normal(*TOKENS, C))
    assert 0 < max(sizes) <= 2 + 3


class Stream:
    """A stand-in for a CUDA stream, which tells what it waits for."""

    def __init__(self, name, events):
        self.name, self.events = name, events

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")


def test_another_stream_waits_for_the_replay(monkeypatch):
    """Branches of a layer may run beside each other.

    Would catch a tensor that is read while it is made, or whose memory is given away while it is read.
    """
    events, calls, take = [], [], Workspace.take
    streams = [Stream("main", events), Stream("side", events)]
    monkeypatch.setattr(blocks, "current_stream", lambda _: streams[len(calls) % 2])
    monkeypatch.setattr(Workspace, "take", lambda self, *a: (take(self, *a), calls.append(a))[0])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: events.append(f"recorded on {stream.name}"))
    model = Model(depth=3)
    assert_same(model, normal(*TOKENS, C))
    assert len(calls) > 4
    assert events == ["side waits for main", "recorded on side"] * (len(calls) // 2)


def test_the_default_length_is_the_argmin():
    """Exactly, where √(nL/(n + 2)) is off; errors by name."""
    for n in (2, 4, 8):
        for depth in (1, 2, 7, 24, 32, 36, 60, 100):
            cost = {length: n * -(-depth // length) + (n + 2) * length for length in range(1, depth + 1)}
            length = mhc.recompute_length(depth, n)
            assert cost[length] == min(cost.values())
            assert all(cost[shorter] > cost[length] for shorter in range(1, length))
    assert [mhc.recompute_length(depth) for depth in (24, 36, 60)] == [4, 4, 6]
    with pytest.raises(ValueError, match="recompute_length: num_sublayers: expected at least 1, got 0"):
        mhc.recompute_length(0)
    with pytest.raises(TypeError, match="recompute_length: num_sublayers: expected an int, got float"):
        mhc.recompute_length(32.0)
    with pytest.raises(ValueError, match="recompute_length: num_streams: expected one of"):
        mhc.recompute_length(32, 9)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    """Bits are the same there, and the allocator holds less after the forward."""
    model = Model(dtype=dtype).cuda()
    h = normal(256, C, dtype=dtype).cuda().requires_grad_()
    found, held = [], []
    for model.recompute in (None, 3):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = model(h)
        held.append(torch.cuda.memory_allocated() - before)
        found.append(torch.autograd.grad(out, [h, *model.parameters()], normal(*out.shape, dtype=dtype).cuda()))
        del out
    assert all(map(torch.equal, *found))
    fewer = 256 * C * h.element_size() * ((DEPTH - 3) * 4 + DEPTH)
    assert held[0] - held[1] >= 0.9 * fewer  # the allocator rounds up
