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

Backward. Let dots = theta x̃^T and t = tanh(dots), let alpha[m] be that of row m's group, and g_h [n + 2, n] the
gradients of the three mappings in that order:

    g_bias[m, i]   = Σ_tokens g_h[m, i]
    g_alpha        = Σ_tokens g_h[m, i]·t[m, i], summed over the rows m of a group and over i
    g_dots[m, i]   = g_h[m, i]·alpha[m]·(1 − t[m, i]²)
    g_theta[m, c]  = Σ_tokens Σ_i g_dots[m, i]·x̃[i, c]
    g_x̃[i, c]     = Σ_m g_dots[m, i]·theta[m, c]

Then x̃[i, c] = s[i]·x[i, c], where s[i] has the derivative −s[i]³/C · x[i, c] by x[i, c], and so

    g_x[i, c] = s[i]·g_x̃[i, c] − s[i]³/C · x[i, c] · Σ_c g_x̃[i, c]·x[i, c]
              = s[i]·(g_x̃[i, c] − x̃[i, c] · mean over c of g_x̃[i, c]·x̃[i, c])
"""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, ProjectionGradients, Spec, as_float64, as_gradient
from .coefficients import alpha_per_row, join_groups, split_groups, sum_groups, sum_tokens
from .post import post, post_backward
from .pre import aggregate, aggregate_backward
from .projection import absorb_norm_weight, absorb_norm_weight_backward, rms_scale, sum_outer


def normalize_streams(x: ArrayLike, rms_eps: float) -> Array:
    """x̃[i, c] = x[i, c] / sqrt(mean over c of x[i, c]² + rms_eps); [..., n, C], a norm per stream."""
    x = as_float64("x", x, (..., "n", "C"))
    return x * rms_scale(np.square(x).sum(axis=-1), x.shape[-1], rms_eps)[..., None]


def normalize_streams_backward(g_x_norm: ArrayLike | None, x: ArrayLike, rms_eps: float) -> Array:
    """g_x[i, c] = s[i] · (g_x̃[i, c] − x̃[i, c] · mean over c of g_x̃[i, c]·x̃[i, c]).

    Args:
        g_x_norm: g_x̃, [..., n, C], or None.
        x, rms_eps: as for `normalize_streams`.

    Returns:
        g_x, [..., n, C].
    """
    x = as_float64("x", x, (..., "n", "C"))
    g_x_norm = as_gradient("g_x_norm", g_x_norm, x.shape)
    scale = rms_scale(np.square(x).sum(axis=-1), x.shape[-1], rms_eps)[..., None]
    x_norm = scale * x
    return scale * (g_x_norm - x_norm * (g_x_norm * x_norm).mean(axis=-1, keepdims=True))


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
        norm_weight: weight of the RMS norm over each stream, [C], if theta has not absorbed it.

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


def hc_coefficients_backward(
    g_h_pre: ArrayLike | None,
    g_h_post: ArrayLike | None,
    g_h_res: ArrayLike | None,
    x: ArrayLike,
    theta: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> ProjectionGradients:
    """Compute the gradients of the projection's inputs from those of the three mappings; derived above.

    Args:
        g_h_pre, g_h_post: [..., n], or None.
        g_h_res: [..., n, n], [out, in], or None.
        x, theta, alpha, bias, spec, norm_weight: as for `hc_coefficients`; of bias only the shape matters.

    Returns:
        g_x [..., n, C], and g_theta [n + 2, C], g_alpha [3], g_bias [n² + 2n] and g_norm_weight [C], summed over
        tokens; the last is None where norm_weight is.
    """
    n, C = spec.num_streams, spec.hidden_size
    x = as_float64("x", x, (..., n, C))
    theta = as_float64("theta", theta, (n + 2, C))
    as_float64("bias", bias, (n * n + 2 * n,))
    g_mappings = join_groups(
        as_gradient("g_h_pre", g_h_pre, x.shape[:-1]),
        as_gradient("g_h_post", g_h_post, x.shape[:-1]),
        as_gradient("g_h_res", g_h_res, (*x.shape[:-1], n)),
    )

    absorbed, alpha_rows = absorb_norm_weight(theta, norm_weight), alpha_per_row(alpha, n)
    x_norm = normalize_streams(x, spec.rms_eps)
    tanh = np.tanh(np.einsum("mc,...ic->...mi", absorbed, x_norm))

    g_dots = (g_mappings * alpha_rows).reshape(tanh.shape) * (1.0 - np.square(tanh))
    g_x = normalize_streams_backward(np.einsum("...mi,mc->...ic", g_dots, absorbed), x, spec.rms_eps)
    g_absorbed = sum_outer(np.swapaxes(g_dots, -1, -2), x_norm)
    g_theta, g_norm_weight = absorb_norm_weight_backward(g_absorbed, theta, norm_weight)
    g_alpha = sum_groups(sum_tokens(g_mappings * tanh.reshape(g_mappings.shape)), n)
    return g_x, g_theta, g_alpha, sum_tokens(g_mappings), g_norm_weight


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


def hc_pre_backward(
    g_layer_input: ArrayLike | None,
    g_h_post: ArrayLike | None,
    g_h_res: ArrayLike | None,
    x: ArrayLike,
    theta: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> ProjectionGradients:
    """`aggregate_backward`, whose g_h_pre goes into `hc_coefficients_backward`; g_x is the sum of both.

    Args:
        g_layer_input: [..., C], or None.
        g_h_post: [..., n], or None.
        g_h_res: [..., n, n], [out, in], or None.
        x, theta, alpha, bias, spec, norm_weight: as for `hc_pre`.

    Returns:
        g_x, g_theta, g_alpha, g_bias and g_norm_weight, as `hc_coefficients_backward` does.
    """
    parameters = theta, alpha, bias, spec, norm_weight
    h_pre, _, _ = hc_coefficients(x, *parameters)
    g_x_direct, g_h_pre = aggregate_backward(g_layer_input, x, h_pre)
    g_x, g_theta, g_alpha, g_bias, g_norm_weight = hc_coefficients_backward(g_h_pre, g_h_post, g_h_res, x, *parameters)
    return g_x_direct + g_x, g_theta, g_alpha, g_bias, g_norm_weight


# Eq. 3 is one equation for HC and mHC; only the coefficients differ.
hc_post = post
hc_post_backward = post_backward
