"""The boundary, backward: from the gradients of x_next and the layer's input to those of what was mixed, and of phi.

With x_next[j] = Σ_i h_res[j, i] · x[i] + h_post[j] · F (Eq. 3, F the layer's output), rounded, then projected on phi
and aggregated with h_pre, the gradient that reaches x_next, per token, is

    g[j, c] = g_x_next[j, c] + h_pre[j] · g_layer_input[c] + ρ · x_next[j, c] + Σ_m g_dots[m] · phi[m, j, c]

from outside, through the aggregation, through the scale s and through x·phi (`projection_backward`), and from it

    g_x[i, c]      = Σ_j h_res[j, i] · g[j, c]         g_layer_output[c] = Σ_j h_post[j] · g[j, c]
    g_h_res[j, i]  = Σ_c g[j, c] · x[i, c]             g_h_post[j]       = Σ_c g[j, c] · F[c]
    g_phi[m, j, c] = Σ_tokens g_dots[m] · x_next[j, c]

In the delayed form, where h_pre came from outside, its gradient Σ_c g_layer_input[c] · x_next[j, c] is taken as well.

**Two passes.** g_dots and ρ need ⟨g_layer_input, x_next[j]⟩ complete, a sum over all channels: `aggregate_backward`
takes it, at (n + 1)·C read, from the x_next that the forward wrote and that its reader keeps anyway. To rebuild it
there would cost C more and n² multiply-adds. This kernel is the second pass: (2n + 2)·C read, (n + 1)·C written, (4n +
4)·C for both. Here x_next is rebuilt, which costs no traffic. The delayed form needs no first pass, (3n + 3)·C in all.

**One tile, all streams.** g mixes streams, so a block has all of them, for some channels, whose part of phi stays in
shared memory, and walks over a range of tokens. Per tile: x_next into shared memory as the operand of
g_phi, whose sums stay in registers; the product with phi, stream by stream; through shared memory, to a layout where a
thread holds consecutive channels, everything else. Sums over channels leave a partial sum a block of channels, g_phi
one a range of tokens: `boundary_sums` adds them up in order. A token's gradients depend on no other token.

**Identity connections.** Without h_res, where H_res is the identity, x_next[j] = x[j] + h_post[j] · F in one fma, g_x
is g, and there is no g_h_res: of the sums over channels g_h_post is left.

Between the terms of g nothing is rounded to the stream's dtype, where the separate kernels round twice: gradients equal
theirs within that tolerance, not to the bit.
"""

import tilelang.language as T

from .boundary_backward_warps import boundary_backward_warps_kernel
from .boundary_plans import BoundaryBackwardPlan
from .post_project import add_output, fragment_each, mix
from .projection import high_half
from .projection_plans import WarpsPlan


@T.macro
def store_split(high, low, first, second, value, plan: BoundaryBackwardPlan):
    """high[first, second] + low[first, second] = value; without a split, high is the value."""
    if plan.split:
        high[first, second] = T.cast(high_half(value, plan.operand_dtype), plan.operand_dtype)
        low[first, second] = T.cast(value - high_half(value, plan.operand_dtype), plan.operand_dtype)
    else:
        high[first, second] = value


@T.macro
def load_phi(high, low, phi, stream, first_channel, plan: BoundaryBackwardPlan):
    """The halves of phi's rows at this block's channels of a stream; rows of padding are zero."""
    hidden_size = phi.shape[2]
    for m, c in T.Parallel(plan.padded_rows, plan.channels):
        value = T.if_then_else(
            m < plan.rows and first_channel + c < hidden_size, phi[m, stream, first_channel + c], 0.0
        )
        store_split(high, low, m, c, value, plan)


@T.macro
def load_g_dots(high, low, g_projected, first_token, plan: BoundaryBackwardPlan):
    """The halves of g_dots, token by row; zero beyond the last token."""
    num_tokens = g_projected.shape[1]
    for m, t in T.Parallel(plan.padded_rows, plan.tokens):
        value = T.if_then_else(m < plan.rows and first_token + t < num_tokens, g_projected[m, first_token + t], 0.0)
        store_split(high, low, t, m, value, plan)


@T.macro
def multiply(acc, a_high, a_low, b_high, b_low, plan: BoundaryBackwardPlan, transpose_A: bool, b_is_split: bool):
    """acc += (a_high + a_low) · (b_high + b_low) but for low · low."""
    T.gemm(a_high, b_high, acc, transpose_A=transpose_A)
    if plan.split:
        T.gemm(a_low, b_high, acc, transpose_A=transpose_A)
        if b_is_split:
            T.gemm(a_high, b_low, acc, transpose_A=transpose_A)


