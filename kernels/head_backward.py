"""head, backward: `coefficients_backward` of the pre group alone, where phi has n rows and alpha one element.

The rest of head's backward is that of `aggregate`: `aggregate_backward` for g_h_pre, then this, then
`projection_backward`.
"""

import tilelang.language as T

from .coefficients_backward import Results, gate_backward, load_scale, store_rho
from .coefficients_thread_backward import Given
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
            given, results = Given(projected, alpha, bias, scale), Results(g_projected, partial, rho)
            first = tile * block
            load_scale(results, given, first)
            gate_backward(results, given, g_z, scaled, g_h_pre, 1.0, rows, tile, first)
            store_rho(results, scale, n * hidden_size, first)

    return head_coefficients_backward
