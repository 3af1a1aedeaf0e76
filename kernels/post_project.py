"""post_project: the boundary's first pass, `post` of one sublayer and the projection of the next from the same tile.

Equations (3), (14) and (15), for token t:

    x_next[t, j, c] = Σ_i h_res[t, j, i] · x[t, i, c] + h_post[t, j] · layer_output[t, c]
    dots[t, m]      = Σ_{j,c} x_next[t, j, c] · phi[m, j, c]        squares[t] = Σ_{j,c} x_next[t, j, c]²

and, where h_pre is given (the delayed form, in which it comes from the sublayer before),

    layer_input[t, c] = Σ_j h_pre[t, j] · x_next[t, j, c]

Traffic per token: (n + 1)·C read, n·C written, and another C with the layer's input: nothing then is left of the
boundary but the coefficients, (2n + 2)·C in all. Without it `coefficients` and `aggregate` follow, (3n + 2)·C in all.

**The same bits as the parts.** x_next is formed with the fma chain of `post`, rounded once to the stream's dtype and
written; the rounded tile is what is projected and aggregated, in the chunks, groups and slabs of `projection` and
with its macros. So a boundary that is fused differs in nothing from one that is not, and a split, a run-time value,
moves no bit.

**One chunk a pass**, of other streams and on a CPU. A block has a tile of tokens and walks over chunks of channels. The
n streams of a chunk are mixed a few tokens at a time, in registers; the results stay in shared memory as operands of
the product, stream after stream. phi is split into its halves where it is loaded (`projection` has a launch for that),
the next stream's while this one is multiplied. A CPU multiplies float32: there the rounded tile is widened once a
stream, and squared with it.

**By warps.** A 16-bit stream of two or four (C a multiple of 8) has a kernel of its own on a GPU, `post_project_warps`:
the same x_next, other tiles. A warp has 16 tokens; lane l mixes tokens l // 4 and l // 4 + 8, of each 8 channels in a
row, and what it mixed is the operand that it multiplies:

    channels of a span    0 … 7    8 … 15   16 … 23  24 … 31
    token 0, and 8        lane 0   lane 1   lane 2   lane 3     16 bytes of each stream: words w0 w1 w2 w3
    token 1, and 9        lane 4   lane 5   lane 6   lane 7
    …
    token 7, and 15       lane 28  lane 29  lane 30  lane 31

    product of step 0     (w0, w1) is the lane's column of B     with phi's channels 8q + (0, 1) and 8q + (2, 3)
    product of step 1     (w2, w3)                               with phi's channels 8q + (4, 5) and 8q + (6, 7)
    squares               (w0, w1, w2, w3) is two rows of A      with (w0, w2), and with (w1, w3): the diagonals

Backward: `boundary_backward`.
"""

import tilelang.language as T

from .boundary_plans import PostProjectPlan
from .eight_streams import post_project_of_eight_kernel
from .post_project_warps import post_project_by_warps_kernel
from .projection import accumulate_dots, accumulate_squares, allocate_sums, clear, close_chunk, high_half, store_slab
from .projection_plans import LANES, ProjectionPlan, WarpProjectionPlan


@T.macro
def fragment_each(streams, shape, dtype):
    """A fragment for each stream. Bound to a name one by one: in a list comprehension they would have none."""
    fragments = []
    for _ in streams:
        fragment = T.alloc_fragment(shape, dtype)
        fragments.append(fragment)
    return fragments


@T.macro
def mix(next_rows, x_rows, layer_rows, h_post, h_res, first_token, streams):
    """next_rows[k] = Σ_i h_res[j, i] · x_rows[i] + h_post[j] · layer_rows, j the k-th of `streams`, in `post`'s order.

    Rows beyond the last token take its weights; nothing of them is written.
    """
    num_tokens, n = h_post.shape
    rows, channels = layer_rows.shape
    for r, c in T.Parallel(rows, channels):
        token = T.min(first_token + r, num_tokens - 1)
        for to, j in zip(next_rows, streams, strict=True):
            to[r, c] = h_post[token, j] * T.cast(layer_rows[r, c], T.float32)
            for i in tuple(range(n)):
                to[r, c] = T.ieee_fmaf(h_res[token, j, i], T.cast(x_rows[i][r, c], T.float32), to[r, c])


