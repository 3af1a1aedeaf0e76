"""aggregate_quantized: `aggregate_norm`, and the normalised sum in float8 with a scale for every 128 channels.

Equation (3), H_pre x, the layer's RMSNorm, then what an FP8 product takes. With y the float32 number that
`aggregate_norm` rounds to layer_input, per token and group g of 128 consecutive channels (the last group of a C that is
no multiple of 128 is shorter):

    peak[t, g]   = max(1e-4, max over c in g of |y[t, c]|)
    scales[t, g] = peak[t, g] / 448                  with `power_of_two` the next power of two (UE8M0), or itself
    values[t, c] = e4m3(y[t, c] · (1 / scales[t, g]))

448 is e4m3's largest number; rounding is to nearest even, from float32, and saturates. These are the operations of
DeepGEMM's per_token_cast_to_fp8, so a group of zeros has the scale of 1e-4. Peaks are compared as integers, which
orders magnitudes, infinity and NaN: with one of the last two a group's scale is infinite and its values are 0 or NaN,
so that 0 · ∞ dequantises to NaN.

Both quotients have the bits of a division and none of its branches. With R = 1/448 in float32, q = peak · R is off by
less than a unit in the last place, what is left, peak - 448 · q, is exact, and q + left · R rounds to the quotient:
of all 2^23 mantissas, since a peak is at least 1e-4 and nothing underflows. 1 / scale is the hardware's guess and a
step of Newton's (see `sinkhorn_thread`), of a scale below 2^120; on a CPU a division. An infinity, which either step
would turn into NaN, stays.

Traffic per token: n·C read; C bytes and 4 bytes a group written instead of C elements, or beside them with
`has_layer_input`. A group lies within 16 or more neighbouring lanes, who exchange its peak by shuffles; on a CPU it is
several steps (`parts`). r and layer_input have the bits of `aggregate_norm`: lanes and their order are the same.
"""

import tilelang.language as T

from .aggregate_norm import aggregate_step, aggregate_token
from .plans import QuantizedTile
from .warps import fma

E4M3 = "float8_e4m3fn"
LARGEST = 448.0
ONE_OF_LARGEST = 0x124924A * 2.0**-33  # 1 / 448, in float32
LEAST_PEAK, INFINITY = 0x38D1B717, 0x7F800000  # the bits of 1e-4 and of infinity
MAGNITUDE, EXPONENT, MANTISSA = 0x7FFFFFFF, 0x7F800000, 0x7FFFFF


@T.macro
def normalise(y, u, weight_frag, weight, scale, step, slot, part, tile: QuantizedTile):
    """y[part] = u[slot] · r · w of the step's channels; 0 beyond the last channel."""
    T.copy(weight[step * tile.lanes, 0], weight_frag)
    for lane in T.Parallel(tile.lanes):
        for c in T.unroll(tile.width):
            y[part, lane, c] = u[slot, lane, c] * scale[0] * T.cast(weight_frag[lane, c], T.float32)


@T.macro
def raise_peaks(peak, y, part, tile: QuantizedTile):
    """peak[g, m] = the largest magnitude so far of member m of group g, as bits."""
    for g, m in T.Parallel(tile.groups, tile.members):
        for c in T.unroll(tile.width):
            peak[g, m] = T.max(
                peak[g, m], T.bitwise_and(T.reinterpret(y[part, g * tile.members + m, c], T.int32), T.int32(MAGNITUDE))
            )


@T.macro
def scale_of_peaks(group_scale, inverse, peaks, power_of_two, tile: QuantizedTile):
    """group_scale[g] from the bits of a peak, and 1 / group_scale[g], with the bits of two divisions."""
    for g in T.Parallel(tile.groups):
        peaks[g] = T.min(T.max(peaks[g], LEAST_PEAK), INFINITY)
        group_scale[g] = T.reinterpret(peaks[g], T.float32) * T.float32(ONE_OF_LARGEST)
    for g in T.Parallel(tile.groups):
        group_scale[g] = T.if_then_else(
            peaks[g] < INFINITY,
            fma(
                fma(T.float32(-LARGEST), group_scale[g], T.reinterpret(peaks[g], T.float32)),
                T.float32(ONE_OF_LARGEST),
                group_scale[g],
            ),
            group_scale[g],
        )
    for g in T.Parallel(tile.groups):
        group_scale[g] = T.if_then_else(
            power_of_two != 0,
            T.reinterpret(
                T.bitwise_and(T.reinterpret(group_scale[g], T.int32) + T.int32(MANTISSA), T.int32(EXPONENT)), T.float32
            ),
            group_scale[g],
        )
    if tile.guesses:
        for g in T.Parallel(tile.groups):
            inverse[g] = T.call_extern("float32", "tl::fast_rcp", group_scale[g])
        for g in T.Parallel(tile.groups):
            inverse[g] = T.if_then_else(
                peaks[g] < INFINITY,
                fma(fma(-group_scale[g], inverse[g], T.float32(1)), inverse[g], inverse[g]),
                inverse[g],
            )
    else:
        for g in T.Parallel(tile.groups):
            inverse[g] = T.float32(1.0) / group_scale[g]


