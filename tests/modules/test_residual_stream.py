"""ResidualStream: the functions in the right order, to the bit, and an error for every other order."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from models import assert_equal, gradients, normal, randomize

import mhc_tilelang as mhc
from mhc_tilelang import ops, reference
from mhc_tilelang.checking.comparison import numpy64

KINDS = ("mhc", "hc", "residual")
C, DEPTH, TOKENS = 64, 4, (2, 5)
SPEC = mhc.MHCSpec.deepseek_v4(C)
every_kind = pytest.mark.parametrize("kind", KINDS)


class Model(torch.nn.Module):
    """Layers that mix channels, random connections, a random head; `run_sublayer` may be exchanged."""

    def __init__(self, kind, reduction="sum", dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.layers = torch.nn.ModuleList(torch.nn.Linear(C, C, dtype=dtype) for _ in range(DEPTH))
        self.connections = torch.nn.ModuleList(randomize(mhc.connection(kind, SPEC, i), i) for i in range(DEPTH))
        self.reduction = randomize(mhc.HyperHead(SPEC)) if reduction == "head" else reduction

    def forward(self, h):
        stream = mhc.ResidualStream(h, SPEC.num_streams, self.kind)
        for connection, layer in zip(self.connections, self.layers, strict=True):
            self.run_sublayer(stream, connection, layer)
        return stream.reduce(self.reduction)

    @staticmethod
    def run_sublayer(stream, connection, layer):
        stream.write(torch.tanh(layer(stream.read(connection))))


def by_hand(model, h):
    """Run the model by the functions; sums in the order of the stream's own."""
    x, waiting = ops.expand(h, SPEC.num_streams) if model.kind == "hc" else h, None
    for connection, layer in zip(model.connections, model.layers, strict=True):
        if model.kind == "residual":
            x = x + torch.tanh(layer(x))
        elif model.kind == "mhc":
            parameters = (connection.phi, connection.alpha, connection.bias, SPEC)
            if waiting is None:
                x, layer_input, *mappings = ops.expand_pre(x, *parameters)
            else:
                x, layer_input, *mappings = ops.post_pre(x, *waiting, *parameters)
            waiting = torch.tanh(layer(layer_input)), *mappings
        else:
            layer_input, *mappings = connection(x)
            x = connection.merge(x, torch.tanh(layer(layer_input)), *mappings)
    if isinstance(model.reduction, mhc.HyperHead):
        head = model.reduction
        parameters = (head.phi, head.alpha, head.bias, SPEC)
        return ops.head(x, *parameters) if waiting is None else ops.post_head(x, *waiting, *parameters)[1]
    if waiting is not None:
        x = ops.post(x, *waiting)
    if model.kind == "residual":
        return x
    return ops.collapse(x, mean=model.reduction == "mean")


# Values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "reduction"),
    [("mhc", "sum"), ("mhc", "mean"), ("mhc", "head"), ("hc", "mean"), ("hc", "head"), ("residual", "sum")],
)
def test_equals_the_functions_to_the_bit(kind, reduction, dtype):
    """Forward and backward. Catches a merge with the mappings or the x of another sublayer, or a lost last write."""
    model = Model(kind, reduction, dtype)
    h = normal(*TOKENS, C, dtype=dtype)
    assert_equal(gradients(model, model, h), gradients(model, partial(by_hand, model), h))


@every_kind
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_matches_the_float64_stream(kind, reduction):
    """An implementation that shares nothing with this one; its error was 2e-7 at most. Catches a transposed h_res."""
    model = Model(kind, reduction)

    def sublayer(connection, layer):
        weight, bias = numpy64(layer.weight.detach()), numpy64(layer.bias.detach())
        parameters = {name: numpy64(p.detach()) for name, p in connection.named_parameters()}
        parameters = {"phi" if name == "theta" else name: p for name, p in parameters.items()}
        return reference.Sublayer(lambda u: np.tanh(u @ weight.T + bias), **parameters)

    h = normal(*TOKENS, C)
    sublayers = list(map(sublayer, model.connections, model.layers))
    expected = reference.run_stream(numpy64(h), sublayers, SPEC, kind, reduction)
    error = np.linalg.norm(numpy64(model(h).detach()) - expected) / np.linalg.norm(expected)
    assert error < 3e-6