@T.macro
def add_output(next_rows, x_rows, layer_rows, h_post, first_token, streams):
    """Mix where H_res is the identity: next_rows[k] = h_post[j] · layer_rows + x_rows[j], in one fma."""
    num_tokens, _ = h_post.shape
    rows, channels = layer_rows.shape
    for r, c in T.Parallel(rows, channels):
        token = T.min(first_token + r, num_tokens - 1)
        for to, j in zip(next_rows, streams, strict=True):
            to[r, c] = T.ieee_fmaf(
                h_post[token, j], T.cast(layer_rows[r, c], T.float32), T.cast(x_rows[j][r, c], T.float32)
            )


@T.macro
def aggregate(input_rows, rounded, h_pre, first_token):
    """input_rows = Σ_j h_pre[j] · rounded[j], in the order of `aggregate`."""
    num_tokens, n = h_pre.shape
    rows, channels = input_rows.shape
    for r, c in T.Parallel(rows, channels):
        input_rows[r, c] = 0.0
        for j in tuple(range(n)):
            input_rows[r, c] = T.ieee_fmaf(
                h_pre[T.min(first_token + r, num_tokens - 1), j], T.cast(rounded[j][r, c], T.float32), input_rows[r, c]
            )


@T.macro
def widen(next_tile, squares, rounded, first_row):
    """A CPU's operand: next_tile[first_row + r] = rounded[r], as float32. The squares are added in the same pass."""
    rows, channels = rounded.shape
    for r in T.serial(rows):
        for group in T.serial(channels // LANES):
            for lane in T.Parallel(LANES):
                value = T.cast(rounded[r, group * LANES + lane], T.float32)
                next_tile[first_row + r, group * LANES + lane] = value
                squares[first_row + r, lane] = T.ieee_fmaf(value, value, squares[first_row + r, lane])


@T.macro
def store_halves(phi_tile, phi_rows, high, low, plan: ProjectionPlan):
    """phi_tile = high halves of phi_rows, then low ones."""
    for m, c in T.Parallel(plan.held_rows, plan.channels):
        high[m, c] = T.cast(high_half(phi_rows[m, c], plan.operand_dtype), plan.operand_dtype)
        low[m, c] = T.cast(phi_rows[m, c] - high_half(phi_rows[m, c], plan.operand_dtype), plan.operand_dtype)
    if plan.held_rows == plan.rows:
        T.copy(high, phi_tile[0 : plan.rows, 0 : plan.channels])
        T.copy(low, phi_tile[plan.rows : 2 * plan.rows, 0 : plan.channels])
    else:
        for m, c in T.Parallel(plan.held_rows, plan.channels):
            if m < plan.rows:
                phi_tile[m, c] = high[m, c]
                phi_tile[plan.rows + m, c] = low[m, c]


def post_project_kernel(
    num_streams: int,
    hidden_size: int,
    dtype: str,
    layer_dtype: str,
    plan: PostProjectPlan,
    has_h_pre: bool,
    has_h_res: bool = True,
):
    """x [T, n, C], layer_output [T, C], h_post [T, n], h_res [T, n, n], phi [M, n, C]
    -> x_next [T, n, C], partial [slabs, slab_rows, T] as in `projection`.

    `has_h_pre` adds h_pre [T, n] -> layer_input [T, C]; without it both are one-element placeholders, never accessed.
    `chunks_per_split` chunks go to each block of a token tile. Without h_res, which is then such a placeholder, H_res
    is the identity.
    """
    if isinstance(plan.projection, WarpProjectionPlan):
        if num_streams == 8:
            return post_project_of_eight_kernel(hidden_size, layer_dtype, plan, has_h_pre)
        return post_project_by_warps_kernel(num_streams, hidden_size, layer_dtype, plan, has_h_pre, has_h_res)
    n, rows, projection = num_streams, plan.rows, plan.projection
    tokens, channels = projection.tokens, projection.channels
    num_chunks = projection.num_chunks(hidden_size)
    num_tokens = T.dynamic("num_tokens")
    num_slabs = T.dynamic("num_slabs")
    unused = (1,)
    streams = tuple(range(n))
    # A CPU forms all streams of a channel from one conversion of x; a GPU's registers hold one at a time.
    together = tuple((j,) for j in streams) if projection.split else (streams,)
    tile_dtype = dtype if projection.split else "float32"

    @T.prim_func
    def post_project(
        x: T.Tensor[(num_tokens, n, hidden_size), dtype],
        layer_output: T.Tensor[(num_tokens, hidden_size), layer_dtype],
        h_post: T.Tensor[(num_tokens, n), T.float32],
        h_res: T.Tensor[(num_tokens, n, n) if has_h_res else unused, T.float32],
        phi: T.Tensor[(projection.rows, n, hidden_size), T.float32],
        h_pre: T.Tensor[(num_tokens, n) if has_h_pre else unused, T.float32],
        x_next: T.Tensor[(num_tokens, n, hidden_size), dtype],
        partial: T.Tensor[(num_slabs, projection.slab_rows, num_tokens), T.float32],
        layer_input: T.Tensor[(num_tokens, hidden_size) if has_h_pre else unused, dtype],
        chunks_per_split: T.int32,
    ):
        with T.Kernel(
            T.ceildiv(num_tokens, tokens), T.ceildiv(num_chunks, chunks_per_split), threads=projection.threads
        ) as (tile, split):
            next_tiles = [T.alloc_shared((tokens, channels), tile_dtype) for _ in streams]
            phi_tile = T.alloc_shared((projection.padded_rows, channels), projection.operand_dtype)
            x_rows = fragment_each(streams, (rows, channels), dtype)
            layer_rows = T.alloc_fragment((rows, channels), layer_dtype)
            next_rows = fragment_each(together[0], (rows, channels), T.float32)
            rounded = fragment_each(streams, (rows, channels), dtype)
            input_rows = T.alloc_fragment((rows, channels), T.float32)
            phi_rows = T.alloc_fragment((projection.held_rows, channels), T.float32)
            phi_high = T.alloc_fragment((projection.held_rows, channels), projection.operand_dtype)
            phi_low = T.alloc_fragment((projection.held_rows, channels), projection.operand_dtype)
            sums, group, total = allocate_sums(projection)

            if plan.blocks_per_sm > 1:
                T.annotate_min_blocks_per_sm(plan.blocks_per_sm)
            first_token = tile * tokens
            first_chunk = split * chunks_per_split
            if projection.padded_rows > projection.halves * projection.rows:
                T.clear(phi_tile)  # rows of padding, which nothing writes later
            clear(total)
            if projection.is_grouped(hidden_size):
                clear(group)
            for chunk in T.serial(first_chunk, T.min(first_chunk + chunks_per_split, num_chunks)):
                first = chunk * channels
                if projection.split:
                    T.copy(phi[0 : projection.held_rows, 0, first : first + channels], phi_rows)
                else:
                    clear(sums)
                for step in T.unroll(tokens // rows, unroll_factor=1):
                    row = first_token + step * rows
                    for i in streams:
                        T.copy(x[row : row + rows, i, first : first + channels], x_rows[i])
                    T.copy(layer_output[row : row + rows, first : first + channels], layer_rows)
                    for group_streams in together:
                        if has_h_res:
                            mix(next_rows, x_rows, layer_rows, h_post, h_res, row, group_streams)
                        else:
                            add_output(next_rows, x_rows, layer_rows, h_post, row, group_streams)
                        for values, j in zip(next_rows, group_streams, strict=True):
                            T.copy(values, rounded[j])
                            T.copy(rounded[j], x_next[row : row + rows, j, first : first + channels])
                            if projection.split:
                                T.copy(rounded[j], next_tiles[j][step * rows : (step + 1) * rows, 0:channels])
                            else:
                                widen(next_tiles[j], sums.squares, rounded[j], step * rows)
                    if has_h_pre:
                        aggregate(input_rows, rounded, h_pre, row)
                        T.copy(input_rows, layer_input[row : row + rows, first : first + channels])
                if projection.split:
                    clear(sums)
                for j in streams:
                    if projection.split:
                        store_halves(phi_tile, phi_rows, phi_high, phi_low, projection)
                        if j + 1 < n:
                            T.copy(phi[0 : projection.held_rows, j + 1, first : first + channels], phi_rows)
                    else:
                        T.copy(phi[0 : projection.rows, j, first : first + channels], phi_tile)
                    if projection.split:
                        accumulate_squares(sums.squares, next_tiles[j], tokens, channels)
                    accumulate_dots(sums.dots, next_tiles[j], phi_tile, projection, tile_dtype)
                close_chunk(partial, chunk, first_token, sums, group, total, projection, hidden_size)
            if num_slabs == 1:
                store_slab(partial, 0, first_token, total, projection)

    return post_project
