"""The projection of the stream onto its coefficients, and the RMS scale: Eq. 14 and 15.

One scan of x yields both. The norm is applied to the M dots rather than to the n·C elements (Eq. 16, in
`coefficients`), and its weight is absorbed into phi, so that no normalised stream ever exists.
"""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, as_float64


def absorb_norm_weight(phi: ArrayLike, norm_weight: ArrayLike | None) -> Array:
    """phi[m, k] · norm_weight[k]: (x ⊙ norm_weight)·phi^T = x·(phi ⊙ norm_weight)^T.

    Args:
        phi: [M, K].
        norm_weight: [K], or None for a norm without a weight.

    Returns:
        [M, K].
    """
    phi = as_float64("phi", phi, ("M", "K"))
    if norm_weight is None:
        return phi
    return phi * as_float64("norm_weight", norm_weight, phi.shape[1:])


def project(x: ArrayLike, phi: ArrayLike) -> tuple[Array, Array]:
    """Eq. 14 and the sum of Eq. 15, over x⃗ = vec(x), k = i·C + c.

        dots[m]     = Σ_k x⃗[k] · phi[m, k]
        sum_squares = Σ_k x⃗[k]²

    Args:
        x: the stream, [..., n, C].
        phi: [M, n·C], one row per coefficient, any M.

    Returns:
        dots [..., M] and sum_squares [...], the latter not yet divided by n·C.
    """
    x = as_float64("x", x, (..., "n", "C"))
    *leading, n, C = x.shape
    phi = as_float64("phi", phi, ("M", n * C))
    x_flat = x.reshape(*leading, n * C)
    return x_flat @ phi.T, np.square(x_flat).sum(axis=-1)


def rms_scale(sum_squares: ArrayLike, num_elements: int, rms_eps: float) -> Array:
    """s = 1 / sqrt(sum_squares / num_elements + rms_eps); with rms_eps = 0 this is 1/r of Eq. 15.

    Args:
        sum_squares: [...].
        num_elements: how many squares were summed, n·C.
        rms_eps: keeps the scale of a zero stream finite.

    Returns:
        s, [...].
    """
    return 1.0 / np.sqrt(as_float64("sum_squares", sum_squares, (...,)) / num_elements + rms_eps)
