"""From an embedding to the wide stream: n equal streams. The way back is `head`, or a sum or a mean."""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, as_float64


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
