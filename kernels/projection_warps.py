"""The projection as thread-level code (see `warps`): for 16-bit streams of two or four on a GPU.

The sums are those of `projection`. A warp has 16 tokens and walks over chunks of 64 channels, two spans of 32. It takes
a span of a stream as the tensor core's m16n8k16 wants its second operand, 8 tokens a product:

    lane l has the tokens l // 4 and l // 4 + 8, and of each the 8 channels from 8·q on, q = l % 4: 16 bytes, four words
    words 0 and 1 are the operand of one product, words 2 and 3 that of the next

So a vector that was loaded, or mixed in registers, is an operand as it is. Which channels a product's steps are follows
from where phi has its columns, and that is settled once, by `split_phi_fragments`: a unit of 16 bytes is what a lane
needs of 16 rows for one product, and a block copies a chunk of units without a thought. For
`post_pre`, which has no launch before it, `copy_phi_rows` and `split_phi_rows` make the units in shared memory.

Rows of phi lie in tiles of 16: high halves, then the low ones of the same rows, whose products are added to the same
sums; 8 rows that are left have their high halves in one tile with their low ones, added up when a chunk is closed.

**float16.** Halves are float16 as the stream is, since one product has operands of one kind. 11 bits and 11 bits hold
phi to 2^-23 of an element. Low halves are kept 2^11 times as large, so that they are normal where the high ones are, to
2^-36 below that, and so have sums of their own, multiplied with 2^-11 when a chunk is closed. From 65520 on an element
of phi has no high half: its row is then NaN for every token, and with it the row's coefficients.

**Squares** are the diagonal of products too: a vector's four words are two rows of a first operand, (0, 2) and (1, 3),
and multiplied with themselves. Of 128 sums a lane uses at most two; this takes 2 instructions where 16 multiply-adds
and 8 conversions would do the same.

**Order.** A chunk's sums start from zero: spans in order, of each the streams, of each the steps of 16 channels, of
each the high halves, then the low ones. Chunks are added up in groups, and groups by who reads the slabs, a slab a
group or a slab a chunk: so the split moves no bit, nor does a token's place. A NaN of one token touches no other: its
products are rows or columns of their own.
"""

from dataclasses import dataclass
from typing import Any

import tilelang.language as T

from .projection_plans import WarpProjectionPlan
from .warp_tiles import copy_inside
from .warps import (
    VECTOR,
    WARP,
    WARP_CHANNELS,
    WARP_TOKENS,
    WORDS,
    clear_sums,
    copy_async,
    fma,
    high_half,
    low_half,
    mma,
    pack,
    place_no_guards,
    vector_at,
)

STEPS = WARP_CHANNELS // 16  # products that a span of a stream takes


@dataclass(frozen=True)
class Sums:
    """A lane's sums of products: of the chunk with phi and of its squares, and of the chunk's group."""

    dots: Any
    squares: Any
    group_dots: Any
    group_squares: Any


@T.macro
def allocate_sums(plan: WarpProjectionPlan):
    """A lane's registers for them."""
    dots = T.alloc_local((2 * plan.dots_tiles * 4,), T.float32)
    squares = T.alloc_local((16,), T.float32)
    group_dots = T.alloc_local((2 * plan.group_sums,), T.float32)
    group_squares = T.alloc_local((2,), T.float32)
    return Sums(dots, squares, group_dots, group_squares)


def scale_low(low, plan: WarpProjectionPlan):
    """A low half as it is kept."""
    return low if plan.low_scale == 1 else low * T.float32(plan.low_scale)


