"""post: mix the streams and add the layer's output, in one read and one write of the wide stream.

Equation (3):

    x_next[t, j, c] = Σ_i h_res[t, j, i] · x[t, i, c] + h_post[t, j] · layer_output[t, c]

Traffic per token, in elements of the stream's dtype: (n + 1)·C read, n·C written. A thread owns a few
consecutive channels of all n streams, so x is read once, and neither shared memory nor a barrier is needed.

The order of the sum is part of the contract, since fused kernels must give the same bits:
acc = h_post[j] · F, then acc = fma(h_res[j, i], x[i], acc) for i ascending, in float32, rounded once.

Without h_res, where H_res is the identity, x_next[j, c] = fma(h_post[j], layer_output[c], x[j, c]).

`layer_dtype` differs from `dtype` under autocast, where layers return 16 bits into a float32 stream, and where they
return float32 into a 16-bit one. Either is read as it is; the latter is (n + 2)·C read, and rounded once, in x_next.
"""

import tilelang.language as T

from .plans import ChannelTile


@T.macro
def mix_streams(acc, x_frag, layer_output_frag, h_post, h_res, token):
    """acc[j, c] = h_post[token, j] · layer_output_frag[c] + Σ_i h_res[token, j, i] · x_frag[i, c], in post's order."""
    n, block = x_frag.shape
    for c in T.Parallel(block):
        for j in T.unroll(n):
            acc[j, c] = h_post[token, j] * T.cast(layer_output_frag[c], T.float32)
            for i in T.unroll(n):
                acc[j, c] = T.ieee_fmaf(h_res[token, j, i], T.cast(x_frag[i, c], T.float32), acc[j, c])


@T.macro
def add_output(acc, x_frag, layer_output_frag, h_post, token):
    """acc[j, c] = h_post[token, j] · layer_output_frag[c] + x_frag[j, c]."""
    n, block = x_frag.shape
    for c in T.Parallel(block):
        for j in T.unroll(n):
            acc[j, c] = T.ieee_fmaf(
                h_post[token, j], T.cast(layer_output_frag[c], T.float32), T.cast(x_frag[j, c], T.float32)
            )


def post_kernel(
    num_streams: int, hidden_size: int, dtype: str, layer_dtype: str, tile: ChannelTile, has_h_res: bool = True
):
    """x [T, n, C], layer_output [T, C], h_post [T, n], h_res [T, n, n] -> x_next [T, n, C].

    Without h_res it is a one-element placeholder, never accessed.
    """
    n, block = num_streams, tile.channels
    blocks = -(-hidden_size // block)
    num_tokens = T.dynamic("num_tokens")

    @T.prim_func
    def post(
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        layer_output: T.Tensor[(num_tokens, hidden_size), layer_dtype],
        h_post: T.Tensor[(num_tokens, n), T.float32],
        h_res: T.Tensor[(num_tokens, n, n) if has_h_res else (1,), T.float32],
        x_next: T.Tensor[(num_tokens, n, hidden_size), dtype],
    ):
        # One axis for tokens and blocks of channels: with two, nvcc 13.0 makes 4-byte stores of the first vector.
        with T.Kernel(num_tokens * blocks, threads=tile.threads) as index:
            token = index // blocks
            first = index % blocks * block
            x_frag = T.alloc_fragment((n, block), dtype)
            layer_output_frag = T.alloc_fragment((block,), layer_dtype)
            acc = T.alloc_fragment((n, block), T.float32)
            T.copy(x[token, 0, first], x_frag)
            T.copy(layer_output[token, first], layer_output_frag)
            if has_h_res:
                mix_streams(acc, x_frag, layer_output_frag, h_post, h_res, token)
            else:
                add_output(acc, x_frag, layer_output_frag, h_post, token)
            T.copy(acc, x_next[token, 0, first])

    return post
