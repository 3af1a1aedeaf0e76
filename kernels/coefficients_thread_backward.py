"""`coefficients_backward` as thread-level code (see `warps`): on a GPU, for two or four streams.

The formulas and their order are those of `coefficients_backward`: a token a lane, a warp a block. Its parts make up
`coefficients_aggregate_backward` as well.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from .logits import RowGroup, row_groups, sigmoid
from .sinkhorn_thread_backward import sinkhorn_token_backward
from .warps import WARP, clear_sums, place_no_guards


class Given(NamedTuple):
    """What the rows of a token's mappings are made of, and its `scale`, the factor s."""

    projected: Any
    alpha: Any
    bias: Any
    scale: Any


class Rows(NamedTuple):
    """Where they go: g_projected, and in shared memory what the block sums up over its tokens: as in the results of
    `coefficients_backward` a column an alpha, then one a row of phi; here they are rows, a token a column.
    """

    g_projected: Any
    parts: Any
    groups: int  # of rows, which have an alpha each


@T.macro
def store_row(rows: Rows, given: Given, group: RowGroup, row, g_z, token, lane):
    """One row's g_dots, and its g_z among what the block sums up."""
    rows.g_projected[row, token] = g_z * given.alpha[group.index] * given.scale
    rows.parts[rows.groups + row, lane] = g_z


@T.macro
def gate_backward(total, rows: Rows, given: Given, g_h, place, post_scale, group: RowGroup, token, lane):
    """A gate's rows, from g_h[place, j]; total[group] = Σ_j g_z · m. post_scale is 1 for h_pre; g_h None is zero."""
    m, g_z = T.alloc_var(T.float32), T.alloc_var(T.float32)
    total[group.index] = 0.0
    for j in T.unroll(group.inner):
        g_z = 0.0
        if g_h is not None:
            m = given.projected[group.first + j, token]
            z = given.alpha[group.index] * m + given.bias[group.first + j]
            g_z = post_scale * g_h[place, j] * (sigmoid(z) * sigmoid(-z))
            total[group.index] = total[group.index] + g_z * m
        store_row(rows, given, group, group.first + j, g_z, token, lane)


@T.macro
def res_backward(total, rows: Rows, given: Given, g_h_res, denominators, group, token, lane, iters, sinkhorn_eps):
    """The rows of h_res; total[group] = Σ_i Σ_j g_z · m. g_h_res None is zero."""
    n = group.outer
    H = T.alloc_local((n * n,), T.float32)
    logits = T.alloc_local((n * n,), T.float32)
    inner = T.alloc_var(T.float32)
    clear_sums(H)
    if g_h_res is not None:
        for j in T.unroll(n):
            for i in T.vectorized(n):
                H[j * n + i] = g_h_res[token, j, i]
        for m in T.unroll(n * n):
            logits[m] = given.alpha[group.index] * given.projected[group.first + m, token] + given.bias[group.first + m]
        sinkhorn_token_backward(H, logits, denominators, lane, n, iters, sinkhorn_eps)
    total[group.index] = 0.0
    for i in T.unroll(n):
        inner = 0.0
        for j in T.unroll(n):
            inner = inner + H[j * n + i] * given.projected[group.first + j * n + i, token]
            store_row(rows, given, group, group.first + j * n + i, H[j * n + i], token, lane)
        total[group.index] = total[group.index] + inner


@T.macro
def store_rho(rows: Rows, given: Given, total, num_rows, num_elements, token, lane):
    """ρ = −s²/K · Σ_m g_z · alpha · m, and the groups' sums among what the block sums up."""
    rho = T.alloc_var(T.float32)
    rho = 0.0
    for k in T.unroll(rows.groups):
        rho = rho + given.alpha[k] * total[k]
        rows.parts[k, lane] = total[k]
    rows.g_projected[num_rows, token] = -(given.scale * given.scale) * (1.0 / num_elements) * rho


@T.macro
def sum_tokens(partial, parts, block, thread, tokens):
    """The block's sums over its tokens, ascending: a sum a thread."""
    total = T.alloc_var(T.float32)
    if thread < parts.shape[0]:
        total = 0.0
        for t in T.serial(tokens):
            total = total + parts[thread, t]
        partial[block, thread] = total


def coefficients_backward_by_threads_kernel(
    num_streams: int, hidden_size: int, has_g_h_pre: bool, has_g_h_post: bool, has_g_h_res: bool, capacity: int
):
    """As `coefficients_backward_kernel`, with blocks of a warp."""
    n, num_rows = num_streams, num_streams * num_streams + 2 * num_streams
    pre, post, res = row_groups(n)
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
        with T.Kernel(T.ceildiv(num_tokens, WARP), threads=WARP) as block:
            parts = T.alloc_shared((3 + num_rows, WARP + 1), T.float32)
            denominators = T.alloc_shared(((2 * capacity - 2) * n, WARP), T.float32)
            total = T.alloc_local((3,), T.float32)
            scale, token = T.alloc_var(T.float32), T.alloc_var(T.int32)
            lane = T.get_thread_binding()
            token = block * WARP + lane
            given = Given(projected, alpha, bias, scale)
            rows = Rows(g_projected, parts, 3)
            if token < num_tokens:
                scale = projected[num_rows, token]
                gate_backward(
                    *(total, rows, given, g_h_pre if has_g_h_pre else None),
                    *(token, 1.0, pre, token, lane),
                )
                gate_backward(
                    *(total, rows, given, g_h_post if has_g_h_post else None),
                    *(token, post_scale, post, token, lane),
                )
                res_backward(
                    *(total, rows, given, g_h_res if has_g_h_res else None),
                    *(denominators, res, token, lane, iters, sinkhorn_eps),
                )
                store_rho(rows, given, total, num_rows, n * hidden_size, token, lane)
            T.sync_threads()
            sum_tokens(partial, parts, block, lane, T.min(WARP, num_tokens - block * WARP))

    return place_no_guards(coefficients_backward)
