"""The delayed form (V4.1): a sublayer reads with the h_pre of the sublayer before it, the first one reads stream 0.

Would catch: a sublayer that reads with its own h_pre, one that reads with an older one, an h_pre lost by a look at the
stream, its gradient dropped between two sublayers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from differentiable import DELAYED, requiring, upstream
from helpers import assert_same_bits
from models import assert_equal, gradients, normal, randomize
from test_autograd import assert_near_float64
from torch.utils.checkpoint import checkpoint

import mhc_tilelang as mhc
from mhc_tilelang import ops, reference
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.inputs import Case

C, DEPTH, TOKENS = 24, 4, (2, 5)
SPEC = mhc.MHCSpec.deepseek_v4_1(C)
PLAIN = replace(SPEC, delayed_pre=False)
PARAMETERS = ("phi", "alpha", "bias")


class Model(torch.nn.Module):
    """Layers that mix channels, random connections, a random head; `run_sublayer` may be exchanged."""

    def __init__(self, spec=SPEC, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(C, C, dtype=dtype) for _ in range(DEPTH))
        self.connections = torch.nn.ModuleList(randomize(mhc.HyperConnection(spec, i), i) for i in range(DEPTH))
        self.head = randomize(mhc.HyperHead(spec))

    def forward(self, h):
        stream = mhc.ResidualStream(h)
        for connection, layer in zip(self.connections, self.layers, strict=True):
            self.run_sublayer(stream, connection, layer)
        return stream.reduce(self.head)

    @staticmethod
    def run_sublayer(stream, connection, layer):
        stream.write(torch.tanh(layer(stream.read(connection))))


def by_hand(model, h):
    """Run the model by the functions."""
    x, waiting = ops.expand(h, 4), None
    h_pre = ops.first_pre(x)
    for connection, layer in zip(model.connections, model.layers, strict=True):
        parameters = (connection.phi, connection.alpha, connection.bias, SPEC)
        if waiting is None:
            layer_input, *mappings, h_pre = ops.pre(x, *parameters, h_pre=h_pre)
        else:
            x, layer_input, *mappings, h_pre = ops.post_pre(x, *waiting, *parameters, h_pre=h_pre)
        waiting = torch.tanh(layer(layer_input)), *mappings
    return ops.post_head(x, *waiting, model.head.phi, model.head.alpha, model.head.bias, SPEC)[1]


def float64_of(module, names):
    return [numpy64(getattr(module, name).detach()) for name in names]


def reference_gradients(model, h):
    """The output and all gradients in float64 by the reference's functions, from the last sublayer to the first."""
    layers = [float64_of(layer, ("weight", "bias")) for layer in model.layers]
    parameters = [(*float64_of(connection, PARAMETERS), SPEC) for connection in model.connections]
    head = (*float64_of(model.head, PARAMETERS), SPEC)

    def layer_output(index, layer_input):
        weight, bias = layers[index]
        return np.tanh(layer_input @ weight.T + bias)

    h = numpy64(h)
    x = reference.expand(h, 4)
    first = (x, reference.first_pre(x), *parameters[0])
    inputs, boundaries = [], []
    layer_input, h_post, h_res, h_pre = reference.delayed_pre(*first)
    for index, following in enumerate(parameters[1:]):
        inputs.append(layer_input)
        boundaries.append((x, layer_output(index, layer_input), h_post, h_res, h_pre, *following))
        x, layer_input, h_post, h_res, h_pre = reference.delayed_post_pre(*boundaries[-1])
    inputs.append(layer_input)
    last = (x, layer_output(DEPTH - 1, layer_input), h_post, h_res)
    end = reference.post(*last)
    found = {"out": reference.head(end, *head)}

    def through_layer(index, g_output, output):
        g_sum = g_output * (1 - output**2)
        found[f"layers.{index}.weight"] = np.einsum("abo,abi->oi", g_sum, inputs[index])
        found[f"layers.{index}.bias"] = g_sum.sum((0, 1))
        return g_sum @ layers[index][0]

    def keep(prefix, g_parameters):
        found.update(zip((f"{prefix}.{name}" for name in PARAMETERS), g_parameters, strict=True))

    g_out = numpy64(normal(*found["out"].shape, seed=7))
    g_x, *g_parameters, _ = reference.head_backward(g_out, end, *head)
    keep("head", g_parameters)
    g_x, g_output, *g_mappings = reference.post_backward(g_x, *last)
    g_input, g_pre = through_layer(DEPTH - 1, g_output, last[1]), None  # nothing reads the last h_pre
    for index in range(DEPTH - 1, 0, -1):
        boundary = boundaries[index - 1]
        g_x, g_output, g_post, g_res, g_pre, *g_parameters, _ = reference.delayed_post_pre_backward(
            g_x, g_input, *g_mappings, g_pre, *boundary
        )
        g_mappings = g_post, g_res
        keep(f"connections.{index}", g_parameters)
        g_input = through_layer(index - 1, g_output, boundary[1])
    g_first, _, *g_parameters, _ = reference.delayed_pre_backward(g_input, *g_mappings, g_pre, *first)
    keep("connections.0", g_parameters)
    found["h"] = reference.expand_backward(g_x + g_first, h, 4)
    return found


