"""aggregate: sum the n streams, weighted by h_pre, into the layer's input.

Equation (3), H_pre x:

    layer_input[t, c] = Σ_i h_pre[t, i] · x[t, i, c]

Traffic per token: n·C read, C written. The streams are added in ascending order, each with one fma in
float32, and the sum is rounded once. `head` aggregates with this kernel too.
"""

import tilelang.language as T

from .plans import ChannelTile


@T.macro
def aggregate_streams(acc, x_frag, h_pre, token):
    """acc[c] = Σ_i h_pre[token, i] · x_frag[i, c], in the order of `aggregate`."""
    n, block = x_frag.shape
    for c in T.Parallel(block):
        acc[c] = 0.0
        for i in T.unroll(n):
            acc[c] = T.ieee_fmaf(h_pre[token, i], T.cast(x_frag[i, c], T.float32), acc[c])


def aggregate_kernel(num_streams: int, hidden_size: int, dtype: str, tile: ChannelTile):
    """x [T, n, C], h_pre [T, n] -> layer_input [T, C]."""
    n, block = num_streams, tile.channels
    blocks = -(-hidden_size // block)
    num_tokens = T.dynamic("num_tokens")

    @T.prim_func
    def aggregate(
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        h_pre: T.Tensor[(num_tokens, n), T.float32],
        layer_input: T.Tensor[(num_tokens, hidden_size), dtype],
    ):
        # One axis for tokens and blocks of channels: with two, nvcc 13.0 makes 4-byte stores of the first vector.
        with T.Kernel(num_tokens * blocks, threads=tile.threads) as index:
            token = index // blocks
            first = index % blocks * block
            x_frag = T.alloc_fragment((n, block), dtype)
            acc = T.alloc_fragment((block,), T.float32)
            T.copy(x[token, 0, first], x_frag)
            aggregate_streams(acc, x_frag, h_pre, token)
            T.copy(acc, layer_input[token, first])

    return aggregate
