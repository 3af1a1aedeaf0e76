"""expand, backward: h[c] was read n times, so g_h[t, c] = Σ_i g_x[t, i, c].

The same sum ends a model whose streams are simply added: each of the two is the other's backward. Streams are added in
ascending order in float32, and the sum is rounded once.

Traffic per token: n·C read, C written.
"""

import tilelang.language as T

from .plans import ChannelTile


def expand_backward_kernel(num_streams: int, hidden_size: int, dtype: str, tile: ChannelTile):
    """g_x [T, n, C] -> g_h [T, C]."""
    n, block = num_streams, tile.channels
    blocks = -(-hidden_size // block)
    num_tokens = T.dynamic("num_tokens")

    @T.prim_func
    def expand_backward(
        g_x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        g_h: T.Tensor[(num_tokens, hidden_size), dtype],
    ):
        # One axis for tokens and blocks of channels: with two, nvcc 13.0 makes 4-byte stores of the first vector.
        with T.Kernel(num_tokens * blocks, threads=tile.threads) as index:
            token = index // blocks
            first = index % blocks * block
            g_frag = T.alloc_fragment((n, block), dtype)
            acc = T.alloc_fragment((block,), T.float32)
            T.copy(g_x[token, 0, first], g_frag)
            for c in T.Parallel(block):
                acc[c] = 0.0
                for i in T.unroll(n):
                    acc[c] += T.cast(g_frag[i, c], T.float32)
            T.copy(acc, g_h[token, first])

    return expand_backward
