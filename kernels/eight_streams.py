"""`project` and `post_project` of eight streams as thread-level code: bfloat16, where a block has 227 KB (see `warps`).

Formulas, lanes and sums are those of `projection_warps` and `post_project_warps`. Eight streams of two tokens are 64
registers a lane, and so are those of x_next: there is room for one of the two. A word of x_next takes the place of the
word of x once all streams of its two channels are made, and x of the next span that of x_next, stream by stream:

    wait for the chunk's phi, barrier, start to copy the next chunk's
    for each of the lane's two tokens
        for each two of four words: x of all streams to float32; for each stream its row of h_res from shared memory,
            nine multiply-adds an element, and the word is x_next's
        store x_next
    for each stream
        its words are operands of the products with phi, and with themselves for the squares
        load x of the next span into the registers that are free now

80 rows of phi are ten tiles, 80 KB a span: a chunk is one span, and a block has 128 tokens, so that phi is read from
the L2 half as often as with 64, and a multiprocessor one block. Shared memory: two chunks of phi, 160 KB, and the
tokens' coefficients, 36 or 40 KB: more than sm_80 and sm_120 have, where eight streams are left to tiles, as are heads
and identity connections. What limits it is shared memory: 640 wavefronts of phi a warp and span, 288 of coefficients.
"""

import tilelang.language as T

