"""`mhc-tilelang bench overhead`: the check, the statistics and the memory by themselves, then a tiny layer end to end.

Would catch: a number over a failed check, connections that are not run with the same layers, an overhead that a slow
round moves, memory counted twice, a CPU's figure that reads like the paper's, an option that is accepted and ignored.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mhc_tilelang import ResidualStream, cli, launch, ops
from mhc_tilelang.checking import plain_torch
from mhc_tilelang.errors import MHCError
from mhc_tilelang.modules.connections import ResidualConnection
from mhc_tilelang.perf.measure import timing
from mhc_tilelang.perf.measure.timing import Run, Sample
from mhc_tilelang.perf.overhead import command
from mhc_tilelang.perf.overhead import report as overhead_report
from mhc_tilelang.perf.overhead import run as overhead
from mhc_tilelang.perf.overhead.layers import EAGER, HC, KERNELS, KINDS, RESIDUAL, Layer, make_layers
from mhc_tilelang.perf.sizes import LayerSizes

CPU = torch.device("cpu")
SIZES = LayerSizes(hidden_size=48, num_heads=2, ffn_width=64, head_size=8)
CUSTOM = "--device cpu --model custom --hidden-size 48 --heads 2 --ffn-width 64 --head-size 8 --tokens 32 --repeats 2"
CUSTOM += " --dtype bfloat16"
SECONDS = {RESIDUAL: 1.0, HC: 3.0, EAGER: 2.0, KERNELS: 1.25}


def layers(dtype: torch.dtype = torch.bfloat16) -> dict[str, Layer]:
    return make_layers(SIZES, num_tokens=32, sequence=16, num_streams=4, dtype=dtype, device=CPU)


@dataclass
class MadeUpClock:
    """Runs nothing. A layer takes its `SECONDS`, anything else a hundredth, and every call twice the last round's."""

    of: dict[int, float]
    calls_per_round: int
    calls: int = 0

    def __call__(self, run: Run) -> Sample:
        slowness = 2.0 ** (self.calls // self.calls_per_round)
        self.calls += 1
        return Sample(self.of.get(id(getattr(run, "__self__", None)), 0.01) * slowness)


def measure(modes: tuple[str, ...], num_kernels: int) -> overhead.Measurement:
    made = layers()
    of = {id(made[kind]): seconds for kind, seconds in SECONDS.items()}
    return overhead.measure_layers(made, modes, MadeUpClock(of, num_kernels + 4 * len(modes)), repeats=5)


def test_overhead_is_the_ratio_within_rounds() -> None:
    """Rounds double in time; the ratios, and their quartiles, stay."""
    measured = measure(("forward", "training"), num_kernels=8)
    for timings in measured.modes.values():
        assert timings[KERNELS].time.median == 1.25 * 2.0**4  # two rounds of warm-up, and the third of five
        for kind, seconds in SECONDS.items():
            ratio = timings[kind].ratio
            assert (ratio.lower_quartile, ratio.median, ratio.upper_quartile) == (seconds,) * 3


def test_the_kernels_part_counts_both_sublayers() -> None:
    measured = measure(("forward", "training"), num_kernels=8)
    assert set(measured.kernels) == {*overhead.FORWARD_KERNELS, *overhead.SEPARATE_BACKWARD}
    assert measured.kernel_seconds("forward") == pytest.approx(2 * 3 * 0.16)
    assert measured.kernel_seconds("training") == pytest.approx(2 * 8 * 0.16)


def test_where_the_backward_is_fused_its_kernels_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU fuses it; every call runs."""
    monkeypatch.setattr(overhead.boundary_plans, "backward_is_fused", lambda *_: True)
    alone = overhead.kernels_alone(layers()[KERNELS].x, training=True)
    assert set(alone) == {*overhead.FORWARD_KERNELS, *overhead.BACKWARD_KERNELS}
    for run in alone.values():
        run()


def test_forward_alone_runs_no_backward() -> None:
    measured = measure(("forward",), num_kernels=3)
    assert tuple(measured.kernels) == overhead.FORWARD_KERNELS
    assert measured.memory == {}


def test_connections_share_layers_parameters_and_input() -> None:
    made = layers()
    assert all(made[kind].sublayers is made[RESIDUAL].sublayers for kind in KINDS)
    for eager, kernels in zip(made[EAGER].connections, made[KERNELS].connections, strict=True):
        own = dict(eager.named_parameters())  # type: ignore[attr-defined]
        assert all(own[name] is p for name, p in kernels.named_parameters())  # type: ignore[attr-defined]
    assert all(torch.equal(made[kind].x, made[KERNELS].x) for kind in (HC, EAGER))
    assert torch.equal(made[RESIDUAL].x, made[KERNELS].x[..., 0, :])
    waiting = {kind: made[kind].waiting for kind in KINDS}
    for kind in (HC, EAGER):
        assert all(torch.equal(one, other) for one, other in zip(waiting[kind], waiting[KERNELS], strict=True))
    assert torch.equal(waiting[RESIDUAL][0], waiting[KERNELS][0])


def test_a_plain_residual_is_the_layer_as_one_would_write_it() -> None:
    layer = layers(torch.float32)[RESIDUAL]
    attention, ffn = layer.sublayers
    [written] = layer.waiting
    h = layer.x + written
    h = h + attention(h)
    x_next, layer_output = layer.forward()
    torch.testing.assert_close(x_next, h)
    torch.testing.assert_close(layer_output, ffn(h))


def recorded(calls: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which notes its name when it is called."""

    def run(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        return function(*arguments, **named)

    return run


def test_the_kernels_layer_is_what_a_residual_stream_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits are equal, and each sublayer is one boundary: no merge and no read of its own."""
    made = layers()[KERNELS]
    (attention, ffn), (one, other) = made.sublayers, made.connections
    h = made.x[..., 0, :].detach().contiguous()
    stream = ResidualStream(h, num_streams=4)
    for connection, sublayer in ((other, ffn), (one, attention), (other, ffn)):
        stream.write(sublayer(stream.read(connection)))
    x = ops.expand(h, 4)
    layer_input, *mappings = other(x)  # type: ignore[operator]
    layer = replace(made, x=x, waiting=(ffn(layer_input), *mappings))
    calls: list[str] = []
    for module, name in ((launch, "post_pre"), (launch, "post"), (launch, "project")):
        monkeypatch.setattr(module, name, recorded(calls, name, getattr(module, name)))
    results = layer.forward()
    assert calls == ["post_pre", "post_pre"]
    assert torch.equal(other.merge(*results), stream.x)


def test_attention_is_causal() -> None:
    """A token's output does not change with those after it."""
    attention, _ = layers(torch.float32)[RESIDUAL].sublayers
    u = torch.randn(1, 16, 48, generator=torch.Generator().manual_seed(0))
    later = u.clone()
    later[:, 9:] += 1
    torch.testing.assert_close(attention(later)[:, :9], attention(u)[:, :9])


@pytest.mark.parametrize(("fast", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_measures_the_dtype_it_multiplies(fast: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    assert command.default_dtype(CPU) == expected
    assert command.default_dtype(torch.device("cuda")) == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernels_layer_passes_the_check(dtype: torch.dtype) -> None:
    errors = overhead.check_layers(layers(dtype))
    assert {"x_next", "g_x", "g_FeedForward.down.weight", "g_connection 0.phi", "g_connection 1.alpha"} <= set(errors)


def transposed(x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor) -> torch.Tensor:
    return POST(x, layer_output, h_post, h_res.mT)


POST = plain_torch.post


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_transposed_h_res_fails_the_check(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_torch, "post", transposed)
    with pytest.raises(MHCError, match="x_next: expected the kernels' layer within"):
        overhead.check_layers(layers(dtype))


@pytest.mark.parametrize("name", ["x", "h_res", "Attention.qkv.weight", "connection 0.phi", "connection 1.bias"])
@pytest.mark.parametrize("factor", [0.0, 1.2, float("nan")])
def test_a_wrong_gradient_fails_the_check(name: str, factor: float) -> None:
    class Wrong(Layer):
        def training(self) -> tuple[torch.Tensor, ...]:
            gradients = zip(self.leaves(), super().training(), strict=True)
            return tuple(g * factor if leaf == name else g for leaf, g in gradients)

    made = layers()
    kernels = made[KERNELS]
    made[KERNELS] = Wrong(**vars(kernels))
    with pytest.raises(MHCError, match=f"g_{name}: expected"):
        overhead.check_layers(made)


class Square(nn.Module):
    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return u * u


def test_saved_bytes_count_a_buffer_once_and_no_weight() -> None:
    """A square saves its input, twice and in one buffer; a linear map its input and its weight."""
    x, written, *upstream = (torch.randn(2, 8, 16) for _ in range(4))
    layer = Layer((Square(),), (ResidualConnection(),), x.requires_grad_(), (written,), tuple(upstream))
    assert overhead.saved_for_backward(layer) == x.nbytes
    with_linear = replace(layer, sublayers=(Square(), nn.Linear(16, 16)), connections=(ResidualConnection(),) * 2)
    assert overhead.saved_for_backward(with_linear) == 2 * x.nbytes


def test_kernels_save_less_than_plain_torch() -> None:
    made = layers()
    saved = {kind: overhead.saved_for_backward(made[kind]) for kind in KINDS}
    assert saved[RESIDUAL] < saved[KERNELS] < saved[EAGER]


@pytest.fixture
def made_up_clock(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Every call takes a millisecond; the list has the calls."""
    calls: list[Run] = []

    def clock(run: Run) -> Sample:
        calls.append(run)
        return Sample(1e-3)

    monkeypatch.setattr(timing, "clock_for", lambda *_: clock)
    return calls


def run_json(tmp_path: Path, *options: str) -> dict[str, Any]:
    file = tmp_path / "overhead.json"
    assert cli.main(["bench", "overhead", *CUSTOM.split(), *options, "--json", str(file)]) == 0
    loaded: dict[str, Any] = json.loads(file.read_text())
    return loaded


def test_a_tiny_layer_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real clock: the table, the JSON, and what a CPU's output says about itself."""
    got = run_json(tmp_path)
    out = capsys.readouterr().out
    order = ("\nmeasured: mHC with our", "\nmeasured ", "MODEL, not a measurement: on an H200", "docs/overhead.md")
    assert sorted(order, key=out.index) == list(order)
    assert "This is not comparable with 6.7 %" in out
    assert "no prediction for this machine" in out
    assert set(got["measured"]) == {"forward", "training"}
    for timings in got["measured"].values():
        assert tuple(timings) == KINDS
        assert all(timing["time"]["median"] > 0 for timing in timings.values())
        assert timings[RESIDUAL]["overhead"] == {"median": 0, "lower_quartile": 0, "upper_quartile": 0}
    for kind, timing_of in got["measured"]["training"].items():
        if kind != RESIDUAL:
            assert overhead_report.percent(timing_of["overhead"]["median"]) in out
    assert set(got["kernels"]) == {*overhead.FORWARD_KERNELS, *overhead.SEPARATE_BACKWARD}
    assert got["memory"]["kind"] == "saved for backward"
    assert set(got["memory"]["bytes"]) == set(KINDS)
    assert got["layer"] == {"model": "custom", **vars(SIZES), "num_streams": 4, "dtype": "bfloat16"}
    assert (got["num_tokens"], got["sequence"], got["rounds"]) == (32, 32, 2)
    assert got["paper"]["overhead"] == 0.067
    assert got["paper"]["not_comparable"].startswith("not comparable with 6.7 %")
    assert len(got["model"]["predictions"]) == 4 * 2
    assert got["model"]["this_device"] == []
    assert max(got["check"].values()) < 0.1


@pytest.mark.usefixtures("made_up_clock")
def test_a_described_machine_gets_a_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--mode training --devices A100 --bandwidth 50 --flops 0.4 --bandwidth-share 1 --flops-share 0.5"
    got = run_json(tmp_path, *options.split())
    out = capsys.readouterr().out
    assert set(got["measured"]) == {"training"}
    assert {p["device"] for p in got["model"]["predictions"]} == {"A100"}
    [prediction] = got["model"]["this_device"]
    assert prediction["device"] == "this machine"
    assert got["model"]["assumptions"] == {"bandwidth_share": 1.0, "flops_share": 0.5}
    [line] = [line for line in out.splitlines() if "mHC, kernels" in line]
    assert overhead_report.percent(prediction["overhead"]["our kernels"]) in line
    assert "on an H200" not in out
    assert "no prediction" not in out
    assert re.search(r"A100, .*: as above, by bytes: A100, n = 4, C = \d+: nothing is stored", out)


def test_a_failed_check_ends_it_without_a_number(
    made_up_clock: list[Run], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_torch, "post", transposed)
    assert cli.main(["bench", "overhead", *CUSTOM.split()]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "x_next" in shown.err
    assert "nothing is measured" in shown.err
    assert made_up_clock == []


def test_on_a_gpu_the_figure_is_not_called_incomparable() -> None:
    measured = measure(("training",), num_kernels=8)
    assert overhead_report.conclusion(measured, "cuda") == (
        "measured: mHC with our kernels adds 25.0 % (quartiles 25.0 % to 25.0 %) to forward + backward of this layer; "
        "the paper: 6.7 %."
    )
    assert "not comparable" in overhead_report.conclusion(measured, "cpu")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model custom --heads 2", "--model custom: expected --hidden-size, --ffn-width, --heads, got no"),
        ("--model 3b --heads 2", "--heads: expected with --model custom only, got --model 3b"),
        ("--tokens 5000", "--tokens: expected at most 4096 or a multiple of it, got 5000"),
        ("--bandwidth 50", "--bandwidth, --flops: expected both or neither"),
    ],
)
def test_contradictions_are_one_line(options: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "overhead", "--device", "cpu", *options.split()]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", ["--model 7b", "--tokens 0", "--dtype int8", "--mode backward", "--devices V100", "--flops -1"]
)
def test_bad_options_exit_2(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "overhead", *options.split()])
    assert options.split()[0] in capsys.readouterr().err


def test_its_help_and_the_model_load_no_torch() -> None:
    code = """
import sys
from mhc_tilelang import cli
from mhc_tilelang.perf import sizes
from mhc_tilelang.perf.overhead import model, report
try:
    cli.main(["bench", "overhead", "--help"])
except SystemExit:
    pass
assert not {"torch", "tilelang"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
