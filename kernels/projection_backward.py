"""projection, backward: the gradients of the stream and of phi, from one read of the stream.

From dots[t, m] = Σ_k x[t, k] · phi[m, k] and s[t], which depends on Σ_k x[t, k]² (Eq. 14, 15), with k = (i, c), the
gradients g_dots [T, M] and ρ [T] of `coefficients_backward`:

    g_x[t, k]   = Σ_m g_dots[t, m] · phi[m, k] + ρ[t] · x[t, k]
    g_phi[m, k] = Σ_t g_dots[t, m] · x[t, k]

Where the stream was also aggregated with weights that come from this projection, h_pre[t, i] · g_layer_input[t, c]
belongs to g_x[t, i, c] too, and is added here, so that g_x is written once and rounded once.

Traffic per token: n·C read and n·C written, (n + 1)·C read with the aggregation: each of the n streams' blocks reads
g_layer_input, and they are neighbours in the grid, so that all but one find it in the L2 cache.

**Wide stores.** The tensor core leaves a thread two neighbouring elements of g_x. They go through shared memory, in the
tile of g_layer_input, which is no longer needed then, so that a thread stores 16 bytes.

**One read, two products.** A block has some channels of one stream, where phi's rows stay in shared memory, and walks
over a range of tokens. Of each tile of x it makes g_x and adds to its sum for g_phi, which stays in registers.

**Fixed order.** The ranges are a function of the token count and C; every range writes its own partial g_phi,
and `partial_sums` adds those up in order. No atomics.

**Tensor cores, float32 results.** As in `projection`, operands are split into high and low halves: g_dots · phi is
three products (high·high, low·high, high·low), g_dots · x two where x is an operand as it is (bfloat16; float16 in
TF32) and three where it is float32. A CPU multiplies float32. Rows beyond the last token are zero on both sides:
what lies in memory there could be NaN, and 0 · NaN is NaN.
"""

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from .projection import high_half
from .projection_backward_warps import project_backward_warps_kernel
from .projection_plans import ProjectionBackwardPlan, WarpsPlan


@T.macro
def split_tile(high, low, first, second, value, plan):
    """high[first, second] + low[first, second] = value; without a split, high is the value."""
    if plan.split:
        half = high_half(value, plan.operand_dtype)
        high[first, second] = T.cast(half, plan.operand_dtype)
        low[first, second] = T.cast(value - half, plan.operand_dtype)
    else:
        high[first, second] = value


@T.macro
def load_phi(high, low, phi, needs_g_x, first_channel, hidden_size, plan):
    """The halves of phi's rows at this block's channels; rows of padding are zero."""
    for m, c in T.Parallel(plan.padded_rows, plan.channels):
        value = T.if_then_else(
            m < plan.rows and first_channel + c < hidden_size, phi[m, needs_g_x, first_channel + c], 0.0
        )
        split_tile(high, low, m, c, value, plan)


@T.macro
def load_g_dots(high, low, g_projected, first_token, num_tokens, plan):
    """The halves of g_dots, token by row; zero beyond the last token."""
    for m, t in T.Parallel(plan.padded_rows, plan.tokens):
        value = T.if_then_else(m < plan.rows and first_token + t < num_tokens, g_projected[m, first_token + t], 0.0)
        split_tile(high, low, t, m, value, plan)


