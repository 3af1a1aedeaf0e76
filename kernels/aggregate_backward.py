"""aggregate, backward: the gradient of the weights by which the streams were aggregated.

From layer_input[c] = Σ_i h_pre[i] · x[i, c] (Eq. 3), with g = g_layer_input, per token:

    g_h_pre[i] = Σ_c g[c] · x[i, c]
    g_x[i, c]  = h_pre[i] · g[c]

`aggregate_backward` computes the first alone. Where h_pre comes from x through a projection, the projection's backward
needs g_h_pre complete before it can add its own share to g_x; `projection_backward` then adds both from its one read of
x. `aggregate_gradients` computes both, for an h_pre that is given. The n sums over channels are kept as in
`post_backward`, in the same order by both kernels; a product of g_x is rounded once.

Traffic per token: (n + 1)·C read; `aggregate_gradients` writes n·C, and without g_h_pre reads C alone.
"""

import tilelang.language as T

from .plans import ReductionTile


@T.macro
def add_products(lane_sums, g_frag, x_frag):
    """lane_sums[i] += g · x[i], lane by lane."""
    n, lanes, width = x_frag.shape
    for lane in T.Parallel(lanes):
        for c in T.unroll(width):
            for i in T.unroll(n):
                lane_sums[i, lane] = T.ieee_fmaf(
                    T.cast(g_frag[lane, c], T.float32), T.cast(x_frag[i, lane, c], T.float32), lane_sums[i, lane]
                )


def aggregate_backward_kernel(num_streams: int, hidden_size: int, dtype: str, tile: ReductionTile):
    """g_layer_input [T, C / width, width], x [T, n, C / width, width] -> g_h_pre [T, n]."""
    n, lanes, width = num_streams, tile.lanes, tile.width
    row = (hidden_size // width, width)
    num_tokens = T.dynamic("num_tokens")

    @T.prim_func
    def aggregate_backward(
        g_layer_input: T.Tensor[(num_tokens, *row), dtype],
        x: T.Tensor[(num_tokens, n, *row), dtype],
        g_h_pre: T.Tensor[(num_tokens, n), T.float32],
    ):
        with T.Kernel(num_tokens, threads=lanes) as token:
            g_frag = T.alloc_fragment((lanes, width), dtype)
            x_frag = T.alloc_fragment((n, lanes, width), dtype)
            lane_sums = T.alloc_fragment((n, lanes), T.float32)
            sums = T.alloc_fragment((n,), T.float32)
            T.clear(lane_sums)
            for step in T.serial(T.ceildiv(row[0], lanes)):
                T.copy(g_layer_input[token, step * lanes, 0], g_frag)
                T.copy(x[token, 0, step * lanes, 0], x_frag)
                add_products(lane_sums, g_frag, x_frag)
            T.reduce_sum(lane_sums, sums, dim=1, batch=n)
            T.copy(sums, g_h_pre[token, 0])

    return aggregate_backward


def aggregate_gradients_kernel(
    num_streams: int, hidden_size: int, dtype: str, tile: ReductionTile, needs_g_h_pre: bool
):
    """g_layer_input [T, C / width, width], x [T, n, C / width, width], h_pre [T, n] -> g_x as x, g_h_pre [T, n].

    Unless it `needs_g_h_pre`, x and g_h_pre are one-element placeholders, never accessed.
    """
    n, lanes, width = num_streams, tile.lanes, tile.width
    row = (hidden_size // width, width)
    num_tokens = T.dynamic("num_tokens")
    placeholder = (1,)

    @T.prim_func
    def aggregate_gradients(
        g_layer_input: T.Tensor[(num_tokens, *row), dtype],
        x: T.Tensor[(num_tokens, n, *row) if needs_g_h_pre else placeholder, dtype],
        h_pre: T.Tensor[(num_tokens, n), T.float32],
        g_x: T.Tensor[(num_tokens, n, *row), dtype],
        g_h_pre: T.Tensor[(num_tokens, n) if needs_g_h_pre else placeholder, T.float32],
    ):
        with T.Kernel(num_tokens, threads=lanes) as token:
            g_frag = T.alloc_fragment((lanes, width), dtype)
            x_frag = T.alloc_fragment((n, lanes, width), dtype)
            products = T.alloc_fragment((n, lanes, width), T.float32)
            lane_sums = T.alloc_fragment((n, lanes), T.float32)
            sums = T.alloc_fragment((n,), T.float32)
            if needs_g_h_pre:
                T.clear(lane_sums)
            for step in T.serial(T.ceildiv(row[0], lanes)):
                T.copy(g_layer_input[token, step * lanes, 0], g_frag)
                if needs_g_h_pre:
                    T.copy(x[token, 0, step * lanes, 0], x_frag)
                    add_products(lane_sums, g_frag, x_frag)
                for lane in T.Parallel(lanes):
                    for c in T.unroll(width):
                        for i in T.unroll(n):
                            products[i, lane, c] = h_pre[token, i] * T.cast(g_frag[lane, c], T.float32)
                T.copy(products, g_x[token, 0, step * lanes, 0])
            if needs_g_h_pre:
                T.reduce_sum(lane_sums, sums, dim=1, batch=n)
                T.copy(sums, g_h_pre[token, 0])

    return aggregate_gradients