def split_phi_fragments_kernel(
    num_streams: int, hidden_size: int, plan: WarpProjectionPlan, sums_streams: bool = False
):
    """phi [M, n, C] float32 -> phi_split [units, 8]: chunk, span, stream, step, tile, lane; zeros beyond M and C.

    Lane (g, q) of a step has the channels 8·q + 4·step + (0, 1) of rows g and g + 8 of the tile, then those + (2, 3).
    With `sums_streams` there is one stream, phi summed over all, ascending, in float32.
    """
    n, rows, tiles = 1 if sums_streams else num_streams, plan.rows, plan.phi_tiles
    units = plan.num_chunks(hidden_size) * plan.units(n)
    spans = plan.num_chunks(hidden_size) * plan.channels // WARP_CHANNELS

    @T.prim_func
    def split_phi(
        phi: T.Tensor[(rows, num_streams, hidden_size), T.float32],
        phi_split: T.Tensor[(units, VECTOR), plan.operand_dtype],
    ):
        with T.Kernel(spans, n, threads=tiles * STEPS * WARP) as (span, stream):
            values, of_stream = T.alloc_local((4,), T.float32), T.alloc_local((4,), T.float32)
            row = T.alloc_var(T.int32)
            halves = T.alloc_local((VECTOR,), plan.operand_dtype)
            thread = T.get_thread_binding()
            tile, step, lane = thread // (STEPS * WARP), thread // WARP % STEPS, thread % WARP
            channel = span * WARP_CHANNELS + lane % 4 * VECTOR + step * 4
            is_mixed = plan.sum_tiles > plan.full_tiles and tile == plan.full_tiles
            for lower in T.unroll(2):  # rows g, then g + 8
                # high halves of 16 rows a tile, then their low halves; in the tile between 8 rows of both
                first = T.if_then_else(is_mixed, plan.full_tiles * 16, tile % plan.sum_tiles * 16 + lower * 8)
                is_low = T.if_then_else(is_mixed, lower == 1, tile > plan.sum_tiles - 1)
                for e in T.unroll(4):
                    values[e] = 0.0
                row = first + lane // 4
                if T.And(row < rows, channel < hidden_size):
                    for j in T.unroll(num_streams if sums_streams else 1):
                        for e in T.vectorized(4):
                            of_stream[e] = phi[row, stream + j, channel + e]
                        for e in T.unroll(4):
                            values[e] = of_stream[e] if n == num_streams else values[e] + of_stream[e]
                for e in T.unroll(4):
                    high = T.cast(T.cast(values[e], plan.operand_dtype), T.float32)
                    halves[e // 2 * 4 + lower * 2 + e % 2] = T.cast(
                        T.if_then_else(is_low, scale_low(values[e] - high, plan), high), plan.operand_dtype
                    )
            unit = (((span * n + stream) * STEPS + step) * tiles + tile) * WARP + lane
            for e in T.vectorized(VECTOR):
                phi_split[unit, e] = halves[e]

    return place_no_guards(split_phi)


