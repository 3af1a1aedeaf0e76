"""`boundary_backward` as thread-level code (see `warp_tiles`): for 16-bit streams on a GPU.

The formulas are those of `boundary_backward`. A block has 32 tokens × 64 channels of all streams at a time and walks
over a range of tokens; two blocks share a multiprocessor that has 227 KB of shared memory. Per tile:

    wait, split g_dots, barrier       x, layer_output and the coefficients are there
    g = g_x_next + g_dots · phi       sums of the tensor core, which start as g_x_next; its tile takes the next at once
    for both tokens of a lane, slot by slot, in registers:
        x_next, rounded               written where x was: it is what g_phi is a product with
        g += ρ · x_next + h_pre · g_layer_input
        g_x, g_layer_output, sums     over streams in the lane, over channels by shuffles
    barrier
    g_phi += x_next · g_dots          a warp has some channels of one stream, for all of the block's tokens
    sums over channels                of the block's warps, in order

Shared memory, in bytes at n = 4: x twice 16 K, g_x_next 16 K, the layer's two tensors twice 4 K each, phi's halves
24 K, g_dots' halves twice 3.5 K, coefficients 6 K, sums 2.5 K a group of warps. Bytes moved per token: (2n + 2)·C read,
(n + 1)·C written.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from .projection_plans import WarpsPlan
from .warp_tiles import (
    Place,
    WarpTile,
    accumulator,
    add_g_phi,
    add_products,
    clear_padding,
    copy_dots,
    copy_inside,
    is_inside,
    load_dots,
    load_phi,
    split_dots,
    store_g_phi,
    swizzle,
    unpack,
)
from .warps import VECTOR, WARP, WARP_CHANNELS, WARP_TOKENS, fma, place_no_guards, store_vector


class Given(NamedTuple):
    """The kernel's inputs that are copied into shared memory; None for what is not given."""

    x: Any
    g_x_next: Any
    layer_output: Any
    g_layer_input: Any
    g_projected: Any
    h_pre: Any
    h_post: Any
    h_res: Any


class Tiles(NamedTuple):
    """Copies of the inputs in shared memory, g_dots as `words`; `sums` has the warps' sums over channels."""

    x: Any
    g_x_next: Any
    layer: Any
    g_input: Any
    words: Any
    rho: Any
    pre: Any
    post: Any
    res: Any
    sums: Any


