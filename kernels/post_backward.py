"""post, backward: the gradients of everything that was mixed, from one read of the streams.

From x_next[j, c] = Σ_i h_res[j, i] · x[i, c] + h_post[j] · layer_output[c] (Eq. 3), with g = g_x_next, per token:

    g_x[i, c]         = Σ_j h_res[j, i] · g[j, c]
    g_layer_output[c] = Σ_j h_post[j] · g[j, c]
    g_h_res[j, i]     = Σ_c g[j, c] · x[i, c]
    g_h_post[j]       = Σ_c g[j, c] · layer_output[c]

The first two are sums over streams, done in one thread's registers like the forward. The last two are n² + n sums over
channels: a block has a whole token and walks over its channels, every lane adds up its own, and the lanes' sums are
added at the end, once and together, so that their barriers are shared. So the order follows from C and the tile alone.
On a GPU the next step's channels are on their way into shared memory meanwhile: from registers, nvcc would load x only
when it is done with g.

Traffic per token: (2n + 1)·C read, (n + 1)·C written. Gradients that are not needed are skipped: without
`needs_g_mappings` neither x nor layer_output is read. Without h_res, where H_res is the identity, g_x is g_x_next, and
the other two are (n + 1)·C read, C written.
"""

import tilelang.language as T

from .plans import PostBackwardTile


def post_backward_kernel(
    num_streams: int,
    hidden_size: int,
    dtype: str,
    layer_dtype: str,
    tile: PostBackwardTile,
    needs_g_x: bool,
    needs_g_layer_output: bool,
    needs_g_mappings: bool,
    has_h_res: bool = True,
):
    """g_x_next, x [T, n, C], layer_output [T, C], h_post [T, n], h_res [T, n, n] -> the four gradients, same shapes.

    C is written as [C / width, width]. `needs_g_mappings` stands for g_h_post and g_h_res. What is not needed is a
    one-element placeholder, never accessed; so are h_res, g_h_res, x and g_x without h_res.
    """
    n, lanes, width = num_streams, tile.lanes, tile.width
    row = (hidden_size // width, width)
    num_tokens = T.dynamic("num_tokens")
    unused = (1,)
    mixes = needs_g_mappings and has_h_res

    @T.prim_func
    def post_backward(
        g_x_next: T.Tensor[(num_tokens, n, *row), dtype],
        x: T.Tensor[(num_tokens, n, *row) if has_h_res else unused, dtype],
        layer_output: T.Tensor[(num_tokens, *row), layer_dtype],
        h_post: T.Tensor[(num_tokens, n), T.float32],
        h_res: T.Tensor[(num_tokens, n, n) if has_h_res else unused, T.float32],
        g_x: T.Tensor[(num_tokens, n, *row) if needs_g_x else unused, dtype],
        g_layer_output: T.Tensor[(num_tokens, *row) if needs_g_layer_output else unused, layer_dtype],
        g_h_post: T.Tensor[(num_tokens, n) if needs_g_mappings else unused, T.float32],
        g_h_res: T.Tensor[(num_tokens, n, n) if mixes else unused, T.float32],
    ):
        with T.Kernel(num_tokens, threads=lanes) as token:
            g_tile = T.alloc_shared((n, lanes, width), dtype)
            x_tile = T.alloc_shared((n, lanes, width), dtype)
            layer_tile = T.alloc_shared((lanes, width), layer_dtype)
            g_x_acc = T.alloc_fragment((n, lanes, width), T.float32)
            g_layer_acc = T.alloc_fragment((lanes, width), T.float32)
            post_lanes = T.alloc_fragment((n, lanes), T.float32)
            res_lanes = T.alloc_fragment((n, n, lanes), T.float32)
            post_sums = T.alloc_fragment((n,), T.float32)
            res_sums = T.alloc_fragment((n, n), T.float32)
            if tile.blocks_per_sm > 1:
                T.annotate_min_blocks_per_sm(tile.blocks_per_sm)
            if needs_g_mappings:
                T.clear(post_lanes)
            if mixes:
                T.clear(res_lanes)
            for step in T.Pipelined(T.ceildiv(row[0], lanes), num_stages=tile.stages):
                T.copy(g_x_next[token, 0, step * lanes, 0], g_tile)
                if mixes:
                    T.copy(x[token, 0, step * lanes, 0], x_tile)
                if needs_g_mappings:
                    T.copy(layer_output[token, step * lanes, 0], layer_tile)
                if needs_g_x:
                    T.clear(g_x_acc)
                if needs_g_layer_output:
                    T.clear(g_layer_acc)
                for lane in T.Parallel(lanes):
                    for c in T.unroll(width):
                        for j in T.unroll(n):
                            g = T.cast(g_tile[j, lane, c], T.float32)
                            if needs_g_layer_output:
                                g_layer_acc[lane, c] = T.ieee_fmaf(h_post[token, j], g, g_layer_acc[lane, c])
                            if needs_g_mappings:
                                post_lanes[j, lane] = T.ieee_fmaf(
                                    g, T.cast(layer_tile[lane, c], T.float32), post_lanes[j, lane]
                                )
                            for i in T.unroll(n):
                                if needs_g_x:
                                    g_x_acc[i, lane, c] = T.ieee_fmaf(h_res[token, j, i], g, g_x_acc[i, lane, c])
                                if mixes:
                                    res_lanes[j, i, lane] = T.ieee_fmaf(
                                        g, T.cast(x_tile[i, lane, c], T.float32), res_lanes[j, i, lane]
                                    )
                if needs_g_x:
                    T.copy(g_x_acc, g_x[token, 0, step * lanes, 0])
                if needs_g_layer_output:
                    T.copy(g_layer_acc, g_layer_output[token, step * lanes, 0])
            if needs_g_mappings:
                T.reduce_sum(post_lanes, post_sums, dim=1, batch=n)
                if mixes:
                    T.reduce_sum(res_lanes, res_sums, dim=2, batch=n * n)
                T.copy(post_sums, g_h_post[token, 0])
                if mixes:
                    T.copy(res_sums, g_h_res[token, 0, 0])

    return post_backward
