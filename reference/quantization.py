"""The layer's input as an FP8 product takes it: e4m3 numbers, and a scale for every 128 channels.

    scale[g] = max(1e-4, max over c in g of |y[c]|) / 448        or the next power of two (UE8M0)
    value[c] = e4m3(y[c] / scale[g])

e4m3 has four significant bits from 2^-6 to 448 and a spacing of 2^-9 below; it has no infinity, so what is larger
saturates. These are DeepGEMM's formulas; the last group of a row may be shorter than the others.

Backward. Rounding is taken for the identity, straight through: the gradient of y is that of value · scale.
"""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, as_float64

GROUP = 128
LARGEST = 448.0
LEAST_PEAK = 1e-4


def round_e4m3(numbers: ArrayLike) -> Array:
    """The nearest e4m3 numbers, to even where two are as near, in float64; NaN stays NaN."""
    numbers = as_float64("numbers", numbers, (...,))
    _, exponent = np.frexp(numbers)
    spacing = np.ldexp(1.0, np.maximum(exponent - 4, -9))
    with np.errstate(invalid="ignore"):
        return np.clip(np.rint(numbers / spacing) * spacing, -LARGEST, LARGEST)


def quantize(layer_input: ArrayLike, power_of_two: bool = False) -> tuple[Array, Array]:
    """e4m3 numbers and their scales.

    Args:
        layer_input: y, [..., C].
        power_of_two: round scales up to powers of two.

    Returns:
        values [..., C] and scales [..., ⌈C / 128⌉]. A group with a NaN or an infinity has the scale infinity, its
        values 0 or NaN.
    """
    y = as_float64("layer_input", layer_input, (..., "C"))
    groups = -(-y.shape[-1] // GROUP)
    peaks = np.stack([np.abs(y[..., g * GROUP : (g + 1) * GROUP]).max(-1, initial=0.0) for g in range(groups)], -1)
    peaks = np.where(np.isnan(peaks), np.inf, np.maximum(peaks, LEAST_PEAK))
    scales = peaks / LARGEST
    if power_of_two:
        fraction, exponent = np.frexp(scales)
        up = np.ldexp(1.0, exponent - (fraction == 0.5))
        scales = np.where(np.isfinite(scales), up, scales)
    with np.errstate(invalid="ignore"):
        return round_e4m3(y / spread(scales, y.shape[-1])), scales


def dequantize(values: ArrayLike, scales: ArrayLike) -> Array:
    """value · scale, [..., C]."""
    values = as_float64("values", values, (..., "C"))
    with np.errstate(invalid="ignore"):
        return values * spread(as_float64("scales", scales, (..., "G")), values.shape[-1])


def spread(scales: Array, hidden_size: int) -> Array:
    """Every channel's scale, [..., C]."""
    return np.repeat(scales, GROUP, -1)[..., :hidden_size]
