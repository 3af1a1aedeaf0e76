"""After the last sublayer: the streams back into one, weighted by coefficients of the pre kind only."""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, Spec, as_float64
from .coefficients import compute_logits, gate_pre
from .pre import aggregate
from .projection import absorb_norm_weight, project, rms_scale


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
        norm_weight: of the RMS norm over x⃗, [n·C], if phi has not absorbed it.

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