@T.macro
def store_values(values, rounded, y, inverse, token, step, part, tile: QuantizedTile):
    """The step's channels in e4m3."""
    for g, m in T.Parallel(tile.groups, tile.members):
        for c in T.unroll(tile.width):
            rounded[g * tile.members + m, c] = T.cast(y[part, g * tile.members + m, c] * inverse[g], E4M3)
    T.copy(rounded, values[token, step * tile.lanes, 0])


@T.macro
def store_layer_input(layer_input, normed, y, token, step, part, tile: QuantizedTile):
    """The step's channels in the stream's dtype."""
    for lane in T.Parallel(tile.lanes):
        for c in T.unroll(tile.width):
            normed[lane, c] = y[part, lane, c]
    T.copy(normed, layer_input[token, step * tile.lanes, 0])


def aggregate_quantized_kernel(
    num_streams: int, hidden_size: int, dtype: str, weight_dtype: str, tile: QuantizedTile, has_layer_input: bool
):
    """x [T, n, C], h_pre [T, n], weight [C] -> values [T, C] in e4m3, scales [T, ⌈C / 128⌉], layer_input [T, C].

    C is written as [C / width, width]. Without `has_layer_input`, layer_input is a one-element placeholder, never
    accessed.
    """
    n, lanes, width, parts = num_streams, tile.lanes, tile.width, tile.parts
    row = (hidden_size // width, width)
    steps, slots = tile.steps(hidden_size), tile.slots(hidden_size)
    num_tokens = T.dynamic("num_tokens")

    @T.prim_func
    def aggregate_quantized(
        x: T.Tensor[(num_tokens, n, *row), dtype],
        h_pre: T.Tensor[(num_tokens, n), T.float32],
        weight: T.Tensor[row, weight_dtype],
        values: T.Tensor[(num_tokens, *row), E4M3],
        scales: T.Tensor[(num_tokens, tile.scales(hidden_size)), T.float32],
        layer_input: T.Tensor[(num_tokens, *row) if has_layer_input else (1,), dtype],
        eps: T.float32,
        power_of_two: T.int32,
    ):
        with T.Kernel(num_tokens, threads=lanes) as token:
            x_frag = T.alloc_fragment((n, lanes, width), dtype)
            weight_frag = T.alloc_fragment((lanes, width), weight_dtype)
            u = T.alloc_fragment((slots, lanes, width), T.float32)
            y = T.alloc_fragment((parts, lanes, width), T.float32)
            normed = T.alloc_fragment((lanes, width), T.float32)
            rounded = T.alloc_fragment((lanes, width), E4M3)
            squares = T.alloc_fragment((1, lanes), T.float32)
            scale = T.alloc_fragment((1,), T.float32)
            peak = T.alloc_fragment((tile.groups, tile.members), T.int32)
            peaks = T.alloc_fragment((tile.groups,), T.int32)
            group_scale = T.alloc_fragment((tile.groups,), T.float32)
            inverse = T.alloc_fragment((tile.groups,), T.float32)
            aggregate_token(u, scale, squares, x_frag, x, h_pre, token, hidden_size, eps, tile)
            for k in T.unroll(steps // parts, unroll_factor=max(1, slots // parts)):
                T.clear(peak)
                for part in T.serial(parts):
                    slot = k * parts + part if tile.kept else 0
                    if not tile.kept:
                        aggregate_step(u, x_frag, x, h_pre, token, k * parts + part, slot, tile)
                    normalise(y, u, weight_frag, weight, scale, k * parts + part, slot, part, tile)
                    raise_peaks(peak, y, part, tile)
                T.reduce_max(peak, peaks, dim=1)
                scale_of_peaks(group_scale, inverse, peaks, power_of_two, tile)
                T.copy(group_scale, scales[token, k * tile.groups])
                for part in T.serial(parts):
                    store_values(values, rounded, y, inverse, token, k * parts + part, part, tile)
                    if has_layer_input:
                        store_layer_input(layer_input, normed, y, token, k * parts + part, part, tile)

    return aggregate_quantized
