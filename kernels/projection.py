"""projection: x·phi and Σx² from one read of the stream.

Equations (14) and (15), for token t, row m of phi, and K = n·C:

    dots[t, m] = Σ_{i,c} x[t, i, c] · phi[m, i, c]        squares[t] = Σ_{i,c} x[t, i, c]²

Traffic per token: n·C read; dots and squares are small.

**Fixed chunks.** K is summed in chunks of `channels` channels across all n streams, streams in order. Every
chunk starts from zero, a group of chunks is added in order, from zero, and groups are added in order. With one
split a block adds them all in registers and writes the total, one slab. With more, blocks share them out and
write a slab per group, or, where a small batch needs more blocks than there are groups, a slab per chunk; the
reader adds what is left in the same order. So the split count, a run-time value, moves no bit of any token,
and neither does the token's place in the batch.

**Squares** are kept as LANES partial sums per token (channel c belongs to lane c mod LANES), which the
reader adds: their order follows from C alone, not from a thread layout.

**Tensor cores, float32 results.** phi is float32 and must not be rounded to the tensor core's operand type.
It is split once per call, phi = high + low, the two halves stacked as 2·M rows of one product; the reader
adds the halves. 2^-18 of an element is lost with bfloat16 halves, 2^-20 with TF32 ones. A bfloat16 stream is an
operand as it is. float16 and float32 streams use TF32 operands, where float16 is exact and float32 is split
too, x = high + low, in registers. A CPU multiplies float32 phi directly (`split` is off).
"""

from dataclasses import dataclass
from typing import Any

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from .eight_streams import project_of_eight_kernel
from .projection_plans import LANES, ProjectionPlan, WarpProjectionPlan
from .projection_warps import project_by_warps_kernel, split_phi_fragments_kernel

SPLIT_BLOCK = 1024


def high_half(value, operand_dtype: str):
    """The part of a float32 that the tensor core's operand type holds: rounded to bfloat16, cut to TF32."""
    if operand_dtype == "bfloat16":
        return T.cast(T.cast(value, T.bfloat16), T.float32)
    return T.reinterpret(T.reinterpret(value, T.uint32) & T.uint32(0xFFFFE000), T.float32)


def split_phi_kernel(num_streams: int, hidden_size: int, plan: ProjectionPlan, sums_streams: bool = False):
    """phi [M, n, C] float32 -> phi_split [columns, n, C]: rows of high halves, of low halves, of zeros.

    By warps alone, `sums_streams` splits Σ_j phi[:, j] instead, as of one stream.
    """
    if isinstance(plan, WarpProjectionPlan):
        return split_phi_fragments_kernel(num_streams, hidden_size, plan, sums_streams)
    n, rows, columns = num_streams, plan.rows, plan.padded_rows
    threads = 128

    @T.prim_func
    def split_phi(
        phi: T.Tensor[(rows, n, hidden_size), T.float32],
        phi_split: T.Tensor[(columns, n, hidden_size), plan.operand_dtype],
    ):
        with T.Kernel(T.ceildiv(hidden_size, SPLIT_BLOCK), columns, n, threads=threads) as (block, column, i):
            for c in T.Parallel(SPLIT_BLOCK):
                if block * SPLIT_BLOCK + c < hidden_size:
                    value = phi[column % rows, i, block * SPLIT_BLOCK + c]
                    high = high_half(value, plan.operand_dtype)
                    half = T.if_then_else(column < rows, high, T.if_then_else(column < 2 * rows, value - high, 0.0))
                    phi_split[column, i, block * SPLIT_BLOCK + c] = T.cast(half, plan.operand_dtype)

    return split_phi