def boundary_backward_kernel(
    num_streams: int,
    hidden_size: int,
    dtype: str,
    layer_dtype: str,
    plan: BoundaryBackwardPlan | WarpsPlan,
    has_g_x_next: bool,
    has_g_layer_input: bool,
    needs_g_h_pre: bool,
    has_h_res: bool = True,
):
    """g_x_next [T, n, C], g_layer_input [T, C], g_projected [M + 1, T], x [T, n, C], layer_output [T, C], h_pre, h_post
    [T, n], h_res [T, n, n], phi [M, n, C] -> g_x [T, n, C], g_layer_output [T, C], partial_phi [ranges, M, n, C],
    partial_mixing [channel blocks, sums, T], the sums being, for each j, g_h_post[j], g_h_res[j] and, with
    `needs_g_h_pre`, g_h_pre[j].

    `has_g_layer_input` stands for h_pre, too. What is absent is a one-element placeholder, never accessed; there are no
    sums for g_h_res without h_res.
    """
    if isinstance(plan, WarpsPlan):
        return boundary_backward_warps_kernel(
            num_streams, hidden_size, dtype, plan, has_g_x_next, has_g_layer_input, needs_g_h_pre, has_h_res
        )
    n, rows, tokens, channels = num_streams, plan.rows, plan.tokens, plan.channels
    num_tokens = T.dynamic("num_tokens")
    num_ranges = T.dynamic("num_ranges")
    unused = (1,)
    streams = tuple(range(n))
    together = tuple((j,) for j in streams) if plan.split else (streams,)
    operand = plan.operand_dtype
    next_is_split = plan.split and dtype == "float32"
    mixed = streams if has_h_res else ()  # whose products with g are summed
    sums_per_stream = 1 + len(mixed) + needs_g_h_pre
    num_blocks = -(-hidden_size // channels)
    tile_shape = (tokens, channels)

    @T.prim_func
    def boundary_backward(
        g_x_next: T.Tensor[(num_tokens, n, hidden_size) if has_g_x_next else unused, dtype],
        g_layer_input: T.Tensor[(num_tokens, hidden_size) if has_g_layer_input else unused, dtype],
        g_projected: T.Tensor[(rows + 1, num_tokens), T.float32],
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        layer_output: T.Tensor[(num_tokens, hidden_size), layer_dtype],
        h_pre: T.Tensor[(num_tokens, n) if has_g_layer_input else unused, T.float32],
        h_post: T.Tensor[(num_tokens, n), T.float32],
        h_res: T.Tensor[(num_tokens, n, n) if has_h_res else unused, T.float32],
        phi: T.Tensor[(rows, n, hidden_size), T.float32],
        g_x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        g_layer_output: T.Tensor[(num_tokens, hidden_size), layer_dtype],
        partial_phi: T.Tensor[(num_ranges, rows, n, hidden_size), T.float32],
        partial_mixing: T.Tensor[(num_blocks, n * sums_per_stream, num_tokens), T.float32],
        tiles_per_range: T.int32,
    ):
        with T.Kernel(num_blocks, T.ceildiv(T.ceildiv(num_tokens, tokens), tiles_per_range), threads=plan.threads) as (
            channel_block,
            token_range,
        ):
            phi_high = [T.alloc_shared((plan.padded_rows, channels), operand) for _ in streams]
            phi_low = [T.alloc_shared((plan.padded_rows, channels), operand) for _ in streams]
            g_high = T.alloc_shared((tokens, plan.padded_rows), operand)
            g_low = T.alloc_shared((tokens, plan.padded_rows), operand)
            next_tiles = [T.alloc_shared(tile_shape, operand) for _ in streams]
            next_low = T.alloc_shared(tile_shape, operand)
            product_tiles = [T.alloc_shared(tile_shape, T.float32) for _ in range(2)]
            g_phi = fragment_each(streams, (plan.padded_rows, channels), T.float32)
            x_rows = fragment_each(streams, tile_shape, dtype)
            layer_rows = T.alloc_fragment(tile_shape, layer_dtype)
            g_input_rows = T.alloc_fragment(tile_shape, dtype)
            g_next_rows = T.alloc_fragment(tile_shape, dtype)
            next_rows = fragment_each(together[0], tile_shape, T.float32)
            rounded = fragment_each(streams if next_is_split else together[0], tile_shape, dtype)
            product_acc = T.alloc_fragment(tile_shape, T.float32)
            g_rows = fragment_each(streams, tile_shape, T.float32)
            g_x_rows = T.alloc_fragment(tile_shape, T.float32)
            g_layer_rows = T.alloc_fragment(tile_shape, T.float32)
            products = T.alloc_fragment(tile_shape, T.float32)
            sums = T.alloc_fragment((tokens,), T.float32)
            sums_tile = T.alloc_shared((sums_per_stream, tokens), T.float32)

            first = channel_block * channels
            for j in streams:
                load_phi(phi_high[j], phi_low[j], phi, j, first, plan)
                T.clear(g_phi[j])
            first_tile = token_range * tiles_per_range
            for tile in T.serial(first_tile, T.min(first_tile + tiles_per_range, T.ceildiv(num_tokens, tokens))):
                row = tile * tokens
                for j in streams:
                    T.copy(x[row : row + tokens, j, first : first + channels], x_rows[j])
                T.copy(layer_output[row : row + tokens, first : first + channels], layer_rows)
                if has_g_layer_input:
                    T.copy(g_layer_input[row : row + tokens, first : first + channels], g_input_rows)
                load_g_dots(g_high, g_low, g_projected, row, plan)
                for group in together:
                    if has_h_res:
                        mix(next_rows, x_rows, layer_rows, h_post, h_res, row, group)
                    else:
                        add_output(next_rows, x_rows, layer_rows, h_post, row, group)
                    for values, j in zip(next_rows, group, strict=True):
                        T.copy(values, rounded[j % len(rounded)])
                        if next_is_split:
                            for t, c in T.Parallel(tokens, channels):
                                store_split(next_tiles[j], next_low, t, c, rounded[j][t, c], plan)
                        else:
                            T.copy(rounded[j % len(rounded)], next_tiles[j])
                        multiply(g_phi[j], g_high, g_low, next_tiles[j], next_low, plan, True, next_is_split)
                for j in streams:
                    if has_g_x_next:  # in flight during the product; all streams at once would spill
                        T.copy(g_x_next[row : row + tokens, j, first : first + channels], g_next_rows)
                    if plan.split:
                        T.clear(product_acc)
                        multiply(product_acc, g_high, g_low, phi_high[j], phi_low[j], plan, False, True)
                        if len(rounded) < n:  # another stream's is there by now
                            T.copy(next_tiles[j], rounded[0])
                        T.copy(product_acc, product_tiles[j % 2])
                        T.copy(product_tiles[j % 2], g_rows[j])
                    else:  # a CPU has one layout
                        T.clear(g_rows[j])
                        multiply(g_rows[j], g_high, g_low, phi_high[j], phi_low[j], plan, False, True)
                    for t, c in T.Parallel(tokens, channels):
                        token = T.min(row + t, num_tokens - 1)
                        x_next = T.cast(rounded[j % len(rounded)][t, c], T.float32)
                        g_rows[j][t, c] = T.ieee_fmaf(g_projected[rows, token], x_next, g_rows[j][t, c])
                        if has_g_layer_input:
                            g_rows[j][t, c] = T.ieee_fmaf(
                                h_pre[token, j], T.cast(g_input_rows[t, c], T.float32), g_rows[j][t, c]
                            )
                        if has_g_x_next:
                            g_rows[j][t, c] += T.cast(g_next_rows[t, c], T.float32)
                    factors = [(g_rows[j], layer_rows), *((g_rows[j], x_rows[i]) for i in mixed)]
                    factors += [(rounded[j % len(rounded)], g_input_rows)] if needs_g_h_pre else []
                    for place, (values, others) in enumerate(factors):
                        for t, c in T.Parallel(tokens, channels):
                            products[t, c] = T.cast(values[t, c], T.float32) * T.cast(others[t, c], T.float32)
                        T.reduce_sum(products, sums, dim=1)
                        T.copy(sums, sums_tile[place, 0:tokens])
                    for place, t in T.Parallel(sums_per_stream, tokens):
                        if row + t < num_tokens:
                            partial_mixing[channel_block, j * sums_per_stream + place, row + t] = sums_tile[place, t]
                for t, c in T.Parallel(tokens, channels):
                    g_layer_rows[t, c] = 0.0
                    for j in streams:
                        g_layer_rows[t, c] = T.ieee_fmaf(
                            h_post[T.min(row + t, num_tokens - 1), j], g_rows[j][t, c], g_layer_rows[t, c]
                        )
                T.copy(g_layer_rows, g_layer_output[row : row + tokens, first : first + channels])
                for i in streams:
                    if has_h_res:
                        for t, c in T.Parallel(tokens, channels):
                            g_x_rows[t, c] = 0.0
                            for j in streams:
                                g_x_rows[t, c] = T.ieee_fmaf(
                                    h_res[T.min(row + t, num_tokens - 1), j, i], g_rows[j][t, c], g_x_rows[t, c]
                                )
                        T.copy(g_x_rows, g_x[row : row + tokens, i, first : first + channels])
                    else:
                        T.copy(g_rows[i], g_x[row : row + tokens, i, first : first + channels])
            for j in streams:
                for m, c in T.Parallel(plan.padded_rows, channels):
                    if m < rows and first + c < hidden_size:
                        partial_phi[token_range, m, j, first + c] = g_phi[j][m, c]

    return boundary_backward
