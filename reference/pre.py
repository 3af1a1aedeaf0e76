"""Into a sublayer: the coefficients, then H^pre x, the first half of Eq. 3."""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, Spec, as_float64
from .coefficients import coefficients


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
