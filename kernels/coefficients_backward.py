"""coefficients, backward: from the gradients of the three mappings to those of the projection and its parameters.

With m = s·(x·phi) and s, which the forward kept, z = alpha·m + bias is Eq. (16) again. The gates and Sinkhorn give g_z:

    g_z_pre  = g_h_pre · σ(z)·σ(−z)
    g_z_post = post_scale · g_h_post · σ(z)·σ(−z)           σ(−z), since 1 − σ(z) is 0 in float32 from z = 17 on
    g_z_res  = Sinkhorn's backward of g_h_res               see `sinkhorn_backward`

and from there, for row m of phi, which has the alpha of its group,

    g_bias[m]  = Σ_tokens g_z[m]              g_alpha = Σ_tokens Σ_m g_z[m]·m,  m over the rows of a group
    g_dots[m]  = g_z[m] · alpha · s           what the row of x·phi gets
    ρ          = −s²/K · Σ_m g_z[m] · alpha · m             what x gets through s: g_x += ρ·x

`g_projected` has the rows g_dots and, last, ρ: the layout of `projected`. Sums over tokens leave a row of partial sums
a block, which `partial_sums` adds up. One token is one thread; nothing here is as wide as the stream.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from .coefficients_thread_backward import Given, coefficients_backward_by_threads_kernel
from .logits import RowGroup, load_scaled, row_groups, sigmoid
from .sinkhorn_backward import sinkhorn_backward_inplace


class Results(NamedTuple):
    """Where the rows go, the block's sums of them, and in `rho` Σ g_z · alpha · m so far."""

    g_projected: Any
    partial: Any
    rho: Any


