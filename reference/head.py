"""After the last sublayer: the streams back into one, weighted by coefficients of the pre kind only.

Backward: what `coefficients` and `pre` derive, with n rows, one group and the one gate.
"""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, ProjectionGradients, Spec, as_float64, as_gradient
from .coefficients import compute_logits, compute_logits_backward, gate_pre, sigmoid_slope
from .pre import aggregate, aggregate_backward
from .projection import (
    absorb_norm_weight,
    absorb_norm_weight_backward,
    project,
    project_backward,
    rms_scale,
    rms_scale_backward,
)


def head_coefficients(
    x: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> Array:
    """h_pre = σ(alpha · (x⃗·phi^T) · s + bias) + pre_eps, as in Eq. 14 to 17.

    Args:
        x: the stream, [..., n, C].
        phi: [n, n·C].
        alpha: [1].
        bias: [n].
        spec: n, C, rms_eps and pre_eps.
        norm_weight: weight of the RMS norm over x⃗, [n·C], if phi has not absorbed it.

    Returns:
        h_pre, [..., n].
    """
    n, C = spec.num_streams, spec.hidden_size
    x = as_float64("x", x, (..., n, C))
    phi = as_float64("phi", phi, (n, n * C))
    alpha = as_float64("alpha", alpha, (1,))

    dots, sum_squares = project(x, absorb_norm_weight(phi, norm_weight))
    scale = rms_scale(sum_squares, n * C, spec.rms_eps)
    return gate_pre(compute_logits(dots, scale, np.repeat(alpha, n), bias), spec.pre_eps)


def head_coefficients_backward(
    g_h_pre: ArrayLike | None,
    x: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> ProjectionGradients:
    """`coefficients_backward` of the pre group alone.

    Args:
        g_h_pre: [..., n], or None.
        x, phi, alpha, bias, spec, norm_weight: as for `head_coefficients`.

    Returns:
        g_x [..., n, C], and g_phi [n, n·C], g_alpha [1], g_bias [n] and g_norm_weight [n·C], summed over tokens;
        the last is None where norm_weight is.
    """
    n, C = spec.num_streams, spec.hidden_size
    x = as_float64("x", x, (..., n, C))
    phi = as_float64("phi", phi, (n, n * C))
    alpha_rows = np.repeat(as_float64("alpha", alpha, (1,)), n)
    g_h_pre = as_gradient("g_h_pre", g_h_pre, x.shape[:-1])

    absorbed = absorb_norm_weight(phi, norm_weight)
    dots, sum_squares = project(x, absorbed)
    scale = rms_scale(sum_squares, n * C, spec.rms_eps)
    logits = compute_logits(dots, scale, alpha_rows, bias)

    g_logits = g_h_pre * sigmoid_slope(logits)
    g_dots, g_scale, g_alpha_rows, g_bias = compute_logits_backward(g_logits, dots, scale, alpha_rows, bias)
    g_sum_squares = rms_scale_backward(g_scale, sum_squares, n * C, spec.rms_eps)
    g_x, g_absorbed = project_backward(g_dots, g_sum_squares, x, absorbed)
    g_phi, g_norm_weight = absorb_norm_weight_backward(g_absorbed, phi, norm_weight)
    return g_x, g_phi, g_alpha_rows.sum(keepdims=True), g_bias, g_norm_weight


def head(
    x: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> Array:
    """h[c] = Σ_i h_pre[i] · x[i, c]; the arguments are those of `head_coefficients`.

    Returns:
        h, [..., C], before the model's final norm.
    """
    return aggregate(x, head_coefficients(x, phi, alpha, bias, spec, norm_weight))


def head_backward(
    g_h: ArrayLike | None,
    x: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> ProjectionGradients:
    """`aggregate_backward`, whose g_h_pre goes into `head_coefficients_backward`; g_x is the sum of both.

    Args:
        g_h: [..., C], or None.
        x, phi, alpha, bias, spec, norm_weight: as for `head`.

    Returns:
        g_x, g_phi, g_alpha, g_bias and g_norm_weight, as `head_coefficients_backward` does.
    """
    parameters = phi, alpha, bias, spec, norm_weight
    g_x_direct, g_h_pre = aggregate_backward(g_h, x, head_coefficients(x, *parameters))
    g_x, g_phi, g_alpha, g_bias, g_norm_weight = head_coefficients_backward(g_h_pre, x, *parameters)
    return g_x_direct + g_x, g_phi, g_alpha, g_bias, g_norm_weight
