"""The three mappings of a sublayer, computed from the stream: Eq. 7 and 8, in the kernels' form Eq. 14 to 19.

Each step is a function of its own, so that a kernel's intermediate values can be compared with it:
`project` → `rms_scale` → `compute_logits` → `split_groups` → `gate_pre`, `gate_post`, `sinkhorn`.

The M = n² + 2n rows of phi and bias are [pre n | post n | res n·n], the last row-major [out, in].

Backward, the same steps from last to first. The gates, with σ' = σ(z)·σ(−z), and `sinkhorn_backward` give

    g_logits = [g_h_pre·σ'(logits_pre) | post_scale·g_h_post·σ'(logits_post) | sinkhorn_backward(g_h_res)]

Through logits[m] = alpha[m]·s·dots[m] + bias[m], with scaled[m] = s·dots[m] and alpha[m] that of the row's group,

    g_bias[m] = Σ_tokens g_logits[m]
    g_alpha   = Σ_tokens g_logits[m]·scaled[m], summed over the rows m of a group
    g_dots[m] = g_logits[m]·alpha[m]·s
    g_s       = Σ_m g_logits[m]·alpha[m]·dots[m]

and through the projection and the scale, as derived in `projection`, with K = n·C,

    g_phi[m, k] = Σ_tokens g_dots[m]·x⃗[k]
    g_x[k]      = Σ_m g_dots[m]·phi[m, k] + ρ·x⃗[k]
    ρ           = −s³/K · g_s = −s²/K · Σ_m g_logits[m]·alpha[m]·scaled[m]

So scaled [M] and s are all that a forward has to keep of a token besides its arguments. The logits alone would not
do: where alpha is 0, scaled cannot be recovered from them, and g_alpha needs it.
"""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, ProjectionGradients, Spec, as_float64, as_gradient
from .projection import (
    absorb_norm_weight,
    absorb_norm_weight_backward,
    project,
    project_backward,
    rms_scale,
    rms_scale_backward,
)
from .sinkhorn import sinkhorn, sinkhorn_backward


def alpha_per_row(alpha: ArrayLike, num_streams: int) -> Array:
    """One alpha for each of the M rows: [3] (pre, post, res) -> [n² + 2n]."""
    n = num_streams
    return np.repeat(as_float64("alpha", alpha, (3,)), [n, n, n * n])


def sum_groups(rows: Array, num_streams: int) -> Array:
    """Compute the backward of `alpha_per_row`, a sum for each group: [n² + 2n] -> [3]."""
    return np.add.reduceat(rows, [0, num_streams, 2 * num_streams])


def compute_logits(dots: ArrayLike, scale: ArrayLike, alpha: ArrayLike, bias: ArrayLike) -> Array:
    """Eq. 16: logits[m] = alpha[m] · dots[m] · s + bias[m]; s scales the dots and leaves the bias alone.

    Args:
        dots: [..., M].
        scale: s, [...].
        alpha: per row, [M].
        bias: [M].

    Returns:
        logits, [..., M].
    """
    dots = as_float64("dots", dots, (..., "M"))
    scale = as_float64("scale", scale, dots.shape[:-1])
    alpha = as_float64("alpha", alpha, dots.shape[-1:])
    bias = as_float64("bias", bias, dots.shape[-1:])
    return alpha * dots * scale[..., None] + bias


def compute_logits_backward(
    g_logits: ArrayLike | None, dots: ArrayLike, scale: ArrayLike, alpha: ArrayLike, bias: ArrayLike
) -> tuple[Array, Array, Array, Array]:
    """Compute the gradients of logits[m] = alpha[m] · dots[m] · s + bias[m].

    Args:
        g_logits: [..., M], or None.
        dots, scale, alpha, bias: as for `compute_logits`; of bias only the shape matters.

    Returns:
        g_dots [..., M], g_scale [...], and g_alpha [M] and g_bias [M], summed over tokens.
    """
    dots = as_float64("dots", dots, (..., "M"))
    scale = as_float64("scale", scale, dots.shape[:-1])[..., None]
    alpha = as_float64("alpha", alpha, dots.shape[-1:])
    as_float64("bias", bias, dots.shape[-1:])
    g_logits = as_gradient("g_logits", g_logits, dots.shape)
    g_scaled, scaled = g_logits * alpha, dots * scale
    return g_scaled * scale, (g_scaled * dots).sum(axis=-1), sum_tokens(g_logits * scaled), sum_tokens(g_logits)


def sum_tokens(values: Array) -> Array:
    """Sum over all leading dimensions: [..., M] -> [M]."""
    return values.sum(axis=tuple(range(values.ndim - 1)))


def split_groups(logits: ArrayLike, num_streams: int) -> tuple[Array, Array, Array]:
    """[..., n² + 2n] -> pre [..., n], post [..., n], res [..., n, n]; res[j, i] = logits[2n + j·n + i]."""
    n = num_streams
    logits = as_float64("logits", logits, (..., n * n + 2 * n))
    pre, post, res = np.split(logits, [n, 2 * n], axis=-1)
    return pre, post, res.reshape(*res.shape[:-1], n, n)


