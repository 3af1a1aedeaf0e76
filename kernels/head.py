"""head: the coefficients of the last aggregation, where n streams become the model's output.

    h_pre[t, j] = sigmoid(alpha · (x·phi)[t, j] · s[t] + bias[j]) + pre_eps,   s as in `coefficients`

phi has n rows only. The aggregation itself is the `aggregate` kernel.
"""

import tilelang.language as T

from .logits import RowGroup, inverse_rms, logits, slabs_per_group, store_pre
from .projection_plans import ProjectionPlan


def head_coefficients_kernel(num_streams: int, hidden_size: int, plan: ProjectionPlan, block: int):
    """partial [slabs, slab_rows, T], alpha [1], bias [n] -> h_pre [T, n], projected [n + 1, T] as in `coefficients`."""
    n = num_streams
    rows = RowGroup(0, 0, 1, n)
    num_tokens = T.dynamic("num_tokens")
    num_slabs = T.dynamic("num_slabs")

    @T.prim_func
    def head_coefficients(
        partial: T.Tensor[(num_slabs, plan.slab_rows, num_tokens), T.float32],
        alpha: T.Tensor[(1,), T.float32],
        bias: T.Tensor[(n,), T.float32],
        h_pre: T.Tensor[(num_tokens, n), T.float32],
        projected: T.Tensor[(n + 1, num_tokens), T.float32],
        pre_eps: T.float32,
        rms_eps: T.float32,
    ):
        with T.Kernel(T.ceildiv(num_tokens, block), threads=block) as tile:
            scale = T.alloc_fragment((1, block), T.float32)
            z = T.alloc_fragment((1, n, block), T.float32)
            first = tile * block
            group_slabs = slabs_per_group(partial, plan, hidden_size)
            inverse_rms(scale, projected, partial, first, group_slabs, n * hidden_size, rms_eps, plan, block)
            logits(z, projected, partial, scale, alpha, bias, rows, first, group_slabs, plan, block)
            store_pre(h_pre, z, first, pre_eps)

    return head_coefficients
