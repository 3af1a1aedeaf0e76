"""gates: the coefficients of an identity hyper-connection, which has no H_res.

With 2n rows of phi, pre n and post n, and an alpha for either, per token:

    s      = rsqrt(Σx² / K + rms_eps)
    z      = alpha · (x·phi · s) + bias
    h_pre  = sigmoid(z_pre) + pre_eps
    h_post = post_scale · sigmoid(z_post) + post_eps

Macros and order of sums are those of `coefficients`, without Sinkhorn. One token is one thread; 4n + 1 values a token
are written, 2n + 1 of them for the backward.
"""

import tilelang.language as T

from .logits import inverse_rms, logits, row_groups, sigmoid, slabs_per_group, store_pre
from .projection_plans import ProjectionPlan


def gates_kernel(num_streams: int, hidden_size: int, plan: ProjectionPlan, block: int):
    """partial [slabs, slab_rows, T], alpha [2], bias [2n] -> h_pre [T, n], h_post [T, n], projected [2n + 1, T]."""
    n = num_streams
    pre, post, _ = row_groups(n)
    num_tokens = T.dynamic("num_tokens")
    num_slabs = T.dynamic("num_slabs")

    @T.prim_func
    def gates(
        partial: T.Tensor[(num_slabs, plan.slab_rows, num_tokens), T.float32],
        alpha: T.Tensor[(2,), T.float32],
        bias: T.Tensor[(2 * n,), T.float32],
        h_pre: T.Tensor[(num_tokens, n), T.float32],
        h_post: T.Tensor[(num_tokens, n), T.float32],
        projected: T.Tensor[(2 * n + 1, num_tokens), T.float32],
        pre_eps: T.float32,
        rms_eps: T.float32,
        post_scale: T.float32,
        post_eps: T.float32,
    ):
        with T.Kernel(T.ceildiv(num_tokens, block), threads=block) as tile:
            scale = T.alloc_fragment((1, block), T.float32)
            z_pre = T.alloc_fragment((1, n, block), T.float32)
            z_post = T.alloc_fragment((1, n, block), T.float32)
            first = tile * block
            group_slabs = slabs_per_group(partial, plan, hidden_size)
            inverse_rms(scale, projected, partial, first, group_slabs, n * hidden_size, rms_eps, plan, block)
            logits(z_pre, projected, partial, scale, alpha, bias, pre, first, group_slabs, plan, block)
            logits(z_post, projected, partial, scale, alpha, bias, post, first, group_slabs, plan, block)
            store_pre(h_pre, z_pre, first, pre_eps)
            for k, j, t in T.Parallel(1, n, block):
                if first + t < num_tokens:
                    h_post[first + t, j] = post_scale * sigmoid(z_post[k, j, t]) + post_eps

    return gates
