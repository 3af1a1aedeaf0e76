"""The reference's e4m3 and its groups, against torch and ml_dtypes.

Would catch: ties away from even, lost subnormals, an overflow that is not saturated, a scale of another group or of a
rest of channels, a power of two one too low.
"""

import ml_dtypes
import numpy as np
import torch

from mhc_tilelang import reference


def numbers():
    """Every e4m3 number, halfway to its neighbour, and beside that."""
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    finite = np.unique(every[np.isfinite(every)])
    halfway = (finite[1:] + finite[:-1]) / 2
    drawn = np.random.default_rng(0).standard_normal(4000) * np.exp2(np.random.default_rng(1).uniform(-12, 8, 4000))
    # float32 has all of them: neither torch nor ml_dtypes rounds twice.
    beside = np.float32([*np.nextafter(np.float32(halfway), np.float32(500)), *drawn])
    return np.concatenate([finite, halfway, beside.astype(np.float64)])


def test_rounding():
    tried = np.clip(numbers(), -448, 448)
    got = reference.round_e4m3(tried)
    np.testing.assert_array_equal(got, tried.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64))
    torchs = torch.from_numpy(tried).float().to(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(got, torchs)


def test_what_is_no_e4m3_number():
    got = reference.round_e4m3([449.0, 1e9, -np.inf, np.inf, np.nan, 2.0**-10, 2.0**-10 * 1.01])
    np.testing.assert_array_equal(got, [448, 448, -448, 448, np.nan, 0, 2.0**-9])


def test_groups():
    """Scales of 128 channels and of the rest; what comes back is within half a spacing."""
    y = np.random.default_rng(2).standard_normal((5, 300)) * np.repeat([1.0, 1e3, 1e-3], [128, 128, 44])
    for power_of_two in (False, True):
        values, scales = reference.quantize(y, power_of_two)
        assert values.shape == (5, 300)
        assert scales.shape == (5, 3)
        peaks = np.stack([np.abs(part).max(-1) for part in (y[:, :128], y[:, 128:256], y[:, 256:])], -1)
        if power_of_two:
            assert (np.log2(scales) % 1 == 0).all()
            assert ((scales >= peaks / 448) & (scales < 2 * peaks / 448)).all()
        else:
            np.testing.assert_array_equal(scales, peaks / 448)
        back = reference.dequantize(values, scales)
        step = np.exp2(np.maximum(np.floor(np.log2(np.abs(values) + 2.0**-9)), -6) - 3)
        assert (np.abs(back - y) <= step / 2 * np.repeat(scales, 128, -1)[:, :300]).all()


def test_a_power_of_two_is_kept():
    """A scale that is one already; the next number above it is rounded up."""
    _, [[scale, above]] = reference.quantize([[*[448 * 4.0] * 128, *[448 * 4.001] * 128]], True)
    assert (scale, above) == (4, 8)


def test_zeros_and_what_is_not_finite():
    values, scales = reference.quantize([[0.0] * 128 + [1.0] * 127 + [np.nan] + [np.inf] + [2.0] * 127])
    np.testing.assert_array_equal(scales, [[1e-4 / 448, np.inf, np.inf]])
    assert not values[0, :128].any()
    assert np.isnan(reference.dequantize(values, scales)[0, 128:]).all()
