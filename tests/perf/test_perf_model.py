"""The model of a layer's overhead, against sums done by hand and against the kernels' traffic.

Would catch: a sublayer counted once, a factor of two in FLOPs or bytes, a form whose elements are not those of the
kernels, a share that is accepted and ignored, the datasheet of another edition of a GPU.
"""

from __future__ import annotations

import pytest

from mhc_tilelang.perf.overhead import model
from mhc_tilelang.perf.overhead.model import (
    DEVICES,
    FORMS,
    ONE_BY_ONE,
    OURS,
    RESIDUAL,
    Device,
    known_device,
    layer_work,
    predict,
)
from mhc_tilelang.perf.sizes import MODELS, LayerSizes
from mhc_tilelang.perf.traffic.formulas import stream_elements


def test_3b_forward_on_an_h200_by_hand() -> None:
    """A token takes 20,971,520 FLOPs of attention's projections, 55,050,240 of the FFN, 16,781,312 of scores."""
    work = layer_work(MODELS["3b"], 4096, "forward")
    assert work.flops == 20_971_520 + 55_050_240 + 16_781_312
    assert work.elements == 4 * 1280 + 3 * 7168
    got = predict(MODELS["3b"], DEVICES["H200"], "forward", sequence=4096)
    seconds = 92_803_072 / (0.6 * 989e12) + (26_624 + 2 * 3 * 1280) * 2 / (0.8 * 4.8e12)
    assert got.seconds == pytest.approx(seconds)
    assert got.overhead[OURS] == pytest.approx(2 * (14 - 3) * 1280 * 2 / (0.8 * 4.8e12) / seconds)
    assert got.overhead[ONE_BY_ONE] == pytest.approx(2 * (18 - 3) * 1280 * 2 / (0.8 * 4.8e12) / seconds)
    assert got.overhead[ONE_BY_ONE] == pytest.approx(0.115, abs=5e-4)


def test_3b_training_on_an_h200_by_hand() -> None:
    """Backward: projections twice, scores 2.5 times; 6C + 5F elements; connections 14 + 20 against 3 + 3."""
    got = predict(MODELS["3b"], DEVICES["H200"], "training", sequence=4096)
    flops = 3 * 76_021_760 + 3.5 * 16_781_312
    elements = 10 * 1280 + 8 * 7168 + 2 * 6 * 1280
    seconds = flops / (0.6 * 989e12) + elements * 2 / (0.8 * 4.8e12)
    assert got.seconds == pytest.approx(seconds)
    assert got.overhead[OURS] == pytest.approx(2 * (34 - 6) * 1280 * 2 / (0.8 * 4.8e12) / seconds)


def test_elements_of_the_forms() -> None:
    forward = [form.elements(4, "forward") for form in FORMS.values()]
    assert forward == [34, 18, 18, 14, 10]
    backward = [form.elements(4, "training") - form.elements(4, "forward") for form in FORMS.values()]
    assert backward == [59, 39, 40, 20, 15]
    assert (RESIDUAL.elements(4, "forward"), RESIDUAL.elements(4, "training")) == (3, 6)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_our_elements_are_those_of_the_kernels(n: int) -> None:
    """One by one: the projection's backward also reads g_layer_input, and autograd reads 2n and writes n to add up."""
    forward, backward = (
        sum(sum(stream_elements(kernel + suffix, n)) for kernel in ("project", "aggregate", "post"))
        for suffix in ("", "_backward")
    )
    assert FORMS[ONE_BY_ONE].forward(n) == forward
    assert FORMS[ONE_BY_ONE].backward(n) == backward + 1 + 3 * n
    assert FORMS[OURS].forward(n) == sum(stream_elements("post_pre", n))
    assert FORMS[OURS].backward(n) == sum(stream_elements("post_pre_backward", n))


def test_overhead_follows_bandwidth_and_arithmetic() -> None:
    """Half the bandwidth makes the streams dearer beside the layer, half the FLOP/s cheaper; both together neither."""
    sizes, h200 = MODELS["27b"], DEVICES["H200"]

    def ours(**shares: float) -> float:
        return predict(sizes, h200, "training", sequence=4096, **shares).overhead[OURS]

    assert ours(bandwidth_share=0.4) > ours() > ours(flops_share=0.3)
    double = Device("double", 2 * h200.bandwidth, 2 * h200.flops, "made up")
    assert predict(sizes, double, "training", sequence=4096).overhead[OURS] == pytest.approx(ours())
    assert ours(bandwidth_share=2 * model.BANDWIDTH_SHARE, flops_share=2 * model.FLOPS_SHARE) == pytest.approx(ours())


def test_streams_and_itemsize_count() -> None:
    sizes = LayerSizes(64, 1, 64, head_size=64)
    free = Device("free arithmetic", 1.0, 1e30, "made up")
    narrow, wide = (predict(sizes, free, "forward", sequence=1, itemsize=size) for size in (2, 4))
    assert wide.seconds == pytest.approx(2 * narrow.seconds)
    assert wide.overhead == pytest.approx(narrow.overhead)
    eight = predict(sizes, free, "forward", sequence=1, num_streams=8)
    assert eight.overhead[OURS] == pytest.approx(narrow.overhead[OURS] * (26 - 3) / (14 - 3))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_datasheets_are_found_by_name(name: str, known: str | None) -> None:
    found = known_device(name)
    assert (found and found.name) == known


@pytest.mark.parametrize(
    ("name", "num_layers", "active", "within"),
    [
        ("3b", 12, 612e6, 0.08),
        ("9b", 18, 1.66e9, 0.08),
        ("27b", 30, 4.14e9, 0.08),
        ("v4-flash", 43, 13e9, 0.08),
        ("v4-pro", 61, 49e9, 0.19),
    ],
)
def test_sizes_have_the_published_active_parameters(name: str, num_layers: int, active: float, within: float) -> None:
    """Layers and one embedding of 129280 tokens. Catches experts that are not all counted, or counted twice."""
    sizes = MODELS[name]
    assert num_layers * sizes.parameters + 129_280 * sizes.hidden_size == pytest.approx(active, rel=within)