@T.macro
def copy_tile(tiles: Tiles, given: Given, place: Place, row, stage, tile: WarpTile):
    """Start to copy the tile that begins at token `row`: a lane what it reads itself, threads the coefficients."""
    n, tokens, vectors, thread = tile.num_streams, tile.tokens, tile.vectors, place.thread
    num_tokens = given.x.shape[0]
    for half in T.unroll(2):
        token = row + place.token + half * 8
        to = half * 8 * n * vectors + place.of_streams
        for j in T.unroll(n):
            at = to + stage * tile.stream_vectors + j * vectors
            copy_inside(
                tiles.x[at, 0], given.x[token, j, place.channel], is_inside(given.x, token, place.channel, tile)
            )
        if given.g_x_next is not None:
            for j in T.unroll(n):
                at = to + j * vectors
                copy_inside(
                    tiles.g_x_next[at, 0],
                    given.g_x_next[token, j, place.channel],
                    is_inside(given.x, token, place.channel, tile),
                )
        to_layer = stage * tile.layer_vectors + half * 8 * vectors + place.of_layers
        copy_inside(
            tiles.layer[to_layer, 0],
            given.layer_output[token, place.channel],
            is_inside(given.x, token, place.channel, tile),
        )
        if given.g_layer_input is not None:
            copy_inside(
                tiles.g_input[to_layer, 0],
                given.g_layer_input[token, place.channel],
                is_inside(given.x, token, place.channel, tile),
            )
    if given.h_res is not None:
        for r in T.unroll(-(-tokens * n // tile.threads)):
            at = r * tile.threads + thread
            if at < tokens * n:
                inside = row + at // n < num_tokens
                copy_inside(tiles.res[stage * tokens * n + at, 0], given.h_res[row + at // n, at % n, 0], inside, n)
    if thread < tokens:
        inside = row + thread < num_tokens
        copy_inside(tiles.rho[stage * tokens + thread], given.g_projected[tile.rows, row + thread], inside, 1)
        copy_inside(tiles.post[stage * tokens + thread, 0], given.h_post[row + thread, 0], inside, n)
        if given.g_layer_input is not None:
            copy_inside(tiles.pre[stage * tokens + thread, 0], given.h_pre[row + thread, 0], inside, n)
    copy_dots(tiles.words, given.g_projected, row, stage, thread, tile)
    T.ptx_commit_group()


@T.macro
def start_sums(g, tiles: Tiles, given: Given, place: Place, vector, words, tile: WarpTile):
    """g = g_x_next, slot by slot, or zero."""
    values = T.alloc_local((VECTOR,), T.float32)
    first = T.alloc_var(T.int32)
    first = place.of_streams + place.q % tile.num_streams * tile.vectors
    for s in T.unroll(tile.num_streams):
        at = T.bitwise_xor(first, s * tile.vectors)
        for half in T.unroll(2):
            if given.g_x_next is None:
                for e in T.unroll(VECTOR):
                    g[accumulator(s, half, e)] = 0.0
            else:
                for e in T.vectorized(VECTOR):
                    vector[e] = tiles.g_x_next[at + half * 8 * tile.num_streams * tile.vectors, e]
                unpack(values, 0, vector, words)
                for e in T.unroll(VECTOR):
                    g[accumulator(s, half, e)] = values[e]


@T.macro
def mix_token(
    g,
    g_x,
    g_layer_output,
    tiles: Tiles,
    given: Given,
    place: Place,
    row,
    half,
    stage,
    vector,
    words,
    needs_g_h_pre,
    tile,
):
    """Everything of one of a lane's two tokens: x_next, its gradient g, and what follows from g.

    Without h_res, a slot is mixed with nothing: its x is its own stream's, and its g is g_x.
    """
    n, vectors = tile.num_streams, tile.vectors
    mixed = 0 if given.h_res is None else n
    sums = 1 + mixed + needs_g_h_pre
    x = T.alloc_local((n * VECTOR,), T.float32)
    layer = T.alloc_local((VECTOR,), T.float32)
    g_input = T.alloc_local((VECTOR,), T.float32)
    h = T.alloc_local((n,), T.float32)
    x_next = T.alloc_local((VECTOR,), T.float32)
    g_x_acc = T.alloc_local((n * VECTOR,), T.float32)
    g_layer_acc = T.alloc_local((VECTOR,), T.float32)
    own = T.alloc_local((sums,), T.float32)
    total = T.alloc_local((sums,), T.float32)
    at, of_layers, token = (T.alloc_var(T.int32) for _ in range(3))
    at = place.of_streams + (stage * tile.tokens + half * 8) * n * vectors
    of_layers = place.of_layers + (stage * tile.tokens + half * 8) * vectors
    token = stage * tile.tokens + place.token + half * 8  # among the coefficients
    for i in T.unroll(mixed):
        for e in T.vectorized(VECTOR):
            vector[e] = tiles.x[at + i * vectors, e]
        unpack(x, i * VECTOR, vector, words)
    for e in T.vectorized(VECTOR):
        vector[e] = tiles.layer[of_layers, e]
    unpack(layer, 0, vector, words)
    if given.g_layer_input is not None:
        for e in T.vectorized(VECTOR):
            vector[e] = tiles.g_input[of_layers, e]
        unpack(g_input, 0, vector, words)
    for e in T.unroll(n * VECTOR):
        g_x_acc[e] = 0.0
    for e in T.unroll(VECTOR):
        g_layer_acc[e] = 0.0
    for k in T.unroll(sums):
        total[k] = 0.0
    rho = tiles.rho[token]
    for s in T.unroll(n):
        j = T.bitwise_xor(place.q % n, s)
        if mixed > 0:
            for i in T.vectorized(n):
                h[i] = tiles.res[token * n + j, i]
        else:
            for e in T.vectorized(VECTOR):
                vector[e] = tiles.x[T.bitwise_xor(at + place.q % n * vectors, s * vectors), e]
            unpack(x, 0, vector, words)
        post = tiles.post[token, j]
        for k in T.unroll(sums):
            own[k] = 0.0
        for e in T.unroll(VECTOR):
            if mixed > 0:
                x_next[e] = post * layer[e]
                for i in T.unroll(n):
                    x_next[e] = fma(h[i], x[i * VECTOR + e], x_next[e])
            else:
                x_next[e] = fma(post, layer[e], x[e])
        for e in T.vectorized(VECTOR):
            vector[e] = T.cast(x_next[e], vector.dtype)
        for e in T.vectorized(VECTOR):
            tiles.x[T.bitwise_xor(at + place.q % n * vectors, s * vectors), e] = vector[e]
        unpack(x_next, 0, vector, words)
        for e in T.unroll(VECTOR):
            place_of_g = accumulator(s, half, e)
            g[place_of_g] = fma(rho, x_next[e], g[place_of_g])
            if given.g_layer_input is not None:
                g[place_of_g] = fma(tiles.pre[token, j], g_input[e], g[place_of_g])
            own[0] = fma(g[place_of_g], layer[e], own[0])
            g_layer_acc[e] = fma(post, g[place_of_g], g_layer_acc[e])
            for i in T.unroll(mixed):
                own[1 + i] = fma(g[place_of_g], x[i * VECTOR + e], own[1 + i])
                g_x_acc[i * VECTOR + e] = fma(h[i], g[place_of_g], g_x_acc[i * VECTOR + e])
            if needs_g_h_pre:
                own[mixed + 1] = fma(g_input[e], x_next[e], own[mixed + 1])
        if mixed == 0:
            for e in T.vectorized(VECTOR):
                vector[e] = T.cast(g[accumulator(s, half, e)], vector.dtype)
            to = row + place.token + half * 8
            store_vector(g_x[to, j, place.channel], words, 0, is_inside(given.x, to, place.channel, tile))
        for k in T.unroll(sums):
            total[k] = T.if_then_else(s == 0, own[k], total[k] + T.shfl_xor(own[k], s))
    if n < 4:
        for k in T.unroll(sums):
            total[k] += T.shfl_xor(total[k], n)
    if place.q < n:
        for k in T.unroll(sums):
            group = place.thread // WARP % tile.groups
            tiles.sums[group * sums + k, (place.token + half * 8) * n + place.q] = total[k]
    inside = is_inside(given.x, row + place.token + half * 8, place.channel, tile)
    for i in T.unroll(mixed):
        for e in T.vectorized(VECTOR):
            vector[e] = T.cast(g_x_acc[i * VECTOR + e], vector.dtype)
        store_vector(g_x[row + place.token + half * 8, i, place.channel], words, 0, inside)
    for e in T.vectorized(VECTOR):
        vector[e] = T.cast(g_layer_acc[e], vector.dtype)
    store_vector(g_layer_output[row + place.token + half * 8, place.channel], words, 0, inside)


@T.macro
def store_sums(partial_mixing, sums_tile, channel_block, row, thread, sums, tile: WarpTile):
    """The block's sums over its channels: those of its groups of warps, ascending."""
    n, positions = tile.num_streams, tile.tokens * tile.num_streams
    for r in T.unroll(-(-sums * positions // tile.threads)):
        at = r * tile.threads + thread
        token = row + at % positions // n
        if T.And(at < sums * positions, token < partial_mixing.shape[2]):
            total = T.alloc_var(T.float32)
            total = sums_tile[at // positions, at % positions]
            for group in T.unroll(tile.groups - 1):
                total += sums_tile[(group + 1) * sums + at // positions, at % positions]
            partial_mixing[channel_block, at % n * sums + at // positions, token] = total


def boundary_backward_warps_kernel(
    num_streams: int,
    hidden_size: int,
    dtype: str,
    plan: WarpsPlan,
    has_g_x_next: bool,
    has_g_layer_input: bool,
    needs_g_h_pre: bool,
    has_h_res: bool = True,
):
    """Build `boundary_backward_kernel` by warps; C is a multiple of 8, and layer_output has the stream's dtype."""
    n, rows = num_streams, plan.rows
    tile = WarpTile(n, rows, plan.tokens, plan.channels, plan.stages)
    tokens, stages = plan.tokens, plan.stages
    num_tokens = T.dynamic("num_tokens")
    num_ranges = T.dynamic("num_ranges")
    unused = (1,)
    sums = (n if has_h_res else 0) + 1 + needs_g_h_pre
    num_blocks = -(-hidden_size // plan.channels)

    @T.prim_func
    def boundary_backward(
        g_x_next: T.Tensor[(num_tokens, n, hidden_size) if has_g_x_next else unused, dtype],
        g_layer_input: T.Tensor[(num_tokens, hidden_size) if has_g_layer_input else unused, dtype],
        g_projected: T.Tensor[(rows + 1, num_tokens), T.float32],
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        layer_output: T.Tensor[(num_tokens, hidden_size), dtype],
        h_pre: T.Tensor[(num_tokens, n) if has_g_layer_input else unused, T.float32],
        h_post: T.Tensor[(num_tokens, n), T.float32],
        h_res: T.Tensor[(num_tokens, n, n) if has_h_res else unused, T.float32],
        phi: T.Tensor[(rows, n, hidden_size), T.float32],
        g_x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        g_layer_output: T.Tensor[(num_tokens, hidden_size), dtype],
        partial_phi: T.Tensor[(num_ranges, rows, n, hidden_size), T.float32],
        partial_mixing: T.Tensor[(num_blocks, n * sums, num_tokens), T.float32],
        tiles_per_range: T.int32,
    ):
        with T.Kernel(num_blocks, T.ceildiv(T.ceildiv(num_tokens, tokens), tiles_per_range), threads=tile.threads) as (
            channel_block,
            token_range,
        ):
            x_tile = T.alloc_shared((stages * tile.stream_vectors, VECTOR), dtype)
            g_tile = T.alloc_shared((tile.stream_vectors, VECTOR), dtype)
            layer_tile = T.alloc_shared((stages * tile.layer_vectors, VECTOR), dtype)
            g_input_tile = T.alloc_shared((stages * tile.layer_vectors, VECTOR), dtype)
            phi_tile = T.alloc_shared((tile.phi_rows, tile.phi_vectors * VECTOR), T.bfloat16)
            dots = T.alloc_shared((stages * tokens * tile.dots_vectors, VECTOR), T.bfloat16)
            words_of_dots = T.view(dots, (stages * tokens * tile.dots_vectors, 4), T.float32)
            rho_tile = T.alloc_shared((stages * tokens,), T.float32)
            pre_tile = T.alloc_shared((stages * tokens, n), T.float32)
            post_tile = T.alloc_shared((stages * tokens, n), T.float32)
            res_tile = T.alloc_shared((stages * tokens * n, n), T.float32)
            sums_tile = T.alloc_shared((tile.groups * sums, tokens * n), T.float32)
            g = T.alloc_local((n * 16,), T.float32)
            halves = T.alloc_local((len(tile.products) * VECTOR,), T.bfloat16)
            phi_halves = T.alloc_local((tile.blocks * VECTOR,), T.bfloat16)
            g_phi = T.alloc_local((tile.g_phi_tiles * tile.blocks * 4,), T.float32)
            vector = T.alloc_local((VECTOR,), dtype)
            words = T.view(vector, (VECTOR // 2,), T.uint32)
            T.annotate_min_blocks_per_sm(plan.blocks_per_sm)

            thread = T.get_thread_binding()
            lane, warp = thread % WARP, thread // WARP
            # Variables, which tilelang does not put in place of their names: their sums with constants are addresses.
            token, channel, of_streams, of_layers = (T.alloc_var(T.int32) for _ in range(4))
            token = warp // tile.groups * WARP_TOKENS + lane // 4
            channel = channel_block * plan.channels + warp % tile.groups * WARP_CHANNELS + lane % 4 * VECTOR
            of_layers = token * tile.vectors + T.bitwise_xor(warp % tile.groups * 4 + lane % 4, swizzle(lane // 4))
            of_streams = of_layers + token * (n - 1) * tile.vectors
            place = Place(thread, lane % 4, token, channel, of_streams, of_layers)
            given = Given(
                *(x, g_x_next if has_g_x_next else None, layer_output, g_layer_input if has_g_layer_input else None),
                *(g_projected, h_pre, h_post, h_res if has_h_res else None),
            )
            tiles = Tiles(
                *(x_tile, g_tile, layer_tile, g_input_tile, words_of_dots),
                *(rho_tile, pre_tile, post_tile, res_tile, sums_tile),
            )
            first_tile = token_range * tiles_per_range
            num_tiles = T.min(tiles_per_range, T.ceildiv(num_tokens, tokens) - first_tile)

            copy_tile(tiles, given, place, first_tile * tokens, 0, tile)
            load_phi(phi_tile, phi, 0, channel_block * plan.channels, thread, tile)
            clear_padding(dots, thread, tile)
            for e in T.unroll(tile.g_phi_tiles * tile.blocks * 4):
                g_phi[e] = 0.0
            for step in T.serial(num_tiles):
                row = (first_tile + step) * tokens
                stage = step % stages
                T.ptx_wait_group(0)
                split_dots(dots, words_of_dots, stage, thread, tile)
                T.sync_threads()
                start_sums(g, tiles, given, place, vector, words, tile)
                if stages > 1 and step + 1 < num_tiles:
                    copy_tile(tiles, given, place, row + tokens, 1 - stage, tile)
                load_dots(halves, dots, stage, warp, lane, tile)
                for s in T.unroll(n):
                    add_products(g, s * 16, s, halves, phi_halves, phi_tile, warp, lane, tile)
                for half in T.unroll(2):
                    mix_token(
                        *(g, g_x, g_layer_output, tiles, given, place, row, half, stage, vector, words),
                        *(needs_g_h_pre, tile),
                    )
                T.sync_threads()
                add_g_phi(g_phi, dots, x_tile, stage, warp, lane, tile)
                store_sums(partial_mixing, sums_tile, channel_block, row, thread, sums, tile)
                if stages == 1:
                    T.sync_threads()
                    if step + 1 < num_tiles:
                        copy_tile(tiles, given, place, row + tokens, 0, tile)
            store_g_phi(partial_phi, g_phi, token_range, 0, channel_block * plan.channels, warp, lane, tile)

    return place_no_guards(boundary_backward)
