"""`aggregate_norm_backward` as thread-level code (see `warps`): for 16-bit streams on a GPU.

The formulas are those of `aggregate_norm_backward`. A block has some tokens one after the other, a thread the same
channels of all of them: `slots` vectors of 8, at `thread`, `thread + threads` and so on. Per token:

    for each slot    u, and its terms of A, B, D and Σ u²; load x and g_layer_input of the next token
    in each warp     the sums over lanes, left in shared memory
    barrier
    all              D and Σ u² of every warp: r, and r³ · D / C
    for each slot    g_u, stored; g_w, in registers until the block's last token

So memory works on the next token while this one is added up, and one barrier is met a token: what warps leave for each
other has two places, taken in turn.

**Order.** A thread adds up its channels ascending, a warp its lanes pairwise, 16 apart, then 8, 4, 2, 1, and all add
the warps up ascending: r may differ in its last bits from the one that `aggregate_norm` multiplied with.

Shared memory: w in float32, 4·C bytes, of which a thread reads what it wrote itself.
"""

import tilelang.language as T

from .plans import NormWarpsTile
from .warps import (
    VECTOR,
    WARP,
    WORDS,
    clear_sums,
    fma,
    high_half,
    low_half,
    pack,
    place_no_guards,
    store_vector,
    vector_at,
)


@T.macro
def keep_weight(weight_tile, weight, at, slot, thread, threads):
    """The thread's vector `at` of w, in float32, in two places of 16 bytes."""
    for half in T.unroll(2):
        for e in T.vectorized(WORDS):
            weight_tile[(slot * 2 + half) * threads + thread, e] = T.cast(weight[at, half * WORDS + e], T.float32)


@T.macro
def kept_weight(w, weight_tile, slot, thread, threads):
    """w = what `keep_weight` has left of the slot."""
    for half in T.unroll(2):
        for e in T.vectorized(WORDS):
            w[half * WORDS + e] = weight_tile[(slot * 2 + half) * threads + thread, e]


@T.macro
def load_slot(words, g_words, x, g_layer_input, token, at, slot, inside):
    """A thread's vectors of all streams and of g_layer_input."""
    n = x.shape[1]
    g_words[slot * WORDS : (slot + 1) * WORDS] = vector_at(g_layer_input[token, at, 0], inside)
    for i in T.unroll(n):
        to = (slot * n + i) * WORDS
        words[to : to + WORDS] = vector_at(x[token, i, at, 0], inside)


@T.macro
def add_slot(dots, norms, u, words, g_words, w, h, slot, n, dtype):
    """u of the slot; dots += A and B, norms += D and Σ u², by its channels ascending."""
    x = T.alloc_local((n,), T.float32)
    weighted = T.alloc_local((1,), T.float32)
    for e in T.unroll(WORDS):
        for k in (0, 1):
            half = high_half if k else low_half
            at = slot * VECTOR + e * 2 + k
            u[at] = 0.0
            for i in T.unroll(n):
                x[i] = half(words[(slot * n + i) * WORDS + e], dtype)
                u[at] = fma(h[i], x[i], u[at])
            weighted[0] = w[e * 2 + k] * half(g_words[slot * WORDS + e], dtype)
            for i in T.unroll(n):
                dots[i] = fma(weighted[0], x[i], dots[i])
                dots[n + i] = fma(u[at], x[i], dots[n + i])
            norms[0] = fma(weighted[0], u[at], norms[0])
            norms[1] = fma(u[at], u[at], norms[1])


