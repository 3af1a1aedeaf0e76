"""Carrying an embedding through many sublayers (Eq. 4), under each of the three connections."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from mhc_tilelang import reference
from mhc_tilelang.reference import Sublayer

NUM_STREAMS, HIDDEN_SIZE, NUM_TOKENS, DEPTH = 4, 16, 3, 6
PAPER = SimpleNamespace(
    num_streams=NUM_STREAMS,
    hidden_size=HIDDEN_SIZE,
    sinkhorn_iters=20,
    sinkhorn_eps=0.0,
    pre_eps=0.0,
    rms_eps=1e-20,
    post_scale=2.0,
)
EMBEDDING = np.random.default_rng(0).standard_normal((NUM_TOKENS, HIDDEN_SIZE))


def zero_layer(layer_input):
    return np.zeros_like(layer_input)


def make_layers(seed=1):
    """Layers that differ: tanh of a random linear map."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((DEPTH, HIDDEN_SIZE, HIDDEN_SIZE)) / np.sqrt(HIDDEN_SIZE)
    return [lambda layer_input, w=w: np.tanh(layer_input @ w) for w in weights]


def make_sublayers(layers, connection):
    """Random parameters, different in every sublayer."""
    n, C = NUM_STREAMS, HIDDEN_SIZE
    rng = np.random.default_rng(2)
    if connection == "residual":
        return [Sublayer(layer) for layer in layers]
    shape = {"mhc": (n * n + 2 * n, n * C), "hc": (n + 2, C)}[connection]
    return [
        Sublayer(
            layer,
            phi=rng.standard_normal(shape) / np.sqrt(shape[1]),
            alpha=[0.5, 0.7, 0.9],
            bias=rng.standard_normal(n * n + 2 * n),
            norm_weight=rng.uniform(0.5, 1.5, shape[1]),
        )
        for layer in layers
    ]


def max_gain(mixing):
    """The larger of the Amax gains of a composite mapping: largest |row sum| and |column sum|."""
    return max(np.abs(mixing.sum(axis=-1)).max(), np.abs(mixing.sum(axis=-2)).max())


def composite_mixing(steps):
    composite = np.eye(NUM_STREAMS)
    for step in steps:
        composite = step.h_res @ composite
    return composite


def test_residual_stream_is_a_chain_of_residuals():
    """Catches a residual widened to n streams, whose sum would be n times too large."""
    layers = make_layers()
    expected = EMBEDDING
    for layer in layers:
        expected = reference.residual(expected, layer(expected))
    for reduction in ("sum", "mean"):
        actual = reference.run_stream(EMBEDDING, make_sublayers(layers, "residual"), PAPER, "residual", reduction)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_mhc_stream_is_a_chain_of_boundaries():
    """pre, then post_pre at each boundary, then a last post. Catches parameters of another sublayer."""
    sublayers = make_sublayers(make_layers(), "mhc")
    x = reference.expand(EMBEDDING, NUM_STREAMS)
    parameters = [(s.phi, s.alpha, s.bias, PAPER, s.norm_weight) for s in sublayers]
    layer_input, h_post, h_res = reference.pre(x, *parameters[0])
    for sublayer, following in zip(sublayers[:-1], parameters[1:], strict=True):
        layer_output = sublayer.layer(layer_input)
        x, layer_input, h_post, h_res = reference.post_pre(x, layer_output, h_post, h_res, *following)
    x = reference.post(x, sublayers[-1].layer(layer_input), h_post, h_res)
    np.testing.assert_allclose(reference.run_stream(EMBEDDING, sublayers, PAPER), x.sum(axis=1), rtol=1e-12)
    mean = reference.run_stream(EMBEDDING, sublayers, PAPER, reduction="mean")
    np.testing.assert_allclose(mean, x.mean(axis=1), rtol=1e-12)


