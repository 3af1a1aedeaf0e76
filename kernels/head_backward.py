"""head, backward: `coefficients_backward` of the pre group alone, where phi has n rows and alpha one element.

The rest of head's backward is that of `aggregate`: `aggregate_backward` for g_h_pre, then this, then
`projection_backward`.
"""

import tilelang.language as T

from .coefficients_backward import gate_backward, group_backward, load_scale, load_scaled, store_rho
from .logits import RowGroup


def head_coefficients_backward_kernel(num_streams: int, hidden_size: int, block: int):
    """g_h_pre [T, n], projected [n + 1, T], alpha [1], bias [n]
    -> g_projected [n + 1, T], partial [blocks, 1 + n] of g_alpha and g_bias.
    """
    n = num_streams
    rows = RowGroup(0, 0, 1, n)
    num_tokens = T.dynamic("num_tokens")
    num_partials = T.dynamic("num_partials")

    @T.prim_func
    def head_coefficients_backward(
        g_h_pre: T.Tensor[(num_tokens, n), T.float32],
        projected: T.Tensor[(n + 1, num_tokens), T.float32],
        alpha: T.Tensor[(1,), T.float32],
        bias: T.Tensor[(n,), T.float32],
        g_projected: T.Tensor[(n + 1, num_tokens), T.float32],
        partial: T.Tensor[(num_partials, 1 + n), T.float32],
    ):
        with T.Kernel(T.ceildiv(num_tokens, block), threads=block) as tile:
            scale = T.alloc_fragment((block,), T.float32)
            rho = T.alloc_fragment((block,), T.float32)
            scaled = T.alloc_fragment((1, n, block), T.float32)
            g_z = T.alloc_fragment((1, n, block), T.float32)
            first = tile * block
            load_scale(scale, rho, projected, n, first, num_tokens, block)
            load_scaled(scaled, projected, rows, first, num_tokens, block)
            gate_backward(g_z, g_h_pre, scaled, alpha, bias, 1.0, rows, first, num_tokens, block)
            group_backward(rho, partial, g_projected, g_z, scaled, scale, alpha, rows, tile, num_tokens, block)
            store_rho(g_projected, rho, scale, n, n * hidden_size, first, num_tokens, block)

    return head_coefficients_backward
