"""coefficients_aggregate: `coefficients` and `aggregate` in one launch, which waits for nothing but the projection.

Equations (15) to (19) and (3), for token t:

    layer_input[t, c] = Σ_i h_pre[t, i] · x[t, i, c]
    h_pre[t, i]       = sigmoid(alpha · s · (x·phi)[t, i] + bias[i]) + pre_eps
    h_post[t], h_res[t], and what a backward needs, as `coefficients`

Traffic per token: n·C read, C written; small: the partial sums once in the blocks that make the mappings, and their
rows of h_pre and the squares, (n + 1)/(n² + 2n + 1) of them, once for each warp that aggregates.

The first blocks of the grid make the mappings, one thread a token, and keep what a backward reads. All others
aggregate, a warp a token or a part of its channels: each adds up its token's few sums itself, by the formula of
`coefficients` and with its bits, instead of waiting for a launch that does. Its first vectors are on their way
meanwhile. So Sinkhorn's iterations keep nobody waiting, and neither does h_pre.

For partial sums of `projection_warps`, whose slabs have one row a sum.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from .boundary_plans import CoefficientsAggregatePlan
from .logits import row_groups, sigmoid, slabs_per_group
from .post_project_warps import aggregate_vector
from .projection_plans import WarpProjectionPlan
from .sinkhorn_thread import sinkhorn_token
from .warps import (
    VECTOR,
    WARP,
    WORDS,
    clear_sums,
    place_no_guards,
    store_vector,
    vector_at,
)

SLABS_AT_ONCE = 4  # whose sums a thread loads before it adds them
VECTORS_AT_ONCE = 4  # of each stream, that a lane loads before it aggregates


class Numbers(NamedTuple):
    """Run-time constants of the mappings, and 1 / (n · C)."""

    iters: Any
    sinkhorn_eps: Any
    pre_eps: Any
    rms_eps: Any
    post_scale: Any
    inverse_size: float
    post_eps: Any = None


def group_size(partial, projection: WarpProjectionPlan, hidden_size: int):
    """Return how many slabs are added up from zero at a time."""
    found = slabs_per_group(partial, projection, hidden_size)
    return 1 if found is None else found


@T.macro
def sum_token_slabs(total, partial, token, group_slabs, rows):
    """total = the token's sums of some rows: slabs ascending, in groups, each from zero, as `coefficients` does."""
    group = T.alloc_local((len(rows),), T.float32)
    num_slabs = partial.shape[0]
    clear_sums(total, group)
    for slab in T.unroll(num_slabs, unroll_factor=SLABS_AT_ONCE):
        for k, row in enumerate(rows):
            group[k] = group[k] + partial[slab, row, token]
        ends = T.Or((slab + 1) % group_slabs == 0, slab + 1 == num_slabs)  # no branch, or loads would wait for it
        for k in T.unroll(len(rows)):
            total[k] = T.Select(ends, total[k] + group[k], total[k])
            group[k] = T.Select(ends, T.float32(0), group[k])


@T.macro
def scale_sums(z, projected, token, numbers: Numbers):
    """The token's sums z as s·(x·phi), and s for Σx²; `projected`, if given, gets them too."""
    num_rows = z.shape[0] - 1
    z[num_rows] = T.rsqrt(z[num_rows] * numbers.inverse_size + numbers.rms_eps)
    if projected is not None:
        projected[num_rows, token] = z[num_rows]
    for m in T.unroll(num_rows):
        z[m] = z[m] * z[num_rows]
        if projected is not None:
            projected[m, token] = z[m]


@T.macro
def make_gates(h_pre, h_post, z, alpha, bias, token, numbers: Numbers, n):
    """The token's h_pre and h_post from its scaled sums: one thread's work."""
    pre, post, _ = row_groups(n)
    for j in T.unroll(n):
        h_pre[token, j] = sigmoid(alpha[pre.index] * z[j] + bias[j]) + numbers.pre_eps
        post_logit = alpha[post.index] * z[post.first + j] + bias[post.first + j]
        if numbers.post_eps is None:
            h_post[token, j] = numbers.post_scale * sigmoid(post_logit)
        else:
            h_post[token, j] = numbers.post_scale * sigmoid(post_logit) + numbers.post_eps


