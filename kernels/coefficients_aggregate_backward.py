"""coefficients_aggregate, backward: `aggregate_backward` and `coefficients_backward` in one launch.

The formulas are those of the two. What makes them one launch is that Sinkhorn's backward, a chain of latencies of one
thread a token, needs nothing of the sum over channels: g_h_pre reaches the gate of h_pre and, through it, ρ alone. A
block has some tokens, whole:

    warp 0        a token a lane: the rows of h_post and h_res, with Sinkhorn's backward
    other warps   a token at a time: g_h_pre[i] = Σ_c g_layer_input[c] · x[i, c]
    barrier
    warp 0        the rows of h_pre, and ρ
    barrier
    warp 0        the block's sums for g_alpha and g_bias, a sum a lane, tokens ascending

Traffic per token: (n + 1)·C read; small: what `coefficients_backward` reads and writes, but for g_h_pre.

Without h_res, where H_res is the identity, it is `gates_backward` that is joined, of 2n rows.

A sum over channels is kept in the lanes of a warp, 8 consecutive channels a step, and ends in shuffles. How many tokens
a block has changes no token's bits.
"""

import tilelang.language as T

from .boundary_plans import CoefficientsAggregateBackwardPlan
from .coefficients_thread_backward import Given, Rows, gate_backward, res_backward, store_rho, sum_tokens
from .logits import row_groups
from .warps import VECTOR, WARP, WORDS, clear_sums, fma, high_half, low_half, place_no_guards, vector_at

VECTORS_AT_ONCE = 2  # of g_layer_input and of each stream, in flight for a lane


@T.macro
def load_vectors(words, g_layer_input, x, token, at, slot):
    """A lane's vectors `at` of g_layer_input and of all streams; zeros beyond the last channel."""
    n, hidden_size = x.shape[1], x.shape[2]
    first = slot * (n + 1) * WORDS
    words[first : first + WORDS] = vector_at(g_layer_input[token, at * VECTOR], at * VECTOR < hidden_size)
    for i in T.unroll(n):
        to = first + (i + 1) * WORDS
        words[to : to + WORDS] = vector_at(x[token, i, at * VECTOR], at * VECTOR < hidden_size)


@T.macro
def unpack_at(values, words, elements, at):
    """values = the 8 elements from word `at` on, in float32."""
    if elements.dtype == "bfloat16":
        for e in T.unroll(WORDS):
            values[2 * e] = low_half(words[at + e])
            values[2 * e + 1] = high_half(words[at + e])
    else:
        for e in T.unroll(VECTOR):
            values[e] = T.cast(elements[2 * at + e], T.float32)


@T.macro
def add_dots(sums, words, elements, slot, n):
    """sums[i] += g_layer_input · x[i], over the channels of the lane's vectors."""
    g = T.alloc_local((VECTOR,), T.float32)
    x = T.alloc_local((VECTOR,), T.float32)
    unpack_at(g, words, elements, slot * (n + 1) * WORDS)
    for i in T.unroll(n):
        unpack_at(x, words, elements, (slot * (n + 1) + i + 1) * WORDS)
        for e in T.unroll(VECTOR):
            sums[i] = fma(g[e], x[e], sums[i])


