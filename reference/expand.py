"""The ends of the stream: expand an embedding into n equal streams, collapse them by their sum; also see `head`.

Backward: h[c] is read n times, so its gradient is the sum of n; each of the two is the other's backward.
"""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, as_float64, as_gradient


def expand(h: ArrayLike, num_streams: int) -> Array:
    """x[i, c] = h[c].

    Args:
        h: the embedding, [..., C].
        num_streams: n.

    Returns:
        x, [..., n, C].
    """
    if num_streams < 1:
        raise ValueError(f"num_streams: expected at least 1, got {num_streams}")
    h = as_float64("h", h, (..., "C"))
    return np.repeat(h[..., None, :], num_streams, axis=-2)


def expand_backward(g_x: ArrayLike | None, h: ArrayLike, num_streams: int) -> Array:
    """g_h[c] = Σ_i g_x[i, c].

    Args:
        g_x: [..., n, C], or None.
        h, num_streams: as for `expand`.

    Returns:
        g_h, [..., C].
    """
    return as_gradient("g_x", g_x, expand(h, num_streams).shape).sum(axis=-2)


def collapse(x: ArrayLike) -> Array:
    """h[c] = Σ_i x[i, c].

    Args:
        x: [..., n, C].

    Returns:
        h, [..., C].
    """
    return as_float64("x", x, (..., "n", "C")).sum(axis=-2)


def collapse_backward(g_h: ArrayLike | None, x: ArrayLike) -> Array:
    """g_x[i, c] = g_h[c].

    Args:
        g_h: [..., C], or None.
        x: as for `collapse`.

    Returns:
        g_x, [..., n, C].
    """
    x = as_float64("x", x, (..., "n", "C"))
    return expand(as_gradient("g_h", g_h, (*x.shape[:-2], x.shape[-1])), x.shape[-2])
