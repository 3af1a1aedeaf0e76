"""aggregate_norm, backward: from the gradient of the normalised layer input to that of the sum before it.

With u[c] = Σ_i h_pre[i] · x[i, c], r = rsqrt(Σ_c u[c]² / C + eps), layer_input[c] = u[c] · r · w[c] and
g = g_layer_input, per token:

    ∂r/∂u[c]   = −r³ · u[c] / C
    g_w[c]     = Σ_tokens g[c] · u[c] · r
    g_r        = Σ_c g[c] · w[c] · u[c]                                     = D
    g_u[c]     = r · w[c] · g[c] − r³ · D / C · u[c]

and then as in `aggregate_backward`, with g_u for g:

    g_h_pre[i] = Σ_c g_u[c] · x[i, c] = r · A[i] − r³ · D / C · B[i]
    A[i] = Σ_c w[c] · g[c] · x[i, c],   B[i] = Σ_c u[c] · x[i, c]

So one walk over the channels finds every sum, A, B, D and Σ u², in lanes as in `aggregate_norm` (r comes of the same
additions), and a second walk writes g_u, which takes the place of g_layer_input in all that follows: the share of
the aggregation in g_x is h_pre[i] · g_u. For that it is rounded to the stream's dtype; g_h_pre is made of float32 sums.

A block takes `tokens_per_block` tokens one after the other and keeps their sum for g_w, so that a row of partial sums
is left per block and not per token; `partial_sums` adds the rows. What the first walk made of x and g stays in
registers, and so do the sums for g_w. Where channels are too many for that (`kept` is off) x and g are read again,
from the cache, and the sums for g_w are in their row of `partial` from the first token on, 8·C bytes a token of cache.

Traffic per token: (n + 1)·C read, C written, (n + 1)·C more from the cache where nothing is kept; w twice from the
cache. The partial sums cost 4·C bytes to write and as many to read, per block.
"""

import tilelang.language as T

from .aggregate_norm import add_squares, aggregate_step, inverse_rms
from .aggregate_norm_backward_warps import aggregate_norm_backward_by_warps_kernel
from .plans import NormTile, NormWarpsTile


@T.macro
def load_gradient(g, g_frag, g_layer_input, token, step, slot, tile: NormTile):
    """g[slot] = g_layer_input of the step's channels; 0 beyond the last channel."""
    T.copy(g_layer_input[token, step * tile.lanes, 0], g_frag)
    for lane in T.Parallel(tile.lanes):
        for c in T.unroll(tile.width):
            g[slot, lane, c] = g_frag[lane, c]


@T.macro
def add_dots(dots, own_dots, inner, squares, x_frag, u, g, weight_frag, num_streams: int, slot, tile: NormTile):
    """Row i of dots: A[i]; row n + i, of one stream that of own_dots: B[i]; inner: D; squares: Σ u². Lane by lane, all.

    Loops apart, since one takes a fragment by a single form of index.
    """
    for lane in T.Parallel(tile.lanes):
        for c in T.unroll(tile.width):
            for i in T.unroll(num_streams):
                dots[i, lane] = T.ieee_fmaf(
                    T.cast(weight_frag[lane, c], T.float32) * T.cast(g[slot, lane, c], T.float32),
                    T.cast(x_frag[i, lane, c], T.float32),
                    dots[i, lane],
                )
            inner[0, lane] = T.ieee_fmaf(
                T.cast(weight_frag[lane, c], T.float32) * T.cast(g[slot, lane, c], T.float32),
                u[slot, lane, c],
                inner[0, lane],
            )
    for lane in T.Parallel(tile.lanes):
        for c in T.unroll(tile.width):
            for i in T.unroll(num_streams):
                if num_streams == 1:  # tilelang takes no constant index of a fragment but 0
                    own_dots[i, lane] = T.ieee_fmaf(
                        u[slot, lane, c], T.cast(x_frag[i, lane, c], T.float32), own_dots[i, lane]
                    )
                else:
                    dots[num_streams + i, lane] = T.ieee_fmaf(
                        u[slot, lane, c], T.cast(x_frag[i, lane, c], T.float32), dots[num_streams + i, lane]
                    )
    add_squares(squares, u, slot, tile)