def a_row_a_thread(outer: int, inner: int, threads: int) -> T.Fragment:
    """The layout of sums over a block's tokens: one a thread, or several; again in the threads that are left.

    All of them in every thread where they would not be shared out evenly.
    """
    rows = outer * inner
    if rows > threads and rows % threads:
        return T.Fragment((outer, inner), lambda a, b, k: (k, a * inner + b), replicate=threads)
    if threads // 2 < rows < threads:
        return T.Fragment((outer, inner), lambda a, b: (a * inner + b, 0))
    if rows >= threads:
        return T.Fragment((outer, inner), lambda a, b: ((a * inner + b) % threads, (a * inner + b) // threads))
    return T.Fragment((outer, inner), lambda a, b, k: (k * rows + a * inner + b, 0), replicate=threads // rows)


@T.macro
def group_backward(results: Results, given: Given, g_z, scaled, group: RowGroup, tile):
    """One group of rows: its g_dots, the block's sums for g_alpha and g_bias, and its part of Σ g_z · alpha · m.

    `partial` has a column per alpha, then one per row. Overwrites scaled.
    """
    g_projected, partial, rho = results
    outer, inner, block = g_z.shape
    num_tokens, num_alphas = g_projected.shape[1], partial.shape[1] - (g_projected.shape[0] - 1)
    row_sums = T.alloc_fragment((outer, inner), T.float32)
    inner_sums = T.alloc_fragment((inner, block), T.float32)
    token_sums = T.alloc_fragment((block,), T.float32)
    block_sum = T.alloc_fragment((1,), T.float32)
    if outer > 1:  # spares layout inference half its time
        T.annotate_layout({row_sums: a_row_a_thread(outer, inner, block)})
    T.reduce_sum(g_z, row_sums, dim=2)
    if outer * inner > block and outer * inner % block:  # as many rounds as rows: 36 or 49 have no layout in 32 threads
        for a in T.unroll(outer):
            for b in T.Parallel(inner):
                partial[tile, num_alphas + group.first + a * inner + b] = row_sums[a, b]
    else:
        for a, b in T.Parallel(outer, inner):
            partial[tile, num_alphas + group.first + a * inner + b] = row_sums[a, b]
    for a, b, t in T.Parallel(outer, inner, block):
        if tile * block + t < num_tokens:
            g_projected[group.first + a * inner + b, tile * block + t] = (
                g_z[a, b, t] * given.alpha[group.index] * given.scale[t]
            )
    for a, b, t in T.Parallel(outer, inner, block):
        scaled[a, b, t] *= g_z[a, b, t]
    T.reduce_sum(scaled, inner_sums, dim=0)
    T.reduce_sum(inner_sums, token_sums, dim=0)
    for t in T.Parallel(block):
        rho[t] += given.alpha[group.index] * token_sums[t]
    T.reduce_sum(token_sums, block_sum, dim=0)
    for k in T.Parallel(1):
        partial[tile, group.index + k] = block_sum[k]


@T.macro
def gate_backward(results: Results, given: Given, g_z, scaled, g_h, post_scale, group: RowGroup, tile, first_token):
    """A gate's group of rows, with g_z[0, j, t] = post_scale · g_h · σ(z)·σ(−z); zero where g_h is None.

    post_scale is 1 for h_pre. As everywhere where a macro passes a kernel's scalar on, it has the scalar's name:
    TileLang 0.1.15 renames it.
    """
    load_scaled(scaled, given.projected, group, first_token)
    if g_h is None:
        T.clear(g_z)
    else:
        for k, j, t in T.Parallel(*g_z.shape):
            z = given.alpha[group.index] * scaled[k, j, t] + given.bias[group.first + j]
            g = T.if_then_else(first_token + t < g_h.shape[0], g_h[first_token + t, j], 0.0)
            g_z[k, j, t] = post_scale * g * (sigmoid(z) * sigmoid(-z))
    group_backward(results, given, g_z, scaled, group, tile)


@T.macro
def load_scale(results: Results, given: Given, first_token):
    """s of every token, and rho = 0."""
    last_row, num_tokens = given.projected.shape[0] - 1, given.projected.shape[1]
    for t in T.Parallel(given.scale.shape[0]):
        given.scale[t] = T.if_then_else(first_token + t < num_tokens, given.projected[last_row, first_token + t], 0.0)
    T.clear(results.rho)


@T.macro
def store_rho(results: Results, scale, num_elements, first_token):
    """ρ = −s²/K · Σ_m g_z · alpha · m."""
    last_row, num_tokens = results.g_projected.shape[0] - 1, results.g_projected.shape[1]
    for t in T.Parallel(scale.shape[0]):
        if first_token + t < num_tokens:
            results.g_projected[last_row, first_token + t] = (
                -(scale[t] * scale[t]) * (1.0 / num_elements) * results.rho[t]
            )


def coefficients_backward_kernel(
    num_streams: int,
    hidden_size: int,
    block: int,
    has_g_h_pre: bool,
    has_g_h_post: bool,
    has_g_h_res: bool,
    capacity: int,
    by_threads: bool = False,
):
    """g_h_pre, g_h_post [T, n], g_h_res [T, n, n], projected [M + 1, T], alpha [3], bias [M]
    -> g_projected [M + 1, T], partial [blocks, 3 + M] of g_alpha and g_bias.

    What is not given, as `has_…` say, is a one-element placeholder, never accessed, and counts as zero. iters may
    be 1 to `capacity`.
    """
    if by_threads:
        has_given = (has_g_h_pre, has_g_h_post, has_g_h_res)
        return coefficients_backward_by_threads_kernel(num_streams, hidden_size, *has_given, capacity)
    n = num_streams
    pre, post, res = row_groups(n)
    num_rows = n * n + 2 * n
    num_tokens = T.dynamic("num_tokens")
    num_partials = T.dynamic("num_partials")
    absent = (1,)

    @T.prim_func
    def coefficients_backward(
        g_h_pre: T.Tensor[(num_tokens, n) if has_g_h_pre else absent, T.float32],
        g_h_post: T.Tensor[(num_tokens, n) if has_g_h_post else absent, T.float32],
        g_h_res: T.Tensor[(num_tokens, n, n) if has_g_h_res else absent, T.float32],
        projected: T.Tensor[(num_rows + 1, num_tokens), T.float32],
        alpha: T.Tensor[(3,), T.float32],
        bias: T.Tensor[(num_rows,), T.float32],
        g_projected: T.Tensor[(num_rows + 1, num_tokens), T.float32],
        partial: T.Tensor[(num_partials, 3 + num_rows), T.float32],
        iters: T.int32,
        sinkhorn_eps: T.float32,
        post_scale: T.float32,
    ):
        with T.Kernel(T.ceildiv(num_tokens, block), threads=block) as tile:
            scale = T.alloc_fragment((block,), T.float32)
            rho = T.alloc_fragment((block,), T.float32)
            scaled_pre = T.alloc_fragment((1, n, block), T.float32)
            scaled_post = T.alloc_fragment((1, n, block), T.float32)
            scaled_res = T.alloc_fragment((n, n, block), T.float32)
            g_z_pre = T.alloc_fragment((1, n, block), T.float32)
            g_z_post = T.alloc_fragment((1, n, block), T.float32)
            g_z_res = T.alloc_fragment((n, n, block), T.float32)
            z_res = T.alloc_shared((n, n, block), T.float32)
            given, results = Given(projected, alpha, bias, scale), Results(g_projected, partial, rho)
            first = tile * block
            load_scale(results, given, first)
            gate_backward(results, given, g_z_pre, scaled_pre, g_h_pre if has_g_h_pre else None, 1.0, pre, tile, first)
            gate_backward(
                *(results, given, g_z_post, scaled_post, g_h_post if has_g_h_post else None),
                *(post_scale, post, tile, first),
            )
            load_scaled(scaled_res, projected, res, first)
            if has_g_h_res:
                for j, i, t in T.Parallel(n, n, block):
                    z_res[j, i, t] = alpha[2] * scaled_res[j, i, t] + bias[2 * n + j * n + i]
                for j, i, t in T.Parallel(n, n, block):
                    g_z_res[j, i, t] = T.if_then_else(first + t < num_tokens, g_h_res[first + t, j, i], 0.0)
                sinkhorn_backward_inplace(g_z_res, z_res, n, block, capacity, iters, sinkhorn_eps)
                load_scaled(scaled_res, projected, res, first)  # not held in registers meanwhile
            else:
                T.clear(g_z_res)
            group_backward(results, given, g_z_res, scaled_res, res, tile)
            store_rho(results, scale, n * hidden_size, first)

    return coefficients_backward