def run_reference(model, h, spec=SPEC):
    """The sum over streams at the end, by `reference.run_stream`."""

    def sublayer(connection, layer):
        weight, bias = float64_of(layer, ("weight", "bias"))
        return reference.Sublayer(lambda u: np.tanh(u @ weight.T + bias), *float64_of(connection, PARAMETERS))

    return reference.run_stream(numpy64(h), list(map(sublayer, model.connections, model.layers)), spec)


# Functions


@pytest.mark.parametrize("name", DELAYED)
def test_gradients_match_float64(name):
    """Gradients of all outputs together, the returned h_pre included, for the given h_pre too."""
    function, case = DELAYED[name], Case(4, 64, torch.float32, 63)
    tensors = requiring(function.tensors(case, (7, 9)))
    outputs = function.call(tensors, case.spec)
    assert_near_float64(function, case, tensors, outputs, upstream(outputs))


def test_results_are_the_functions_one_after_the_other():
    """Results have the bits of `coefficients` and `post`. Catches results in another order."""
    connection = randomize(mhc.HyperConnection(SPEC))
    parameters = (connection.phi, connection.alpha, connection.bias, SPEC)
    x, output, h_pre = normal(*TOKENS, 4, C), normal(*TOKENS, C, seed=2), normal(*TOKENS, 4, seed=3)
    own_pre, h_post, h_res = ops.coefficients(x, *parameters)
    layer_input, *mappings = ops.pre(x, *parameters, h_pre=h_pre)
    assert_same_bits(mappings, [h_post, h_res, own_pre])
    x_next = ops.post(x, output, h_post, h_res)
    assert_same_bits(
        ops.post_pre(x, output, h_post, h_res, *parameters, h_pre=h_pre),
        [x_next, *ops.pre(x_next, *parameters, h_pre=h_pre)],
    )
    given = ops.pre(x, *parameters, h_pre=own_pre)
    assert_same_bits(given[:3], ops.pre(x, *parameters[:3], PLAIN))
    assert not torch.equal(given[0], layer_input)


def test_the_first_h_pre_takes_stream_0():
    """The layer's input is that stream, to the bit, for zero tokens and no leading dimension too."""
    for leading in (TOKENS, (0, 3), ()):
        for dtype in (torch.bfloat16, torch.float32):
            x = normal(*leading, 4, C, dtype=dtype)
            h_pre = mhc.first_pre(x)
            assert h_pre.is_contiguous()
            connection = randomize(mhc.HyperConnection(SPEC))
            assert torch.equal(connection(x, h_pre)[0], x[..., 0, :])
            assert np.array_equal(numpy64(h_pre), reference.first_pre(numpy64(x)))
    with pytest.raises(ValueError, match=r"first_pre: x: expected shape \[..., n, C\], got \[3\]"):
        mhc.first_pre(torch.zeros(3))


# Streams


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)])
def test_stream_equals_the_functions_to_the_bit(dtype):
    """Forward and backward."""
    model, h = Model(dtype=dtype), normal(*TOKENS, C, dtype=dtype)
    assert_equal(gradients(model, model, h), gradients(model, lambda h: by_hand(model, h), h))


def test_stream_matches_float64():
    """Output and every gradient, against functions that share nothing with these. float32: errors were 1e-6 at most."""
    model, h = Model(), normal(*TOKENS, C)
    expected = reference_gradients(model, h)
    got = gradients(model, model, h)
    assert got.keys() == expected.keys()
    for name, exact in expected.items():
        error = np.linalg.norm(numpy64(got[name]) - exact) / np.linalg.norm(exact)
        assert error < 1e-5, name


def test_reference_stream_is_the_chain():
    """`run_stream` with a delayed spec is delayed_pre, then delayed_post_pre; and its steps say what was read with."""
    model, h = Model(), normal(*TOKENS, C)
    stream = mhc.ResidualStream(h)
    for connection, layer in zip(model.connections, model.layers, strict=True):
        Model.run_sublayer(stream, connection, layer)
    expected = run_reference(model, h)
    np.testing.assert_allclose(numpy64(stream.reduce().detach()), expected, rtol=1e-5, atol=1e-5)
    steps = list(
        reference.stream_steps(
            numpy64(h), [reference.Sublayer(np.tanh, *float64_of(c, PARAMETERS)) for c in model.connections], SPEC
        )
    )
    assert np.array_equal(steps[0].layer_input, numpy64(h))
    for before, step, connection in zip(steps, steps[1:], model.connections, strict=False):
        own_pre, _, _ = reference.coefficients(before.x, *float64_of(connection, PARAMETERS), SPEC)
        assert np.array_equal(step.h_pre, own_pre)


