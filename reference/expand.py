"""From an embedding to the wide stream: n equal streams. The way back is `head`, or a sum or a mean.

Backward: h[c] is read n times, so its gradient is the sum of n.
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
