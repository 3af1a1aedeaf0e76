"""Identity hyper-connections: H^res is the identity, so the streams are mixed by the layers alone.

    s       = 1 / sqrt(mean over (i, c) of x[i, c]² + rms_eps)
    z       = alpha · (x⃗·phi^T) · s + bias                    2n rows: pre n, post n, with an alpha each
    h_pre   = σ(z_pre) + pre_eps
    h_post  = post_scale · σ(z_post) + post_eps
    x_next[j, c] = x[j, c] + h_post[j] · layer_output[c]

Backward: that of `coefficients` and `post` without the res rows and h_res; x goes through `identity_post` as it is.
"""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, ProjectionGradients, Spec, as_float64, as_gradient
from .coefficients import compute_logits, compute_logits_backward, gate_post, gate_pre, sigmoid_slope
from .pre import aggregate, aggregate_backward
from .projection import (
    absorb_norm_weight,
    absorb_norm_weight_backward,
    project,
    project_backward,
    rms_scale,
    rms_scale_backward,
)


def gates(
    x: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """h_pre and h_post, [..., n] each.

    Args:
        x: the stream, [..., n, C].
        phi: [2n, n·C].
        alpha: [2], order pre, post.
        bias: [2n].
        spec: n, C and the constants above.
        norm_weight: weight of the RMS norm over x⃗, [n·C], if phi has not absorbed it.
    """
    logits_pre, logits_post = _logits(x, phi, alpha, bias, spec, norm_weight)[0]
    return gate_pre(logits_pre, spec.pre_eps), gate_post(logits_post, spec.post_scale) + spec.post_eps


def gates_backward(
    g_h_pre: ArrayLike | None,
    g_h_post: ArrayLike | None,
    x: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> ProjectionGradients:
    """g_x, g_phi, g_alpha, g_bias and g_norm_weight, as `coefficients_backward` does; g_h_pre, g_h_post: [..., n]."""
    n, x = spec.num_streams, as_float64("x", x, (..., spec.num_streams, spec.hidden_size))
    (logits_pre, logits_post), dots, sum_squares, scale = _logits(x, phi, alpha, bias, spec, norm_weight)
    g_logits = np.concatenate(
        [
            as_gradient("g_h_pre", g_h_pre, x.shape[:-1]) * sigmoid_slope(logits_pre),
            spec.post_scale * as_gradient("g_h_post", g_h_post, x.shape[:-1]) * sigmoid_slope(logits_post),
        ],
        axis=-1,
    )
    g_dots, g_scale, g_rows, g_bias = compute_logits_backward(g_logits, dots, scale, _rows(alpha, n), bias)
    g_sum_squares = rms_scale_backward(g_scale, sum_squares, spec.num_streams * spec.hidden_size, spec.rms_eps)
    g_x, g_absorbed = project_backward(g_dots, g_sum_squares, x, absorb_norm_weight(phi, norm_weight))
    g_phi, g_norm_weight = absorb_norm_weight_backward(g_absorbed, phi, norm_weight)
    return g_x, g_phi, g_rows.reshape(2, n).sum(axis=1), g_bias, g_norm_weight


def identity_pre(
    x: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """`gates`, then `aggregate`: layer_input [..., C] and h_post [..., n]."""
    h_pre, h_post = gates(x, phi, alpha, bias, spec, norm_weight)
    return aggregate(x, h_pre), h_post


def identity_pre_backward(
    g_layer_input: ArrayLike | None,
    g_h_post: ArrayLike | None,
    x: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> ProjectionGradients:
    """Compute the gradients of `identity_pre`; g_x is the sum of what both read."""
    h_pre, _ = gates(x, phi, alpha, bias, spec, norm_weight)
    g_x_direct, g_h_pre = aggregate_backward(g_layer_input, x, h_pre)
    g_x, *rest = gates_backward(g_h_pre, g_h_post, x, phi, alpha, bias, spec, norm_weight)
    return (g_x_direct + g_x, *rest)  # type: ignore[return-value]


def identity_post(x: ArrayLike, layer_output: ArrayLike, h_post: ArrayLike) -> Array:
    """x_next[j, c] = x[j, c] + h_post[j] · layer_output[c]; [..., n, C]."""
    x = as_float64("x", x, (..., "n", "C"))
    h_post = as_float64("h_post", h_post, x.shape[:-1])
    layer_output = as_float64("layer_output", layer_output, (*x.shape[:-2], x.shape[-1]))
    return x + h_post[..., None] * layer_output[..., None, :]


def identity_post_backward(
    g_x_next: ArrayLike | None, x: ArrayLike, layer_output: ArrayLike, h_post: ArrayLike
) -> tuple[Array, Array, Array]:
    """g_x = g_x_next, g_layer_output[c] = Σ_j h_post[j] · g_x_next[j, c], g_h_post[j] = Σ_c g_x_next[j, c] · F[c]."""
    x = as_float64("x", x, (..., "n", "C"))
    g = as_gradient("g_x_next", g_x_next, x.shape)
    h_post = as_float64("h_post", h_post, x.shape[:-1])
    layer_output = as_float64("layer_output", layer_output, (*x.shape[:-2], x.shape[-1]))
    return g.copy(), np.einsum("...j,...jc->...c", h_post, g), np.einsum("...jc,...c->...j", g, layer_output)


def _logits(
    x: ArrayLike, phi: ArrayLike, alpha: ArrayLike, bias: ArrayLike, spec: Spec, norm_weight: ArrayLike | None
) -> tuple[tuple[Array, Array], Array, Array, Array]:
    n, C = spec.num_streams, spec.hidden_size
    x = as_float64("x", x, (..., n, C))
    phi = as_float64("phi", phi, (2 * n, n * C))
    dots, sum_squares = project(x, absorb_norm_weight(phi, norm_weight))
    scale = rms_scale(sum_squares, n * C, spec.rms_eps)
    pre, post = np.split(compute_logits(dots, scale, _rows(alpha, n), bias), 2, axis=-1)
    return (pre, post), dots, sum_squares, scale


def _rows(alpha: ArrayLike, num_streams: int) -> Array:
    return np.repeat(as_float64("alpha", alpha, (2,)), num_streams)