def test_own_and_earlier_differ():
    """Tests the tests above: a stream that reads with its own h_pre is far from the delayed one."""
    model, h = Model(), normal(*TOKENS, C)
    delayed, own = run_reference(model, h), run_reference(model, h, PLAIN)
    assert np.linalg.norm(delayed - own) > 0.1 * np.linalg.norm(delayed)


def test_a_look_changes_no_value():
    """x or a reduction between sublayers: the merge is by `post`, the read by `pre`; equal to the bit."""
    model, h = Model(), normal(*TOKENS, C)
    expected = model(h)
    for look in (lambda stream: stream.x, lambda stream: stream.reduce(model.head)):
        model.run_sublayer = lambda stream, *sublayer, look=look: (look(stream), Model.run_sublayer(stream, *sublayer))
        assert torch.equal(model(h), expected)


class OwnForward(mhc.HyperConnection):
    """A class of a user's own: the stream does not hand it a write that waits."""

    def forward(self, x, h_pre):
        return super().forward(x, h_pre)


def test_a_class_of_ones_own_is_handed_the_h_pre():
    model, h = Model(), normal(*TOKENS, C)
    expected = model(h)
    for connection in model.connections:
        connection.__class__ = OwnForward
    assert torch.equal(model(h), expected)


def test_a_sublayer_without_grad():
    """Its h_pre is a constant to the next sublayer: no gradient reaches it, and values are the same."""
    model, h = Model(), normal(*TOKENS, C)
    modes = [torch.no_grad, torch.enable_grad, torch.no_grad, torch.enable_grad]

    def run(h):
        stream = mhc.ResidualStream(h)
        for mode, connection, layer in zip(modes, model.connections, model.layers, strict=True):
            with mode():
                Model.run_sublayer(stream, connection, layer)
        return stream.reduce(model.head)

    got = gradients(model, run, h)
    assert torch.equal(got["out"], model(h))
    assert all(got[f"connections.{k}.{name}"] is None for k in (0, 1, 2) for name in PARAMETERS)
    assert got["connections.3.phi"].any()


def test_inference_mode():
    model, h = Model(), normal(*TOKENS, C)
    expected = model(h)
    with torch.inference_mode():
        assert torch.equal(model(h), expected)


def test_compiles_as_one_graph():
    torch.compiler.reset()
    model, h = Model(), normal(*TOKENS, C)
    compiled = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), h)
    for name, expected in gradients(model, model, h).items():
        assert (compiled[name] - expected).norm() < 1e-5 * expected.norm(), name


def test_checkpointed_layers():
    model, h = Model(), normal(*TOKENS, C)
    expected = gradients(model, model, h)

    def sublayer(stream, connection, layer):
        layer_input = stream.read(connection)
        stream.write(checkpoint(lambda u: torch.tanh(layer(u)), layer_input, use_reentrant=False))

    model.run_sublayer = sublayer
    assert_equal(gradients(model, model, h), expected)


# Errors


def test_connections_of_both_forms_in_one_stream():
    for first, second in ((SPEC, PLAIN), (PLAIN, SPEC)):
        stream = mhc.ResidualStream(normal(*TOKENS, C))
        stream.write(stream.read(mhc.HyperConnection(first)))
        wanted = f"read: connection: expected a spec with delayed_pre={first.delayed_pre}, .* got {second.delayed_pre}"
        with pytest.raises(ValueError, match=wanted):
            stream.read(mhc.HyperConnection(second))
        stream.read(mhc.HyperConnection(first))


def test_a_connection_alone_insists_on_an_h_pre():
    """Catches a loop over connections in which each of them would read stream 0, or its own."""
    x, connection = normal(*TOKENS, 4, C), mhc.HyperConnection(SPEC)
    with pytest.raises(TypeError, match=r"expected x and h_pre, or .* and h_pre, got x and 0 more; .* first_pre\(x\)"):
        connection(x)
    layer_input, h_post, h_res, _ = connection(x, mhc.first_pre(x))
    with pytest.raises(TypeError, match="got x and 3 more"):
        connection(x, layer_input, h_post, h_res)
    for given in ((h_post,), (layer_input, h_post, h_res, h_post)):
        with pytest.raises(TypeError, match="expected x, or x, layer_output, h_post, h_res, got x and"):
            mhc.HyperConnection(PLAIN)(x, *given)
    assert repr(connection) == "HyperConnection(hidden_size=24, num_streams=4, sublayer=0, delayed_pre=True)"


def test_unconstrained_connections_have_no_delayed_form():
    with pytest.raises(ValueError, match="UnconstrainedHyperConnection: spec: expected delayed_pre=False, got True"):
        mhc.connection("hc", SPEC)
    with pytest.raises(ValueError, match="spec: expected no delayed_pre for 'hc'"):
        reference.run_stream(np.zeros((3, C)), [], SPEC, "hc")