def test_float32_stream_takes_what_autocast_returns():
    """bfloat16 layer outputs, in a stream and with mappings that stay float32."""
    for kind in KINDS:
        model = Model(kind)
        with torch.autocast("cpu", torch.bfloat16):
            stream = mhc.ResidualStream(normal(*TOKENS, C), connection=kind)
            layer_input = stream.read(model.connections[0])
            layer_output = model.layers[0](layer_input)
            stream.write(layer_output)
            x_next = stream.x
        assert (layer_input.dtype, layer_output.dtype, x_next.dtype) == (torch.float32, torch.bfloat16, torch.float32)
        expected = mhc.ResidualStream(normal(*TOKENS, C), connection=kind)
        expected.read(model.connections[0])
        expected.write(layer_output.float())
        torch.testing.assert_close(x_next, expected.x, rtol=1e-6, atol=1e-6)


def test_x_shows_the_stream_and_changes_nothing():
    """Before a read, between a read and its write, after a write; catches a look that loses the write.

    A look before the first read costs the last bits of what is read: it is `pre` then.
    """
    model = Model("mhc")
    h = normal(*TOKENS, C)
    stream = mhc.ResidualStream(h)
    assert torch.equal(stream.x, ops.expand(h, 4))
    for connection, layer in zip(model.connections, model.layers, strict=True):
        before = stream.x
        layer_input = stream.read(connection)
        assert torch.equal(stream.x, before)
        layer_output = torch.tanh(layer(layer_input))
        stream.write(layer_output)
        assert torch.equal(stream.x, connection.merge(before, layer_output, *connection(before)[1:]))
    torch.testing.assert_close(stream.reduce(), model(h), rtol=1e-5, atol=1e-5)
    with pytest.raises(AttributeError):
        stream.x = h


def test_a_write_waits(monkeypatch):
    """It waits for the next read or a head, which fuse it into one operator, or the reduction; catches an eager merge.

    So does the embedding for the first read.
    """
    calls = []
    for name in ("expand", "pre", "post", "head", "expand_pre", "post_pre", "post_head"):
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, name=name, call=original, **k: calls.append(name) or call(*a, **k))
    model = Model("mhc")
    stream = mhc.ResidualStream(normal(*TOKENS, C))
    stream.write(stream.read(model.connections[0]))
    assert calls == ["expand_pre"]
    stream.write(stream.read(model.connections[1]))
    assert calls == ["expand_pre", "post_pre"]
    stream.reduce()
    stream.reduce("mean")
    assert calls == ["expand_pre", "post_pre", "post"]
    head = mhc.HyperHead(SPEC)
    stream.write(stream.read(model.connections[2]))
    stream.reduce(head)
    assert calls[3:] == ["pre", "post_head"]
    stream.reduce(head)
    assert calls[5:] == ["head"]
    mhc.ResidualStream(normal(*TOKENS, C)).reduce(head)
    assert calls[6:] == ["expand", "head"]