def join_groups(pre: Array, post: Array, res: Array) -> Array:
    """Join groups, inverting `split_groups`, or its backward: pre, post [..., n], res [..., n, n] -> [..., n² + 2n]."""
    *leading, n = pre.shape
    return np.concatenate([pre, post, res.reshape(*leading, n * n)], axis=-1)


def sigmoid(z: Array) -> Array:
    """σ(z) = 1 / (1 + exp(−z)), to full relative accuracy in both tails and without overflow."""
    return np.exp(-np.logaddexp(0.0, -z))


def sigmoid_slope(z: Array) -> Array:
    """σ'(z) = σ(z) · (1 − σ(z)) = σ(z) · σ(−z), to full relative accuracy in both tails."""
    return sigmoid(z) * sigmoid(-z)


def gate_pre(logits: ArrayLike, pre_eps: float) -> Array:
    """Eq. 17: h_pre[i] = σ(logits[i]) + pre_eps; [..., n]."""
    return sigmoid(as_float64("logits", logits, (..., "n"))) + pre_eps


def gate_post(logits: ArrayLike, post_scale: float) -> Array:
    """Eq. 18: h_post[j] = post_scale · σ(logits[j]), post_scale = 2 in the paper; [..., n]."""
    return post_scale * sigmoid(as_float64("logits", logits, (..., "n")))


def coefficients(
    x: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> tuple[Array, Array, Array]:
    """Eq. 14 to 19.

        s      = 1 / sqrt(mean over (i, c) of x[i, c]² + rms_eps)
        logits = alpha · (x⃗·phi^T) · s + bias
        h_pre  = σ(logits_pre) + pre_eps
        h_post = post_scale · σ(logits_post)
        h_res  = sinkhorn(logits_res)

    Args:
        x: the stream, [..., n, C].
        phi: [n² + 2n, n·C].
        alpha: [3], order pre, post, res.
        bias: [n² + 2n].
        spec: n, C, the constants above, sinkhorn_iters and sinkhorn_eps.
        norm_weight: weight of the RMS norm over x⃗, [n·C], if phi has not absorbed it.

    Returns:
        h_pre [..., n], h_post [..., n] and h_res [..., n, n], [out, in].
    """
    n, C = spec.num_streams, spec.hidden_size
    M, K = n * n + 2 * n, n * C
    x = as_float64("x", x, (..., n, C))
    phi = as_float64("phi", phi, (M, K))

    dots, sum_squares = project(x, absorb_norm_weight(phi, norm_weight))
    scale = rms_scale(sum_squares, K, spec.rms_eps)
    logits = compute_logits(dots, scale, alpha_per_row(alpha, n), bias)
    logits_pre, logits_post, logits_res = split_groups(logits, n)

    h_pre = gate_pre(logits_pre, spec.pre_eps)
    h_post = gate_post(logits_post, spec.post_scale)
    h_res = sinkhorn(logits_res, spec.sinkhorn_iters, spec.sinkhorn_eps)
    return h_pre, h_post, h_res


def coefficients_backward(
    g_h_pre: ArrayLike | None,
    g_h_post: ArrayLike | None,
    g_h_res: ArrayLike | None,
    x: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> ProjectionGradients:
    """Compute the gradients of the projection's inputs from those of the three mappings; derived above.

    Args:
        g_h_pre, g_h_post: [..., n], or None.
        g_h_res: [..., n, n], [out, in], or None.
        x, phi, alpha, bias, spec, norm_weight: as for `coefficients`.

    Returns:
        g_x [..., n, C], and g_phi [n² + 2n, n·C], g_alpha [3], g_bias [n² + 2n] and g_norm_weight [n·C],
        summed over tokens; the last is None where norm_weight is.
    """
    n, C = spec.num_streams, spec.hidden_size
    M, K = n * n + 2 * n, n * C
    x = as_float64("x", x, (..., n, C))
    phi = as_float64("phi", phi, (M, K))
    g_h_pre = as_gradient("g_h_pre", g_h_pre, x.shape[:-1])
    g_h_post = as_gradient("g_h_post", g_h_post, x.shape[:-1])

    absorbed, alpha_rows = absorb_norm_weight(phi, norm_weight), alpha_per_row(alpha, n)
    dots, sum_squares = project(x, absorbed)
    scale = rms_scale(sum_squares, K, spec.rms_eps)
    logits = compute_logits(dots, scale, alpha_rows, bias)
    logits_pre, logits_post, logits_res = split_groups(logits, n)

    g_logits = join_groups(
        g_h_pre * sigmoid_slope(logits_pre),
        spec.post_scale * g_h_post * sigmoid_slope(logits_post),
        sinkhorn_backward(g_h_res, logits_res, spec.sinkhorn_iters, spec.sinkhorn_eps),
    )
    g_dots, g_scale, g_alpha_rows, g_bias = compute_logits_backward(g_logits, dots, scale, alpha_rows, bias)
    g_sum_squares = rms_scale_backward(g_scale, sum_squares, K, spec.rms_eps)
    g_x, g_absorbed = project_backward(g_dots, g_sum_squares, x, absorbed)
    g_phi, g_norm_weight = absorb_norm_weight_backward(g_absorbed, phi, norm_weight)
    return g_x, g_phi, sum_groups(g_alpha_rows, n), g_bias, g_norm_weight