@T.macro
def combine(g_h_pre, scale, pull, dot_sums, own_sums, token, num_streams: int, hidden_size: int):
    """pull[0], D so far, becomes r³ · D / C, by which g_u is pulled towards u; then g_h_pre."""
    combined = T.alloc_fragment((num_streams,), T.float32)
    for k in T.Parallel(1):
        pull[k] = pull[k] * scale[k] * scale[k] * scale[k] * (1.0 / hidden_size)
    for i in T.Parallel(num_streams):
        combined[i] = scale[0] * dot_sums[i]
    for i in T.Parallel(num_streams):
        if num_streams == 1:
            combined[i] = T.ieee_fmaf(-pull[0], own_sums[i], combined[i])
        else:
            combined[i] = T.ieee_fmaf(-pull[0], dot_sums[num_streams + i], combined[i])
    T.copy(combined, g_h_pre[token, 0])


@T.macro
def write_gradient(g_u, result, u, g, weight_frag, weight, scale, pull, token, step, slot, tile: NormTile):
    """g_u of the step's channels."""
    T.copy(weight[step * tile.lanes, 0], weight_frag)
    for lane in T.Parallel(tile.lanes):
        for c in T.unroll(tile.width):
            result[lane, c] = T.ieee_fmaf(
                -pull[0],
                u[slot, lane, c],
                scale[0] * T.cast(weight_frag[lane, c], T.float32) * T.cast(g[slot, lane, c], T.float32),
            )
    T.copy(result, g_u[token, step * tile.lanes, 0])


@T.macro
def add_weight_gradient(g_weight, u, g, scale, slot, tile: NormTile):
    """g_weight[slot] += g · u · r."""
    for lane in T.Parallel(tile.lanes):
        for c in T.unroll(tile.width):
            g_weight[slot, lane, c] = T.ieee_fmaf(
                T.cast(g[slot, lane, c], T.float32), u[slot, lane, c] * scale[0], g_weight[slot, lane, c]
            )


@T.macro
def load_partial(g_weight, partial, group, t, step, tile: NormTile):
    """g_weight[0] = the block's sums of the step's channels so far: 0 before its first token."""
    for lane in T.Parallel(tile.lanes):
        for c in T.unroll(tile.width):
            if step * tile.lanes + lane < partial.shape[1]:
                g_weight[0, lane, c] = T.if_then_else(t > 0, partial[group, step * tile.lanes + lane, c], 0.0)


@T.macro
def store_partial(partial, g_weight, group, step, slot, tile: NormTile):
    """The block's sums of the step's channels."""
    for lane in T.Parallel(tile.lanes):
        for c in T.unroll(tile.width):
            if step * tile.lanes + lane < partial.shape[1]:
                partial[group, step * tile.lanes + lane, c] = g_weight[slot, lane, c]


