"""Unconstrained Hyper-Connections (HC, arXiv 2409.19606), Eq. 5: what mHC constrains.

Unlike in mHC, each stream is normalised and projected by itself. x̃ is [n, C]; theta_pre and theta_post are
[1, C], theta_res is [n, C], and the mHC paper writes theta x̃^T:

    theta_pre x̃^T, theta_post x̃^T   [1, n]   entry i is read off stream i
    theta_res x̃^T                   [n, n]   entry [j, i]: row j of theta_res with stream i

H^res x sums over the second index of H^res. So in entry [j, i] the stream i that was projected is the input,
and the row j of theta_res names the output: h_res is [out, in] as in mHC, and nothing is transposed. (The HC
paper writes A_r = h_res^T, builds it as x̃ W_r with W_r = theta_res^T, and applies A_r^T: the same map.)

Stacked as theta [n + 2, C], rows pre, post, res, the product theta x̃^T is [n + 2, n], and its n² + 2n entries
lie in mHC's order [pre n | post n | res n·n]. So bias and alpha have mHC's shapes and order too.
"""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, Spec, as_float64
from .coefficients import alpha_per_row, split_groups
from .post import post
from .pre import aggregate
from .projection import absorb_norm_weight, rms_scale


def normalize_streams(x: ArrayLike, rms_eps: float) -> Array:
    """x̃[i, c] = x[i, c] / sqrt(mean over c of x[i, c]² + rms_eps); [..., n, C], a norm per stream."""
    x = as_float64("x", x, (..., "n", "C"))
    return x * rms_scale(np.square(x).sum(axis=-1), x.shape[-1], rms_eps)[..., None]


def hc_coefficients(
    x: ArrayLike,
    theta: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> tuple[Array, Array, Array]:
    """Eq. 5: H = alpha · tanh(theta x̃^T) + bias, for H^pre, H^post and H^res, with no constraint on any.

        h_pre[i]    = alpha[0] · tanh(Σ_c theta[0, c] · x̃[i, c]) + bias[i]
        h_post[j]   = alpha[1] · tanh(Σ_c theta[1, c] · x̃[j, c]) + bias[n + j]
        h_res[j, i] = alpha[2] · tanh(Σ_c theta[2 + j, c] · x̃[i, c]) + bias[2n + j·n + i]

    Args:
        x: the stream, [..., n, C].
        theta: [n + 2, C].
        alpha: [3], order pre, post, res.
        bias: [n² + 2n], the static part.
        spec: n, C and rms_eps.
        norm_weight: of the RMS norm over each stream, [C], if theta has not absorbed it.

    Returns:
        h_pre [..., n], h_post [..., n] and h_res [..., n, n], [out, in].
    """
    n, C = spec.num_streams, spec.hidden_size
    M = n * n + 2 * n
    x = as_float64("x", x, (..., n, C))
    theta = absorb_norm_weight(as_float64("theta", theta, (n + 2, C)), norm_weight)
    bias = as_float64("bias", bias, (M,))

    dots = np.einsum("mc,...ic->...mi", theta, normalize_streams(x, spec.rms_eps))
    dots = dots.reshape(*x.shape[:-2], M)
    return split_groups(alpha_per_row(alpha, n) * np.tanh(dots) + bias, n)


def hc_pre(
    x: ArrayLike,
    theta: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> tuple[Array, Array, Array]:
    """`hc_coefficients`, then `aggregate`; the arguments are those of `hc_coefficients`.

    Returns:
        layer_input [..., C], and h_post [..., n] and h_res [..., n, n] for `hc_post`.
    """
    h_pre, h_post, h_res = hc_coefficients(x, theta, alpha, bias, spec, norm_weight)
    return aggregate(x, h_pre), h_post, h_res


# Eq. 3 is one equation for HC and mHC; only the coefficients differ.
hc_post = post
