"""expand_project: the stream's first boundary, `expand` and the projection of the first sublayer from one read of h.

With x[t, j, c] = h[t, c] for every stream j, equations (14) and (15) need h alone, for token t and row m of phi:

    phi_sum[m, c] = Σ_j phi[m, j, c]
    dots[t, m]    = Σ_c h[t, c] · phi_sum[m, c]        squares[t] = n · Σ_c h[t, c]²

Traffic per token: C read, n·C written. `coefficients` follows, which takes these sums as it takes those of
`projection`, then `aggregate` on the one stream that all are, with the sum of the weights:

    layer_input[t, c] = (Σ_j h_pre[t, j]) · h[t, c]

2·C more, so (n + 3)·C in all, where the three kernels apart move (3n + 2)·C, and an nth of the products.

**Other bits than the general path's.** n equal products are added before they are multiplied, so logits differ in their
last bits from those of the expanded stream. phi is summed in ascending order of streams, in float32, and split after
that; chunks, groups and slabs are those of `projection`, and a token's result depends on the token alone. n is a power
of two, so that to multiply by it rounds nothing.

Backward, with g_dots and ρ of `coefficients_backward`, which gives ρ for each stream:

    g_h[t, c]      = Σ_j g_x[t, j, c] + (Σ_j h_pre[t, j]) · g_layer_input[t, c]
                     + n · ρ[t] · h[t, c] + Σ_m g_dots[t, m] · phi_sum[m, c]
    g_h_pre[t, j]  = Σ_c g_layer_input[t, c] · h[t, c]          the same for every j
    g_phi[m, j, c] = Σ_t g_dots[t, m] · h[t, c]                 the same for every j

It has no kernel of its own: `aggregate_backward` and `projection_backward` on one stream, 2·C and 3·C, and
`expand_backward` for the first sum, (n + 1)·C. What is left is to add the two, 3·C: (n + 9)·C in all, instead of (7n +
3)·C one by one.
"""

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from .boundary_plans import ExpandProjectPlan
from .expand_project_warps import expand_project_by_warps_kernel
from .post_project import store_halves
from .projection import accumulate_dots, accumulate_squares, allocate_sums, clear, close_chunk, store_slab
from .projection_plans import LANES, ProjectionPlan, WarpProjectionPlan


@T.macro
def sum_streams(phi_sum, phi_rows, phi, first, num_streams: int, plan: ProjectionPlan):
    """phi_sum[m, c] = Σ_j phi[m, j, first + c], streams in ascending order; phi_rows is for one of them."""
    T.copy(phi[0 : plan.held_rows, 0, first : first + plan.channels], phi_sum)
    for j in tuple(range(1, num_streams)):
        T.copy(phi[0 : plan.held_rows, j, first : first + plan.channels], phi_rows)
        for m, c in T.Parallel(plan.held_rows, plan.channels):
            phi_sum[m, c] += phi_rows[m, c]


@T.macro
def scale_squares(squares, factor: int, plan: ProjectionPlan):
    """squares *= factor"""
    for t, lane in T.Parallel(plan.tokens, LANES):
        squares[t, lane] *= factor


def expand_project_kernel(num_streams: int, hidden_size: int, dtype: str, plan: ExpandProjectPlan):
    """h [T, C], phi [M, n, C] -> x [T, n, C], partial [slabs, slab_rows, T] as in `projection`.

    `chunks_per_split` chunks go to each block of a token tile.
    """
    if isinstance(plan.projection, WarpProjectionPlan):
        return expand_project_by_warps_kernel(num_streams, hidden_size, plan)
    n, projection = num_streams, plan.projection
    tokens, channels = projection.tokens, projection.channels
    num_chunks = projection.num_chunks(hidden_size)
    num_tokens = T.dynamic("num_tokens")
    num_slabs = T.dynamic("num_slabs")
    tile_dtype = dtype if projection.split else "float32"
    is_operand = projection.operand_dtype == dtype == "bfloat16"

    @T.prim_func
    def expand_project(
        h: T.Tensor[(num_tokens, hidden_size), dtype],
        phi: T.Tensor[(projection.rows, n, hidden_size), T.float32],
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        partial: T.Tensor[(num_slabs, projection.slab_rows, num_tokens), T.float32],
        chunks_per_split: T.int32,
    ):
        with T.Kernel(
            T.ceildiv(num_tokens, tokens), T.ceildiv(num_chunks, chunks_per_split), threads=projection.threads
        ) as (
            tile,
            split,
        ):
            h_rows = T.alloc_fragment((tokens, channels), dtype)
            h_tile = T.alloc_shared((tokens, channels), tile_dtype)
            phi_rows = T.alloc_fragment((projection.held_rows, channels), T.float32)
            phi_sum = T.alloc_fragment((projection.held_rows, channels), T.float32)
            phi_high = T.alloc_fragment((projection.held_rows, channels), projection.operand_dtype)
            phi_low = T.alloc_fragment((projection.held_rows, channels), projection.operand_dtype)
            phi_tile = T.alloc_shared((projection.padded_rows, channels), projection.operand_dtype)
            sums, group, total = allocate_sums(projection)

            if plan.blocks_per_sm > 1:
                T.annotate_min_blocks_per_sm(plan.blocks_per_sm)
            if projection.split and not is_operand and projection.padded_rows <= 96:  # as in `projection`
                T.annotate_layout({h_tile: make_swizzled_layout(h_tile)})
            first_token = tile * tokens
            first_chunk = split * chunks_per_split
            if projection.padded_rows > projection.halves * projection.rows:
                T.clear(phi_tile)  # rows of padding, which nothing writes later
            clear(total)
            if projection.is_grouped(hidden_size):
                clear(group)
            for chunk in T.serial(first_chunk, T.min(first_chunk + chunks_per_split, num_chunks)):
                first = chunk * channels
                T.copy(h[first_token : first_token + tokens, first : first + channels], h_rows)
                T.copy(h_rows, h_tile)
                for j in T.unroll(n):
                    T.copy(h_rows, x[first_token : first_token + tokens, j, first : first + channels])
                sum_streams(phi_sum, phi_rows, phi, first, n, projection)
                if projection.split:
                    store_halves(phi_tile, phi_sum, phi_high, phi_low, projection)
                else:
                    T.copy(phi_sum, phi_tile)
                clear(sums)
                accumulate_squares(sums.squares, h_tile, tokens, channels)
                scale_squares(sums.squares, n, projection)
                accumulate_dots(sums.dots, h_tile, phi_tile, projection, tile_dtype)
                close_chunk(partial, chunk, first_token, sums, group, total, projection, hidden_size)
            if num_slabs == 1:
                store_slab(partial, 0, first_token, total, projection)

    return expand_project
