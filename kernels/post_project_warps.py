"""`post_project` as thread-level code (see `warps`): for 16-bit streams of two or four on a GPU.

The formulas are those of `post_project`, mixing has the fma chain of `post`, sums are those of `projection_warps`:
x_next and partial sums have the bits of `post`, then `project`, and layer_input those of the aggregation.

A warp has 16 tokens, a lane two of them, g = lane // 4 and g + 8, and 8 consecutive channels of all streams at a time:

    wait for the chunk's phi, barrier, start to copy the next chunk's
    for each span of 32 channels
        for each of the lane's two tokens
            x, layer_output     in registers since the span before: 16 bytes a stream
            x_next              five multiply-adds an element, rounded to words of two, 16 bytes a stream
            load x, layer_output of the next span into the registers that are free now
            store x_next
        the words are operands of the products with phi, and with themselves for the squares

So no element of the stream passes through shared memory, one barrier is met a chunk, and a load is under way while the
span before is mixed and multiplied. A chunk's spans are written out one after the other: addresses are then computed
once a chunk, 30 instructions of 740 a span less, and nvcc keeps some coefficients from one span to the next. Shared
memory: two chunks of phi, 48 KB, and the tokens' coefficients, 5 KB.
"""

import tilelang.language as T

from .boundary_plans import PostProjectPlan
from .projection_warps import allocate_sums, close_chunk, copy_phi, project_span, take_phi
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
    pack,
    place_no_guards,
    store_vector,
    vector_at,
)


