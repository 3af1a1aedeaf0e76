"""Imported weights compute what they computed where they came from: layer input, next stream and gradients.

The other side is its formulas in float64 (`foreign_sublayers`), or the package itself where it is installed. Would
catch: res rows left in the wrong order, the order of Sinkhorn's steps taken for the other, columns of phi that do not
follow the streams, a constant of another framework.
"""

from __future__ import annotations

from dataclasses import replace

import foreign_sublayers
import pytest
import torch
from foreign_states import C, heads, states

import mhc_tilelang as mhc
from mhc_tilelang import convert

EARLIER = convert.CONVENTIONS["liger"]
TOKENS = 37
# A logit, a float32 sum of n·C products, is off by some 1e-6 where it is 6, which Sinkhorn passes on at most n-fold.
# Found: 1.2e-7 of the norm, 1e-6 of a gradient's. The nearest wrong convention, the other order, is 1.6e-3 off.
TOLERANCE = 1e-5


def streams(n, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, n, C, generator=generator), torch.randn(TOKENS, C, generator=generator)


def relative(got, expected):
    return float((got.detach().double() - expected.detach()).norm() / expected.detach().norm())


def double(state):
    return {name: tensor.double().requires_grad_() for name, tensor in state.items()}


def imported(framework, n=4):
    """(their state, the connection of ours that computes the same, their sublayer), and norm_weight if there is one."""
    theirs, sublayer = states(framework.removeprefix("earlier_"), n), getattr(foreign_sublayers, framework)
    if framework == "earlier_megatron":
        state, spec = convert.megatron.import_state(theirs, EARLIER), mhc.MHCSpec(C, n, sinkhorn_eps=0, pre_eps=0)
    else:
        module = getattr(convert, framework)
        sizes = (C,) if framework == "transformer_engine" else (C, n)
        state, spec = module.import_state(theirs), module.spec(*sizes)
    rows_first = framework in ("liger", "earlier_megatron", "lucidrains")
    connection = (convert.RowsFirstConnection if rows_first else mhc.HyperConnection)(spec)
    norm_weight = state.pop("norm_weight", None)
    if norm_weight is not None:
        state["phi"] = state["phi"] * norm_weight
    connection.load_state_dict(state)
    return theirs, connection, sublayer


def run(connection, x, layer_output):
    layer_input, *mappings = connection(x)
    return layer_input, connection.merge(x, layer_output, *mappings)