@T.macro
def accumulate_squares(squares, x_tile, tokens, channels):
    """squares[t, lane] += Σ x_tile[t, c]² over the channels c of the lane, ascending."""
    for group in T.serial(channels // LANES):
        for t, lane in T.Parallel(tokens, LANES):
            value = T.cast(x_tile[t, group * LANES + lane], T.float32)
            squares[t, lane] = T.ieee_fmaf(value, value, squares[t, lane])


@T.macro
def accumulate_dots(dots, x_tile, phi_tile, plan: ProjectionPlan, dtype: str):
    """dots[t, m] += Σ_c x_tile[t, c] · phi_tile[m, c] on operands that the tensor core takes unrounded."""
    if not plan.split or plan.operand_dtype == dtype == "bfloat16":
        T.gemm(x_tile, phi_tile, dots, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
    else:
        high = T.alloc_fragment((plan.tokens, plan.channels), T.float32)
        for t, c in T.Parallel(plan.tokens, plan.channels):
            high[t, c] = high_half(T.cast(x_tile[t, c], T.float32), "float32")
        T.gemm(high, phi_tile, dots, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
        if dtype == "float32":
            for t, c in T.Parallel(plan.tokens, plan.channels):
                high[t, c] = x_tile[t, c] - high_half(x_tile[t, c], "float32")
            T.gemm(high, phi_tile, dots, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)


@dataclass(frozen=True)
class Sums:
    """Fragments that a block sums into: the dots [tokens, columns] and the lanes of the squares [tokens, LANES]."""

    dots: Any
    squares: Any


@T.macro
def allocate_sums(plan: ProjectionPlan):
    """The sums of a chunk, of its group, and of all the block's chunks."""
    dots = T.alloc_fragment((plan.tokens, plan.padded_rows), T.float32)
    squares = T.alloc_fragment((plan.tokens, LANES), T.float32)
    group_dots = T.alloc_fragment((plan.tokens, plan.padded_rows), T.float32)
    group_squares = T.alloc_fragment((plan.tokens, LANES), T.float32)
    total_dots = T.alloc_fragment((plan.tokens, plan.padded_rows), T.float32)
    total_squares = T.alloc_fragment((plan.tokens, LANES), T.float32)
    return Sums(dots, squares), Sums(group_dots, group_squares), Sums(total_dots, total_squares)


@T.macro
def clear(sums: Sums):
    """Both, from zero."""
    T.clear(sums.dots)
    T.clear(sums.squares)


@T.macro
def add_sums(to: Sums, sums: Sums, plan: ProjectionPlan):
    """to += sums"""
    for t, m in T.Parallel(plan.tokens, plan.padded_rows):
        to.dots[t, m] += sums.dots[t, m]
    for t, lane in T.Parallel(plan.tokens, LANES):
        to.squares[t, lane] += sums.squares[t, lane]


@T.macro
def store_slab(partial, slab, first_token, sums: Sums, plan: ProjectionPlan):
    """partial[slab] = dots of the halves, then the lanes of the squares; tokens last, so writes coalesce."""
    num_dots = plan.halves * plan.rows
    num_tokens = partial.shape[2]
    for t, m in T.Parallel(plan.tokens, plan.padded_rows):
        if first_token + t < num_tokens and m < num_dots:
            partial[slab, m, first_token + t] = sums.dots[t, m]
    for t, lane in T.Parallel(plan.tokens, LANES):
        if first_token + t < num_tokens:
            partial[slab, num_dots + lane, first_token + t] = sums.squares[t, lane]


@T.macro
def close_chunk(partial, chunk, first_token, sums: Sums, group: Sums, total: Sums, plan: ProjectionPlan, hidden_size):
    """A chunk is summed: written as a slab of its own, or added to its group, which is written or added to the total.

    Which of them follows from how many slabs there are.
    """
    num_slabs = partial.shape[0]
    num_chunks = plan.num_chunks(hidden_size)
    if plan.is_grouped(hidden_size):
        if num_slabs == num_chunks:
            store_slab(partial, chunk, first_token, sums, plan)
        else:
            add_sums(group, sums, plan)
            if (chunk + 1) % plan.chunks_per_group == 0 or chunk + 1 == num_chunks:
                if num_slabs > 1:
                    store_slab(partial, chunk // plan.chunks_per_group, first_token, group, plan)
                else:
                    add_sums(total, group, plan)
                clear(group)
    elif num_slabs > 1:
        store_slab(partial, chunk, first_token, sums, plan)
    else:
        add_sums(total, sums, plan)


def project_kernel(num_streams: int, hidden_size: int, dtype: str, plan: ProjectionPlan):
    """x [T, n, C], phi [columns, n, C] -> partial [slabs, slab_rows, T].

    `chunks_per_split` chunks go to each block of a token tile; `partial` has the slabs of `projection_plans.num_slabs`.
    """
    if isinstance(plan, WarpProjectionPlan) and num_streams == 8:
        return project_of_eight_kernel(hidden_size, plan)
    if isinstance(plan, WarpProjectionPlan):
        return project_by_warps_kernel(num_streams, hidden_size, plan)
    n, tokens, channels = num_streams, plan.tokens, plan.channels
    num_chunks = plan.num_chunks(hidden_size)
    num_tokens = T.dynamic("num_tokens")
    num_slabs = T.dynamic("num_slabs")

    @T.prim_func
    def project(
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        phi: T.Tensor[(plan.padded_rows, n, hidden_size), plan.operand_dtype],
        partial: T.Tensor[(num_slabs, plan.slab_rows, num_tokens), T.float32],
        chunks_per_split: T.int32,
    ):
        with T.Kernel(T.ceildiv(num_tokens, tokens), T.ceildiv(num_chunks, chunks_per_split), threads=plan.threads) as (
            tile,
            split,
        ):
            x_tile = T.alloc_shared((tokens, channels), dtype)
            phi_tile = T.alloc_shared((plan.padded_rows, channels), plan.operand_dtype)
            sums, group, total = allocate_sums(plan)

            # Read by fragments, not as an operand, which the product would lay out itself: without this, eight rows
            # meet in a bank. At n = 8 the indices spill 132 bytes of registers on sm_90a.
            if plan.split and not plan.operand_dtype == dtype == "bfloat16" and plan.padded_rows <= 96:
                T.annotate_layout({x_tile: make_swizzled_layout(x_tile)})
            first_token = tile * tokens
            first_chunk = split * chunks_per_split
            clear(total)
            if plan.is_grouped(hidden_size):
                clear(group)
            for chunk in T.serial(first_chunk, T.min(first_chunk + chunks_per_split, num_chunks)):
                clear(sums)
                for i in T.Pipelined(n, num_stages=plan.stages):
                    T.copy(
                        x[first_token : first_token + tokens, i, chunk * channels : (chunk + 1) * channels],
                        x_tile,
                    )
                    T.copy(phi[0 : plan.padded_rows, i, chunk * channels : (chunk + 1) * channels], phi_tile)
                    accumulate_squares(sums.squares, x_tile, tokens, channels)
                    accumulate_dots(sums.dots, x_tile, phi_tile, plan, dtype)
                close_chunk(partial, chunk, first_token, sums, group, total, plan, hidden_size)
            if num_slabs == 1:
                store_slab(partial, 0, first_token, total, plan)

    return project
