"""The plain residual connection, Eq. 1: what every other connection is measured against."""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, as_float64, as_gradient


def residual(x: ArrayLike, layer_output: ArrayLike) -> Array:
    """x_next = x + layer_output; x and layer_output [..., C]."""
    x = as_float64("x", x, (..., "C"))
    return x + as_float64("layer_output", layer_output, x.shape)


def residual_backward(g_x_next: ArrayLike | None, x: ArrayLike, layer_output: ArrayLike) -> tuple[Array, Array]:
    """g_x = g_layer_output = g_x_next; [..., C], g_x_next possibly None."""
    g_x_next = as_gradient("g_x_next", g_x_next, residual(x, layer_output).shape)
    return g_x_next.copy(), g_x_next.copy()


def residual_coefficients(x: ArrayLike) -> tuple[Array, Array, Array]:
    """Eq. 1 written as Eq. 3: a stream of its own width, all three mappings 1.

    Args:
        x: [..., 1, C].

    Returns:
        h_pre [..., 1], h_post [..., 1], h_res [..., 1, 1].
    """
    *leading, n, _ = as_float64("x", x, (..., 1, "C")).shape
    return np.ones((*leading, n)), np.ones((*leading, n)), np.ones((*leading, n, n))
