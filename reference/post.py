"""Out of a sublayer: mix the streams and add the output to each, the second half of Eq. 3.

Backward. x_next is bilinear in (h_res, x) and in (h_post, layer_output): in each pair, the gradient of the one is
g_x_next summed with the other over the index that the one lacks. So streams go back through the transpose of
h_res, and the coefficients' gradients are dots over channels.
"""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, as_float64, as_gradient


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


def post_backward(
    g_x_next: ArrayLike | None, x: ArrayLike, layer_output: ArrayLike, h_post: ArrayLike, h_res: ArrayLike
) -> tuple[Array, Array, Array, Array]:
    """Compute the four gradients of Eq. 3's second half.

        g_x[i, c]         = Σ_j h_res[j, i] · g_x_next[j, c]
        g_layer_output[c] = Σ_j h_post[j] · g_x_next[j, c]
        g_h_post[j]       = Σ_c g_x_next[j, c] · layer_output[c]
        g_h_res[j, i]     = Σ_c g_x_next[j, c] · x[i, c]

    Args:
        g_x_next: [..., n, C], or None.
        x, layer_output, h_post, h_res: as for `post`.

    Returns:
        g_x [..., n, C], g_layer_output [..., C], g_h_post [..., n] and g_h_res [..., n, n], [out, in].
    """
    x = as_float64("x", x, (..., "n", "C"))
    *leading, n, C = x.shape
    layer_output = as_float64("layer_output", layer_output, (*leading, C))
    h_post = as_float64("h_post", h_post, (*leading, n))
    h_res = as_float64("h_res", h_res, (*leading, n, n))
    g_x_next = as_gradient("g_x_next", g_x_next, x.shape)
    return (
        np.einsum("...ji,...jc->...ic", h_res, g_x_next),
        np.einsum("...j,...jc->...c", h_post, g_x_next),
        np.einsum("...jc,...c->...j", g_x_next, layer_output),
        np.einsum("...jc,...ic->...ji", g_x_next, x),
    )
