"""Into a sublayer: the coefficients, then H^pre x, the first half of Eq. 3.

Backward. The aggregate is bilinear: g_h_pre is its gradient by the coefficients, the only one that h_pre has.
x is read twice, by the aggregate and by `coefficients`, and its gradient is the sum of both.
"""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, ProjectionGradients, Spec, as_float64, as_gradient
from .coefficients import coefficients, coefficients_backward


def aggregate(x: ArrayLike, h_pre: ArrayLike) -> Array:
    """layer_input[c] = Σ_i h_pre[i] · x[i, c].

    Args:
        x: the stream, [..., n, C].
        h_pre: [..., n].

    Returns:
        layer_input, [..., C].
    """
    x = as_float64("x", x, (..., "n", "C"))
    h_pre = as_float64("h_pre", h_pre, x.shape[:-1])
    return np.einsum("...i,...ic->...c", h_pre, x)


def aggregate_backward(g_layer_input: ArrayLike | None, x: ArrayLike, h_pre: ArrayLike) -> tuple[Array, Array]:
    """g_x[i, c] = h_pre[i] · g_layer_input[c] and g_h_pre[i] = Σ_c g_layer_input[c] · x[i, c].

    Args:
        g_layer_input: [..., C], or None.
        x, h_pre: as for `aggregate`.

    Returns:
        g_x [..., n, C] and g_h_pre [..., n].
    """
    x = as_float64("x", x, (..., "n", "C"))
    *leading, _, C = x.shape
    h_pre = as_float64("h_pre", h_pre, x.shape[:-1])
    g_layer_input = as_gradient("g_layer_input", g_layer_input, (*leading, C))
    return (
        np.einsum("...i,...c->...ic", h_pre, g_layer_input),
        np.einsum("...c,...ic->...i", g_layer_input, x),
    )


def pre(
    x: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> tuple[Array, Array, Array]:
    """`coefficients`, then `aggregate`; the arguments are those of `coefficients`.

    Returns:
        layer_input [..., C], and h_post [..., n] and h_res [..., n, n] for the `post` of the same sublayer.
    """
    h_pre, h_post, h_res = coefficients(x, phi, alpha, bias, spec, norm_weight)
    return aggregate(x, h_pre), h_post, h_res


def pre_backward(
    g_layer_input: ArrayLike | None,
    g_h_post: ArrayLike | None,
    g_h_res: ArrayLike | None,
    x: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> ProjectionGradients:
    """`aggregate_backward`, whose g_h_pre goes into `coefficients_backward`; g_x is the sum of both.

    Args:
        g_layer_input: [..., C], or None.
        g_h_post: [..., n], or None.
        g_h_res: [..., n, n], [out, in], or None.
        x, phi, alpha, bias, spec, norm_weight: as for `pre`.

    Returns:
        g_x, g_phi, g_alpha, g_bias and g_norm_weight, as `coefficients_backward` does.
    """
    parameters = phi, alpha, bias, spec, norm_weight
    h_pre, _, _ = coefficients(x, *parameters)
    g_x_direct, g_h_pre = aggregate_backward(g_layer_input, x, h_pre)
    g_x, g_phi, g_alpha, g_bias, g_norm_weight = coefficients_backward(g_h_pre, g_h_post, g_h_res, x, *parameters)
    return g_x_direct + g_x, g_phi, g_alpha, g_bias, g_norm_weight