from .boundary_plans import PostProjectPlan
from .post_project_warps import copy_coefficients
from .projection_plans import WarpProjectionPlan
from .projection_warps import allocate_sums, close_chunk, copy_phi, project_stream, take_phi
from .warps import (
    VECTOR,
    WARP,
    WARP_TOKENS,
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

PAIR = 2  # words of a token that are mixed with one reading of its coefficients


@T.macro
def load_stream(words, x, i, token, channel, inside, n):
    """The lane's vectors of stream i, of both its tokens; zeros beyond the last."""
    for half in (0, 1):
        at = (half * n + i) * WORDS
        words[at : at + WORDS] = vector_at(
            x[token + half * 8, i, channel], T.And(inside, token + half * 8 < x.shape[0])
        )


@T.macro
def load_layer(layer_words, layer_output, token, channel, inside):
    """The lane's vectors of the layer's output, of both its tokens: of float32 two each."""
    per_token = layer_words.shape[0] // 2
    for half in (0, 1):
        for k in T.unroll(per_token // WORDS):
            to = half * per_token + k * WORDS
            offset = k * (VECTOR * WORDS // per_token)
            layer_words[to : to + WORDS] = vector_at(
                layer_output[token + half * 8, channel + offset],
                T.And(inside, token + half * 8 < layer_output.shape[0]),
            )


@T.macro
def load_row(values, coefficients, row):
    """values = a row of eight coefficients: two accesses of 16 bytes."""
    for first in (0, 4):
        for k in T.vectorized(4):
            values[first + k] = coefficients[row, first + k]


@T.macro
def mix_in_place(words, input_words, layer_words, coefficients, row, half, n, dtype, has_h_pre):
    """words, x of a token, become its x_next, in `post`'s order; its rows of h_res, h_post and h_pre start at `row`.

    With h_pre, input_words = its layer_input, from x_next as it was rounded.
    """
    x, h = T.alloc_local((2 * PAIR * n,), T.float32), T.alloc_local((n,), T.float32)
    h_post, f = T.alloc_local((n,), T.float32), T.alloc_local((2 * PAIR,), T.float32)
    value = T.alloc_local((2,), T.float32)
    per_token = layer_words.shape[0] // 2
    for first in tuple(range(0, WORDS, PAIR)):
        T.sync_warp()  # or the compiler would keep the coefficients of two words for the next two, and spill
        for e in tuple(range(PAIR)):
            for i in T.unroll(n):
                x[(e * n + i) * 2] = low_half(words[(half * n + i) * WORDS + first + e], dtype)
                x[(e * n + i) * 2 + 1] = high_half(words[(half * n + i) * WORDS + first + e], dtype)
            if per_token == WORDS:
                f[e * 2] = low_half(layer_words[half * per_token + first + e], dtype)
                f[e * 2 + 1] = high_half(layer_words[half * per_token + first + e], dtype)
            else:
                for k in T.unroll(2):
                    f[e * 2 + k] = T.reinterpret(layer_words[half * per_token + (first + e) * 2 + k], T.float32)
        load_row(h_post, coefficients, row + n)
        for j in T.unroll(n):
            load_row(h, coefficients, row + j)
            for e in tuple(range(PAIR)):
                for k in T.unroll(2):
                    value[k] = h_post[j] * f[e * 2 + k]
                for i in T.unroll(n):
                    for k in T.unroll(2):
                        value[k] = fma(h[i], x[(e * n + i) * 2 + k], value[k])
                pack(words, (half * n + j) * WORDS + first + e, value, dtype)
        if has_h_pre:
            load_row(h, coefficients, row + n + 1)
            for e in tuple(range(PAIR)):
                for k in T.unroll(2):
                    value[k] = 0.0
                for j in T.unroll(n):
                    value[0] = fma(h[j], low_half(words[(half * n + j) * WORDS + first + e], dtype), value[0])
                    value[1] = fma(h[j], high_half(words[(half * n + j) * WORDS + first + e], dtype), value[1])
                pack(input_words, first + e, value, dtype)


def project_of_eight_kernel(hidden_size: int, plan: WarpProjectionPlan):
    """Build `project_by_warps_kernel` for eight streams."""
    n, num_chunks, units, dtype = 8, plan.num_chunks(hidden_size), plan.units(8), plan.operand_dtype
    whole = hidden_size % plan.channels == 0  # the last chunk is not a part of one
    num_tokens = T.dynamic("num_tokens")
    num_slabs = T.dynamic("num_slabs")

    @T.prim_func
    def project(
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        phi: T.Tensor[(num_chunks * units, VECTOR), dtype],
        partial: T.Tensor[(num_slabs, plan.slab_rows, num_tokens), T.float32],
        chunks_per_split: T.int32,
    ):
        with T.Kernel(
            T.ceildiv(num_tokens, plan.tokens), T.ceildiv(num_chunks, chunks_per_split), threads=plan.threads
        ) as (tile, split):
            phi_tile = T.alloc_shared((2 * units, VECTOR), dtype)
            words = T.alloc_local((2 * n * WORDS,), T.uint32)
            sums = allocate_sums(plan)
            token, channel, stage = T.alloc_var(T.int32), T.alloc_var(T.int32), T.alloc_var(T.int32)

            thread = T.get_thread_binding()
            lane = thread % WARP
            first_chunk = split * chunks_per_split
            last_chunk = T.min(first_chunk + chunks_per_split, num_chunks)
            token = tile * plan.tokens + thread // WARP * WARP_TOKENS + lane // 4
            channel = first_chunk * plan.channels + lane % 4 * VECTOR
            stage = 0
            for i in T.unroll(n):
                load_stream(words, x, i, token, channel, True if whole else channel < hidden_size, n)
            copy_phi(phi_tile, phi, first_chunk, 0, thread, plan)
            T.ptx_commit_group()
            clear_sums(sums.group_dots, sums.group_squares)
            for chunk in T.serial(first_chunk, last_chunk):
                take_phi(phi_tile, phi, chunk, last_chunk, stage, thread, plan)
                clear_sums(sums.dots, sums.squares)
                inside = chunk + 1 < last_chunk
                if not whole:
                    inside = T.And(inside, channel + plan.channels < hidden_size)
                for j in T.unroll(n):
                    project_stream(sums, words, phi_tile, stage + lane, j, n, plan)
                    load_stream(words, x, j, token, channel + plan.channels, inside, n)
                channel = channel + plan.channels
                close_chunk(partial, chunk, sums, token, plan, hidden_size)
                stage = units - stage

    return place_no_guards(project)


def post_project_of_eight_kernel(hidden_size: int, layer_dtype: str, plan: PostProjectPlan, has_h_pre: bool):
    """Build `post_project_kernel` by warps for eight streams."""
    n, projection = 8, plan.projection
    channels, threads, tokens = projection.channels, projection.threads, projection.tokens
    num_chunks, units = projection.num_chunks(hidden_size), projection.units(n)
    dtype = projection.operand_dtype
    whole = hidden_size % channels == 0  # the last chunk is not a part of one
    per_token = WORDS if layer_dtype == dtype else 2 * WORDS
    of_token = n + 1 + has_h_pre  # rows of coefficients
    unused = (1,)
    num_tokens = T.dynamic("num_tokens")
    num_slabs = T.dynamic("num_slabs")

    @T.prim_func
    def post_project(
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        layer_output: T.Tensor[(num_tokens, hidden_size), layer_dtype],
        h_post: T.Tensor[(num_tokens, n), T.float32],
        h_res: T.Tensor[(num_tokens, n, n), T.float32],
        phi: T.Tensor[(num_chunks * units, VECTOR), dtype],
        h_pre: T.Tensor[(num_tokens, n) if has_h_pre else unused, T.float32],
        x_next: T.Tensor[(num_tokens, n, hidden_size), dtype],
        partial: T.Tensor[(num_slabs, projection.slab_rows, num_tokens), T.float32],
        layer_input: T.Tensor[(num_tokens, hidden_size) if has_h_pre else unused, dtype],
        chunks_per_split: T.int32,
    ):
        with T.Kernel(T.ceildiv(num_tokens, tokens), T.ceildiv(num_chunks, chunks_per_split), threads=threads) as (
            tile,
            split,
        ):
            phi_tile = T.alloc_shared((2 * units, VECTOR), dtype)
            coefficients = T.alloc_shared((tokens * of_token, n), T.float32)
            words = T.alloc_local((2 * n * WORDS,), T.uint32)
            layer_words = T.alloc_local((2 * per_token,), T.uint32)
            input_words = T.alloc_local((WORDS,), T.uint32)
            sums = allocate_sums(projection)
            token, channel, stage = T.alloc_var(T.int32), T.alloc_var(T.int32), T.alloc_var(T.int32)
            row = T.alloc_var(T.int32)

            thread = T.get_thread_binding()
            lane, warp = thread % WARP, thread // WARP
            first_chunk = split * chunks_per_split
            last_chunk = T.min(first_chunk + chunks_per_split, num_chunks)
            token = tile * tokens + warp * WARP_TOKENS + lane // 4
            channel = first_chunk * channels + lane % 4 * VECTOR
            row = (warp * WARP_TOKENS + lane // 4) * of_token
            stage = 0
            for i in T.unroll(n):
                load_stream(words, x, i, token, channel, True if whole else channel < hidden_size, n)
            load_layer(layer_words, layer_output, token, channel, True if whole else channel < hidden_size)
            copy_phi(phi_tile, phi, first_chunk, 0, thread, projection)
            copy_coefficients(
                *(coefficients, h_res, h_post, h_pre if has_h_pre else None),
                *(tile * tokens + warp * WARP_TOKENS, lane, warp * WARP_TOKENS * of_token),
            )
            T.ptx_commit_group()
            clear_sums(sums.group_dots, sums.group_squares)
            for chunk in T.serial(first_chunk, last_chunk):
                take_phi(phi_tile, phi, chunk, last_chunk, stage, thread, projection)
                clear_sums(sums.dots, sums.squares)
                for half in (0, 1):
                    mix_in_place(
                        *(words, input_words, layer_words, coefficients),
                        *(row + half * 8 * of_token, half, n, dtype, has_h_pre),
                    )
                    written = token + half * 8 < num_tokens
                    if not whole:
                        written = T.And(written, channel < hidden_size)
                    for j in T.unroll(n):
                        store_vector(x_next[token + half * 8, j, channel], words, (half * n + j) * WORDS, written)
                    if has_h_pre:
                        store_vector(layer_input[token + half * 8, channel], input_words, 0, written)
                inside = chunk + 1 < last_chunk
                if not whole:
                    inside = T.And(inside, channel + channels < hidden_size)
                load_layer(layer_words, layer_output, token, channel + channels, inside)
                for j in T.unroll(n):
                    project_stream(sums, words, phi_tile, stage + lane, j, n, projection)
                    load_stream(words, x, j, token, channel + channels, inside, n)
                channel = channel + channels
                close_chunk(partial, chunk, sums, token, projection, hidden_size)
                stage = units - stage

    return place_no_guards(post_project)
