"""The last launch of a boundary's backward: every kind of partial sum added up, each in an order that the sizes fix.

    g_phi[e]            = Σ_ranges partial_phi[range, e]
    g_h_post, g_h_res   = Σ_channel blocks partial_mixing[block, sum, t]     and g_h_pre in the delayed form
    g_parameters[e]     = Σ_blocks partial_parameters[block, e]              of alpha, then of bias

What there are few of is added in one lane, ascending; what `coefficients_backward` leaves, a row a warp of tokens, in
the lanes of `partial_sums`. The three kinds share out the grid: first the blocks of g_phi, then those of the sums over
channels, then those of the parameters.
"""

import tilelang.language as T


@T.macro
def add_rows(total, partial, first, lanes: int, block: int):
    """total[first + e] = Σ_p partial[p, first + e] for `block` elements, in lanes as in `partial_sums`.

    Shapes are not bound to names: that would rename the sizes of every tensor that has them.
    """
    acc = T.alloc_fragment((lanes, block), T.float32)
    sums = T.alloc_fragment((block,), T.float32)
    T.clear(acc)
    for step in T.serial(T.ceildiv(partial.shape[0], lanes)):
        for lane, e in T.Parallel(lanes, block):
            if step * lanes + lane < partial.shape[0] and first + e < partial.shape[1]:
                acc[lane, e] += partial[step * lanes + lane, first + e]
    T.reduce_sum(acc, sums, dim=0)
    for e in T.Parallel(block):
        if first + e < partial.shape[1]:
            total[first + e] = sums[e]


@T.macro
def add_mixing(total, partial, place, index, first_token, block: int):
    """total[t, index] = Σ_b partial[b, place, t] for `block` tokens."""
    sums = T.alloc_fragment((block,), T.float32)
    T.clear(sums)
    for b in T.serial(partial.shape[0]):
        for t in T.Parallel(block):
            if first_token + t < partial.shape[2]:
                sums[t] += partial[b, place, first_token + t]
    for t in T.Parallel(block):
        if first_token + t < partial.shape[2]:
            total[first_token + t, index] = sums[t]


def boundary_sums_kernel(
    num_streams: int, needs_g_h_pre: bool, has_ranges: bool, lanes: int, block: int, has_h_res: bool = True
):
    """partial_phi [ranges, M·K], partial_mixing [channel blocks, sums, T], partial_parameters [blocks, 3 + M]
    -> g_phi [M·K], g_h_post [T, n], g_h_res [T, n·n], g_h_pre [T, n], g_parameters [3 + M].

    Without `has_ranges`, g_phi is complete: it and its partial sum are one-element placeholders, never accessed,
    as is g_h_pre unless `needs_g_h_pre`, and g_h_res without `has_h_res`.
    """
    n = num_streams
    num_tokens = T.dynamic("num_tokens")
    num_ranges = T.dynamic("num_ranges")
    num_weights = T.dynamic("num_weights")
    num_channel_blocks = T.dynamic("num_channel_blocks")
    num_blocks = T.dynamic("num_blocks")
    num_parameters = T.dynamic("num_parameters")
    mixed = n if has_h_res else 0
    sums_per_stream = mixed + 1 + needs_g_h_pre
    num_sums = n * sums_per_stream

    @T.prim_func
    def boundary_sums(
        partial_phi: T.Tensor[(num_ranges, num_weights), T.float32],
        partial_mixing: T.Tensor[(num_channel_blocks, num_sums, num_tokens), T.float32],
        partial_parameters: T.Tensor[(num_blocks, num_parameters), T.float32],
        g_phi: T.Tensor[(num_weights,), T.float32],
        g_h_post: T.Tensor[(num_tokens, n), T.float32],
        g_h_res: T.Tensor[(num_tokens, n * n) if has_h_res else (1,), T.float32],
        g_h_pre: T.Tensor[(num_tokens, n) if needs_g_h_pre else (1,), T.float32],
        g_parameters: T.Tensor[(num_parameters,), T.float32],
    ):
        with T.Kernel(
            (T.ceildiv(num_weights, block) if has_ranges else 0)
            + num_sums * T.ceildiv(num_tokens, block)
            + T.ceildiv(num_parameters, block),
            threads=block,
        ) as tile:
            weight_blocks = T.ceildiv(num_weights, block) if has_ranges else 0
            token_blocks = T.ceildiv(num_tokens, block)
            if tile < weight_blocks:
                if has_ranges:
                    add_rows(g_phi, partial_phi, tile * block, 1, block)
            elif tile < weight_blocks + num_sums * token_blocks:
                j = (tile - weight_blocks) // token_blocks // sums_per_stream
                k = (tile - weight_blocks) // token_blocks % sums_per_stream
                place = j * sums_per_stream + k
                first = (tile - weight_blocks) % token_blocks * block
                if k == 0:
                    add_mixing(g_h_post, partial_mixing, place, j, first, block)
                elif k <= mixed:
                    if has_h_res:
                        add_mixing(g_h_res, partial_mixing, place, j * n + k - 1, first, block)
                else:
                    if needs_g_h_pre:
                        add_mixing(g_h_pre, partial_mixing, place, j, first, block)
            else:
                add_rows(
                    g_parameters,
                    partial_parameters,
                    (tile - weight_blocks - num_sums * token_blocks) * block,
                    lanes,
                    block,
                )

    return boundary_sums
