"""The RMSNorm that a layer begins with, of what the aggregation gives it.

    y[c] = u[c] · r · w[c],   r = rsqrt(mean over c of u[c]² + eps)

Nothing is rounded here, so `rms_norm(aggregate(x, h_pre), …)` is also what a kernel computes that normalises u before
it rounds it.

Backward. ∂r/∂u[c] = −r³ · u[c] / C, so with D = Σ_c g_y[c] · w[c] · u[c]:

    g_u[c] = r · w[c] · g_y[c] − r³ · D / C · u[c]        g_w[c] = Σ over tokens of g_y[c] · u[c] · r
"""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, as_float64, as_gradient


def rms_norm(layer_input: ArrayLike, weight: ArrayLike, eps: float) -> Array:
    """y, the normalised layer input.

    Args:
        layer_input: u, [..., C], as `aggregate` or `pre` returns it.
        weight: w, [C].
        eps: added to the mean square.

    Returns:
        y, [..., C].
    """
    u, weight, scale = _scaled(layer_input, weight, eps)
    return u * scale * weight


def rms_norm_backward(
    g_normed: ArrayLike | None, layer_input: ArrayLike, weight: ArrayLike, eps: float
) -> tuple[Array, Array]:
    """g_u and g_w.

    Args:
        g_normed: g_y, [..., C], or None.
        layer_input, weight, eps: as for `rms_norm`.

    Returns:
        g_layer_input [..., C], and g_weight [C], summed over tokens.
    """
    u, weight, scale = _scaled(layer_input, weight, eps)
    g = as_gradient("g_normed", g_normed, u.shape)
    inner = (g * weight * u).sum(-1, keepdims=True)
    g_u = scale * weight * g - scale**3 * inner / u.shape[-1] * u
    return g_u, (g * u * scale).reshape(-1, u.shape[-1]).sum(0)


def _scaled(layer_input: ArrayLike, weight: ArrayLike, eps: float) -> tuple[Array, Array, Array]:
    """u, w and r [..., 1]."""
    u = as_float64("layer_input", layer_input, (..., "C"))
    weight = as_float64("weight", weight, (u.shape[-1],))
    return u, weight, 1 / np.sqrt(np.square(u).mean(-1, keepdims=True) + eps)
