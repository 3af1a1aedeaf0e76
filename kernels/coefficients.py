"""coefficients: from the projection's chunk sums to the three mappings of a sublayer.

Equations (16) to (19), per token, with K = n·C:

    s      = rsqrt(Σx² / K + rms_eps)
    z      = alpha · (x·phi · s) + bias                   the bias is not scaled by s
    h_pre  = sigmoid(z_pre) + pre_eps
    h_post = post_scale · sigmoid(z_post)
    h_res  = sinkhorn(z_res)

Rows of x·phi: pre n, post n, res n·n with [out, in] row-major. One token is one thread, as in `sinkhorn`;
everything is float32. Only the partial sums are read, and 2·(n² + 2n) + 1 values a token written: the mappings, and
as `projected` what a backward cannot get from them, the rows s·(x·phi) and, last, s.

h_post and h_res are needed after the layer, h_pre before it. So where `aggregate_mappings` follows, which makes the two
of them from `projected` beside the aggregation, they are `is_deferred` here, and Sinkhorn's iterations keep nothing
waiting.
"""

from dataclasses import dataclass

import tilelang.language as T

from .projection_plans import ProjectionPlan, WarpProjectionPlan
from .sinkhorn import a_token_a_thread, sinkhorn_inplace


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
def store_post(h_post, z, first_token, post_scale):
    """h_post of the logits z [1, n, block]."""
    outer, inner, block = z.shape
    for k, j, t in T.Parallel(outer, inner, block):
        if first_token + t < h_post.shape[0]:
            h_post[first_token + t, j] = post_scale * sigmoid(z[k, j, t])


@T.macro
def store_res(h_res, P, first_token, iters, sinkhorn_eps):
    """h_res of the logits P [n, n, block], which it works on."""
    n, _, block = P.shape
    sinkhorn_inplace(P, n, block, iters, sinkhorn_eps)
    for j, i, t in T.Parallel(n, n, block):
        if first_token + t < h_res.shape[0]:
            h_res[first_token + t, j, i] = P[j, i, t]


def coefficients_kernel(
    num_streams: int,
    hidden_size: int,
    plan: ProjectionPlan,
    block: int,
    is_deferred: bool = False,
    pdl: bool = False,
    has_h_res: bool = True,
):
    """partial [slabs, slab_rows, T], alpha [3], bias [M]
    -> h_pre [T, n], h_post [T, n], h_res [T, n, n], projected [M + 1, T].

    Where they are `is_deferred`, h_post and h_res are one-element placeholders, never accessed, and what they are made
    with (iters, sinkhorn_eps, post_scale) is not read. Where it is `pdl`,
    the launch waits on the device for the one before it, and the next may begin once all blocks have.

    Without h_res, where H_res is the identity, they are `gates`.
    """
    if not has_h_res:
        from .gates import gates_kernel

        return gates_kernel(num_streams, hidden_size, plan, block)
    if isinstance(plan, WarpProjectionPlan) and not is_deferred:
        from .coefficients_aggregate import coefficients_by_threads_kernel

        return coefficients_by_threads_kernel(num_streams, hidden_size, plan, block)
    n = num_streams
    pre, post, res = row_groups(n)
    num_rows = n * n + 2 * n
    num_tokens = T.dynamic("num_tokens")
    num_slabs = T.dynamic("num_slabs")
    unused = (1,)

    @T.prim_func
    def coefficients(
        partial: T.Tensor[(num_slabs, plan.slab_rows, num_tokens), T.float32],
        alpha: T.Tensor[(3,), T.float32],
        bias: T.Tensor[(num_rows,), T.float32],
        h_pre: T.Tensor[(num_tokens, n), T.float32],
        h_post: T.Tensor[unused if is_deferred else (num_tokens, n), T.float32],
        h_res: T.Tensor[unused if is_deferred else (num_tokens, n, n), T.float32],
        projected: T.Tensor[(num_rows + 1, num_tokens), T.float32],
        iters: T.int32,
        sinkhorn_eps: T.float32,
        pre_eps: T.float32,
        rms_eps: T.float32,
        post_scale: T.float32,
    ):
        with T.Kernel(T.ceildiv(num_tokens, block), threads=block) as tile:
            scale = T.alloc_fragment((1, block), T.float32)
            z_pre = T.alloc_fragment((1, n, block), T.float32)
            z_post = T.alloc_fragment((1, n, block), T.float32)
            P = T.alloc_fragment((n, n, block), T.float32)
            row = a_token_a_thread(1, n, block)
            T.annotate_layout({scale: a_token_a_thread(1, block), z_pre: row, z_post: row})
            T.annotate_layout({P: a_token_a_thread(n, n, block)})
            if pdl:
                T.pdl_sync()
                T.pdl_trigger()
            first = tile * block
            group_slabs = slabs_per_group(partial, plan, hidden_size)
            inverse_rms(scale, projected, partial, first, group_slabs, n * hidden_size, rms_eps, plan, block)
            logits(z_pre, projected, partial, scale, alpha, bias, pre, first, group_slabs, plan, block)
            for k, j, t in T.Parallel(1, n, block):
                if first + t < num_tokens:
                    h_pre[first + t, j] = sigmoid(z_pre[k, j, t]) + pre_eps
            if is_deferred:
                scaled_dots(z_post, projected, partial, scale, post, first, group_slabs, plan, block)
                scaled_dots(P, projected, partial, scale, res, first, group_slabs, plan, block)
            else:
                logits(z_post, projected, partial, scale, alpha, bias, post, first, group_slabs, plan, block)
                store_post(h_post, z_post, first, post_scale)
                logits(P, projected, partial, scale, alpha, bias, res, first, group_slabs, plan, block)
                store_res(h_res, P, first, iters, sinkhorn_eps)

    return coefficients
