"""aggregate_mappings: `aggregate`, and beside it the two mappings that are needed only after the layer.

Equations (3), (18) and (19), for token t, from the rows of `projected` that `coefficients` kept:

    layer_input[t, c] = Σ_i h_pre[t, i] · x[t, i, c]
    z[t, m]           = alpha · projected[m, t] + bias[m]
    h_post[t]         = post_scale · sigmoid(z_post[t])
    h_res[t]          = sinkhorn(z_res[t])

Traffic per token: n·C read and C written, as `aggregate`; and n² + n values of float32 read, and written.

The layer waits for h_pre and its input, not for Sinkhorn, a chain of dependent steps that one token cannot shorten.
The first blocks of the grid, one thread a token, walk that chain while all others stream. Same formulas, same macros,
same bits as `coefficients` and `aggregate`.
"""

import tilelang.language as T

from .aggregate import aggregate_streams
from .boundary_plans import AggregateMappingsPlan
from .coefficients import store_post, store_res
from .logits import load_scaled, row_groups, scale_and_shift


def aggregate_mappings_kernel(
    num_streams: int,
    hidden_size: int,
    dtype: str,
    plan: AggregateMappingsPlan,
    pdl: bool,
):
    """x [T, n, C], h_pre [T, n], projected [M + 1, T], alpha [3], bias [M]
    -> layer_input [T, C], h_post [T, n], h_res [T, n, n].

    Where it is `pdl`, the launch waits on the device for the one before it.
    """
    n, block, tokens = num_streams, plan.tile.channels, plan.tokens
    blocks = -(-hidden_size // block)
    _, post, res = row_groups(n)
    num_rows = n * n + 2 * n
    num_tokens = T.dynamic("num_tokens")

    @T.prim_func
    def aggregate_mappings(
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        h_pre: T.Tensor[(num_tokens, n), T.float32],
        projected: T.Tensor[(num_rows + 1, num_tokens), T.float32],
        alpha: T.Tensor[(3,), T.float32],
        bias: T.Tensor[(num_rows,), T.float32],
        layer_input: T.Tensor[(num_tokens, hidden_size), dtype],
        h_post: T.Tensor[(num_tokens, n), T.float32],
        h_res: T.Tensor[(num_tokens, n, n), T.float32],
        iters: T.int32,
        sinkhorn_eps: T.float32,
        post_scale: T.float32,
    ):
        with T.Kernel(T.ceildiv(num_tokens, tokens) + num_tokens * blocks, threads=plan.tile.threads) as index:
            mapping_blocks = T.ceildiv(num_tokens, tokens)
            x_frag = T.alloc_fragment((n, block), dtype)
            acc = T.alloc_fragment((block,), T.float32)
            z_post = T.alloc_fragment((1, n, tokens), T.float32)
            P = T.alloc_fragment((n, n, tokens), T.float32)
            if plan.blocks_per_sm > 1:
                T.annotate_min_blocks_per_sm(plan.blocks_per_sm)
            if pdl:
                T.pdl_sync()
            if index < mapping_blocks:
                first = index * tokens
                load_scaled(z_post, projected, post, first)
                load_scaled(P, projected, res, first)
                scale_and_shift(z_post, alpha, bias, post)
                store_post(h_post, z_post, first, post_scale)
                scale_and_shift(P, alpha, bias, res)
                store_res(h_res, P, first, iters, sinkhorn_eps)
            else:
                at = index - mapping_blocks
                token = at // blocks
                channel = at % blocks * block
                T.copy(x[token, 0, channel], x_frag)
                aggregate_streams(acc, x_frag, h_pre, token)
                T.copy(acc, layer_input[token, channel])

    return aggregate_mappings
