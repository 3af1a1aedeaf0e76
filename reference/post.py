"""Out of a sublayer: mix the streams and add the output to each, the second half of Eq. 3."""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, as_float64


def post(x: ArrayLike, layer_output: ArrayLike, h_post: ArrayLike, h_res: ArrayLike) -> Array:
    """x_next[j, c] = Σ_i h_res[j, i] · x[i, c] + h_post[j] · layer_output[c].

    Args:
        x: the stream that `pre` read, [..., n, C].
        layer_output: [..., C].
        h_post: [..., n].
        h_res: [..., n, n], [out, in].

    Returns:
        x_next, [..., n, C].
    """
    x = as_float64("x", x, (..., "n", "C"))
    *leading, n, C = x.shape
    layer_output = as_float64("layer_output", layer_output, (*leading, C))
    h_post = as_float64("h_post", h_post, (*leading, n))
    h_res = as_float64("h_res", h_res, (*leading, n, n))
    return np.einsum("...ji,...ic->...jc", h_res, x) + np.einsum("...j,...c->...jc", h_post, layer_output)
