"""MHCSpec: what it takes, what it refuses by name, and its presets."""

import math
from dataclasses import FrozenInstanceError, replace

import pytest

from mhc_tilelang import MHCSpec


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"hidden_size": 0}, ValueError),
        ({"hidden_size": -1}, ValueError),
        ({"hidden_size": 64.0}, TypeError),
        ({"hidden_size": "64"}, TypeError),
        ({"hidden_size": True}, TypeError),
        ({"num_streams": 9}, ValueError),
        ({"num_streams": 16}, ValueError),
        ({"num_streams": 4.0}, TypeError),
        ({"sinkhorn_iters": 0}, ValueError),
        ({"sinkhorn_iters": None}, TypeError),
        ({"delayed_pre": 1}, TypeError),
        ({"delayed_pre": None}, TypeError),
    ]
    + [
        ({name: value}, error)
        for name in ("sinkhorn_eps", "pre_eps", "rms_eps", "post_scale")
        for value, error in [(-1.0, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("1", TypeError)]
    ],
)
def test_bad_spec(changed, error):
    [(name, value)] = changed.items()
    with pytest.raises(error, match=rf"^{name}: expected .*, got .*{value}"):
        MHCSpec(**{"hidden_size": 64, **changed})


def test_presets():
    """The documented constants. Catches a preset that drifts."""
    v4 = MHCSpec.deepseek_v4(hidden_size=2560)
    assert v4 == MHCSpec(2560, 4, 20, 1e-6, 1e-6, 1e-6, 2.0) == MHCSpec(2560)
    paper = MHCSpec.paper(hidden_size=2560)
    assert paper == replace(v4, sinkhorn_eps=0.0, pre_eps=0.0, rms_eps=1e-20)
    assert MHCSpec.paper(64, num_streams=8, rms_eps=1e-12) == MHCSpec(64, 8, 20, 0.0, 0.0, 1e-12, 2.0)
    assert MHCSpec.deepseek_v4_1(5120) == replace(MHCSpec(5120), rms_eps=1e-20, delayed_pre=True)
    assert MHCSpec.deepseek_v4_1(64, delayed_pre=False, num_streams=2) == MHCSpec(64, 2, rms_eps=1e-20)
    assert MHCSpec.glm5_3(4096) == replace(v4, hidden_size=4096, rms_eps=1e-5)
    hy4 = replace(v4, hidden_size=64, rms_eps=1e-5, post_eps=1e-6, residual_mapping="identity")
    assert MHCSpec.hy4(64) == hy4
    assert (hy4.num_coefficients, hy4.num_groups, v4.num_groups) == (8, 2, 3)
    assert hash(MHCSpec(64, delayed_pre=True)) != hash(MHCSpec(64))
    assert (v4.num_coefficients, v4.stream_size) == (24, 10_240)
    with pytest.raises(FrozenInstanceError):
        v4.num_streams = 8


def test_integers_for_floats():
    """`sinkhorn_eps=0` is a number like 0.0, and the same spec."""
    assert MHCSpec(64, sinkhorn_eps=0, post_scale=2) == MHCSpec(64, sinkhorn_eps=0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rms_eps", 1e-60), ("post_scale", 1e300), ("pre_eps", 10**400), ("sinkhorn_eps", float("nan"))],
)
def test_constants_that_float32_does_not_hold(name, value):
    """They would become 0 or infinity in a kernel."""
    with pytest.raises(ValueError, match=name):
        MHCSpec(8, **{name: value})


def test_whole_numbers_and_floats_are_one_spec():
    """An int constant would be another key, and so another compilation of the same kernel."""
    assert repr(MHCSpec(8, post_scale=2, pre_eps=0)) == repr(MHCSpec(8, post_scale=2.0, pre_eps=0.0))
