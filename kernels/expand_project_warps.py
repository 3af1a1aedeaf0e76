"""`expand_project` as thread-level code (see `warps`): for 16-bit streams of two or four on a GPU.

The formulas are those of `expand_project`, lanes and sums those of `projection_warps` for one stream, h, whose phi is
the sum over streams that `split_phi` leaves:

    wait for the chunk's phi, barrier, start to copy the next chunk's
    take h of the chunk, loaded since the chunk before, and load the next chunk's: 16 bytes a token and span
    for each span of 32 channels
        store the lane's vectors to every stream: n stores of 16 bytes for one load
        the words are operands of the products with phi_sum, and with themselves for the squares

What is stored is what was loaded: no element is converted. A block has 64 tokens; of the (n + 1)·C a token that it
moves n·C are stores, which nothing waits for.
"""

import tilelang.language as T

from .boundary_plans import ExpandProjectPlan
from .projection_warps import allocate_sums, close_chunk, copy_phi, project_span, take_phi
from .warps import (
    VECTOR,
    WARP,
    WARP_CHANNELS,
    WARP_TOKENS,
    WORDS,
    clear_sums,
    place_no_guards,
    store_vector,
    vector_at,
)


@T.macro
def load_chunk(ahead, h, token, channel, inside, whole):
    """ahead[span] = the lane's vectors of its two tokens; zeros beyond the last token and channel."""
    num_tokens, hidden_size = h.shape
    for span, words in enumerate(ahead):
        for half in (0, 1):
            there = T.And(inside, token + half * 8 < num_tokens)
            if not whole:
                there = T.And(there, channel + span * WARP_CHANNELS < hidden_size)
            words[half * WORDS : (half + 1) * WORDS] = vector_at(
                h[token + half * 8, channel + span * WARP_CHANNELS], there
            )


@T.macro
def store_streams(x, words, token, channel, inside):
    """x[token, j] = the lane's vector of h for every stream j, of both tokens."""
    num_tokens, n, _ = x.shape
    for half in (0, 1):
        for j in T.unroll(n):
            there = T.And(inside, token + half * 8 < num_tokens)
            store_vector(x[token + half * 8, j, channel], words, half * WORDS, there)


def expand_project_by_warps_kernel(num_streams: int, hidden_size: int, plan: ExpandProjectPlan):
    """Build `expand_project_kernel` by warps, for phi [units, 8], summed over streams."""
    n, projection = num_streams, plan.projection
    channels, threads, dtype = projection.channels, projection.threads, projection.operand_dtype
    num_chunks, units = projection.num_chunks(hidden_size), projection.units(1)
    spans = tuple(range(channels // WARP_CHANNELS))
    whole = hidden_size % channels == 0  # the last chunk is not a part of one
    num_tokens = T.dynamic("num_tokens")
    num_slabs = T.dynamic("num_slabs")

    @T.prim_func
    def expand_project(
        h: T.Tensor[(num_tokens, hidden_size), dtype],
        phi: T.Tensor[(num_chunks * units, VECTOR), dtype],
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        partial: T.Tensor[(num_slabs, projection.slab_rows, num_tokens), T.float32],
        chunks_per_split: T.int32,
    ):
        with T.Kernel(
            T.ceildiv(num_tokens, projection.tokens), T.ceildiv(num_chunks, chunks_per_split), threads=threads
        ) as (tile, split):
            phi_tile = T.alloc_shared((2 * units, VECTOR), dtype)
            ahead = [T.alloc_local((2 * WORDS,), T.uint32) for _ in spans]
            words = [T.alloc_local((2 * WORDS,), T.uint32) for _ in spans]
            sums = allocate_sums(projection)
            token, channel, stage = T.alloc_var(T.int32), T.alloc_var(T.int32), T.alloc_var(T.int32)

            T.annotate_min_blocks_per_sm(plan.blocks_per_sm)
            thread = T.get_thread_binding()
            lane = thread % WARP
            first_chunk = split * chunks_per_split
            last_chunk = T.min(first_chunk + chunks_per_split, num_chunks)
            token = tile * projection.tokens + thread // WARP * WARP_TOKENS + lane // 4
            channel = first_chunk * channels + lane % 4 * VECTOR
            stage = 0
            load_chunk(ahead, h, token, channel, True, whole)
            copy_phi(phi_tile, phi, first_chunk, 0, thread, projection)
            T.ptx_commit_group()
            clear_sums(sums.group_dots, sums.group_squares)
            for chunk in T.serial(first_chunk, last_chunk):
                take_phi(phi_tile, phi, chunk, last_chunk, stage, thread, projection)
                for span in spans:
                    for e in T.unroll(2 * WORDS):
                        words[span][e] = ahead[span][e]
                load_chunk(ahead, h, token, channel + channels, chunk + 1 < last_chunk, whole)
                clear_sums(sums.dots, sums.squares)
                for span in spans:
                    first = channel + span * WARP_CHANNELS
                    store_streams(x, words[span], token, first, True if whole else first < hidden_size)
                    at = stage + lane + span * units // len(spans)
                    project_span(sums, words[span], phi_tile, at, 1, projection)
                for e in T.unroll(16):
                    sums.squares[e] *= n  # n is a power of two
                close_chunk(partial, chunk, sums, token, projection, hidden_size)
                channel = channel + channels
                stage = units - stage

    return place_no_guards(expand_project)
