"""`project_backward` as thread-level code (see `warp_tiles`): for 16-bit streams on a GPU.

The formulas are those of `projection_backward`. A block has 32 tokens × 64 channels of one, two or four streams at a
time and walks over a range of tokens. Per tile:

    wait, split g_dots, barrier              x and the coefficients are there; the next tile is on its way from here on
    for each stream, slot by slot
        ρ · x + h_pre · g_layer_input        in registers, where the tensor core adds
        + g_dots · phi                       and from where 16 bytes are stored
    g_phi += x · g_dots                      a warp has some channels of one stream, for all of the block's tokens

One barrier a tile: a stage is copied over only when all warps have left the tile before.
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
    """The kernel's inputs that are copied into shared memory, None for what is not given; the block's first stream."""

    x: Any
    g_layer_input: Any
    g_projected: Any
    h_pre: Any
    stream: Any


class Tiles(NamedTuple):
    """Copies of the inputs in shared memory, g_dots as `words`."""

    x: Any
    g_input: Any
    words: Any
    rho: Any
    pre: Any


@T.macro
def copy_tile(tiles: Tiles, given: Given, place: Place, row, stage, tile: WarpTile):
    """Start to copy the tile that begins at token `row`: a lane what it reads itself, threads the coefficients."""
    n, tokens, vectors, thread = tile.num_streams, tile.tokens, tile.vectors, place.thread
    num_tokens = given.x.shape[0]
    for half in T.unroll(2):
        token = row + place.token + half * 8
        to = half * 8 * n * vectors + place.of_streams + stage * tile.stream_vectors
        for j in T.unroll(n):
            inside = is_inside(given.x, token, place.channel, tile)
            copy_inside(tiles.x[to + j * vectors, 0], given.x[token, given.stream + j, place.channel], inside)
        if given.g_layer_input is not None:
            to_layer = stage * tile.layer_vectors + half * 8 * vectors + place.of_layers
            inside = is_inside(given.x, token, place.channel, tile)
            copy_inside(tiles.g_input[to_layer, 0], given.g_layer_input[token, place.channel], inside)
    if thread < tokens:
        inside = row + thread < num_tokens
        copy_inside(tiles.rho[stage * tokens + thread], given.g_projected[tile.rows, row + thread], inside, 1)
    if given.h_pre is not None:
        for r in T.unroll(-(-tokens * n // tile.threads)):
            at = r * tile.threads + thread
            if at < tokens * n:
                inside = row + at // n < num_tokens
                copy_inside(
                    tiles.pre[stage * tokens * n + at], given.h_pre[row + at // n, given.stream + at % n], inside, 1
                )
    copy_dots(tiles.words, given.g_projected, row, stage, thread, tile)
    T.ptx_commit_group()


@T.macro
def store_stream(g_x, sums, tiles: Tiles, given: Given, place: Place, row, slot, stage, vector, words, products, tile):
    """One slot's g_x: what comes through s and the aggregation, then the products, stored from where they sum up."""
    n, vectors = tile.num_streams, tile.vectors
    values = T.alloc_local((VECTOR,), T.float32)
    at, of_layers, token = (T.alloc_var(T.int32) for _ in range(3))
    at = place.of_streams + stage * tile.stream_vectors + place.q % n * vectors
    of_layers = place.of_layers + stage * tile.layer_vectors
    token = stage * tile.tokens + place.token
    stream = T.bitwise_xor(place.q % n, slot)
    for half in T.unroll(2):
        rho = tiles.rho[token + half * 8]
        if given.g_layer_input is None:
            for e in T.unroll(VECTOR):
                sums[accumulator(0, half, e)] = 0.0
        else:
            for e in T.vectorized(VECTOR):
                vector[e] = tiles.g_input[of_layers + half * 8 * vectors, e]
            unpack(values, 0, vector, words)
            for e in T.unroll(VECTOR):
                weight = tiles.pre[(token + half * 8) * n + stream]
                sums[accumulator(0, half, e)] = weight * values[e]
        for e in T.vectorized(VECTOR):
            vector[e] = tiles.x[T.bitwise_xor(at, slot * vectors) + half * 8 * n * vectors, e]
        unpack(values, 0, vector, words)
        for e in T.unroll(VECTOR):
            sums[accumulator(0, half, e)] = fma(rho, values[e], sums[accumulator(0, half, e)])
    add_products(sums, 0, slot, *products, tile)
    for half in T.unroll(2):
        to = row + place.token + half * 8
        for e in T.vectorized(VECTOR):
            vector[e] = T.cast(sums[accumulator(0, half, e)], vector.dtype)
        inside = is_inside(given.x, to, place.channel, tile)
        store_vector(g_x[to, given.stream + stream, place.channel], words, 0, inside)


