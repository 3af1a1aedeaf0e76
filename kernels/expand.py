"""expand: an embedding becomes n equal streams, x[t, i, c] = h[t, c].

Traffic per token: C read, n·C written. Nothing is rounded.
"""

import tilelang.language as T

from .plans import ChannelTile


def expand_kernel(num_streams: int, hidden_size: int, dtype: str, tile: ChannelTile):
    """h [T, C] -> x [T, n, C]."""
    n, block = num_streams, tile.channels
    num_tokens = T.dynamic("num_tokens")

    @T.prim_func
    def expand(
        h: T.Tensor[(num_tokens, hidden_size), dtype],
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
    ):
        with T.Kernel(num_tokens, T.ceildiv(hidden_size, block), threads=tile.threads) as (
            token,
            channel_block,
        ):
            first = channel_block * block
            h_frag = T.alloc_fragment((block,), dtype)
            T.copy(h[token, first], h_frag)
            for i in T.unroll(n):
                T.copy(h_frag, x[token, i, first])

    return expand
