"""aggregate_norm: aggregate the n streams and normalise the sum, for a layer that begins with a norm of its own.

Equation (3), H_pre x, then an RMSNorm over the channels with the weight w of the layer:

    u[t, c]           = Σ_i h_pre[t, i] · x[t, i, c]
    r[t]              = rsqrt(Σ_c u[t, c]² / C + eps)
    layer_input[t, c] = u[t, c] · r[t] · w[c]

u is that of `aggregate`, fma by fma, and stays in float32: nothing is rounded to the stream's dtype but the result.

Traffic per token: n·C read, C written; w comes from the cache, 4·C bytes of it (2·C in 16 bits). A block has a whole
token and walks over its channels twice, since r needs all of them. What the first walk made stays in registers, 32
channels a thread at most: up to C = 8192 at vectors of full width or none, since the lanes grow with C. Beyond that
(`kept` is off) the second walk reads x again, n·C more from the cache, and makes the same u of it. Channel c is added
up in lane (c / width) mod lanes, then the lanes are added: the order follows from C and the dtype alone.
"""

import tilelang.language as T

from .plans import NormTile


@T.macro
def aggregate_step(u, x_frag, x, h_pre, token, step, slot, tile: NormTile):
    """u[slot] = Σ_i h_pre[i] · x[i] for the step's channels, as `aggregate` adds them; 0 beyond the last channel."""
    T.copy(x[token, 0, step * tile.lanes, 0], x_frag)
    for lane in T.Parallel(tile.lanes):
        for c in T.unroll(tile.width):
            u[slot, lane, c] = 0.0
            for i in T.unroll(x.shape[1]):
                u[slot, lane, c] = T.ieee_fmaf(h_pre[token, i], T.cast(x_frag[i, lane, c], T.float32), u[slot, lane, c])


@T.macro
def add_squares(squares, u, slot, tile: NormTile):
    """squares[0] += u[slot]², lane by lane."""
    for lane in T.Parallel(tile.lanes):
        for c in T.unroll(tile.width):
            squares[0, lane] = T.ieee_fmaf(u[slot, lane, c], u[slot, lane, c], squares[0, lane])


@T.macro
def inverse_rms(scale, squares, hidden_size: int, eps):
    """scale[0] = r, the lanes of squares added up."""
    T.reduce_sum(squares, scale, dim=1)
    for k in T.Parallel(1):
        scale[k] = T.rsqrt(scale[k] * (1.0 / hidden_size) + eps)


@T.macro
def aggregate_token(u, scale, squares, x_frag, x, h_pre, token, hidden_size: int, eps, tile: NormTile):
    """The first walk: u of the token's channels, kept or for one step at a time, and scale[0] = r."""
    T.clear(squares)
    for step in T.unroll(tile.steps(hidden_size), unroll_factor=tile.slots(hidden_size)):
        slot = step if tile.kept else 0
        aggregate_step(u, x_frag, x, h_pre, token, step, slot, tile)
        add_squares(squares, u, slot, tile)
    inverse_rms(scale, squares, hidden_size, eps)


def aggregate_norm_kernel(num_streams: int, hidden_size: int, dtype: str, weight_dtype: str, tile: NormTile):
    """x [T, n, C / width, width], h_pre [T, n], weight [C / width, width] -> layer_input [T, C / width, width]."""
    n, lanes, width = num_streams, tile.lanes, tile.width
    row = (hidden_size // width, width)
    steps, slots = tile.steps(hidden_size), tile.slots(hidden_size)
    num_tokens = T.dynamic("num_tokens")

    @T.prim_func
    def aggregate_norm(
        x: T.Tensor[(num_tokens, n, *row), dtype],
        h_pre: T.Tensor[(num_tokens, n), T.float32],
        weight: T.Tensor[row, weight_dtype],
        layer_input: T.Tensor[(num_tokens, *row), dtype],
        eps: T.float32,
    ):
        with T.Kernel(num_tokens, threads=lanes) as token:
            x_frag = T.alloc_fragment((n, lanes, width), dtype)
            weight_frag = T.alloc_fragment((lanes, width), weight_dtype)
            u = T.alloc_fragment((slots, lanes, width), T.float32)
            normed = T.alloc_fragment((lanes, width), T.float32)
            squares = T.alloc_fragment((1, lanes), T.float32)
            scale = T.alloc_fragment((1,), T.float32)
            aggregate_token(u, scale, squares, x_frag, x, h_pre, token, hidden_size, eps, tile)
            for step in T.unroll(steps, unroll_factor=slots):
                slot = step if tile.kept else 0
                if not tile.kept:
                    aggregate_step(u, x_frag, x, h_pre, token, step, slot, tile)
                T.copy(weight[step * lanes, 0], weight_frag)
                for lane in T.Parallel(lanes):
                    for c in T.unroll(width):
                        normed[lane, c] = u[slot, lane, c] * scale[0] * T.cast(weight_frag[lane, c], T.float32)
                T.copy(normed, layer_input[token, step * lanes, 0])

    return aggregate_norm