@T.macro
def copy_phi(phi_tile, phi, chunk, stage, thread, plan: WarpProjectionPlan):
    """Start to copy a chunk of phi into a stage of its tile, all threads of the block together."""
    units = phi_tile.shape[0] // 2
    for r in T.unroll(units // plan.threads):
        at = r * plan.threads + thread
        copy_async(phi_tile[stage + at, 0], phi[chunk * units + at, 0])


@T.macro
def take_phi(phi_tile, phi, chunk, last_chunk, stage: T.Ref, thread, plan: WarpProjectionPlan):
    """Wait for the chunk's phi, which is at `stage`, and start to copy the next chunk's into the other stage."""
    T.ptx_wait_group(0)
    T.sync_threads()
    if chunk + 1 < last_chunk:
        copy_phi(phi_tile, phi, chunk + 1, phi_tile.shape[0] // 2 - stage, thread, plan)
    T.ptx_commit_group()


@T.macro
def copy_phi_rows(phi_tile, phi, stream, channel, lane, spans):
    """Start to copy a stream's rows to where `split_phi_rows` leaves their halves: of a lane four channels of rows
    lane // 4, + 8 and so on. Zeros beyond the last channel and the last row.
    """
    rows, n, hidden_size = phi.shape
    eights = -(-rows // 8)
    whole = T.view(phi_tile, (phi_tile.shape[0], WORDS), T.float32)
    for span in T.unroll(spans):
        for step in T.unroll(STEPS):
            for r in T.unroll(eights):
                to = (((span * n + stream) * STEPS + step) * eights + r) * WARP + lane
                first = channel + span * WARP_CHANNELS + step * WORDS
                source = T.min(first, hidden_size - WORDS)
                if rows % 8 == 0:
                    copy_inside(whole[to, 0], phi[lane // 4 + r * 8, stream, source], first < hidden_size, WORDS)
                else:
                    row = T.min(lane // 4 + r * 8, rows - 1)
                    inside = T.And(first < hidden_size, lane // 4 + r * 8 < rows)
                    copy_inside(whole[to, 0], phi[row, stream, source], inside, WORDS)


@T.macro
def split_phi_rows(phi_tile, stream, lane, n, spans, plan: WarpProjectionPlan):
    """The halves of what the lane has copied, in its place, as `split_phi_fragments` has them."""
    tiles, full, dtype = plan.phi_tiles, plan.full_tiles, plan.operand_dtype  # a tile for 8 rows that were copied
    rows, halves = T.alloc_local((tiles * WORDS,), T.float32), T.alloc_local((tiles * WORDS,), T.uint32)
    values = T.alloc_local((2,), T.float32)
    copied = T.view(phi_tile, (phi_tile.shape[0], WORDS), T.float32)
    whole = T.view(phi_tile, (phi_tile.shape[0], WORDS), T.uint32)
    for span in T.unroll(spans):
        for step in T.unroll(STEPS):
            unit = ((span * n + stream) * STEPS + step) * tiles * WARP + lane
            for r in T.unroll(tiles):
                for e in T.vectorized(WORDS):
                    rows[r * WORDS + e] = copied[unit + r * WARP, e]
            for r in tuple(range(tiles)):
                for pair in T.unroll(2):
                    # of 16 rows: high halves, then low; between them 8 rows of both
                    to = r // 2 * WORDS + pair * 2 + r % 2
                    to_low = to + (full + 1) * WORDS if r < 2 * full else to + 1
                    for e in T.unroll(2):
                        values[e] = rows[r * WORDS + pair * 2 + e]
                    pack(halves, to, values, dtype)
                    values[0] = scale_low(values[0] - low_half(halves[to], dtype), plan)
                    values[1] = scale_low(values[1] - high_half(halves[to], dtype), plan)
                    pack(halves, to_low, values, dtype)
            for m in T.unroll(tiles):
                for e in T.vectorized(WORDS):
                    whole[unit + m * WARP, e] = halves[m * WORDS + e]


@T.macro
def project_stream(sums: Sums, words, phi_tile, at, j, num_streams, plan: WarpProjectionPlan):
    """The chunk's sums += those of a span of stream j: words[(half · n + j) · 4 : …], and phi's units from `at` on."""
    n, tiles, dots_tiles, dtype = num_streams, plan.phi_tiles, plan.dots_tiles, plan.operand_dtype
    at_once = tiles if n <= 4 else 1  # tiles of phi that are in registers
    of_phi = T.alloc_local((at_once * VECTOR,), dtype)
    exchanged = T.alloc_local((WORDS,), T.uint32)
    for step in T.unroll(STEPS):
        for first in tuple(range(0, tiles, at_once)):
            for m in T.unroll(at_once):
                for e in T.vectorized(VECTOR):
                    of_phi[m * VECTOR + e] = phi_tile[at + ((j * STEPS + step) * tiles + first + m) * WARP, e]
            for m in T.unroll(at_once):
                for half in T.unroll(2):
                    of_x = (half * n + j) * WORDS + step * 2
                    mma(
                        *(of_phi, m * VECTOR, words, of_x),
                        *(sums.dots, (half * dots_tiles + (first + m) % dots_tiles) * 4, dtype),
                    )
    for half in T.unroll(2):
        for k in T.unroll(2):
            exchanged[k * 2] = words[(half * n + j) * WORDS + k]
            exchanged[k * 2 + 1] = words[(half * n + j) * WORDS + k + 2]
            mma(words, (half * n + j) * WORDS, exchanged, k * 2, sums.squares, (half * 2 + k) * 4, dtype)


@T.macro
def project_span(sums: Sums, words, phi_tile, at, num_streams, plan: WarpProjectionPlan):
    """The chunk's sums += those of a span: words[(half · n + stream) · 4 : …], and phi's units from `at` on."""
    for j in T.unroll(num_streams):
        project_stream(sums, words, phi_tile, at, j, num_streams, plan)


def both_halves(high, low, plan: WarpProjectionPlan):
    """A dot from its products with both halves of phi."""
    return high + low if plan.low_scale == 1 else fma(low, T.float32(1 / plan.low_scale), high)


def full_half(dots, half, e, plan: WarpProjectionPlan):
    """A dot of a full tile: high and low halves are in one sum, or low ones that are scaled in one of their own."""
    at = half * plan.dots_tiles * 4 + e
    if plan.dots_tiles == plan.sum_tiles:
        return dots[at]
    return both_halves(dots[at], dots[at + plan.sum_tiles * 4], plan)


@T.macro
def close_chunk(partial, chunk, sums: Sums, token, plan: WarpProjectionPlan, hidden_size):
    """A chunk is summed: add it to its group; store that if the group ends here, or if every chunk is a slab.

    `token` is the lane's first one. Of the squares' products a lane has row g on the diagonal where q is g // 2.
    """
    num_slabs, _, num_tokens = partial.shape
    num_chunks, full, of_half = plan.num_chunks(hidden_size), plan.full_tiles, plan.group_sums
    lane = T.get_thread_binding() % WARP
    g, q = lane // 4, lane % 4
    for half in T.unroll(2):
        for e in T.unroll(full * 4):
            sums.group_dots[half * of_half + e] += full_half(sums.dots, half, e, plan)
        for e in T.unroll((plan.sum_tiles - full) * 2):  # high halves, and their low ones 8 rows below
            at = (half * plan.dots_tiles + full) * 4 + e
            sums.group_dots[half * of_half + full * 4 + e] += both_halves(sums.dots[at], sums.dots[at + 2], plan)
        even = sums.squares[half * 8] + sums.squares[half * 8 + 6]
        odd = sums.squares[half * 8 + 1] + sums.squares[half * 8 + 7]
        sums.group_squares[half] += T.if_then_else(g % 2 == 0, even, odd)
    if T.Or(T.Or(num_slabs == num_chunks, (chunk + 1) % plan.chunks_per_group == 0), chunk + 1 == num_chunks):
        slab = T.if_then_else(num_slabs == num_chunks, chunk, chunk // plan.chunks_per_group)
        for half in T.unroll(2):
            for e in T.unroll(2):
                to = token - g + half * 8 + q * 2 + e
                if to < num_tokens:
                    for m in T.unroll(full):
                        for below in T.unroll(2):
                            row = m * 16 + below * 8 + g
                            partial[slab, row, to] = sums.group_dots[half * of_half + m * 4 + below * 2 + e]
                    if plan.sum_tiles > full and (plan.rows % 8 == 0 or full * 16 + g < plan.rows):
                        partial[slab, full * 16 + g, to] = sums.group_dots[half * of_half + full * 4 + e]
            if T.And(q == g // 2, token + half * 8 < num_tokens):
                partial[slab, plan.rows, token + half * 8] = sums.group_squares[half]
        clear_sums(sums.group_dots, sums.group_squares)


@T.macro
def load_streams(words, x, token, half, channel, inside):
    """words[(half · n + i) · 4 : …] = the lane's vector of stream i."""
    n = x.shape[1]
    for i in T.unroll(n):
        at = (half * n + i) * WORDS
        words[at : at + WORDS] = vector_at(x[token, i, channel], inside)


def project_by_warps_kernel(num_streams: int, hidden_size: int, plan: WarpProjectionPlan):
    """x [T, n, C], phi [units, 8] as of `split_phi_fragments_kernel` -> partial [slabs, slab_rows, T].

    `chunks_per_split` chunks go to each block of a token tile. A span is loaded while the one before is multiplied.
    """
    n = num_streams
    num_chunks, units = plan.num_chunks(hidden_size), plan.units(num_streams)
    spans = plan.channels // WARP_CHANNELS
    whole = hidden_size % plan.channels == 0  # the last chunk is not a part of one
    num_tokens = T.dynamic("num_tokens")
    num_slabs = T.dynamic("num_slabs")

    @T.prim_func
    def project(
        x: T.Tensor[(num_tokens, n, hidden_size), plan.operand_dtype],
        phi: T.Tensor[(num_chunks * units, VECTOR), plan.operand_dtype],
        partial: T.Tensor[(num_slabs, plan.slab_rows, num_tokens), T.float32],
        chunks_per_split: T.int32,
    ):
        with T.Kernel(
            T.ceildiv(num_tokens, plan.tokens), T.ceildiv(num_chunks, chunks_per_split), threads=plan.threads
        ) as (tile, split):
            phi_tile = T.alloc_shared((2 * units, VECTOR), plan.operand_dtype)
            ahead = T.alloc_local((2 * n * WORDS,), T.uint32)
            words = T.alloc_local((2 * n * WORDS,), T.uint32)
            sums = allocate_sums(plan)
            token, channel, stage = T.alloc_var(T.int32), T.alloc_var(T.int32), T.alloc_var(T.int32)
            at, following = T.alloc_var(T.int32), T.alloc_var(T.int32)

            thread = T.get_thread_binding()
            lane = thread % WARP
            first_chunk = split * chunks_per_split
            last_chunk = T.min(first_chunk + chunks_per_split, num_chunks)
            token = tile * plan.tokens + thread // WARP * WARP_TOKENS + lane // 4
            channel = first_chunk * plan.channels + lane % 4 * VECTOR
            stage = 0
            for half in T.unroll(2):
                inside = token + half * 8 < num_tokens
                if not whole:
                    inside = T.And(inside, channel < hidden_size)
                load_streams(ahead, x, token + half * 8, half, channel, inside)
            copy_phi(phi_tile, phi, first_chunk, 0, thread, plan)
            T.ptx_commit_group()
            clear_sums(sums.group_dots, sums.group_squares)
            for chunk in T.serial(first_chunk, last_chunk):
                take_phi(phi_tile, phi, chunk, last_chunk, stage, thread, plan)
                clear_sums(sums.dots, sums.squares)
                at = stage + lane
                for span in T.unroll(spans, unroll_factor=1):
                    goes_on = chunk * spans + span + 1 < last_chunk * spans
                    following = channel + WARP_CHANNELS
                    for e in T.unroll(2 * n * WORDS):
                        words[e] = ahead[e]
                    for half in T.unroll(2):
                        inside = T.And(goes_on, token + half * 8 < num_tokens)
                        if not whole:
                            inside = T.And(inside, following < hidden_size)
                        load_streams(ahead, x, token + half * 8, half, following, inside)
                    project_span(sums, words, phi_tile, at, n, plan)
                    channel = channel + WARP_CHANNELS
                    at = at + units // spans
                close_chunk(partial, chunk, sums, token, plan, hidden_size)
                stage = units - stage

    return place_no_guards(project)