def aggregate_norm_backward_kernel(
    num_streams: int, hidden_size: int, dtype: str, weight_dtype: str, tile: NormTile, needs_g_weight: bool
):
    """g_layer_input [T, C], x [T, n, C], h_pre [T, n], weight [C]
    -> g_u [T, C], g_h_pre [T, n], partial [blocks, C] of g_w.

    C is written as [C / width, width]. Without `needs_g_weight`, partial is a one-element placeholder, never accessed.
    """
    if isinstance(tile, NormWarpsTile):
        return aggregate_norm_backward_by_warps_kernel(
            num_streams, hidden_size, dtype, weight_dtype, tile, needs_g_weight
        )
    n, lanes, width = num_streams, tile.lanes, tile.width
    row = (hidden_size // width, width)
    steps, slots = tile.steps(hidden_size), tile.slots(hidden_size)
    num_tokens = T.dynamic("num_tokens")
    num_partials = T.dynamic("num_partials")

    @T.prim_func
    def aggregate_norm_backward(
        g_layer_input: T.Tensor[(num_tokens, *row), dtype],
        x: T.Tensor[(num_tokens, n, *row), dtype],
        h_pre: T.Tensor[(num_tokens, n), T.float32],
        weight: T.Tensor[row, weight_dtype],
        g_u: T.Tensor[(num_tokens, *row), dtype],
        g_h_pre: T.Tensor[(num_tokens, n), T.float32],
        partial: T.Tensor[(num_partials, *row) if needs_g_weight else (1,), T.float32],
        tokens_per_block: T.int32,
        eps: T.float32,
    ):
        with T.Kernel(T.ceildiv(num_tokens, tokens_per_block), threads=lanes) as group:
            x_frag = T.alloc_fragment((n, lanes, width), dtype)
            g_frag = T.alloc_fragment((lanes, width), dtype)
            weight_frag = T.alloc_fragment((lanes, width), weight_dtype)
            u = T.alloc_fragment((slots, lanes, width), T.float32)
            g = T.alloc_fragment((slots, lanes, width), dtype)
            g_weight = T.alloc_fragment((slots, lanes, width), T.float32)
            result = T.alloc_fragment((lanes, width), T.float32)
            dots = T.alloc_fragment((n if n == 1 else 2 * n, lanes), T.float32)
            apart = [dots, *(T.alloc_fragment((n, lanes), T.float32) for _ in range(n == 1))]
            inner = T.alloc_fragment((1, lanes), T.float32)
            squares = T.alloc_fragment((1, lanes), T.float32)
            dot_sums = T.alloc_fragment((n if n == 1 else 2 * n,), T.float32)
            sums_apart = [dot_sums, *(T.alloc_fragment((n,), T.float32) for _ in range(n == 1))]
            scale = T.alloc_fragment((1,), T.float32)
            pull = T.alloc_fragment((1,), T.float32)
            if needs_g_weight:
                T.clear(g_weight)
            first = group * tokens_per_block
            for t in T.serial(T.min(tokens_per_block, num_tokens - first)):
                T.clear(dots)
                if n == 1:
                    T.clear(apart[-1])
                T.clear(inner)
                T.clear(squares)
                for step in T.unroll(steps, unroll_factor=slots):
                    slot = step if tile.kept else 0
                    aggregate_step(u, x_frag, x, h_pre, first + t, step, slot, tile)
                    load_gradient(g, g_frag, g_layer_input, first + t, step, slot, tile)
                    T.copy(weight[step * lanes, 0], weight_frag)
                    add_dots(dots, apart[-1], inner, squares, x_frag, u, g, weight_frag, n, slot, tile)
                T.reduce_sum(dots, dot_sums, dim=1, batch=n if n == 1 else 2 * n)
                if n == 1:
                    T.reduce_sum(apart[-1], sums_apart[-1], dim=1)
                T.reduce_sum(inner, pull, dim=1)
                inverse_rms(scale, squares, hidden_size, eps)
                combine(g_h_pre, scale, pull, dot_sums, sums_apart[-1], first + t, n, hidden_size)
                for step in T.unroll(steps, unroll_factor=slots):
                    slot = step if tile.kept else 0
                    if not tile.kept:
                        aggregate_step(u, x_frag, x, h_pre, first + t, step, slot, tile)
                        load_gradient(g, g_frag, g_layer_input, first + t, step, slot, tile)
                    write_gradient(g_u, result, u, g, weight_frag, weight, scale, pull, first + t, step, slot, tile)
                    if needs_g_weight:
                        if not tile.kept:
                            load_partial(g_weight, partial, group, t, step, tile)
                        add_weight_gradient(g_weight, u, g, scale, slot, tile)
                        if not tile.kept:
                            store_partial(partial, g_weight, group, step, slot, tile)
            if needs_g_weight and tile.kept:
                for step in T.unroll(steps, unroll_factor=slots):
                    store_partial(partial, g_weight, group, step, step, tile)

    return aggregate_norm_backward
