"""expand: an embedding becomes n equal streams, x[t, i, c] = h[t, c].

Traffic per token: C read, n·C written. Nothing is rounded.
"""

import tilelang.language as T

from .plans import ChannelTile


def expand_kernel(num_streams: int, hidden_size: int, dtype: str, tile: ChannelTile):
    """h [T, C] -> x [T, n, C]."""
    n, block = num_streams, tile.channels
    blocks = -(-hidden_size // block)
    num_tokens = T.dynamic("num_tokens")

    @T.prim_func
    def expand(
        h: T.Tensor[(num_tokens, hidden_size), dtype],
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
    ):
        # One axis for tokens and blocks of channels: with two, nvcc 13.0 makes 4-byte stores of the first vector.
        with T.Kernel(num_tokens * blocks, threads=tile.threads) as index:
            token = index // blocks
            first = index % blocks * block
            h_frag = T.alloc_fragment((block,), dtype)
            T.copy(h[token, first], h_frag)
            for i in T.unroll(n):
                T.copy(h_frag, x[token, i, first])

    return expand