def test_the_first_read_is_that_of_an_expanded_stream():
    """Within the last bits, in values and gradients: two orders of float32 sums. Catches another stream or mapping."""
    model, h = Model("mhc", "head"), normal(*TOKENS, C)
    fused = gradients(model, model, h)
    model.run_sublayer = lambda stream, *sublayer: (stream.x, Model.run_sublayer(stream, *sublayer))
    apart = gradients(model, model, h)
    assert not torch.equal(fused["out"], apart["out"])
    for name, expected in apart.items():
        assert (fused[name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_a_reduction_by_a_head_leaves_the_stream():
    """The last write is merged once: the stream reads on, and both ways on have their gradients."""
    model = Model("mhc", "head")

    def run(look, h):
        stream = mhc.ResidualStream(h)
        stream.write(torch.tanh(stream.read(model.connections[0])))
        look(stream)
        between = stream.reduce(model.reduction)
        stream.write(torch.tanh(stream.read(model.connections[1])))
        return between + stream.reduce()

    h = normal(*TOKENS, C)
    got = gradients(model, partial(run, lambda _: None), h)
    expected = gradients(model, partial(run, lambda stream: stream.x), h)
    assert torch.equal(got["out"], expected["out"])
    for name, gradient in expected.items():
        if gradient is not None:
            assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_an_embedding_that_changed_meanwhile_is_refused():
    """The streams would be those of another embedding."""
    h = normal(*TOKENS, C)
    stream = mhc.ResidualStream(h)
    h.zero_()
    for call in (lambda: stream.read(mhc.HyperConnection(SPEC)), lambda: stream.x):
        with pytest.raises(RuntimeError, match="h: expected it as it was given, got one that was changed in place"):
            call()


def test_an_embedding_is_expanded_in_the_mode_of_its_making():
    """Catches a gradient that is lost since the first read, or look, came without grad."""
    for look in (lambda stream: stream.read(mhc.HyperConnection(SPEC)), lambda stream: stream.x):
        h = normal(*TOKENS, C).requires_grad_()
        stream = mhc.ResidualStream(h)
        with torch.no_grad():
            look(stream)
        assert stream.x.requires_grad
        with torch.no_grad():
            stream = mhc.ResidualStream(h)
        look(stream)
        assert not stream.x.requires_grad


def test_a_first_read_with_the_layers_norm():
    """The norm is not lost: `expand`, then `pre`."""
    connection, h = randomize(mhc.HyperConnection(SPEC, rms_norm_eps=1e-6)), normal(*TOKENS, C)
    got = mhc.ResidualStream(h).read(connection)
    assert torch.equal(got, connection(ops.expand(h, 4))[0])
    with pytest.raises(TypeError, match="expands: expected an embedding alone, and no layer norm, got"):
        connection(h, expands=True)


def test_a_connection_of_yours_reads_the_stream():
    """A subclass with a forward of its own is called with the stream, the first time too."""
    shapes = []

    class Own(mhc.HyperConnection):
        def forward(self, x):
            shapes.append(x.shape)
            return super().forward(x)

    mhc.ResidualStream(normal(*TOKENS, C)).read(Own(SPEC))
    assert shapes == [(*TOKENS, 4, C)]


def test_a_fused_boundary_changes_no_value():
    """A stream with a look at x after every sublayer, which merges by `post`, is equal to the bit."""
    model, h = Model("mhc", "head"), normal(*TOKENS, C)
    expected = model(h)
    model.run_sublayer = lambda stream, *sublayer: (Model.run_sublayer(stream, *sublayer), stream.x)
    assert torch.equal(model(h), expected)


def test_no_sum_of_stream_gradients_is_left():
    """Autograd adds nothing as wide as the stream: each x has one reader, the boundary after it, the last one the head.
    It does where every write is merged alone, which tests the test."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Additions(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.shapes = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
                self.shapes.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    model, h = Model("mhc", "head"), normal(*TOKENS, C).requires_grad_()
    for expected in (0, DEPTH - 1):
        out = model(h)
        with Additions() as additions:
            out.backward(normal(*out.shape, seed=7))
        assert additions.shapes.count((*TOKENS, SPEC.num_streams, C)) == expected
        model.run_sublayer = lambda stream, *sublayer: (Model.run_sublayer(stream, *sublayer), stream.x)


def test_reads_go_through_the_modules_call():
    """Hooks see them, which is how FSDP and DDP bring parameters; catches a direct call of forward."""
    model, calls = Model("mhc", "head"), []
    for module in (*model.connections, model.reduction):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    model(normal(*TOKENS, C))
    assert calls == [*model.connections, model.reduction]


# Turns and arguments


def stream_of(kind="mhc", dtype=torch.float32):
    return mhc.ResidualStream(normal(*TOKENS, C, dtype=dtype), connection=kind)


@every_kind
def test_out_of_turn(kind):
    """Every wrong order of two calls; afterwards the stream goes on as if nothing had been asked."""
    model = Model(kind)
    stream = stream_of(kind)
    expected = stream.reduce()
    with pytest.raises(RuntimeError, match=r"ResidualStream.write: expected read\(connection\) before it, got a write"):
        stream.write(normal(*TOKENS, C))
    layer_input = stream.read(model.connections[0])
    for name, call in (("read", lambda: stream.read(model.connections[1])), ("reduce", stream.reduce)):
        with pytest.raises(RuntimeError, match=rf"{name}: expected write\(layer_output\) for the read .* a {name}"):
            call()
    stream.write(torch.zeros_like(layer_input))
    with pytest.raises(RuntimeError, match=r"ResidualStream.write: expected read"):
        stream.write(layer_input)
    assert stream.reduce().shape == expected.shape


@every_kind
def test_connections_of_another_kind_or_size(kind):
    stream = stream_of(kind)
    for other in KINDS:
        if other != kind:
            with pytest.raises(TypeError, match=f"read: connection: expected one of kind '{kind}', got '{other}'"):
                stream.read(mhc.connection(other, SPEC))
    with pytest.raises(TypeError, match=f"read: connection: expected one of kind '{kind}', got 'Linear'"):
        stream.read(torch.nn.Linear(C, C))
    if kind != "residual":
        for spec in (mhc.MHCSpec(C + 1), mhc.MHCSpec(C, num_streams=2)):
            sizes = f"{spec.num_streams} streams of {spec.hidden_size}"
            with pytest.raises(ValueError, match=f"read: connection: expected 4 streams of 64 channels, .* {sizes}"):
                stream.read(mhc.connection(kind, spec))
            with pytest.raises(ValueError, match=f"reduce: reduction: expected 4 streams of 64 channels, .* {sizes}"):
                stream.reduce(mhc.HyperHead(spec))


def test_reductions_that_do_not_exist():
    for reduction in ("max", None, torch.nn.Linear(C, C)):
        with pytest.raises(ValueError, match="reduce: reduction: expected 'sum', 'mean' or a HyperHead, got "):
            stream_of().reduce(reduction)
    with pytest.raises(ValueError, match="expected 'sum' or 'mean' for a plain residual, got a HyperHead"):
        stream_of("residual").reduce(mhc.HyperHead(SPEC))


@every_kind
def test_layer_outputs_that_do_not_fit(kind):
    """Named by the write, not by the read that comes after the next layer; catches a broadcast."""
    connection = mhc.connection(kind, SPEC)
    stream = stream_of(kind)
    stream.read(connection)
    for shape in ((*TOKENS, 1), (C,), (*TOKENS, C + 1), (*TOKENS, 4, C)):
        with pytest.raises(ValueError, match=r"write: layer_output: expected shape \[2, 5, 64\], got "):
            stream.write(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"write: layer_output: expected dtype .* got torch.float64"):
        stream.write(torch.zeros(*TOKENS, C, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"write: layer_output: expected a torch.Tensor, got tuple"):
        stream.write((torch.zeros(*TOKENS, C),))
    for value in (torch.zeros(*TOKENS, C).to_sparse(), torch.nested.nested_tensor([torch.zeros(5, C)] * 2)):
        with pytest.raises(ValueError, match=r"write: layer_output: expected a dense tensor, got "):
            stream.write(value)
    narrow = stream_of(kind, torch.bfloat16)
    narrow.read(connection)
    with pytest.raises(TypeError, match=r"write: .* torch.bfloat16 or torch.float32, got torch.float16"):
        narrow.write(torch.zeros(*TOKENS, C).half())


@every_kind
def test_embeddings_that_do_not_fit(kind):
    with pytest.raises(TypeError, match=r"ResidualStream: h: expected dtype .* got torch.int64"):
        mhc.ResidualStream(torch.zeros(*TOKENS, C, dtype=torch.int64), connection=kind)
    with pytest.raises(TypeError, match=r"ResidualStream: h: expected a torch.Tensor, got list"):
        mhc.ResidualStream([1.0], connection=kind)
    with pytest.raises(ValueError, match=r"ResidualStream: num_streams: expected one of .* got 9"):
        mhc.ResidualStream(normal(*TOKENS, C), 9, kind)
    with pytest.raises(ValueError, match=r"ResidualStream: connection: expected one of .* got 'mHC'"):
        mhc.ResidualStream(normal(*TOKENS, C), connection="mHC")


# torch.compile and activation checkpointing


@every_kind
def test_compiles_as_one_graph(kind):
    """fullgraph=True, forward and backward; the turns leave no trace. float32: a compiler may reorder sums."""
    torch.compiler.reset()
    model = Model(kind, "head" if kind == "mhc" else "sum")
    h = normal(*TOKENS, C)
    compiled = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), h)
    for name, expected in gradients(model, model, h).items():
        error = (compiled[name] - expected).norm() / expected.norm()
        assert error < 1e-5, name