def project_backward_kernel(
    num_streams: int,
    hidden_size: int,
    dtype: str,
    plan: ProjectionBackwardPlan | WarpsPlan,
    needs_g_x: bool,
    needs_g_phi: bool,
    has_g_layer_input: bool,
):
    """g_projected [M + 1, T], x [T, n, C], phi [M, n, C] -> g_x [T, n, C], partial [splits, M, n, C] of g_phi.

    `has_g_layer_input` adds h_pre [T, n] · g_layer_input [T, C] to g_x. What is absent or not needed is a one-element
    placeholder, never accessed.
    """
    if isinstance(plan, WarpsPlan):
        return project_backward_warps_kernel(
            num_streams, hidden_size, dtype, plan, needs_g_x, needs_g_phi, has_g_layer_input
        )
    n, rows, tokens, channels = num_streams, plan.rows, plan.tokens, plan.channels
    operand = plan.operand_dtype
    num_tokens = T.dynamic("num_tokens")
    num_splits = T.dynamic("num_splits")
    unused = (1,)
    x_is_operand = operand == dtype == "bfloat16" or not plan.split
    x_is_split = plan.split and dtype == "float32"

    @T.prim_func
    def project_backward(
        g_projected: T.Tensor[(rows + 1, num_tokens), T.float32],
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        phi: T.Tensor[(rows, n, hidden_size) if needs_g_x else unused, T.float32],
        h_pre: T.Tensor[(num_tokens, n) if has_g_layer_input else unused, T.float32],
        g_layer_input: T.Tensor[(num_tokens, hidden_size) if has_g_layer_input else unused, dtype],
        g_x: T.Tensor[(num_tokens, n, hidden_size) if needs_g_x else unused, dtype],
        partial: T.Tensor[(num_splits, rows, n, hidden_size) if needs_g_phi else unused, T.float32],
        tokens_per_split: T.int32,
    ):
        with T.Kernel(
            n, T.ceildiv(hidden_size, channels), T.ceildiv(num_tokens, tokens_per_split), threads=plan.threads
        ) as (i, channel_block, split):
            x_tile = T.alloc_shared((tokens, channels), dtype)
            g_high = T.alloc_shared((tokens, plan.padded_rows), operand)
            g_low = T.alloc_shared((tokens, plan.padded_rows), operand)
            phi_high = T.alloc_shared((plan.padded_rows, channels), operand)
            phi_low = T.alloc_shared((plan.padded_rows, channels), operand)
            x_high = T.alloc_shared((tokens, channels), operand)
            x_low = T.alloc_shared((tokens, channels), operand)
            rho = T.alloc_shared((tokens,), T.float32)
            weight = T.alloc_shared((tokens,), T.float32)
            g_layer_tile = T.alloc_shared((tokens, channels), dtype)
            g_x_acc = T.alloc_fragment((tokens, channels), T.float32)
            g_phi_acc = T.alloc_fragment((plan.padded_rows, channels), T.float32)

            if plan.threads > 1:
                T.annotate_layout({g_layer_tile: make_swizzled_layout(g_layer_tile)})
                if not (needs_g_phi and x_is_operand):  # the product lays out its operand itself
                    T.annotate_layout({x_tile: make_swizzled_layout(x_tile)})
            first_channel = channel_block * channels
            if needs_g_x:
                load_phi(phi_high, phi_low, phi, i, first_channel, hidden_size, plan)
            if needs_g_phi:
                T.clear(g_phi_acc)
            for tile in T.serial(T.ceildiv(tokens_per_split, tokens)):
                first = split * tokens_per_split + tile * tokens
                if first < num_tokens:
                    T.copy(x[first : first + tokens, i, first_channel : first_channel + channels], x_tile)
                    load_g_dots(g_high, g_low, g_projected, first, num_tokens, plan)
                    if needs_g_x:
                        for t in T.Parallel(tokens):
                            rho[t] = T.if_then_else(first + t < num_tokens, g_projected[rows, first + t], 0.0)
                        if has_g_layer_input:
                            T.copy(
                                g_layer_input[first : first + tokens, first_channel : first_channel + channels],
                                g_layer_tile,
                            )
                            for t in T.Parallel(tokens):
                                weight[t] = T.if_then_else(first + t < num_tokens, h_pre[first + t, i], 0.0)
                            for t, c in T.Parallel(tokens, channels):
                                g_x_acc[t, c] = T.ieee_fmaf(
                                    rho[t],
                                    T.cast(x_tile[t, c], T.float32),
                                    weight[t] * T.cast(g_layer_tile[t, c], T.float32),
                                )
                        else:
                            for t, c in T.Parallel(tokens, channels):
                                g_x_acc[t, c] = rho[t] * T.cast(x_tile[t, c], T.float32)
                        T.gemm(g_high, phi_high, g_x_acc)
                        if plan.split:
                            T.gemm(g_low, phi_high, g_x_acc)
                            T.gemm(g_high, phi_low, g_x_acc)
                        if plan.threads == 1:
                            T.copy(g_x_acc, g_x[first : first + tokens, i, first_channel : first_channel + channels])
                        else:
                            for t, c in T.Parallel(tokens, channels):
                                g_layer_tile[t, c] = T.cast(g_x_acc[t, c], dtype)
                            T.copy(
                                g_layer_tile, g_x[first : first + tokens, i, first_channel : first_channel + channels]
                            )
                    if needs_g_phi:
                        if x_is_operand:
                            T.gemm(g_high, x_tile, g_phi_acc, transpose_A=True)
                            if plan.split:
                                T.gemm(g_low, x_tile, g_phi_acc, transpose_A=True)
                        else:
                            for t, c in T.Parallel(tokens, channels):
                                split_tile(x_high, x_low, t, c, T.cast(x_tile[t, c], T.float32), plan)
                            T.gemm(g_high, x_high, g_phi_acc, transpose_A=True)
                            T.gemm(g_low, x_high, g_phi_acc, transpose_A=True)
                            if x_is_split:
                                T.gemm(g_high, x_low, g_phi_acc, transpose_A=True)
            if needs_g_phi:
                for m, c in T.Parallel(plan.padded_rows, channels):
                    if m < rows and first_channel + c < hidden_size:
                        partial[split, m, i, first_channel + c] = g_phi_acc[m, c]

    return project_backward