FRAMEWORKS = ["deepseek", "liger", "transformer_engine", "megatron", "earlier_megatron", "lucidrains"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_same_function(framework):
    """Forward, and the gradients of the stream, the layer's output and the weights, which the export brings back."""
    theirs, connection, sublayer = imported(framework)
    x, layer_output = (tensor.requires_grad_() for tensor in streams(4))
    their_weights, x64, output64 = double(theirs), *(t.detach().double().requires_grad_() for t in (x, layer_output))
    got, expected = run(connection, x, layer_output), sublayer(their_weights, x64, output64)
    assert max(map(relative, got, expected)) < TOLERANCE

    generator = torch.Generator().manual_seed(4)
    upstream = [torch.randn(tensor.shape, generator=generator) for tensor in got]
    torch.autograd.backward(got, upstream)
    torch.autograd.backward(expected, [tensor.double() for tensor in upstream])
    assert relative(x.grad, x64.grad) < TOLERANCE
    assert relative(layer_output.grad, output64.grad) < TOLERANCE
    if framework in ("transformer_engine", "lucidrains"):
        return  # its gradient by norm_weight, and the unmapped dynamic weights
    keyword = {"convention": EARLIER} if framework == "earlier_megatron" else {}
    gradients = {name: parameter.grad for name, parameter in connection.named_parameters()}
    returned = getattr(convert, framework.removeprefix("earlier_")).export_state(gradients, **keyword)
    for name, gradient in returned.items():
        assert relative(gradient, their_weights[name].grad) < TOLERANCE, name


@pytest.mark.full
@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("framework", [name for name in FRAMEWORKS if name != "transformer_engine"])
def test_same_function_of_other_streams(framework, n):
    theirs, connection, sublayer = imported(framework, n)
    x, layer_output = streams(n)
    got, expected = run(connection, x, layer_output), sublayer(double(theirs), x.double(), layer_output.double())
    assert max(map(relative, got, expected)) < TOLERANCE


@pytest.mark.parametrize("framework", ["deepseek", "liger", "megatron", "earlier_megatron"])
def test_wrong_conventions_show(framework):
    """Rows that were not permuted, or were and should not have been, and the other class: none of them passes."""
    theirs, connection, sublayer = imported(framework)
    x, layer_output = streams(4)
    _, expected = sublayer(double(theirs), x.double(), layer_output.double())
    state, spec = connection.state_dict(), connection.spec
    swapped = {name: convert.swapped_rows(state[name], 4) for name in ("phi", "bias")}
    other = {mhc.HyperConnection: convert.RowsFirstConnection, convert.RowsFirstConnection: mhc.HyperConnection}
    for make, changed in (
        (type(connection), swapped),
        (other[type(connection)], {}),
        (other[type(connection)], swapped),
    ):
        wrong = make(spec)
        wrong.load_state_dict({**state, **changed})
        assert relative(run(wrong, x, layer_output)[1], expected) > 100 * TOLERANCE


def test_unconstrained():
    """lucidrains' plain hyper-connections, dynamic weights and norm weight included."""
    theirs = {**states("unconstrained"), "norm.gamma": 0.1 * torch.randn(C)}
    connection = mhc.UnconstrainedHyperConnection(convert.lucidrains.unconstrained_spec(C))
    connection.load_state_dict(convert.lucidrains.import_unconstrained(theirs))
    x, layer_output = streams(4)
    weights = {name: tensor.double() for name, tensor in theirs.items()}
    expected = foreign_sublayers.unconstrained_lucidrains(weights, x.double(), layer_output.double())
    assert max(map(relative, run(connection, x, layer_output), expected)) < TOLERANCE


def test_heads():
    """DeepSeek's head: fn, scale and base as they are."""
    head = heads("deepseek")
    ours = mhc.HyperHead(convert.deepseek.spec(C))
    ours.load_state_dict(convert.deepseek.import_head(head))
    x, _ = streams(4)
    state = {name: tensor.double() for name, tensor in head.items()}
    scale = torch.rsqrt(x.double().flatten(1).square().mean(1, keepdim=True) + 1e-6)
    pre = (x.double().flatten(1) @ state["fn"].T * scale * state["scale"] + state["base"]).sigmoid() + 1e-6
    assert relative(ours(x), (pre.unsqueeze(2) * x).sum(1)) < TOLERANCE


def test_rows_first_in_a_stream():
    """ResidualStream takes it, unfused, between other connections; a waiting write is refused by the module itself."""
    _, connection, _ = imported("liger")
    x, layer_output = streams(4)
    stream = mhc.ResidualStream(x[:, 0].contiguous())
    plain = mhc.HyperConnection(connection.spec)
    by_hand = mhc.expand(x[:, 0].contiguous(), 4)
    for reader in (plain, connection, connection, plain):
        stream.read(reader)
        stream.write(layer_output)
        by_hand = run(reader, by_hand, layer_output)[1]
    assert torch.equal(stream.x, by_hand)
    with pytest.raises(TypeError, match="RowsFirstConnection: expected x alone, got x and 3 more"):
        connection(x, layer_output, *connection(x)[1:])


def test_rows_first_delayed():
    """Mappings are the same with the h_pre of the sublayer before; its own comes last."""
    _, plain, _ = imported("liger")
    connection = convert.RowsFirstConnection(replace(plain.spec, delayed_pre=True))
    connection.load_state_dict(plain.state_dict())
    x, _ = streams(4)
    layer_input, h_post, h_res, h_pre = connection(x, mhc.first_pre(x))
    assert torch.equal(layer_input, x[:, 0])
    aggregated, *mappings = plain(x)
    assert all(map(torch.equal, (h_post, h_res), mappings))
    assert relative((h_pre.unsqueeze(2) * x).sum(1), aggregated.double()) < TOLERANCE
    with pytest.raises(TypeError, match="RowsFirstConnection: expected x and h_pre, got x and 0 more"):
        connection(x)


# The packages themselves, where they are installed


def test_hyper_connections_package():
    """Static mHC and plain HC of the package agree, as modules, on streams folded into the batch."""
    package = pytest.importorskip("hyper_connections")
    x, layer_output = (tensor.unsqueeze(0) for tensor in streams(4))
    pairs = (
        (
            package.mHC,
            "lucidrains",
            convert.lucidrains.import_state,
            convert.RowsFirstConnection,
            convert.lucidrains.spec,
        ),
        (
            package.HyperConnections,
            "unconstrained",
            convert.lucidrains.import_unconstrained,
            mhc.UnconstrainedHyperConnection,
            convert.lucidrains.unconstrained_spec,
        ),
    )
    for theirs, name, take, ours, spec in pairs:
        module, connection = theirs(4, dim=C), ours(spec(C, 4))
        module.load_state_dict(states(name))
        connection.load_state_dict(take(module.state_dict()))
        branch_input, add_residual = module(convert.lucidrains.export_stream(x))
        x_next = convert.lucidrains.import_stream(add_residual(layer_output), 4)
        got = run(connection, x, layer_output)
        assert max(map(relative, got, (branch_input.double(), x_next.double()))) < TOLERANCE


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_same_function_of_small_streams(framework):
    """Scale 1e-3 has a mean square of 1e-6, as large as rms_eps.

    Catches that of another framework, which elsewhere is nothing beside 1; a mean square that forgets it is √2 off.
    """
    theirs, connection, sublayer = imported(framework)
    x, layer_output = (1e-3 * tensor for tensor in streams(4))
    got, expected = run(connection, x, layer_output), sublayer(double(theirs), x.double(), layer_output.double())
    assert max(map(relative, got, expected)) < TOLERANCE


def test_unconstrained_of_small_streams():
    """lucidrains' plain hyper-connections are the same at small streams: their norm has no eps."""
    theirs = states("unconstrained")
    connection = mhc.UnconstrainedHyperConnection(convert.lucidrains.unconstrained_spec(C))
    connection.load_state_dict(convert.lucidrains.import_unconstrained(theirs))
    x, layer_output = (1e-3 * tensor for tensor in streams(4))
    weights = {name: tensor.double() for name, tensor in theirs.items()}
    expected = foreign_sublayers.unconstrained_lucidrains(weights, x.double(), layer_output.double())
    assert max(map(relative, run(connection, x, layer_output), expected)) < TOLERANCE
