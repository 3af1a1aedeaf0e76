"""Error bounds of kernels against float64, per element, derived from what they round.

u = 2^-24 is the unit roundoff of float32, U that of the stream's dtype: rounding y once changes it by at
most u·|y| or U·|y|. A *magnitude* is the sum of the absolute values of what was added up: every partial sum
is at most that, so a sum of k terms is off by at most k·u times its magnitude. Over thousands of products
that worst case is useless (it would let TF32 pass); there, roundings are independent and grow like the root:
the bound is 3·√K·u times the root of the sum of squares, which is what a standard deviation of about
u·√(K/6) needs to cover the largest of a million results.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..kernels.projection_plans import ProjectionBackwardPlan, ProjectionPlan, WarpsPlan

Array = NDArray[np.float64]

U32 = 2.0**-24
UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
# Below these a rounding is off by up to half of the smallest subnormal instead.
SMALLEST = {"bfloat16": 2.0**-134, "float16": 2.0**-25, "float32": 2.0**-150}
LEAST_SIGMOID = 2.0**-128  # where exp(−z) overflows, and σ(z) is 0


def combination(magnitude: Array, num_terms: int, dtype: str) -> Array:
    """Bound a sum of `num_terms` products in float32, one rounding each, then one to the stream's dtype."""
    return magnitude * (UNIT_ROUNDOFF[dtype] + (num_terms + 1) * U32) + SMALLEST[dtype]


def split_error(plan: ProjectionPlan | ProjectionBackwardPlan | WarpsPlan) -> float:
    """Return the error of a product's operand after phi = high + low, relative to the root of the sum of squares.

    bfloat16 halves leave at most 2^-18 of each element, TF32 halves 2^-21 (x is split as well: 2^-20), float16 halves
    2^-23, and 2^-36 of elements below 1e-4: less than 2^-22 where these are typical; the leftovers have random signs,
    and five standard deviations cover the largest of a million sums.
    """
    if not plan.split:
        return 0.0
    return 5 * {"bfloat16": 2.0**-18, "float16": 2.0**-22, "float32": 2.0**-20}[plan.operand_dtype]


def inner_products(root_sum_squares: Array, num_terms: int) -> Array:
    """Sums of `num_terms` products in float32 in one chain, by the root of their sum of squares.

    The error is a walk with steps of u/√3 times the partial sum, so √(K/6)·u where partial sums are as large as chance
    makes them; of a million sums some wander twice as far, and errors reach five standard deviations.
    """
    return root_sum_squares * 6 * np.sqrt(num_terms) * U32


def dots(x: Array, phi: Array, plan: ProjectionPlan) -> Array:
    """x·phi, [T, K] by [M, K]."""
    root_sum_squares = np.sqrt(np.square(x) @ np.square(phi).T)
    return root_sum_squares * (3 * np.sqrt(x.shape[-1]) * U32 + split_error(plan))


def sum_squares(x: Array) -> Array:
    """Σ x² over the last axis: positive terms, so the magnitude is the sum itself."""
    return np.square(x).sum(-1) * 3 * np.sqrt(x.shape[-1]) * U32


def logits(values: Array, scaled_dots: Array, dots_bound: Array, scale: Array, alpha: Array, size: int) -> Array:
    """z = alpha · (dot · s) + bias: the bound of the dot, that of s (half of Σx²'s, rsqrt 2 u), four roundings."""
    relative = 1.5 * np.sqrt(size) * U32 + 3 * U32
    through = np.abs(alpha) * (scale * dots_bound + np.abs(scaled_dots) * (relative + U32))
    return through + 2 * U32 * (np.abs(alpha * scaled_dots) + np.abs(values))


def sigmoid(gate: Array, logit_bound: Array, scale: float) -> Array:
    """scale · σ(z): σ' = σ(1 − σ) times the logit's bound; exp (2 u), sum, reciprocal and product round."""
    probability = gate / scale
    return scale * (probability * (1 - probability) * logit_bound + 6 * U32 * probability + LEAST_SIGMOID)


def sinkhorn(logit_bound: Array, values: Array, iters: int) -> Array:
    """h_res [..., n, n], one bound per matrix.

    Logits that are off by δ move the result by at most n·δ in the sum of absolute values: Sinkhorn's limit is
    an entropy-regularised projection, and entropy is 1-strongly convex in that norm. Each of the 2·iters
    normalisations rounds by (n + 3)·u, like logits off by as much; independent steps add like the root.
    Subtracting the maximum and exp round by 2·u times the largest |z|, and 2·u.
    """
    n = values.shape[-1]
    largest = np.abs(values).max(axis=(-1, -2), keepdims=True, initial=0.0)
    delta = logit_bound.max(axis=(-1, -2), keepdims=True, initial=0.0) + 2 * U32 * (1 + largest)
    return np.broadcast_to(n * (delta + (n + 3) * U32 * np.sqrt(2 * iters)), values.shape)


def sigmoid_slope(gradient: Array, values: Array, logit_bound: Array) -> Array:
    """values = gradient · σ'(z): |σ''| ≤ σ' times the logit's bound; two sigmoids (5 u each), four products round."""
    return np.abs(values) * (logit_bound + 14 * U32) + np.abs(gradient) * LEAST_SIGMOID


def sinkhorn_backward(gradient: Array, logit_bound: Array, values: Array, iters: int) -> Array:
    """g_logits [..., n, n], one bound per matrix: that of `sinkhorn`, times the largest upstream gradient.

    As there, it bounds the sum of a matrix's absolute errors too: the derivative of the projection is symmetric.

    Going back through a normalisation is a projection, orthogonal where elements are weighted with P, so it does
    not amplify what came before it; each rounds by (n + 3)·u, as it does forward. And logits that are off by δ move
    the derivative of the entropy-regularised projection by as much as they move the projection itself.
    """
    largest = np.abs(gradient).max(axis=(-1, -2), keepdims=True, initial=0.0)
    return largest * sinkhorn(logit_bound, values, iters)


def sum_over_tokens(values: Array, bounds: Array) -> Array:
    """Σ over the last axis of terms that are each off by up to their bound, independently, summed in float32."""
    root_sum_squares = np.sqrt(np.square(values).sum(-1))
    return 3 * np.sqrt(np.square(bounds).sum(-1)) + inner_products(root_sum_squares, max(values.shape[-1], 1))