@T.macro
def sum_channels(g_pre, g_layer_input, x, words, elements, token, place, lane):
    """g_pre[place, i] = Σ_c g_layer_input[token, c] · x[token, i, c]: a warp's work."""
    n, hidden_size = x.shape[1], x.shape[2]
    sums = T.alloc_local((n,), T.float32)
    at = T.alloc_var(T.int32)
    at = lane
    clear_sums(sums)
    for slot in T.unroll(VECTORS_AT_ONCE):
        load_vectors(words, g_layer_input, x, token, at + slot * WARP, slot)
    for _ in T.serial(-(-hidden_size // (VECTOR * WARP * VECTORS_AT_ONCE))):
        at = at + VECTORS_AT_ONCE * WARP
        for slot in T.unroll(VECTORS_AT_ONCE):
            add_dots(sums, words, elements, slot, n)
            load_vectors(words, g_layer_input, x, token, at + slot * WARP, slot)
    for step in T.unroll(5):
        for i in T.unroll(n):
            sums[i] = sums[i] + T.shfl_xor(sums[i], 16 >> step)
    if lane == 0:
        for i in T.unroll(n):
            g_pre[place, i] = sums[i]


def coefficients_aggregate_backward_kernel(
    num_streams: int,
    hidden_size: int,
    dtype: str,
    plan: CoefficientsAggregateBackwardPlan,
    has_g_h_post: bool,
    has_g_h_res: bool,
    has_h_res: bool = True,
):
    """g_layer_input [T, C], x [T, n, C], g_h_post [T, n], g_h_res [T, n, n], projected [M + 1, T], alpha [3], bias [M]
    -> g_projected [M + 1, T], partial [blocks, 3 + M] of g_alpha and g_bias; at most 32 `tokens` a block.

    What is not given is a one-element placeholder, never accessed. iters may be 1 to the plan's capacity. Without h_res
    there are the 2n rows and two alphas of `gates`.
    """
    n, threads, summing = num_streams, WARP * (1 + plan.summing_warps), plan.summing_warps
    pre, post, res = row_groups(n)
    groups, num_rows = (3, n * n + 2 * n) if has_h_res else (2, 2 * n)
    num_tokens = T.dynamic("num_tokens")
    num_partials = T.dynamic("num_partials")
    unused = (1,)

    @T.prim_func
    def coefficients_aggregate_backward(
        g_layer_input: T.Tensor[(num_tokens, hidden_size), dtype],
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        g_h_post: T.Tensor[(num_tokens, n) if has_g_h_post else unused, T.float32],
        g_h_res: T.Tensor[(num_tokens, n, n) if has_g_h_res else unused, T.float32],
        projected: T.Tensor[(num_rows + 1, num_tokens), T.float32],
        alpha: T.Tensor[(groups,), T.float32],
        bias: T.Tensor[(num_rows,), T.float32],
        g_projected: T.Tensor[(num_rows + 1, num_tokens), T.float32],
        partial: T.Tensor[(num_partials, groups + num_rows), T.float32],
        iters: T.int32,
        sinkhorn_eps: T.float32,
        post_scale: T.float32,
        tokens: T.int32,
    ):
        with T.Kernel(T.ceildiv(num_tokens, tokens), threads=threads) as block:
            g_pre = T.alloc_shared((WARP, n), T.float32)
            parts = T.alloc_shared((groups + num_rows, WARP + 1), T.float32)
            if has_h_res:
                denominators = T.alloc_shared(((2 * plan.capacity - 2) * n, WARP), T.float32)
            words = T.alloc_local((VECTORS_AT_ONCE * (n + 1) * WORDS,), T.uint32)
            elements = T.view(words, (VECTORS_AT_ONCE * (n + 1) * VECTOR,), dtype)
            total = T.alloc_local((groups,), T.float32)
            scale = T.alloc_var(T.float32)
            token, place = T.alloc_var(T.int32), T.alloc_var(T.int32)
            T.annotate_min_blocks_per_sm(plan.blocks_per_sm)

            thread = T.get_thread_binding()
            lane, warp = thread % WARP, thread // WARP
            token = block * tokens + lane  # of the first warp
            given = Given(projected, alpha, bias, scale)
            rows = Rows(g_projected, parts, groups)
            if warp == 0:
                if T.And(thread < tokens, token < num_tokens):
                    scale = projected[num_rows, token]
                    gate_backward(
                        *(total, rows, given, g_h_post if has_g_h_post else None),
                        *(token, post_scale, post, token, lane),
                    )
                    if has_h_res:
                        res_backward(
                            *(total, rows, given, g_h_res if has_g_h_res else None),
                            *(denominators, res, token, lane, iters, sinkhorn_eps),
                        )
            else:
                for step in T.serial(T.ceildiv(tokens, summing)):
                    place = step * summing + warp - 1
                    if T.And(place < tokens, block * tokens + place < num_tokens):
                        sum_channels(g_pre, g_layer_input, x, words, elements, block * tokens + place, place, lane)
            T.sync_threads()
            if T.And(thread < tokens, token < num_tokens):
                gate_backward(total, rows, given, g_pre, lane, 1.0, pre, token, lane)
                store_rho(rows, given, total, num_rows, n * hidden_size, token, lane)
            T.sync_threads()
            sum_tokens(partial, parts, block, thread, T.min(tokens, num_tokens - block * tokens))

    return place_no_guards(coefficients_aggregate_backward)
