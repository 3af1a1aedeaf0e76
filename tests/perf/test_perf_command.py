"""`mhc-tilelang bench` from its arguments to its table, with the correctness check and the clock replaced.

Would catch: a number printed over a failed check, a kernel that is measured and was not checked, a check of what is
not measured, rows that wait for the last one, an option that is accepted and ignored, JSON that is not
what the table shows, a traceback where one line will do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import replace_launch

from mhc_tilelang import cli, compiler, launch
from mhc_tilelang.checking import run as checks
from mhc_tilelang.checking.run import Row
from mhc_tilelang.perf.bench import command, ready
from mhc_tilelang.perf.bench import run as bench
from mhc_tilelang.perf.calls import cases, every_call, workloads
from mhc_tilelang.perf.calls.cases import Case, Shape
from mhc_tilelang.perf.measure import timing
from mhc_tilelang.perf.measure.timing import Sample

SMALL = ("--device", "cpu", "--widths", "48", "--tokens", "32", "--repeats", "2")
UNUSUAL = (*cases.BOUNDARY_KERNELS, cases.SUBLAYER_INPUT, cases.BOUNDARY_STEP, cases.POST_PRE_QUANTIZED)
PASSED = Row("post", "bfloat16", 4, 192, 127, error=1e-3, tolerance=2e-3, torch_error=1e-3, passed=True)
FAILED = Row("post", "float32", 4, 192, 127, error=0.5, tolerance=1e-6, torch_error=1e-7, passed=False)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the correctness check return these rows."""

    def stand_in(*rows: Row) -> None:
        monkeypatch.setattr(checks, "iterate", lambda *_: list(rows))

    stand_in(PASSED)
    return stand_in


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Have every call take a millisecond more than the one before; the list says how long a call waits."""
    waits = [0.0]
    ticks = iter(range(1, 100_000))

    def stand_in(run: timing.Run) -> Sample:
        run()
        return Sample(1e-3 * next(ticks), waits[0])

    monkeypatch.setattr(bench, "clock_for", lambda *_: stand_in)
    return waits


def run_json(tmp_path: Path, *options: str) -> dict[str, Any]:
    file = tmp_path / "bench.json"
    assert cli.main(["bench", *SMALL, *options, "--json", str(file)]) == 0
    loaded: dict[str, Any] = json.loads(file.read_text())
    return loaded


@pytest.mark.usefixtures("clock")
def test_a_failed_check_ends_it_without_a_number(
    checked: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measured(_: cases.Shape, of_shape: Iterator[cases.Case], *__: Any, **___: Any) -> Iterator[Any]:
        for case in of_shape:
            pytest.fail(f"measured over a failed check: {case}")
        yield from ()

    checked(PASSED, FAILED)
    monkeypatch.setattr(bench, "run_shape", measured)
    file = tmp_path / "bench.json"
    assert cli.main(["bench", *SMALL, "--json", str(file)]) == 1
    out = capsys.readouterr().out
    assert "float32" in out
    assert "5.0e-01" in out
    assert "bfloat16" not in out
    assert "FAILED: these kernels are wrong" in out
    assert "GB/s" not in out
    assert not file.exists()


@pytest.mark.usefixtures("checked", "clock")
def test_a_kernel_that_torch_contradicts_ends_it_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fault is at the very sizes that are measured, which the check does not visit."""
    aggregate = launch.aggregate

    def ones(x: torch.Tensor, h_pre: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return aggregate(x, h_pre, out=out).fill_(1.0)

    replace_launch(monkeypatch, "aggregate", ones)
    assert cli.main(["bench", *SMALL, "--kernels", "aggregate"]) == 1
    captured = capsys.readouterr()
    assert "GB/s" not in captured.out
    assert "mhc-tilelang bench: baseline aggregate, eager: einsum: expected layer_input within 2e-04" in captured.err


@pytest.mark.usefixtures("checked", "clock")
def test_json(tmp_path: Path) -> None:
    got = run_json(tmp_path, "--kernels", "post", "sinkhorn", "--streams", "2")
    assert set(got) == {"kind", "device", "date", "versions", "threads", "clock_mhz", "method", "copy", "results"}
    assert got["kind"] == "kernels"
    assert got["threads"] == torch.get_num_threads()
    assert got["method"]["rounds"] == 2
    assert got["method"]["baselines"] == "fast"
    post, sinkhorn = got["results"]
    assert (post["kernel"], post["num_streams"], post["hidden_size"], post["num_tokens"]) == ("post", 2, 48, 32)
    assert (sinkhorn["kernel"], sinkhorn["hidden_size"], sinkhorn["dtype"]) == ("sinkhorn", None, "float32")
    for result in (post, sinkhorn):
        total = result["traffic"]["total"]
        assert total == sum(result["traffic"][key] for key in ("stream_read", "stream_written", "small"))
        assert result["bandwidth"] == pytest.approx(total / result["time"]["median"])
        assert result["copy"]["bandwidth"] == pytest.approx(result["copy"]["bytes"] / result["copy"]["time"]["median"])
        assert abs(result["copy"]["bytes"] - total) < 8
        assert result["share_of_copy"] == pytest.approx(result["bandwidth"] / result["copy"]["bandwidth"])
        assert result["time"]["lower_quartile"] <= result["time"]["median"] <= result["time"]["upper_quartile"]
        for form in result["torch"]:
            assert form["mode"] == "eager"
            assert form["over_kernel"] == pytest.approx(form["time"]["median"] / result["time"]["median"])
    assert post["traffic"]["stream_read"] == 3 * 48 * 32 * 2
    assert got["copy"] == max((result["copy"] for result in got["results"]), key=lambda copy: copy["bytes"])


@pytest.mark.usefixtures("checked", "clock")
def test_a_backward_kernel_is_measured_when_asked_for(tmp_path: Path) -> None:
    [post, sinkhorn] = run_json(tmp_path, "--kernels", "post_backward", "sinkhorn_backward")["results"]
    assert (post["kernel"], post["hidden_size"], post["dtype"]) == ("post_backward", 48, "bfloat16")
    assert (sinkhorn["kernel"], sinkhorn["hidden_size"], sinkhorn["dtype"]) == ("sinkhorn_backward", None, "float32")
    assert post["traffic"]["stream_read"] == 9 * 48 * 32 * 2
    assert post["traffic"]["stream_written"] == 5 * 48 * 32 * 2
    assert "bmm in blocks" in [form["form"] for form in post["torch"]]


@pytest.mark.usefixtures("checked", "clock")
def test_forms_that_are_beaten_run_when_asked_for(tmp_path: Path) -> None:
    """The default leaves them out, and says so in `method`; the fastest of all is among both."""
    shown = {}
    for baselines in ("fast", "eager"):
        got = run_json(tmp_path, "--kernels", "post", "--baselines", baselines)
        assert got["method"]["baselines"] == baselines
        shown[baselines] = [form["form"] for form in got["results"][0]["torch"]]
    assert shown == {"fast": ["baddbmm in blocks"], "eager": ["einsum", "multiply and sum", "baddbmm in blocks"]}


@pytest.mark.usefixtures("clock")
def test_what_is_measured_is_checked_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured width is checked once for several batches; nothing else is compiled, nor loaded."""
    loaded, real, checked = set(), compiler._load, []
    real_check = checks.check_case

    def noting(family: str, target: str, parameters: dict[str, Any]) -> Any:
        loaded.add((family, parameters["hidden_size"]))
        return real(family, target, parameters)

    def check(kernel: str, case: Any, inputs: Any) -> Row:
        checked.append((kernel, case.num_streams, case.hidden_size, case.dtype))
        return real_check(kernel, case, inputs)

    monkeypatch.setattr(compiler, "_load", noting)
    monkeypatch.setattr(compiler, "_kernels", {})
    monkeypatch.setattr(checks, "check_case", check)
    options = ("--widths", "48", "--tokens", "32", "40", "--repeats", "1", "--kernels", "post")
    assert cli.main(["bench", "--device", "cpu", *options]) == 0
    assert loaded == {("post", 48)}
    assert checked == [("post", 4, 48, torch.bfloat16)]


@pytest.mark.parametrize("kernel", [*cases.KERNELS, *cases.BACKWARD_KERNELS, *UNUSUAL])
def test_all_that_is_run_is_checked(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that a case launches is one that its checks loaded before: nothing is left to load."""
    case = cases.Case(kernel, cases.Shape(32, 4, 48, "bfloat16"))
    families: dict[str, set[Any]] = {"checked": set(), "measured": set()}
    real, phase = compiler._load, "checked"

    def noting(family: str, target: str, parameters: dict[str, Any]) -> Any:
        families[phase].add((family, *parameters.items()))
        return real(family, target, parameters)

    monkeypatch.setattr(compiler, "_load", noting)
    monkeypatch.setattr(compiler, "_kernels", {})
    preparation = ready.Preparation(torch.device("cpu"))
    with torch.no_grad():
        preparation.prepare([case])
        phase = "measured"
        load = workloads.workload(case, every_call.Given.of(case.shape, torch.device("cpu")))
        load.run()
        if load.separate:
            load.separate.run()
    preparation.close()
    assert families["checked"]
    assert not families["measured"]


@pytest.mark.usefixtures("checked", "clock")
def test_a_row_is_printed_when_it_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second case never comes; the first is there, under the columns' names."""
    real = bench.run_shape

    def one(*arguments: Any, **options: Any) -> Any:
        yield next(real(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_shape", one)
    assert cli.main(["bench", *SMALL, "--kernels", "expand", "aggregate"]) == 130  # interrupted
    shown = capsys.readouterr().out.splitlines()
    place = next(k for k, line in enumerate(shown) if line.startswith("kernel "))
    assert shown[place + 2].startswith("expand")
    assert len(shown[place + 2]) <= len(shown[place + 1])
    assert not any(line.startswith("aggregate") for line in shown)


@pytest.mark.usefixtures("checked", "clock")
def test_table_shows_the_fastest_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "last_level_cache", lambda _: 0)
    [result] = run_json(tmp_path, "--kernels", "aggregate")["results"]
    fastest = min(result["torch"], key=lambda form: form["time"]["median"])
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if line.startswith("aggregate ")]
    assert line.endswith(f"{fastest['over_kernel']:.2f}×  {fastest['form']}")
    assert f"{result['time']['median'] * 1e3:.2f}" in line
    assert "torch forms: eager ones that were near the fastest" in out
    assert "the machine was busy" not in out


@pytest.mark.usefixtures("checked")
def test_a_prediction_stands_beside_what_is_measured_on_a_gpu(
    checked, clock: list[float], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clock and GPU are stand-ins: a number, an interval where that is all, why there is none."""
    from mhc_tilelang.perf.predict import predicted

    shape = ("h200", 16, 64, "float32")
    numbers = {"aggregate": (45.0, 40.0, 50.0, "memory"), "post": (None, 5.0, 9.0, "launch and latency")}

    def stand_in(case, device, flushed):
        assert (device.name, flushed) == ("h200", True)
        us, low, high, regime = numbers.get(case.kernel, (None, None, None, predicted.REFUSED))
        return predicted.Prediction(case.kernel, *shape, us, low, high, regime, 1.0, 1.0, 1, (), "")

    monkeypatch.setattr(command, "gpu_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(predicted, "predict", stand_in)
    path = tmp_path / "found.json"
    options = "--kernels aggregate post expand --widths 64 --tokens 16 --dtype float32 --repeats 2"
    assert cli.main(["bench", "--device", "cpu", *options.split(), "--json", str(path)]) == 0
    found = {row["kernel"]: row["predicted_ms"] for row in json.loads(path.read_text())["results"]}
    assert found == {"aggregate": "0.045", "post": "0.005 to 0.009", "expand": "no answer"}
    text = capsys.readouterr().out
    assert any("predicted" in line for line in text.splitlines() if line.startswith("kernel"))
    assert "not measured" in text
    assert command.beside(Case("sinkhorn", Shape(8, 4, 64, "float32")), "NVIDIA A100") == ""


def test_marks(clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "last_level_cache", lambda _: 1 << 20)
    clock[0] = 1e6
    assert cli.main(["bench", *SMALL, "--kernels", "post"]) == 0
    out = capsys.readouterr().out
    assert "\npost*! " in out
    assert "* all bytes fit the last-level cache" in out
    assert "! the machine was busy" in out


@pytest.mark.usefixtures("checked", "clock")
def test_options_reach_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def stand_in(
        chosen: list[cases.Case], device: torch.device, baselines: str, repeats: int, seconds: float | None
    ) -> Any:
        asked.update(cases=chosen, device=device, baselines=baselines, repeats=repeats, seconds=seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_cases", stand_in)
    options = "--kernels aggregate --widths 32 64 --tokens 8 16 --streams 8 --dtype float32 float16 --baselines all"
    assert cli.main(["bench", "--device", "cpu", *options.split(), "--repeats", "7"]) == 130  # interrupted
    assert asked["device"] == torch.device("cpu")
    assert (asked["baselines"], asked["repeats"], asked["seconds"]) == ("all", 7, None)
    expected = [(T, 8, C, d) for d in ("float32", "float16") for C in (32, 64) for T in (8, 16)]
    assert asked["cases"] == [cases.Case("aggregate", cases.Shape(*sizes)) for sizes in expected]

    assert cli.main(["bench", "--device", "cpu"]) == 130  # interrupted
    assert {case.kernel for case in asked["cases"]} == {
        *cases.KERNELS,
        *cases.BACKWARD_KERNELS,
        *cases.BOUNDARY_KERNELS,
    }
    assert {case.shape.hidden_size for case in asked["cases"]} == set(cases.CPU_WIDTHS) < set(cases.WIDTHS)
    assert {case.shape.dtype for case in asked["cases"]} == {"bfloat16"}
    assert asked["baselines"] == "fast"


@pytest.mark.parametrize(
    "options",
    [
        "--kernels nonsense",
        "--kernels head_backward",
        "--dtype int8",
        "--widths 0",
        "--widths wide",
        "--tokens -1",
        "--streams 9",
        "--repeats 0",
        "--baselines some",
        "--device tpu",
    ],
)
def test_bad_options_exit_2(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", *options.split()])
    assert options.split()[0] in capsys.readouterr().err


def test_options_in_front_of_another_measurement_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """They would be the kernels' and get lost."""
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--repeats", "3", "overhead"])
    assert "--repeats: expected after overhead, got it in front" in capsys.readouterr().err


def test_other_measurements_are_listed_and_explain_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--baselines" in shown
    for name, module in command.MEASUREMENTS.items():
        assert f"{name} {module.HELP}" in shown
        with pytest.raises(SystemExit, match="0"):
            cli.main(["bench", name, "--help"])
        assert "--json FILE" in capsys.readouterr().out


@pytest.mark.usefixtures("checked")
def test_cuda_without_a_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--device", "cuda"]) == 1
    assert capsys.readouterr().err.startswith("mhc-tilelang bench: --device cuda: torch sees no GPU")