@T.macro
def make_h_res(h_res, z, alpha, bias, token, numbers: Numbers, n):
    """The token's h_res from its scaled sums: one thread's work."""
    P = T.alloc_local((n * n,), T.float32)
    res = row_groups(n)[2]
    for m in T.unroll(n * n):
        P[m] = alpha[res.index] * z[res.first + m] + bias[res.first + m]
    sinkhorn_token(P, n, numbers.iters, numbers.sinkhorn_eps)
    for j in T.unroll(n):
        for i in T.vectorized(n):
            h_res[token, j, i] = P[j * n + i]


@T.macro
def map_token(h_pre, h_post, h_res, projected, partial, alpha, bias, token, group_slabs, numbers: Numbers, n):
    """The token's mappings from its partial sums, h_res if given: one thread's work, none beyond the last token."""
    rows = projected.shape[0]
    z = T.alloc_local((rows,), T.float32)
    if token < partial.shape[2]:
        sum_token_slabs(z, partial, token, group_slabs, tuple(range(rows)))
        scale_sums(z, projected, token, numbers)
        make_gates(h_pre, h_post, z, alpha, bias, token, numbers, n)
        if h_res is not None:
            make_h_res(h_res, z, alpha, bias, token, numbers, n)


@T.macro
def load_vectors(words, x, token, at, last):
    """The lane's next vectors of all streams: words[(v · n + i) · 4 : …] is that of stream i at `at` + v · 32."""
    n = x.shape[1]
    for v in T.unroll(VECTORS_AT_ONCE):
        for i in T.unroll(n):
            to = (v * n + i) * WORDS
            words[to : to + WORDS] = vector_at(x[token, i, (at + v * WARP) * VECTOR], at + v * WARP < last)


