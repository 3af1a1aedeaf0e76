"""post_pre: the whole boundary between two sublayers in one launch, for few tokens (see `warps`).

Equations (3) and (14) to (19), with the bits of `post_project`, then `coefficients_aggregate`:

    x_next[t, j, c]   = Σ_i h_res[t, j, i] · x[t, i, c] + h_post[t, j] · layer_output[t, c]
    h_pre, h_post, h_res of the next sublayer from Σ_k x_next[t, k] · phi[m, k] and Σ_k x_next[t, k]²
    layer_input[t, c] = Σ_i h_pre[t, i] · x_next[t, i, c], in the delayed form with the h_pre of the boundary before

Traffic per token: (2n + 2)·C, x_next is not read again; phi once for 16 tokens, in float32.

A block has 16 tokens and a chunk of 64 channels, of which a thread mixes 8 of one token in all streams. They stay in
its registers:

    load     x, layer_output, the coefficients, phi (a stream a warp): all at once
    mix      x_next, stored, and left in shared memory as an operand; phi's halves beside it
    project  the chunk's sums of 8 tokens a warp: rows 0 to 15, or the others and the squares; left in `partial`
    arrive   one more of the tile's blocks has its sums there
    wait     until all have, but not for long; not in the delayed form
    end      add the chunks' sums up in their order, h_pre, layer_input of the chunk; the last that came makes
             h_post, h_res and what a backward reads
    leave    one more is through

Who does what; lane l has token l // 4 of its warp's eight, and 8 channels from 8 · (l % 4) on:

    warp         0                  1                  2                       3
    mixes        tokens 0 … 7       tokens 8 … 15      tokens 0 … 7            tokens 8 … 15
                 channels 0 … 31    channels 0 … 31    channels 32 … 63        channels 32 … 63
    multiplies   rows 0 … 15        rows 0 … 15        rows 16 … 23, squares   rows 16 … 23, squares
                 tokens 0 … 7       tokens 8 … 15      tokens 0 … 7            tokens 8 … 15
    adds up      every chunk's sums: two threads have four tokens of a row
    makes        layer_input        layer_input        layer_input             layer_input
    in the last              and    h_res                              and     h_pre, h_post, `projected`

With 8 rows or fewer, of two streams or an identity connection, warps 0 and 1 have none to multiply.

    block of chunk 0     mix, project, arrive (1) , wait ───────────┐  end, leave
    block of chunk 1        mix, project, arrive (2), wait ─────────┤  end, leave
    block of chunk 2     mix, project, arrive (3), wait, note ─ ─ ─ ┤  leave       its patience was over
    …                                                               │
    block of chunk 39            mix, project, arrive (40: the last)┴─ end, h_post, h_res, leave: the last to leave
                                                                       aggregates chunk 2, and sets the word to zero

**Nothing depends on who waits.** A block that has waited `polls` times leaves a note instead, and the last one to leave
does what the notes say, from x_next in memory, with the same bits. So blocks need not be on the device at a time: no
cooperative launch is wanted, nothing can hang, and what the grid's order or another stream delays is only late.

**In the delayed form nobody waits.** Its layer_input is aggregated with a given h_pre while x_next is in registers. A
block arrives and is done; the last to arrive adds the chunks up, makes the mappings and sets the word to zero.

`sync` has a word a tile that counts who has arrived, left and left a note, and a note a block. All are zero before a
launch, and the last to leave sets them to zero again: no launch clears them, and a CUDA graph may be replayed. Two
launches that may run at a time must not share it (see `launch.workspace`).

Between blocks, order is made by the word alone: adding to it releases what the block wrote, barrier first, and acquires
what the others had; what `wait` reads acquires too.
"""

import tilelang.language as T

from .boundary_plans import PostPrePlan
from .coefficients_aggregate import Numbers, make_gates, make_h_res, scale_sums
from .post_pre_sums import add_chunks, project_chunk, store_chunk, weigh_streams
from .post_project_warps import aggregate_vector, load_span, mix_vector
from .projection_warps import copy_phi_rows, split_phi_rows
from .warps import (
    VECTOR,
    WARP,
    WARP_CHANNELS,
    WORDS,
    copy_async,
    place_no_guards,
    store_vector,
    vector_at,
)

ARRIVED, LEFT, NOTED = 1, 1 << 10, 1 << 20  # what is added to a tile's word


