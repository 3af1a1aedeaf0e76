"""Sums of the boundary in one launch, `post_pre`: of a chunk by a warp, of all chunks by a block (see `warps`).

A block has 16 tokens and a chunk of 64 channels. `project_chunk` and `store_chunk` leave a chunk's sums in `partial`,
by the formulas and in the order of `projection_warps`; `add_chunks` adds them up as `sum_token_slabs` does, and
`weigh_streams` makes h_pre of them.
"""

import tilelang.language as T

from .coefficients_aggregate import Numbers
from .logits import sigmoid
from .projection_plans import WarpProjectionPlan
from .projection_warps import STEPS, both_halves
from .warps import VECTOR, WARP, WORDS, clear_sums, mma

QUAD = 4  # tokens whose sums a thread adds up


@T.macro
def project_chunk(dots, squares, phi_tile, next_tile, half, lane, n, spans, upper, plan: WarpProjectionPlan):
    """The chunk's sums of 8 tokens, in the order of `project_span`: of rows 0 to 15 if `upper`, else of the other 8,
    high halves above their low ones, and of the squares.
    """
    tiles, full, dtype = plan.phi_tiles, plan.full_tiles, plan.operand_dtype
    of_phi = T.alloc_local((2 * VECTOR,), dtype)
    words, exchanged = T.alloc_local((WORDS,), T.uint32), T.alloc_local((WORDS,), T.uint32)
    whole = T.view(next_tile, (next_tile.shape[0], WORDS), T.uint32)
    clear_sums(dots, squares)
    for span in T.unroll(spans):
        for j in T.unroll(n):
            for e in T.vectorized(WORDS):
                words[e] = whole[((span * 2 + half) * n + j) * WARP + lane, e]
            for step in T.unroll(STEPS):
                unit = ((span * n + j) * STEPS + step) * tiles * WARP + lane
                for m, tile in enumerate((0, full + 1) if upper else (full,)):
                    for e in T.vectorized(VECTOR):
                        of_phi[m * VECTOR + e] = phi_tile[unit + tile * WARP, e]
                    mma(of_phi, m * VECTOR, words, step * 2, dots, m % (dots.shape[0] // 4) * 4, dtype)
            if not upper:
                for k in T.unroll(2):
                    exchanged[k * 2] = words[k]
                    exchanged[k * 2 + 1] = words[k + 2]
                    mma(words, 0, exchanged, k * 2, squares, k * 4, dtype)


@T.macro
def store_chunk(partial, tile, chunk, dots, squares, half, lane, upper, plan: WarpProjectionPlan):
    """A chunk's sums, from zero as `close_chunk` adds them: `partial` has 16 tokens in a row."""
    pair = T.alloc_local((2,), T.float32)
    g, first, rows, full = lane // 4, half * 8 + lane % 4 * 2, plan.rows, plan.full_tiles * 16
    if upper:
        for below in T.unroll(2):
            for e in T.unroll(2):
                at = below * 2 + e
                pair[e] = 0.0 + (dots[at] if dots.shape[0] == 4 else both_halves(dots[at], dots[4 + at], plan))
            for e in T.vectorized(2):
                partial[tile, chunk, below * 8 + g, first + e] = pair[e]
    else:
        for e in T.unroll(2):
            pair[e] = 0.0 + both_halves(dots[e], dots[e + 2], plan)
        if rows % 8 == 0 or full + g < rows:
            for e in T.vectorized(2):
                partial[tile, chunk, full + g, first + e] = pair[e]
        if lane % 4 == g // 2:  # which has row g on the diagonal
            even, odd = squares[0] + squares[6], squares[1] + squares[7]
            partial[tile, chunk, rows, half * 8 + g] = 0.0 + T.if_then_else(g % 2 == 0, even, odd)


@T.macro
def add_chunks(z, partial, tile, needed_rows, num_tokens, rows, n, per_group, threads):
    """z[row, token] = the tile's sums: chunks ascending in groups, each from zero, as `sum_token_slabs` does.

    Of `needed_rows` fewer than all, only h_pre's and the squares. Two threads have four tokens of a row, each half of
    the groups: the first one's total is where the second one goes on.
    """
    num_chunks, tokens = partial.shape[1], partial.shape[3]
    of_first = -(-num_chunks // (2 * per_group))  # groups
    whole = 2 * of_first * per_group == num_chunks
    total, of_chunk = T.alloc_local((QUAD,), T.float32), T.alloc_local((QUAD,), T.float32)
    sums = T.alloc_local((of_first * QUAD,), T.float32)
    # Variables, for tilelang takes half a minute to simplify what these expressions are together.
    row, quad, chunk = T.alloc_var(T.int32), T.alloc_var(T.int32), T.alloc_var(T.int32)
    shift, second, item, items = T.alloc_var(T.int32), T.alloc_var(T.int32), T.alloc_var(T.int32), T.alloc_var(T.int32)
    left = num_tokens - tile * tokens
    shift = T.if_then_else(left > 2 * QUAD, 2, T.if_then_else(left > QUAD, 1, 0))  # of four, two, one quads
    items = T.shift_left(needed_rows, shift)
    second = T.get_thread_binding() % 2
    item = T.get_thread_binding() // 2
    for _ in T.serial(T.ceildiv(items, threads // 2)):
        row = T.shift_right(item, shift)
        quad = item - T.shift_left(row, shift)
        if T.And(needed_rows <= rows, row == n):
            row = rows
        row = T.min(row, rows)
        clear_sums(sums, total)
        chunk = second * of_first * per_group
        for g in T.unroll(of_first):
            for _ in T.unroll(per_group):
                if whole or chunk < num_chunks:
                    for e in T.vectorized(QUAD):
                        of_chunk[e] = partial[tile, chunk, row, quad * QUAD + e]
                    for e in T.unroll(QUAD):
                        sums[g * QUAD + e] = sums[g * QUAD + e] + of_chunk[e]
                chunk = chunk + 1
        for half in T.unroll(2):
            for e in T.unroll(QUAD):
                if half == 1:
                    total[e] = T.shfl_xor(total[e], 1)
                for g in T.unroll(of_first):
                    total[e] = T.Select(second == half, total[e] + sums[g * QUAD + e], total[e])
        if T.And(second == 1, item < items):
            for e in T.vectorized(QUAD):
                z[row, quad * QUAD + e] = total[e]
        item = item + threads // 2


@T.macro
def weigh_streams(h, z, alpha, bias, at, rows, n, numbers: Numbers):
    """h = the token's h_pre, from its sums."""
    scale = T.alloc_local((1,), T.float32)
    scale[0] = T.rsqrt(z[rows, at] * numbers.inverse_size + numbers.rms_eps)
    for i in T.unroll(n):
        h[i] = sigmoid(alpha[0] * (z[i, at] * scale[0]) + bias[i]) + numbers.pre_eps
