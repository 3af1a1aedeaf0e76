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

import tilelang.language as T

from .coefficients_thread_backward import coefficients_backward_by_threads_kernel
from .logits import RowGroup, row_groups, sigmoid
from .sinkhorn_backward import sinkhorn_backward_inplace


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
def load_scaled(scaled, projected, group: RowGroup, first_token, num_tokens, block):
    """scaled[a, b, t] = m of the group's row a · inner + b; zero beyond the last token."""
    for a, b, t in T.Parallel(group.outer, group.inner, block):
        scaled[a, b, t] = T.if_then_else(
            first_token + t < num_tokens, projected[group.first + a * group.inner + b, first_token + t], 0.0
        )


@T.macro
def gate_backward(g_z, g_h, scaled, alpha, bias, post_scale, group: RowGroup, first_token, num_tokens, block):
    """g_z[0, j, t] = post_scale · g_h · σ(z)·σ(−z), post_scale being 1 for h_pre.

    As everywhere where a macro passes a kernel's scalar on, it has the scalar's name: TileLang 0.1.15 renames it.
    """
    for k, j, t in T.Parallel(1, group.inner, block):
        z = alpha[group.index] * scaled[k, j, t] + bias[group.first + j]
        g = T.if_then_else(first_token + t < num_tokens, g_h[first_token + t, j], 0.0)
        g_z[k, j, t] = post_scale * g * (sigmoid(z) * sigmoid(-z))


@T.macro
def group_backward(rho, partial, g_projected, g_z, scaled, scale, alpha, group: RowGroup, tile, num_tokens, block):
    """One group of rows: its g_dots, the block's sums for g_alpha and g_bias, and its part of Σ g_z · alpha · m.

    `partial` has a column per alpha, then one per row. Overwrites scaled.
    """
    outer, inner = group.outer, group.inner
    num_alphas = partial.shape[1] - (g_projected.shape[0] - 1)
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
            g_projected[group.first + a * inner + b, tile * block + t] = g_z[a, b, t] * alpha[group.index] * scale[t]
    for a, b, t in T.Parallel(outer, inner, block):
        scaled[a, b, t] *= g_z[a, b, t]
    T.reduce_sum(scaled, inner_sums, dim=0)
    T.reduce_sum(inner_sums, token_sums, dim=0)
    for t in T.Parallel(block):
        rho[t] += alpha[group.index] * token_sums[t]
    T.reduce_sum(token_sums, block_sum, dim=0)
    for k in T.Parallel(1):
        partial[tile, group.index + k] = block_sum[k]


@T.macro
def load_scale(scale, rho, projected, num_rows, first_token, num_tokens, block):
    """s of every token, and rho = 0."""
    for t in T.Parallel(block):
        scale[t] = T.if_then_else(first_token + t < num_tokens, projected[num_rows, first_token + t], 0.0)
    T.clear(rho)


@T.macro
def store_rho(g_projected, rho, scale, num_rows, num_elements, first_token, num_tokens, block):
    """ρ = −s²/K · Σ_m g_z · alpha · m."""
    for t in T.Parallel(block):
        if first_token + t < num_tokens:
            g_projected[num_rows, first_token + t] = -(scale[t] * scale[t]) * (1.0 / num_elements) * rho[t]


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
            first = tile * block
            load_scale(scale, rho, projected, num_rows, first, num_tokens, block)

            load_scaled(scaled_pre, projected, pre, first, num_tokens, block)
            if has_g_h_pre:
                gate_backward(g_z_pre, g_h_pre, scaled_pre, alpha, bias, 1.0, pre, first, num_tokens, block)
            else:
                T.clear(g_z_pre)
            group_backward(rho, partial, g_projected, g_z_pre, scaled_pre, scale, alpha, pre, tile, num_tokens, block)

            load_scaled(scaled_post, projected, post, first, num_tokens, block)
            if has_g_h_post:
                gate_backward(g_z_post, g_h_post, scaled_post, alpha, bias, post_scale, post, first, num_tokens, block)
            else:
                T.clear(g_z_post)
            group_backward(
                rho, partial, g_projected, g_z_post, scaled_post, scale, alpha, post, tile, num_tokens, block
            )

            load_scaled(scaled_res, projected, res, first, num_tokens, block)
            if has_g_h_res:
                for j, i, t in T.Parallel(n, n, block):
                    z_res[j, i, t] = alpha[2] * scaled_res[j, i, t] + bias[2 * n + j * n + i]
                for j, i, t in T.Parallel(n, n, block):
                    g_z_res[j, i, t] = T.if_then_else(first + t < num_tokens, g_h_res[first + t, j, i], 0.0)
                sinkhorn_backward_inplace(g_z_res, z_res, n, block, capacity, iters, sinkhorn_eps)
                load_scaled(scaled_res, projected, res, first, num_tokens, block)  # not held in registers meanwhile
            else:
                T.clear(g_z_res)
            group_backward(rho, partial, g_projected, g_z_res, scaled_res, scale, alpha, res, tile, num_tokens, block)
            store_rho(g_projected, rho, scale, num_rows, n * hidden_size, first, num_tokens, block)

    return coefficients_backward
