"""gates, backward: from the gradients of h_pre and h_post to those of the projection and its parameters.

Derivation, layout and order of sums are those of `coefficients_backward` without the res group:

    g_z_pre  = g_h_pre · σ(z)·σ(−z)
    g_z_post = post_scale · g_h_post · σ(z)·σ(−z)
"""

import tilelang.language as T

from .coefficients_backward import Results, gate_backward, load_scale, store_rho
from .coefficients_thread_backward import Given
from .logits import row_groups


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
    def gates_backward(
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
            given, results = Given(projected, alpha, bias, scale), Results(g_projected, partial, rho)
            first = tile * block
            load_scale(results, given, first)
            gate_backward(results, given, g_z_pre, scaled_pre, g_h_pre if has_g_h_pre else None, 1.0, pre, tile, first)
            gate_backward(
                *(results, given, g_z_post, scaled_post, g_h_post if has_g_h_post else None),
                *(post_scale, post, tile, first),
            )
            store_rho(results, scale, n * hidden_size, first)

    return gates_backward