@T.macro
def load_span(words, layer_words, x, layer_output, token, half, channel, inside):
    """The vectors of the lane's token `half` of all streams, and of the layer's output: of float32 two."""
    n = x.shape[1]
    per_token = layer_words.shape[0] // 2
    for i in T.unroll(n):
        at = (half * n + i) * WORDS
        words[at : at + WORDS] = vector_at(x[token + half * 8, i, channel], inside)
    for k in T.unroll(per_token // WORDS):
        to = half * per_token + k * WORDS
        offset = k * (VECTOR * WORDS // per_token)
        layer_words[to : to + WORDS] = vector_at(layer_output[token + half * 8, channel + offset], inside)


@T.macro
def copy_coefficients(coefficients, h_res, h_post, h_pre, first_token, lane, at):
    """Start to copy the warp's coefficients: of a token rows of n: h_res, if given, h_post, h_pre, if given."""
    num_tokens, n = h_post.shape
    mixed = 0 if h_res is None else n
    of_token = mixed + (1 if h_pre is None else 2)
    token, row = T.alloc_var(T.int32), T.alloc_var(T.int32)
    for r in T.unroll(-(-WARP_TOKENS * of_token // WARP)):
        row = r * WARP + lane
        if row < WARP_TOKENS * of_token:
            token = T.min(first_token + row // of_token, num_tokens - 1)
            row = row % of_token
            to = at + r * WARP + lane
            for first in tuple(range(0, n, 4)):  # 16 bytes at most
                if row == mixed:
                    copy_async(coefficients[to, first], h_post[token, first], min(n, 4))
                elif row > mixed:
                    if h_pre is not None:
                        copy_async(coefficients[to, first], h_pre[token, first], min(n, 4))
                elif h_res is not None:
                    copy_async(coefficients[to, first], h_res[token, row, first], min(n, 4))


@T.macro
def load_coefficients(h, given, coefficients, row, has_h_pre):
    """h = the h_res, if it has one, and h_post of the token whose rows start at `row`, given = its h_pre."""
    n, rows = given.shape[0], h.shape[0] // given.shape[0]
    for r in T.unroll(rows):
        for e in T.vectorized(n):
            h[r * n + e] = coefficients[row + r, e]
    if has_h_pre:
        for e in T.vectorized(n):
            given[e] = coefficients[row + rows, e]


@T.macro
def mix_vector(next_words, words, layer_words, h, half, n, dtype):
    """next_words = a token's x_next, in `post`'s order; h has its h_res and h_post, or h_post alone."""
    x = T.alloc_local((2 * n,), T.float32)
    f = T.alloc_local((2,), T.float32)
    value = T.alloc_local((2,), T.float32)
    per_token = layer_words.shape[0] // 2
    for e in T.unroll(WORDS):
        for i in T.unroll(n):
            x[i * 2] = low_half(words[(half * n + i) * WORDS + e], dtype)
            x[i * 2 + 1] = high_half(words[(half * n + i) * WORDS + e], dtype)
        if per_token == WORDS:
            f[0] = low_half(layer_words[half * per_token + e], dtype)
            f[1] = high_half(layer_words[half * per_token + e], dtype)
        else:
            for k in T.unroll(2):
                f[k] = T.reinterpret(layer_words[half * per_token + e * 2 + k], T.float32)
        for j in T.unroll(n):
            if h.shape[0] == n:
                for k in T.unroll(2):
                    value[k] = fma(h[j], f[k], x[j * 2 + k])
            else:
                for k in T.unroll(2):
                    value[k] = h[n * n + j] * f[k]
                for i in T.unroll(n):
                    for k in T.unroll(2):
                        value[k] = fma(h[j * n + i], x[i * 2 + k], value[k])
            pack(next_words, (half * n + j) * WORDS + e, value, dtype)


@T.macro
def aggregate_vector(input_words, next_words, h, half, n, dtype):
    """input_words = a token's layer_input, from x_next as it was rounded; h has its h_pre."""
    value = T.alloc_local((2,), T.float32)
    for e in T.unroll(WORDS):
        for k in T.unroll(2):
            value[k] = 0.0
        for j in T.unroll(n):
            value[0] = fma(h[j], low_half(next_words[(half * n + j) * WORDS + e], dtype), value[0])
            value[1] = fma(h[j], high_half(next_words[(half * n + j) * WORDS + e], dtype), value[1])
        pack(input_words, e, value, dtype)


def post_project_by_warps_kernel(
    num_streams: int, hidden_size: int, layer_dtype: str, plan: PostProjectPlan, has_h_pre: bool, has_h_res: bool = True
):
    """Build `post_project_kernel` by warps, for phi [units, 8], as `split_phi_fragments_kernel` leaves it."""
    n, projection = num_streams, plan.projection
    channels, threads, tokens = projection.channels, projection.threads, projection.tokens
    num_chunks, units = projection.num_chunks(hidden_size), projection.units(n)
    dtype = projection.operand_dtype
    spans = tuple(range(channels // WARP_CHANNELS))
    whole = hidden_size % channels == 0  # the last chunk is not a part of one
    per_token = WORDS if layer_dtype == dtype else 2 * WORDS
    kept = n + 1 if has_h_res else 1  # rows of n coefficients, of h_res and h_post
    of_token = kept + has_h_pre
    num_tokens = T.dynamic("num_tokens")
    num_slabs = T.dynamic("num_slabs")
    unused = (1,)

    @T.prim_func
    def post_project(
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        layer_output: T.Tensor[(num_tokens, hidden_size), layer_dtype],
        h_post: T.Tensor[(num_tokens, n), T.float32],
        h_res: T.Tensor[(num_tokens, n, n) if has_h_res else unused, T.float32],
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
            next_words = T.alloc_local((2 * n * WORDS,), T.uint32)
            input_words = T.alloc_local((WORDS,), T.uint32)
            h = T.alloc_local((kept * n,), T.float32)
            given = T.alloc_local((n,), T.float32)
            sums = allocate_sums(projection)
            token, channel, stage = T.alloc_var(T.int32), T.alloc_var(T.int32), T.alloc_var(T.int32)
            at, row = T.alloc_var(T.int32), T.alloc_var(T.int32)

            T.annotate_min_blocks_per_sm(plan.blocks_per_sm)
            thread = T.get_thread_binding()
            lane, warp = thread % WARP, thread // WARP
            first_chunk = split * chunks_per_split
            last_chunk = T.min(first_chunk + chunks_per_split, num_chunks)
            token = tile * tokens + warp * WARP_TOKENS + lane // 4
            channel = first_chunk * channels + lane % 4 * VECTOR
            row = (warp * WARP_TOKENS + lane // 4) * of_token
            stage = 0
            for half in T.unroll(2):
                inside = token + half * 8 < num_tokens
                if not whole:
                    inside = T.And(inside, channel < hidden_size)
                load_span(words, layer_words, x, layer_output, token, half, channel, inside)
            copy_phi(phi_tile, phi, first_chunk, 0, thread, projection)
            copy_coefficients(
                *(coefficients, h_res if has_h_res else None, h_post, h_pre if has_h_pre else None),
                *(tile * tokens + warp * WARP_TOKENS, lane, warp * WARP_TOKENS * of_token),
            )
            T.ptx_commit_group()
            clear_sums(sums.group_dots, sums.group_squares)
            for chunk in T.serial(first_chunk, last_chunk):
                take_phi(phi_tile, phi, chunk, last_chunk, stage, thread, projection)
                clear_sums(sums.dots, sums.squares)
                at = stage + lane
                for span in spans:
                    for half in (0, 1):
                        load_coefficients(h, given, coefficients, row + half * 8 * of_token, has_h_pre)
                        mix_vector(next_words, words, layer_words, h, half, n, dtype)
                        written = token + half * 8 < num_tokens
                        inside = written if span + 1 < len(spans) else T.And(chunk + 1 < last_chunk, written)
                        if not whole:
                            inside = T.And(inside, channel + (span + 1) * WARP_CHANNELS < hidden_size)
                            written = T.And(written, channel + span * WARP_CHANNELS < hidden_size)
                        following = (words, layer_words, x, layer_output, token, half)
                        load_span(*following, channel + (span + 1) * WARP_CHANNELS, inside)
                        for j in T.unroll(n):
                            store_vector(
                                x_next[token + half * 8, j, channel + span * WARP_CHANNELS],
                                *(next_words, (half * n + j) * WORDS, written),
                            )
                        if has_h_pre:
                            aggregate_vector(input_words, next_words, given, half, n, dtype)
                            store_vector(
                                layer_input[token + half * 8, channel + span * WARP_CHANNELS], input_words, 0, written
                            )
                    project_span(sums, next_words, phi_tile, at + span * units // len(spans), n, projection)
                channel = channel + channels
                close_chunk(partial, chunk, sums, token, projection, hidden_size)
                stage = units - stage

    return place_no_guards(post_project)
