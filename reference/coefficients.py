"""The three mappings of a sublayer, computed from the stream: Eq. 7 and 8, in the kernels' form Eq. 14 to 19.

Each step is a function of its own, so that a kernel's intermediate values can be compared with it:
`project` → `rms_scale` → `compute_logits` → `split_groups` → `gate_pre`, `gate_post`, `sinkhorn`.

The M = n² + 2n rows of phi and bias are [pre n | post n | res n·n], the last row-major [out, in].
"""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, Spec, as_float64
from .projection import absorb_norm_weight, project, rms_scale
from .sinkhorn import sinkhorn


def alpha_per_row(alpha: ArrayLike, num_streams: int) -> Array:
    """One alpha for each of the M rows: [3] (pre, post, res) -> [n² + 2n]."""
    n = num_streams
    return np.repeat(as_float64("alpha", alpha, (3,)), [n, n, n * n])


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


def split_groups(logits: ArrayLike, num_streams: int) -> tuple[Array, Array, Array]:
    """[..., n² + 2n] -> pre [..., n], post [..., n], res [..., n, n]; res[j, i] = logits[2n + j·n + i]."""
    n = num_streams
    logits = as_float64("logits", logits, (..., n * n + 2 * n))
    pre, post, res = np.split(logits, [n, 2 * n], axis=-1)
    return pre, post, res.reshape(*res.shape[:-1], n, n)


def sigmoid(z: Array) -> Array:
    """σ(z) = 1 / (1 + exp(−z)), to full relative accuracy in both tails and without overflow."""
    return np.exp(-np.logaddexp(0.0, -z))


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
        norm_weight: of the RMS norm over x⃗, [n·C], if phi has not absorbed it.

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