def coefficients_aggregate_kernel(
    num_streams: int, hidden_size: int, dtype: str, plan: CoefficientsAggregatePlan, has_h_res: bool = True
):
    """x [T, n, C], partial [slabs, slab_rows, T], alpha [3], bias [M]
    -> layer_input [T, C], h_pre [T, n], h_post [T, n], h_res [T, n, n], projected [M + 1, T].

    `parts` warps share a token's channels. Without h_res, then a placeholder, the formula is that of `gates`: alpha has
    two elements and M is 2n. With it, post_eps is not read.
    """
    n, projection, threads = num_streams, plan.projection, plan.threads
    warps, vectors = threads // WARP, hidden_size // VECTOR
    num_rows = n * n + 2 * n if has_h_res else 2 * n
    num_elements = n * hidden_size
    num_tokens = T.dynamic("num_tokens")
    num_slabs = T.dynamic("num_slabs")

    @T.prim_func
    def coefficients_aggregate(
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        partial: T.Tensor[(num_slabs, projection.slab_rows, num_tokens), T.float32],
        alpha: T.Tensor[(3 if has_h_res else 2,), T.float32],
        bias: T.Tensor[(num_rows,), T.float32],
        layer_input: T.Tensor[(num_tokens, hidden_size), dtype],
        h_pre: T.Tensor[(num_tokens, n), T.float32],
        h_post: T.Tensor[(num_tokens, n), T.float32],
        h_res: T.Tensor[(num_tokens, n, n) if has_h_res else (1,), T.float32],
        projected: T.Tensor[(num_rows + 1, num_tokens), T.float32],
        iters: T.int32,
        sinkhorn_eps: T.float32,
        pre_eps: T.float32,
        rms_eps: T.float32,
        post_scale: T.float32,
        post_eps: T.float32,
        parts: T.int32,
    ):
        with T.Kernel(T.ceildiv(num_tokens, threads) + T.ceildiv(num_tokens * parts, warps), threads=threads) as index:
            words = T.alloc_local((VECTORS_AT_ONCE * n * WORDS,), T.uint32)
            result = T.alloc_local((WORDS,), T.uint32)
            total = T.alloc_local((n + 1,), T.float32)
            h = T.alloc_local((n,), T.float32)
            token, part = T.alloc_var(T.int32), T.alloc_var(T.int32)
            at, last = T.alloc_var(T.int32), T.alloc_var(T.int32)
            T.annotate_min_blocks_per_sm(plan.blocks_per_sm)
            mapping_blocks = T.ceildiv(num_tokens, threads)
            per_group = group_size(partial, projection, hidden_size)
            thread = T.get_thread_binding()
            if index < mapping_blocks:
                token = index * threads + thread
                numbers = Numbers(
                    *(iters, sinkhorn_eps, pre_eps, rms_eps, post_scale, 1.0 / num_elements),
                    post_eps=None if has_h_res else post_eps,
                )
                map_token(
                    *(h_pre, h_post, h_res if has_h_res else None, projected, partial, alpha, bias),
                    *(token, per_group, numbers, n),
                )
            else:
                token = (index - mapping_blocks) * warps + thread // WARP
                part = token % parts
                token = token // parts
                if token < num_tokens:
                    at = part * T.ceildiv(vectors, parts) + thread % WARP
                    last = T.min((part + 1) * T.ceildiv(vectors, parts), vectors)
                    load_vectors(words, x, token, at, last)
                    sum_token_slabs(total, partial, token, per_group, (*range(n), num_rows))
                    total[n] = T.rsqrt(total[n] * (1.0 / num_elements) + rms_eps)
                    for i in T.unroll(n):
                        h[i] = sigmoid(alpha[0] * (total[i] * total[n]) + bias[i]) + pre_eps
                    for _ in T.serial(T.ceildiv(T.ceildiv(vectors, parts), WARP * VECTORS_AT_ONCE)):
                        for v in T.unroll(VECTORS_AT_ONCE):
                            aggregate_vector(result, words, h, v, n, dtype)
                            to = at + v * WARP
                            store_vector(layer_input[token, to * VECTOR], result, 0, to < last)
                        at = at + VECTORS_AT_ONCE * WARP
                        load_vectors(words, x, token, at, last)

    return place_no_guards(coefficients_aggregate)


def coefficients_by_threads_kernel(num_streams: int, hidden_size: int, projection: WarpProjectionPlan, block: int):
    """`coefficients` alone, for the same partial sums: `block` tokens a block, one thread each."""
    n, num_rows = num_streams, num_streams * num_streams + 2 * num_streams
    num_elements = n * hidden_size
    num_tokens = T.dynamic("num_tokens")
    num_slabs = T.dynamic("num_slabs")

    @T.prim_func
    def coefficients(
        partial: T.Tensor[(num_slabs, projection.slab_rows, num_tokens), T.float32],
        alpha: T.Tensor[(3,), T.float32],
        bias: T.Tensor[(num_rows,), T.float32],
        h_pre: T.Tensor[(num_tokens, n), T.float32],
        h_post: T.Tensor[(num_tokens, n), T.float32],
        h_res: T.Tensor[(num_tokens, n, n), T.float32],
        projected: T.Tensor[(num_rows + 1, num_tokens), T.float32],
        iters: T.int32,
        sinkhorn_eps: T.float32,
        pre_eps: T.float32,
        rms_eps: T.float32,
        post_scale: T.float32,
    ):
        with T.Kernel(T.ceildiv(num_tokens, block), threads=block) as tile:
            token = T.alloc_var(T.int32)
            per_group = group_size(partial, projection, hidden_size)
            token = tile * block + T.get_thread_binding()
            numbers = Numbers(iters, sinkhorn_eps, pre_eps, rms_eps, post_scale, 1.0 / num_elements)
            map_token(h_pre, h_post, h_res, projected, partial, alpha, bias, token, per_group, numbers, n)

    return place_no_guards(coefficients)