def test_hc_stream_with_its_initial_parameters_is_the_plain_residual():
    """HC starts as a Pre-Norm residual: all streams carry the same values, their mean is the residual's."""
    n, layers = NUM_STREAMS, make_layers()
    sublayers = [
        Sublayer(
            layer,
            phi=np.zeros((n + 2, HIDDEN_SIZE)),
            alpha=np.full(3, 0.01),
            bias=np.concatenate([np.eye(n)[index % n], np.ones(n), np.eye(n).ravel()]),
        )
        for index, layer in enumerate(layers)
    ]
    actual = reference.run_stream(EMBEDDING, sublayers, PAPER, "hc", "mean")
    expected = reference.run_stream(EMBEDDING, make_sublayers(layers, "residual"), PAPER, "residual")
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("connection", ["mhc", "hc", "residual"])
def test_steps_are_one_walk(connection):
    """Catches a step that reports another stream, another input or another output than the layer had."""
    seen = []

    def watch(layer):
        def watched(layer_input):
            seen.append((layer_input, layer(layer_input)))
            return seen[-1][1]

        return watched

    sublayers = make_sublayers([watch(layer) for layer in make_layers()], connection)
    steps = list(reference.stream_steps(EMBEDDING, sublayers, PAPER, connection))
    assert len(steps) == len(seen) == DEPTH
    for step, (layer_input, layer_output) in zip(steps, seen, strict=True):
        np.testing.assert_array_equal(step.layer_input, layer_input)
        np.testing.assert_array_equal(step.layer_output, layer_output)
        np.testing.assert_array_equal(step.layer_input, reference.aggregate(step.x, step.h_pre))
        x_next = reference.post(step.x, step.layer_output, step.h_post, step.h_res)
        np.testing.assert_array_equal(step.x_next, x_next)
    for step, following in pairwise(steps):
        np.testing.assert_array_equal(step.x_next, following.x)


@pytest.mark.parametrize("connection", ["mhc", "hc"])
def test_composite_mapping_carries_the_early_signal(connection):
    """Eq. 4 with layers that return zero: x_L = ∏ H^res x_0, later factors on the left."""
    sublayers = make_sublayers([zero_layer] * DEPTH, connection)
    steps = list(reference.stream_steps(EMBEDDING, sublayers, PAPER, connection))
    expected = composite_mixing(steps) @ steps[0].x
    np.testing.assert_allclose(steps[-1].x_next, expected, rtol=1e-10, atol=1e-12)


def test_gain_stays_one_under_mhc_and_grows_under_hc():
    """Doubly stochastic matrices are closed under products (Eq. 6), HC's matrices grow with depth.

    Catches one used for the other: with Sinkhorn converged, the composite's Amax gain is 1, or far from it.
    """
    converged = SimpleNamespace(**{**vars(PAPER), "sinkhorn_iters": 500})
    gains = {}
    for connection in ("mhc", "hc"):
        sublayers = make_sublayers([zero_layer] * DEPTH, connection)
        steps = reference.stream_steps(EMBEDDING, sublayers, converged, connection)
        gains[connection] = max_gain(composite_mixing(steps))
    np.testing.assert_allclose(gains["mhc"], 1.0, rtol=1e-9)
    assert gains["hc"] > 10


@pytest.mark.parametrize("iters", [1, 20])
def test_mhc_returns_an_embedding_that_no_layer_adds_to(iters):
    """Rows of sum 1 keep equal streams equal at any depth. Catches columns normalised last."""
    spec = SimpleNamespace(**{**vars(PAPER), "sinkhorn_iters": iters})
    sublayers = make_sublayers([zero_layer] * DEPTH, "mhc")
    np.testing.assert_allclose(reference.run_stream(EMBEDDING, sublayers, spec, reduction="mean"), EMBEDDING)


def test_no_sublayers():
    np.testing.assert_allclose(reference.run_stream(EMBEDDING, [], PAPER), NUM_STREAMS * EMBEDDING)
    np.testing.assert_allclose(reference.run_stream(EMBEDDING, [], PAPER, reduction="mean"), EMBEDDING)


def test_errors_come_before_the_first_layer_and_name_the_argument():
    def unreached(layer_input):
        raise AssertionError("a layer ran")

    mhc = make_sublayers([unreached], "mhc")
    with pytest.raises(ValueError, match=r"connection: expected one of mhc, hc, residual, got 'resnet'"):
        reference.stream_steps(EMBEDDING, mhc, PAPER, "resnet")
    with pytest.raises(ValueError, match=r"reduction: expected one of sum, mean, got 'max'"):
        reference.run_stream(EMBEDDING, mhc, PAPER, reduction="max")
    with pytest.raises(ValueError, match=r"h: expected shape \[..., 16\], got \[3, 15\]"):
        reference.run_stream(EMBEDDING[:, 1:], mhc, PAPER)
    with pytest.raises(ValueError, match=r"sublayer: expected no parameters for a plain residual"):
        reference.run_stream(EMBEDDING, mhc, PAPER, "residual")
    with pytest.raises(ValueError, match=r"sublayer: expected phi, alpha and bias for 'hc'"):
        reference.run_stream(EMBEDDING, [Sublayer(unreached)], PAPER, "hc")


def test_a_layer_that_changes_the_shape_is_refused():
    sublayers = make_sublayers([lambda layer_input: layer_input[:, :1]], "mhc")
    with pytest.raises(ValueError, match=r"layer_output: expected shape \[3, 16\], got \[3, 1\]"):
        reference.run_stream(EMBEDDING, sublayers, PAPER)