def post_pre_kernel(
    num_streams: int, hidden_size: int, dtype: str, plan: PostPrePlan, has_h_pre: bool = False, has_h_res: bool = True
):
    """x [T, n, C], layer_output [T, C], h_post [T, n], h_res [T, n, n], phi [M, n, C], alpha [3], bias [M]
    -> x_next [T, n, C], layer_input [T, C], of the next sublayer h_pre [T, n], h_post [T, n], h_res [T, n, n] and
    projected [M + 1, T]. `partial` [tiles, chunks, M + 1, 16] is between; `sync` [tiles, 1 + chunks] stays zero.

    n is 2 or 4. In the delayed form layer_input is aggregated with h_pre [T, n], else a placeholder, and h_pre_next is
    the next boundary's; polls is not read. Without h_res and h_res_next, then placeholders, H_res is the identity: M is
    2n, alpha has two elements and the coefficients are those of `gates`; with them post_eps is not read.
    """
    n, projection, tokens, threads = num_streams, plan.projection, plan.tokens, plan.threads
    num_chunks, channels, rows = projection.num_chunks(hidden_size), projection.channels, projection.rows
    spans, unused = channels // WARP_CHANNELS, (1,)
    groups = 3 if has_h_res else 2  # of rows that share an alpha
    group = projection.chunks_per_group
    keeper = threads - WARP  # the thread that arrives, waits and leaves
    num_tokens = T.dynamic("num_tokens")
    num_tiles = T.dynamic("num_tiles")

    @T.prim_func
    def post_pre(
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        layer_output: T.Tensor[(num_tokens, hidden_size), dtype],
        h_post: T.Tensor[(num_tokens, n), T.float32],
        h_res: T.Tensor[(num_tokens, n, n) if has_h_res else unused, T.float32],
        phi: T.Tensor[(rows, n, hidden_size), T.float32],
        alpha: T.Tensor[(groups,), T.float32],
        bias: T.Tensor[(rows,), T.float32],
        h_pre: T.Tensor[(num_tokens, n) if has_h_pre else unused, T.float32],
        x_next: T.Tensor[(num_tokens, n, hidden_size), dtype],
        layer_input: T.Tensor[(num_tokens, hidden_size), dtype],
        h_pre_next: T.Tensor[(num_tokens, n), T.float32],
        h_post_next: T.Tensor[(num_tokens, n), T.float32],
        h_res_next: T.Tensor[(num_tokens, n, n) if has_h_res else unused, T.float32],
        projected: T.Tensor[(rows + 1, num_tokens), T.float32],
        partial: T.Tensor[(num_tiles, num_chunks, rows + 1, tokens), T.float32],
        sync: T.Tensor[(num_tiles, 1 + num_chunks), T.int32],
        iters: T.int32,
        sinkhorn_eps: T.float32,
        pre_eps: T.float32,
        rms_eps: T.float32,
        post_scale: T.float32,
        post_eps: T.float32,
        polls: T.int32,
    ):
        with T.Kernel(num_chunks, num_tiles, threads=threads) as (chunk, tile):
            phi_tile = T.alloc_shared((projection.units(n), VECTOR), dtype)
            next_tile = T.alloc_shared((2 * spans * n * WARP, VECTOR), dtype)
            z = T.alloc_shared((rows + 1, tokens), T.float32)
            alpha_tile, bias_tile = T.alloc_shared((groups,), T.float32), T.alloc_shared((rows,), T.float32)
            told = T.alloc_shared((3,), T.int32)  # by the keeper: all have come, it was the last to, the last to leave
            words = T.alloc_local((2 * n * WORDS,), T.uint32)
            layer_words = T.alloc_local((2 * WORDS,), T.uint32)
            next_words = T.alloc_local((n * WORDS,), T.uint32)
            input_words = T.alloc_local((WORDS,), T.uint32)
            h = T.alloc_local((n * n + n if has_h_res else n,), T.float32)
            given = T.alloc_local((n,), T.float32)
            dots = T.alloc_local((4 if projection.low_scale == 1 else 8,), T.float32)
            squares = T.alloc_local((8,), T.float32)
            of_token = T.alloc_local((rows + 1,), T.float32)
            seen, patience, needed = T.alloc_var(T.int32), T.alloc_var(T.int32), T.alloc_var(T.int32)
            token, channel, at = T.alloc_var(T.int32), T.alloc_var(T.int32), T.alloc_var(T.int32)

            T.annotate_min_blocks_per_sm(plan.blocks_per_sm)
            thread = T.get_thread_binding()
            lane, warp = thread % WARP, thread // WARP
            half, span = warp % 2, warp // 2
            numbers = Numbers(
                *(iters, sinkhorn_eps, pre_eps, rms_eps, post_scale, 1.0 / (n * hidden_size)),
                post_eps=None if has_h_res else post_eps,
            )
            at = half * 8 + lane // 4
            token = tile * tokens + at
            channel = chunk * channels + span * WARP_CHANNELS + lane % 4 * VECTOR
            inside = T.And(token < num_tokens, channel < hidden_size)

            if thread < rows:
                copy_async(bias_tile[thread], bias[thread], 1)
            if thread < groups:
                copy_async(alpha_tile[thread], alpha[thread], 1)
            if warp < n:
                copy_phi_rows(phi_tile, phi, warp, chunk * channels + lane % 4 * VECTOR, lane, spans)
            T.ptx_commit_group()
            load_span(words, layer_words, x, layer_output, token, 0, channel, inside)
            if has_h_res:
                for r in T.unroll(n):
                    for e in T.vectorized(n):
                        h[r * n + e] = h_res[T.min(token, num_tokens - 1), r, e]
            for e in T.vectorized(n):
                h[h.shape[0] - n + e] = h_post[T.min(token, num_tokens - 1), e]
            if has_h_pre:
                for e in T.vectorized(n):
                    given[e] = h_pre[T.min(token, num_tokens - 1), e]

            mix_vector(next_words, words, layer_words, h, 0, n, dtype)
            for j in T.unroll(n):
                store_vector(x_next[token, j, channel], next_words, j * WORDS, inside)
                for e in T.vectorized(WORDS):
                    T.view(next_tile, (2 * spans * n * WARP, WORDS), T.uint32)[
                        ((span * 2 + half) * n + j) * WARP + lane, e
                    ] = next_words[j * WORDS + e]
            T.ptx_wait_group(0)
            if warp < n:
                split_phi_rows(phi_tile, warp, lane, n, spans, projection)
            if has_h_pre:
                aggregate_vector(input_words, next_words, given, 0, n, dtype)
                store_vector(layer_input[token, channel], input_words, 0, inside)
            T.sync_threads()

            if tile * tokens + half * 8 < num_tokens:
                if span > 0:
                    project_chunk(dots, squares, phi_tile, next_tile, half, lane, n, spans, False, projection)
                    store_chunk(partial, tile, chunk, dots, squares, half, lane, False, projection)
                elif projection.full_tiles > 0:
                    project_chunk(dots, squares, phi_tile, next_tile, half, lane, n, spans, True, projection)
                    store_chunk(partial, tile, chunk, dots, squares, half, lane, True, projection)
            T.sync_threads()

            if thread == keeper:
                seen = T.atomic_add(sync[tile, 0], ARRIVED, memory_order="acq_rel", return_prev=True) + ARRIVED
                told[1] = T.if_then_else(seen % LEFT == num_chunks, 1, 0)
                if not has_h_pre:
                    patience = polls
                    while T.And(seen % LEFT < num_chunks, patience > 0):
                        seen = T.atomic_load(sync[tile, 0], memory_order="acquire")
                        patience = patience - 1
                told[0] = T.if_then_else(seen % LEFT == num_chunks, 1, 0)
            T.sync_threads()

            is_last = told[1] == 1
            if told[0] == 1:
                needed = T.if_then_else(is_last, rows + 1, n + 1)
                add_chunks(z, partial, tile, needed, num_tokens, rows, n, group, threads)
                T.sync_threads()
                # of two warps, which have nothing to aggregate of eight tokens or fewer
                if T.And(T.And(is_last, half == 1), T.And(lane < tokens, tile * tokens + lane < num_tokens)):
                    for m in T.unroll(rows + 1):
                        of_token[m] = z[m, lane]
                    if span > 0:
                        scale_sums(of_token, projected, tile * tokens + lane, numbers)
                        make_gates(
                            *(h_pre_next, h_post_next, of_token, alpha_tile, bias_tile),
                            *(tile * tokens + lane, numbers, n),
                        )
                    elif has_h_res:
                        scale_sums(of_token, None, tile * tokens + lane, numbers)
                        make_h_res(h_res_next, of_token, alpha_tile, bias_tile, tile * tokens + lane, numbers, n)
            if has_h_pre:
                if T.And(is_last, thread == keeper):
                    sync[tile, 0] = 0
            else:
                if T.And(told[0] == 1, inside):
                    weigh_streams(h, z, alpha_tile, bias_tile, at, rows, n, numbers)
                    aggregate_vector(input_words, next_words, h, 0, n, dtype)
                    store_vector(layer_input[token, channel], input_words, 0, inside)
                if thread == keeper:
                    if told[0] == 0:
                        sync[tile, 1 + chunk] = 1
                    leaving = T.if_then_else(told[0] == 1, LEFT, LEFT + NOTED)
                    seen = T.atomic_add(sync[tile, 0], leaving, memory_order="acq_rel", return_prev=True) + leaving
                    told[2] = T.if_then_else(seen // LEFT % (NOTED // LEFT) == num_chunks, seen // NOTED + 1, 0)
                T.sync_threads()

                if told[2] > 0:  # the last to leave
                    if told[2] > 1:
                        add_chunks(z, partial, tile, n + 1, num_tokens, rows, n, group, threads)
                        T.sync_threads()
                        weigh_streams(h, z, alpha_tile, bias_tile, at, rows, n, numbers)
                        for noted in T.serial(num_chunks):
                            if sync[tile, 1 + noted] == 1:
                                channel = noted * channels + span * WARP_CHANNELS + lane % 4 * VECTOR
                                if T.And(token < num_tokens, channel < hidden_size):
                                    for i in T.unroll(n):
                                        next_words[i * WORDS : (i + 1) * WORDS] = vector_at(
                                            x_next[token, i, channel], True
                                        )
                                    aggregate_vector(input_words, next_words, h, 0, n, dtype)
                                    store_vector(layer_input[token, channel], input_words, 0, True)
                        T.sync_threads()
                        for k in T.serial(T.ceildiv(num_chunks, threads)):
                            if k * threads + thread < num_chunks:
                                sync[tile, 1 + k * threads + thread] = 0
                    if thread == keeper:
                        sync[tile, 0] = 0

    return place_no_guards(post_pre)
