"""The projection of the stream onto its coefficients, and the RMS scale: Eq. 14 and 15.

One scan of x yields both. The norm is applied to the M dots rather than to the n·C elements (Eq. 16, in
`coefficients`), and its weight is absorbed into phi, so that no normalised stream ever exists.

Backward. x⃗ is read twice, by dots[m] = Σ_k x⃗[k]·phi[m, k] and by sum_squares = Σ_k x⃗[k]², so

    g_x[k]      = Σ_m g_dots[m]·phi[m, k] + 2·g_sum_squares·x⃗[k]
    g_phi[m, k] = Σ_tokens g_dots[m]·x⃗[k]

and of s = (sum_squares/K + rms_eps)^(−1/2) the derivative is −s³/(2K). What the scale adds to g_x is thus
ρ·x⃗[k] with one number per token, ρ = 2·g_sum_squares = −s³/K·g_s. Both terms come from one scan of x.
"""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, as_float64, as_gradient


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


def absorb_norm_weight_backward(
    g_absorbed: ArrayLike | None, phi: ArrayLike, norm_weight: ArrayLike | None
) -> tuple[Array, Array | None]:
    """g_phi[m, k] = g_absorbed[m, k]·norm_weight[k] and g_norm_weight[k] = Σ_m g_absorbed[m, k]·phi[m, k].

    Args:
        g_absorbed: [M, K], or None.
        phi, norm_weight: as for `absorb_norm_weight`.

    Returns:
        g_phi [M, K] and g_norm_weight [K], the latter None where norm_weight is.
    """
    phi = as_float64("phi", phi, ("M", "K"))
    g_absorbed = as_gradient("g_absorbed", g_absorbed, phi.shape)
    g_norm_weight = None if norm_weight is None else (g_absorbed * phi).sum(axis=0)
    return absorb_norm_weight(g_absorbed, norm_weight), g_norm_weight


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


def project_backward(
    g_dots: ArrayLike | None, g_sum_squares: ArrayLike | None, x: ArrayLike, phi: ArrayLike
) -> tuple[Array, Array]:
    """g_x[k] = Σ_m g_dots[m]·phi[m, k] + 2·g_sum_squares·x⃗[k] and g_phi[m, k] = Σ_tokens g_dots[m]·x⃗[k].

    Args:
        g_dots: [..., M], or None.
        g_sum_squares: [...], or None.
        x, phi: as for `project`.

    Returns:
        g_x [..., n, C] and g_phi [M, n·C].
    """
    x = as_float64("x", x, (..., "n", "C"))
    *leading, n, C = x.shape
    phi = as_float64("phi", phi, ("M", n * C))
    g_dots = as_gradient("g_dots", g_dots, (*leading, len(phi)))
    g_sum_squares = as_gradient("g_sum_squares", g_sum_squares, leading)
    x_flat = x.reshape(*leading, n * C)
    g_x = g_dots @ phi + 2.0 * g_sum_squares[..., None] * x_flat
    return g_x.reshape(x.shape), sum_outer(g_dots, x_flat)


def sum_outer(rows: Array, columns: Array) -> Array:
    """Σ_tokens rows[m]·columns[k]: [..., M] and [..., K] -> [M, K]."""
    tokens = list(range(rows.ndim - 1))
    return np.tensordot(rows, columns, axes=(tokens, tokens))


def rms_scale(sum_squares: ArrayLike, num_elements: int, rms_eps: float) -> Array:
    """s = 1 / sqrt(sum_squares / num_elements + rms_eps); with rms_eps = 0 this is 1/r of Eq. 15.

    Args:
        sum_squares: [...].
        num_elements: number of squares summed, n·C.
        rms_eps: keeps the scale of a zero stream finite.

    Returns:
        s, [...].
    """
    return 1.0 / np.sqrt(as_float64("sum_squares", sum_squares, (...,)) / num_elements + rms_eps)


def rms_scale_backward(g_scale: ArrayLike | None, sum_squares: ArrayLike, num_elements: int, rms_eps: float) -> Array:
    """g_sum_squares = −s³ / (2·num_elements) · g_scale; g_scale [...] or None, the rest as for `rms_scale`."""
    scale = rms_scale(sum_squares, num_elements, rms_eps)
    return -0.5 / num_elements * scale**3 * as_gradient("g_scale", g_scale, scale.shape)
