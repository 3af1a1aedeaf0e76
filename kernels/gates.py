"""Gates: the coefficients of an identity hyper-connection, which has no H_res, and their backward.

With 2n rows of phi, pre n and post n, and an alpha for either, per token:

    s      = rsqrt(Σx² / K + rms_eps)
    z      = alpha · (x·phi · s) + bias
    h_pre  = sigmoid(z_pre) + pre_eps
    h_post = post_scale · sigmoid(z_post) + post_eps

The macros, their order of sums and the backward's derivation are those of `coefficients` and `coefficients_backward`,
without Sinkhorn; the families are theirs, with `has_h_res` false. One token is one thread; 4n + 1 values a token are
written, 2n + 1 of them for the backward.
"""

import tilelang.language as T

from .coefficients import inverse_rms, logits, row_groups, sigmoid, slabs_per_group
from .coefficients_backward import gate_backward, group_backward, load_scale, load_scaled, store_rho
from .projection_plans import ProjectionPlan


def gates_kernel(num_streams: int, hidden_size: int, plan: ProjectionPlan, block: int):
    """partial [slabs, slab_rows, T], alpha [2], bias [2n] -> h_pre [T, n], h_post [T, n], projected [2n + 1, T]."""
    n = num_streams
    pre, post, _ = row_groups(n)
    num_tokens = T.dynamic("num_tokens")
    num_slabs = T.dynamic("num_slabs")

    @T.prim_func
    def coefficients(
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
            for k, j, t in T.Parallel(1, n, block):
                if first + t < num_tokens:
                    h_pre[first + t, j] = sigmoid(z_pre[k, j, t]) + pre_eps
            for k, j, t in T.Parallel(1, n, block):
                if first + t < num_tokens:
                    h_post[first + t, j] = post_scale * sigmoid(z_post[k, j, t]) + post_eps

    return coefficients


def gates_backward_kernel(num_streams: int, hidden_size: int, block: int, has_g_h_pre: bool, has_g_h_post: bool):
    """g_h_pre, g_h_post [T, n], projected [2n + 1, T], alpha [2], bias [2n]
    -> g_projected [2n + 1, T], partial [blocks, 2 + 2n] of g_alpha and g_bias.

    What is not given is a one-element placeholder, never accessed, and counts as zero.
    """
    n = num_streams
    pre, post, _ = row_groups(n)
    num_tokens = T.dynamic("num_tokens")
    num_partials = T.dynamic("num_partials")
    absent = (1,)

    @T.prim_func
    def coefficients_backward(
        g_h_pre: T.Tensor[(num_tokens, n) if has_g_h_pre else absent, T.float32],
        g_h_post: T.Tensor[(num_tokens, n) if has_g_h_post else absent, T.float32],
        projected: T.Tensor[(2 * n + 1, num_tokens), T.float32],
        alpha: T.Tensor[(2,), T.float32],
        bias: T.Tensor[(2 * n,), T.float32],
        g_projected: T.Tensor[(2 * n + 1, num_tokens), T.float32],
        partial: T.Tensor[(num_partials, 2 + 2 * n), T.float32],
        post_scale: T.float32,
    ):
        with T.Kernel(T.ceildiv(num_tokens, block), threads=block) as tile:
            scale = T.alloc_fragment((block,), T.float32)
            rho = T.alloc_fragment((block,), T.float32)
            scaled_pre = T.alloc_fragment((1, n, block), T.float32)
            scaled_post = T.alloc_fragment((1, n, block), T.float32)
            g_z_pre = T.alloc_fragment((1, n, block), T.float32)
            g_z_post = T.alloc_fragment((1, n, block), T.float32)
            first = tile * block
            load_scale(scale, rho, projected, 2 * n, first, num_tokens, block)
            load_scaled(scaled_pre, projected, pre, first, num_tokens, block)
            if has_g_h_pre:
                gate_backward(g_z_pre, g_h_pre, scaled_pre, alpha, bias, 1.0, pre, first, num_tokens, block)
            else:
                T.clear(g_z_pre)
            group_backward(rho, partial, g_projected, g_z_pre, scaled_pre, scale, alpha, pre, tile, num_tokens, block)
            load_scaled(scaled_post, projected, post, first, num_tokens, block)
            if has_g_h_post:
                gate_backward(g_z_post, g_h_post, scaled_post, alpha, bias, post_scale, post, first, num_tokens, block)
            else:
                T.clear(g_z_post)
            group_backward(
                rho, partial, g_projected, g_z_post, scaled_post, scale, alpha, post, tile, num_tokens, block
            )
            store_rho(g_projected, rho, scale, 2 * n, n * hidden_size, first, num_tokens, block)

    return coefficients_backward
