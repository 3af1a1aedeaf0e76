"""pre, backward: the gradient of the weights by which the streams were aggregated.

From layer_input[c] = Σ_i h_pre[i] · x[i, c] (Eq. 3), with g = g_layer_input, per token:

    g_h_pre[i] = Σ_c g[c] · x[i, c]
    g_x[i, c] += h_pre[i] · g[c]

Only the first is computed here. h_pre itself comes from x through the projection, whose backward needs g_h_pre
complete before it can add its own share to g_x; `projection_backward` then adds both from its one read of x. The n sums
over channels are kept as in `post_backward`.

Traffic per token: (n + 1)·C read, nothing wide written.
"""

import tilelang.language as T

from .plans import ChannelTile


def pre_backward_kernel(num_streams: int, hidden_size: int, dtype: str, tile: ChannelTile):
    """g_layer_input [T, C], x [T, n, C] -> g_h_pre [T, n]."""
    n, block = num_streams, tile.channels
    num_tokens = T.dynamic("num_tokens")

    @T.prim_func
    def pre_backward(
        g_layer_input: T.Tensor[(num_tokens, hidden_size), dtype],
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        g_h_pre: T.Tensor[(num_tokens, n), T.float32],
    ):
        with T.Kernel(num_tokens, threads=tile.threads) as token:
            g_frag = T.alloc_fragment((block,), dtype)
            x_frag = T.alloc_fragment((n, block), dtype)
            products = T.alloc_fragment((n, block), T.float32)
            sums = T.alloc_fragment((n,), T.float32)
            T.clear(products)
            for channel_block in T.serial(T.ceildiv(hidden_size, block)):
                T.copy(g_layer_input[token, channel_block * block], g_frag)
                T.copy(x[token, 0, channel_block * block], x_frag)
                for c in T.Parallel(block):
                    for i in T.unroll(n):
                        products[i, c] = T.ieee_fmaf(
                            T.cast(g_frag[c], T.float32), T.cast(x_frag[i, c], T.float32), products[i, c]
                        )
            T.reduce_sum(products, sums, dim=1)
            T.copy(sums, g_h_pre[token, 0])

    return pre_backward