@T.macro
def sum_lanes(sums_tile, stage, warp, lane, first, values):
    """sums_tile[stage, warp, first : …] = the sums of all lanes' values, a power of two of them.

    Lanes hand over half of the values that they have and keep the others, as long as they have several.
    """
    count = values.shape[0]
    for step in (0, 1, 2, 3, 4):
        offset, kept = 16 >> step, count >> (step + 1)
        for k in T.unroll(max(1, kept)):
            if kept > 0:
                upper = lane // offset % 2 == 1
                given = T.Select(upper, values[k], values[kept + k])
                values[k] = T.Select(upper, values[kept + k], values[k]) + T.shfl_xor(given, offset)
            else:
                values[k] = values[k] + T.shfl_xor(values[k], offset)
    if lane % (WARP // count) == 0:
        sums_tile[stage, warp, first + lane // (WARP // count)] = values[0]


@T.macro
def write_slot(g_u, g_weight, u, g_words, w, scale, pull, token, at, slot, needs_g_weight, dtype):
    """g_u of the slot's channels, and their share of g_w."""
    value = T.alloc_local((2,), T.float32)
    result = T.alloc_local((WORDS,), T.uint32)
    for e in T.unroll(WORDS):
        for k in (0, 1):
            g = (high_half if k else low_half)(g_words[slot * WORDS + e], dtype)
            of = slot * VECTOR + e * 2 + k
            value[k] = fma(-pull, u[of], scale * w[e * 2 + k] * g)
            if needs_g_weight:
                g_weight[of] = fma(g, u[of] * scale, g_weight[of])
        pack(result, e, value, dtype)
    store_vector(g_u[token, at, 0], result, 0, True)


def aggregate_norm_backward_by_warps_kernel(
    num_streams: int, hidden_size: int, dtype: str, weight_dtype: str, tile: NormWarpsTile, needs_g_weight: bool
):
    """Build `aggregate_norm_backward_kernel` by warps."""
    n, threads, width = num_streams, tile.lanes, tile.width
    vectors, slots, warps = hidden_size // width, tile.steps(hidden_size), tile.lanes // WARP
    row = (vectors, width)
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
        with T.Kernel(T.ceildiv(num_tokens, tokens_per_block), threads=threads) as block:
            weight_tile = T.alloc_shared((slots * 2 * threads, WORDS), T.float32)
            sums_tile = T.alloc_shared((2, warps, 2 * n + 2), T.float32)
            words = T.alloc_local((slots * n * WORDS,), T.uint32)
            g_words = T.alloc_local((slots * WORDS,), T.uint32)
            g_ahead = T.alloc_local((slots * WORDS,), T.uint32)
            u = T.alloc_local((slots * VECTOR,), T.float32)
            g_weight = T.alloc_local((slots * VECTOR if needs_g_weight else 1,), T.float32)
            w = T.alloc_local((VECTOR,), T.float32)
            h, h_ahead = T.alloc_local((n,), T.float32), T.alloc_local((n,), T.float32)
            dots, norms = T.alloc_local((2 * n,), T.float32), T.alloc_local((2,), T.float32)
            sums = T.alloc_local((2,), T.float32)
            scale, pull = T.alloc_var(T.float32), T.alloc_var(T.float32)
            token, stage = T.alloc_var(T.int32), T.alloc_var(T.int32)

            T.annotate_min_blocks_per_sm(tile.blocks_per_sm)
            thread = T.get_thread_binding()
            lane, warp = thread % WARP, thread // WARP
            first = block * tokens_per_block
            num_own = T.min(tokens_per_block, num_tokens - first)
            token = first
            stage = 0
            for slot in tuple(range(slots)):
                at = slot * threads + thread
                if at < vectors:
                    keep_weight(weight_tile, weight, at, slot, thread, threads)
                load_slot(words, g_ahead, x, g_layer_input, token, at, slot, at < vectors)
            for e in T.vectorized(n):
                h_ahead[e] = h_pre[token, e]
            if needs_g_weight:
                clear_sums(g_weight)
            for step in T.serial(num_own):
                for e in T.unroll(n):
                    h[e] = h_ahead[e]
                for e in T.unroll(slots * WORDS):
                    g_words[e] = g_ahead[e]
                clear_sums(dots, norms)
                for e in T.vectorized(n):
                    h_ahead[e] = h_pre[T.min(token + 1, num_tokens - 1), e]
                for slot in tuple(range(slots)):
                    at = slot * threads + thread
                    if (slot + 1) * threads <= vectors or at < vectors:
                        kept_weight(w, weight_tile, slot, thread, threads)
                        add_slot(dots, norms, u, words, g_words, w, h, slot, n, dtype)
                        load_slot(words, g_ahead, x, g_layer_input, token + 1, at, slot, step + 1 < num_own)
                sum_lanes(sums_tile, stage, warp, lane, 0, dots)
                sum_lanes(sums_tile, stage, warp, lane, 2 * n, norms)
                T.sync_threads()
                clear_sums(sums)
                for k in T.unroll(warps):
                    for e in T.unroll(2):
                        sums[e] = sums[e] + sums_tile[stage, k, 2 * n + e]
                scale = T.rsqrt(sums[1] * (1.0 / hidden_size) + eps)
                pull = sums[0] * scale * scale * scale * (1.0 / hidden_size)
                if thread < n:
                    clear_sums(sums)
                    for k in T.unroll(warps):
                        for e in T.unroll(2):
                            sums[e] = sums[e] + sums_tile[stage, k, e * n + thread]
                    g_h_pre[token, thread] = fma(-pull, sums[1], scale * sums[0])
                for slot in tuple(range(slots)):
                    at = slot * threads + thread
                    if (slot + 1) * threads <= vectors or at < vectors:
                        kept_weight(w, weight_tile, slot, thread, threads)
                        write_slot(
                            *(g_u, g_weight, u, g_words, w, scale, pull, token, at, slot),
                            *(needs_g_weight, dtype),
                        )
                token = token + 1
                stage = 1 - stage
            if needs_g_weight:
                for slot in tuple(range(slots)):
                    at = slot * threads + thread
                    if at < vectors:
                        for e in T.vectorized(VECTOR):
                            partial[block, at, e] = g_weight[slot * VECTOR + e]

    return place_no_guards(aggregate_norm_backward)