def project_backward_warps_kernel(
    num_streams: int,
    hidden_size: int,
    dtype: str,
    plan: WarpsPlan,
    needs_g_x: bool,
    needs_g_phi: bool,
    has_g_layer_input: bool,
):
    """Build `project_backward_kernel` by warps; C is a multiple of 8."""
    n, rows, stages = plan.streams, plan.rows, plan.stages
    tile = WarpTile(n, rows, plan.tokens, plan.channels, stages)
    tokens = tile.tokens
    num_tokens = T.dynamic("num_tokens")
    num_splits = T.dynamic("num_splits")
    unused = (1,)

    @T.prim_func
    def project_backward(
        g_projected: T.Tensor[(rows + 1, num_tokens), T.float32],
        x: T.Tensor[(num_tokens, num_streams, hidden_size), dtype],
        phi: T.Tensor[(rows, num_streams, hidden_size) if needs_g_x else unused, T.float32],
        h_pre: T.Tensor[(num_tokens, num_streams) if has_g_layer_input else unused, T.float32],
        g_layer_input: T.Tensor[(num_tokens, hidden_size) if has_g_layer_input else unused, dtype],
        g_x: T.Tensor[(num_tokens, num_streams, hidden_size) if needs_g_x else unused, dtype],
        partial: T.Tensor[(num_splits, rows, num_streams, hidden_size) if needs_g_phi else unused, T.float32],
        tokens_per_split: T.int32,
    ):
        with T.Kernel(
            num_streams // n,
            T.ceildiv(hidden_size, plan.channels),
            T.ceildiv(num_tokens, tokens_per_split),
            threads=tile.threads,
        ) as (stream_block, channel_block, split):
            x_tile = T.alloc_shared((stages * tile.stream_vectors, VECTOR), dtype)
            g_input_tile = T.alloc_shared((stages * tile.layer_vectors, VECTOR), dtype)
            phi_tile = T.alloc_shared((tile.phi_rows, tile.phi_vectors * VECTOR), T.bfloat16)
            dots = T.alloc_shared((stages * tokens * tile.dots_vectors, VECTOR), T.bfloat16)
            words_of_dots = T.view(dots, (stages * tokens * tile.dots_vectors, 4), T.float32)
            rho_tile = T.alloc_shared((stages * tokens,), T.float32)
            pre_tile = T.alloc_shared((stages * tokens * n,), T.float32)
            sums = T.alloc_local((16,), T.float32)
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
            first_stream = stream_block * n
            given = Given(
                *(x, g_layer_input if has_g_layer_input else None),
                *(g_projected, h_pre if has_g_layer_input else None, first_stream),
            )
            tiles = Tiles(x_tile, g_input_tile, words_of_dots, rho_tile, pre_tile)
            products = (halves, phi_halves, phi_tile, warp, lane)
            first_token = split * tokens_per_split
            num_tiles = T.ceildiv(T.min(tokens_per_split, num_tokens - first_token), tokens)

            copy_tile(tiles, given, place, first_token, 0, tile)
            if needs_g_x:
                load_phi(phi_tile, phi, first_stream, channel_block * plan.channels, thread, tile)
            clear_padding(dots, thread, tile)
            for e in T.unroll(tile.g_phi_tiles * tile.blocks * 4):
                g_phi[e] = 0.0
            for step in T.serial(num_tiles):
                row = first_token + step * tokens
                stage = step % stages
                T.ptx_wait_group(0)
                split_dots(dots, words_of_dots, stage, thread, tile)
                T.sync_threads()
                if stages > 1 and step + 1 < num_tiles:
                    copy_tile(tiles, given, place, row + tokens, 1 - stage, tile)
                if needs_g_x:
                    load_dots(halves, dots, stage, warp, lane, tile)
                    for slot in T.unroll(n):
                        store_stream(g_x, sums, tiles, given, place, row, slot, stage, vector, words, products, tile)
                if needs_g_phi:
                    add_g_phi(g_phi, dots, x_tile, stage, warp, lane, tile)
                if stages == 1:
                    T.sync_threads()
                    if step + 1 < num_tiles:
                        copy_tile(tiles, given, place, row + tokens, 0, tile)
            if needs_g_phi:
                store_g_phi(partial, g_phi, split, first_stream, channel_block * plan.channels, warp, lane, tile)

    return place_no_guards(project_backward)
