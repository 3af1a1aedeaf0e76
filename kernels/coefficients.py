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

import tilelang.language as T

from .coefficients_aggregate import coefficients_by_threads_kernel
from .logits import inverse_rms, logits, row_groups, scaled_dots, sigmoid, slabs_per_group, store_pre
from .projection_plans import WARP_STREAMS, ProjectionPlan, WarpProjectionPlan
from .sinkhorn import a_token_a_thread, sinkhorn_inplace


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
):
    """partial [slabs, slab_rows, T], alpha [3], bias [M]
    -> h_pre [T, n], h_post [T, n], h_res [T, n, n], projected [M + 1, T].

    Where they are `is_deferred`, h_post and h_res are one-element placeholders, never accessed, and what they are made
    with (iters, sinkhorn_eps, post_scale) is not read. Where it is `pdl`,
    the launch waits on the device for the one before it, and the next may begin once all blocks have.
    """
    if isinstance(plan, WarpProjectionPlan) and not is_deferred and num_streams in WARP_STREAMS:
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
            store_pre(h_pre, z_pre, first, pre_eps)
            if is_deferred:
                scaled_dots(z_post, projected, partial, scale, post, first, group_slabs, plan, block)
                scaled_dots(P, projected, partial, scale, res, first, group_slabs, plan, block)
            else:
                logits(z_post, projected, partial, scale, alpha, bias, post, first, group_slabs, plan, block)
                store_post(h_post, z_post, first, post_scale)
                logits(P, projected, partial, scale, alpha, bias, res, first, group_slabs, plan, block)
                store_res(h_res, P, first, iters, sinkhorn_eps)

    return coefficients
