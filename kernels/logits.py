"""From the projection's partial sums to the logits of Eq. (16), which `coefficients`, `gates` and `head` share.

Rows of phi that share an alpha are a group; of each the slabs are added up in ascending order, scaled by s and shifted
by the bias. What a backward cannot get from the mappings, the rows s·(x·phi) and, last, s, is kept as `projected`,
from which `load_scaled` reads a group's rows again. `store_pre` makes h_pre of its logits.
"""

from dataclasses import dataclass

import tilelang.language as T

from .projection_plans import ProjectionPlan
from .sinkhorn import a_token_a_thread


@dataclass(frozen=True)
class RowGroup:
    """Rows of phi that share an alpha, seen as a matrix [outer, inner]: which alpha, and the first row."""

    index: int
    first: int
    outer: int
    inner: int


def row_groups(num_streams: int) -> tuple[RowGroup, RowGroup, RowGroup]:
    """pre, post and res."""
    n = num_streams
    return RowGroup(0, 0, 1, n), RowGroup(1, n, 1, n), RowGroup(2, 2 * n, n, n)


def slabs_per_group(partial, plan: ProjectionPlan, hidden_size: int):
    """Return how many slabs a group of chunks has: one, or one a chunk. None where chunks are not grouped."""
    if not plan.is_grouped(hidden_size):
        return None
    return T.if_then_else(partial.shape[0] == plan.num_chunks(hidden_size), plan.chunks_per_group, 1)


@T.macro
def sum_slabs(total, partial, first_row, first_token, group_slabs):
    """total[a, b, t] = Σ_slab partial[slab, first_row + a · inner + b, first_token + t], slabs ascending.

    `group_slabs` at a time from zero, which is how the projection adds the chunks of a group up.
    """
    outer, inner, block = total.shape
    num_slabs, _, num_tokens = partial.shape
    T.clear(total)
    if group_slabs is None:
        for slab in T.serial(num_slabs):
            for a, b, t in T.Parallel(outer, inner, block):
                if first_token + t < num_tokens:
                    total[a, b, t] += partial[slab, first_row + a * inner + b, first_token + t]
    else:
        group = T.alloc_fragment((outer, inner, block), T.float32)
        T.annotate_layout({group: a_token_a_thread(outer, inner, block)})
        for first_slab in T.serial(T.ceildiv(num_slabs, group_slabs)):
            T.clear(group)
            for k in T.serial(T.min(group_slabs, num_slabs - first_slab * group_slabs)):
                slab = first_slab * group_slabs + k
                for a, b, t in T.Parallel(outer, inner, block):
                    if first_token + t < num_tokens:
                        group[a, b, t] += partial[slab, first_row + a * inner + b, first_token + t]
            for a, b, t in T.Parallel(outer, inner, block):
                total[a, b, t] += group[a, b, t]


@T.macro
def inverse_rms(scale, projected, partial, first_token, group_slabs, num_elements, rms_eps, plan, block):
    """scale[0, t] = s of Eq. (15): the slabs of each lane added, then the lanes, ascending. Keeps it."""
    lanes = T.alloc_fragment((plan.lanes, 1, block), T.float32)
    T.annotate_layout({lanes: a_token_a_thread(plan.lanes, 1, block)})
    sum_slabs(lanes, partial, plan.halves * plan.rows, first_token, group_slabs)
    T.reduce_sum(lanes, scale, dim=0)
    for k, t in T.Parallel(1, block):
        scale[k, t] = T.rsqrt(scale[k, t] * (1.0 / num_elements) + rms_eps)
    for k, t in T.Parallel(1, block):
        if first_token + t < partial.shape[2]:
            projected[plan.rows + k, first_token + t] = scale[k, t]


@T.macro
def scaled_dots(z, projected, partial, scale, group: RowGroup, first_token, group_slabs, plan, block):
    """z [outer, inner, block] = x·phi · s for a group of rows; keeps it.

    Every group of rows has a fragment of its own, and every loop runs over a whole fragment: TileLang 0.1.15
    lays a fragment out by its first loop and silently truncates it where that loop covers only a part.
    """
    outer, inner = group.outer, group.inner
    sum_slabs(z, partial, group.first, first_token, group_slabs)
    if plan.halves == 2:
        low = T.alloc_fragment((outer, inner, block), T.float32)
        T.annotate_layout({low: a_token_a_thread(outer, inner, block)})
        sum_slabs(low, partial, plan.rows + group.first, first_token, group_slabs)
        for a, b, t in T.Parallel(outer, inner, block):
            z[a, b, t] += low[a, b, t]
    for a, b, t in T.Parallel(outer, inner, block):
        z[a, b, t] *= scale[0, t]
    for a, b, t in T.Parallel(outer, inner, block):
        if first_token + t < partial.shape[2]:
            projected[group.first + a * inner + b, first_token + t] = z[a, b, t]


@T.macro
def load_scaled(scaled, projected, group: RowGroup, first_token):
    """scaled[a, b, t] = s·(x·phi) of the group's row a · inner + b, which was kept; zero beyond the last token."""
    for a, b, t in T.Parallel(*scaled.shape):
        scaled[a, b, t] = T.if_then_else(
            first_token + t < projected.shape[1], projected[group.first + a * group.inner + b, first_token + t], 0.0
        )


@T.macro
def scale_and_shift(z, alpha, bias, group: RowGroup):
    """Eq. (16) for a group of rows, from x·phi · s in place."""
    outer, inner, block = z.shape
    for a, b, t in T.Parallel(outer, inner, block):
        z[a, b, t] = alpha[group.index] * z[a, b, t] + bias[group.first + a * inner + b]


@T.macro
def logits(z, projected, partial, scale, alpha, bias, group: RowGroup, first_token, group_slabs, plan, block):
    """Eq. (16) for a group of rows, z [outer, inner, block]; keeps x·phi · s."""
    scaled_dots(z, projected, partial, scale, group, first_token, group_slabs, plan, block)
    scale_and_shift(z, alpha, bias, group)


def sigmoid(z):
    """1 / (1 + exp(−z)); exp overflows to infinity for z below −88, and the result to 0."""
    return 1.0 / (1.0 + T.exp(-z))


@T.macro
def store_pre(h_pre, z, first_token, pre_eps):
    """h_pre of the logits z [1, n, block]."""
    outer, inner, block = z.shape
    for k, j, t in T.Parallel(outer, inner, block):
        if first_token + t < h_pre.shape[0]:
            h_pre[first_token + t, j] = sigmoid(z[k, j, t]) + pre_eps
