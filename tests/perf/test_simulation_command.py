"""`mhc-tilelang simulate`: what it prints, draws and reads; the page that shows it and `mhc-tilelang memory`.

Would catch: an assumption that is not printed, stored times that are not used, a page that shows older numbers,
predicted times that are taken for measured ones or in other units.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mhc_tilelang import cli
from mhc_tilelang.perf.calls.cases import BACKWARD_KERNELS, KERNELS
from mhc_tilelang.perf.overhead.model import DEVICES
from mhc_tilelang.perf.predict import stored
from mhc_tilelang.perf.predict.stored import Connection
from mhc_tilelang.perf.simulation import report
from mhc_tilelang.perf.simulation.costs import Assumptions, costs
from mhc_tilelang.perf.simulation.overhead import overhead, step_overhead
from mhc_tilelang.perf.sizes import MODELS

STORED = Path(__file__).parents[2] / "perf" / "results" / "amd-epyc-2-cores"


def test_the_command_prints_every_assumption(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "simulation.json"
    assert cli.main(["simulate", "--model", "3b", "--stages", "12", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    for said in ("A MODEL", "80% of the bandwidth", "60% of the FLOP/s", "14C + 20C", "40 GB/s", "stages: 12", "6.7 %"):
        assert said in out
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["assumptions"]["stages"] == 12
    assert [row["model"] for row in content["models"]] == [*MODELS]
    row = next(row for row in content["models"] if row["model"] == "3b")
    assert row["overhead"] == pytest.approx(overhead(Assumptions(model="3b", stages=12)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--stages 31 --model 27b", "--stages: expected at most the 30 layers of 27b, got 31"),
        (f"--results {STORED / 'default.json'}", "expected a GPU of the model's table, got 'AMD EPYC, 2 threads'"),
        (f"--results {STORED / 'overhead-3b.json'}", "expected what `bench --json` wrote"),
    ],
)
def test_bad_options_are_refused_by_name(options: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", *options.split()]) == 1
    assert named in capsys.readouterr().err


def gpu_results(tmp_path: Path, seconds: float, *, fused: bool = False) -> Path:
    """A stored benchmark of a GPU, made of one of a CPU: every kernel takes as long, and the fused boundary."""
    content = json.loads((STORED / "default.json").read_text(encoding="utf-8"))
    content["device"] = "NVIDIA H100 80GB HBM3"
    content["results"] = [row for row in content["results"] if fused or "post_pre" not in row["kernel"]]
    for row in content["results"]:
        row["time"] = {key: seconds if isinstance(value, float) else value for key, value in row["time"].items()}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_stored_times_replace_the_traffic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four kernels each way, of 2048 tokens in the file, and autograd's sum; the device is that of the file."""
    path, file = gpu_results(tmp_path, 1e-4), tmp_path / "out.json"
    assert cli.main(["simulate", "--model", "27b", "--results", str(path), "--json", str(file)]) == 0
    assert "measured, 800.0 + " in capsys.readouterr().out
    content = json.loads(file.read_text(encoding="utf-8"))
    tasks = content["stage_tasks"]["mhc"]
    assert content["assumptions"]["device"] == "H100"
    assert tasks["connection"] == pytest.approx(4 * 1e-4 * 2)
    added = 3 * 4 * 2560 * 2 * 4096 / (0.8 * DEVICES["H100"].bandwidth)
    assert tasks["connection_backward"] == pytest.approx(4 * 1e-4 * 2 + added)
    assert [row["model"] for row in content["models"]] == ["27b"]


def test_stored_times_of_the_fused_boundary(tmp_path: Path) -> None:
    """One time each way, of 2048 tokens, and nothing added."""
    path, file = gpu_results(tmp_path, 1e-4, fused=True), tmp_path / "out.json"
    assert cli.main(["simulate", "--model", "27b", "--results", str(path), "--json", str(file)]) == 0
    tasks = json.loads(file.read_text(encoding="utf-8"))["stage_tasks"]["mhc"]
    assert (tasks["connection"], tasks["connection_backward"]) == pytest.approx((2e-4, 2e-4))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--device A100", "--device: expected H100"),
        ("--streams 2", "expected C 2560, n 2 in bfloat16, got no aggregate, aggregate_backward, coefficients"),
        ("--form single-pass_floor", "--form: expected without --results"),
    ],
)
def test_stored_times_of_something_else(
    options: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [option.replace("_", " ") for option in options.split()]
    assert cli.main(["simulate", "--results", str(gpu_results(tmp_path, 1e-4)), *given]) == 1
    assert named in capsys.readouterr().err


def test_predicted_kernels_take_the_place_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that are those of the bytes give what the bytes give; longer ones more; a refusal is said."""
    given = Assumptions()
    cost = costs(given, plain=False)
    times = [1e6 * seconds for seconds in (cost.connection, cost.connection_backward)]
    found = {2560: Connection(*((us, 0.5 * us, 2 * us) for us in times)), 1280: "spills inside a loop"}
    monkeypatch.setattr(report, "connection", lambda _device, width, _streams: found[width])
    text = report.predicted_table(report.simulate(given, ("27b", "3b")))
    line = next(line for line in text.splitlines() if line.startswith("27b"))
    middle, low, high = re.findall(r"([\d.]+) %", line)
    assert middle == f"{100 * overhead(given):.1f}"
    assert float(low) < float(middle) < float(high)
    assert "3b: as above, by bytes: spills inside a loop" in text
    assert "not measured" in text
    alone = report.predicted_table(report.simulate(Assumptions(form="kernel by kernel"), ("27b",)))
    assert "27b: as above, by bytes: connections are not the fused boundary's" in alone


def test_coefficients_beside_the_layer_add_less() -> None:
    """The stored prediction of the delayed form counts. Catches a kernel taken out of both rows, or of neither."""
    text = report.predicted_table(report.simulate(Assumptions(), ("27b",)))
    lines = [line for line in text.splitlines() if line.startswith("27b, delayed")]
    assert [line.split("  ")[0] for line in lines] == ["27b, delayed", "27b, delayed, beside"]
    inline, beside = (float(re.findall(r"([\d.]+) %", line)[0]) for line in lines)
    assert beside < inline
    fused = stored.connection("H200", 2560, 4)
    assert isinstance(fused, Connection)
    forms = [stored.delayed(fused, "H200", 2560, is_beside) for is_beside in (False, True)]
    [hidden] = [
        part["us"]
        for part in stored.rows()["h200", "post_pre_delayed", 2560]["parts"]
        if part["family"] == "coefficients"
    ]
    assert forms[0].forward[0] - forms[1].forward[0] == pytest.approx(hidden)  # type: ignore[union-attr]


def test_pictures(tmp_path: Path) -> None:
    """All three, with their numbers as text."""
    pytest.importorskip("matplotlib")
    assert cli.main(["simulate", "--out", str(tmp_path)]) == 0
    names = ("stage", "step", "sensitivity")
    stage, step, bars = ((tmp_path / f"simulation-27b-{name}.svg").read_text("utf-8") for name in names)
    said = f"mHC adds {100 * overhead(Assumptions()):.1f} %"
    assert said in stage
    assert "send to previous" in stage
    assert f"mHC adds {100 * step_overhead(Assumptions()):.1f} %" in step
    assert "paper: 6.7 %" in bars


def test_kernels_of_the_file_are_known() -> None:
    """The names that a benchmark is read by are those that it writes."""
    from mhc_tilelang.perf.simulation.measured import ALONE

    assert {name for direction in ALONE for name in direction} <= {*KERNELS, *BACKWARD_KERNELS}


# The page


PAGE = Path(__file__).parents[2] / "docs" / "at-scale-model.md"
SHOWN = re.findall(r"```\n\$ mhc-tilelang (.*?) --out docs/at-scale\n(.*?)\n```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    ("command", "printed"),
    [pytest.param(*one, marks=[pytest.mark.full] if "--measure" in one[0] else [], id=one[0]) for one in SHOWN],
)
def test_the_page_shows_what_the_command_prints(
    command: str, printed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tables to the letter; of pictures all text, since their lines' coordinates are matplotlib's."""
    pytest.importorskip("matplotlib")
    assert cli.main([*command.split(), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.rstrip("\n") == printed
    for drawn in tmp_path.glob("*.svg"):
        shown, new = (
            re.findall(r"<text[^>]*>([^<]*)<", path.read_text("utf-8"))
            for path in (PAGE.parent / "at-scale" / drawn.name, drawn)
        )
        assert shown == new
        assert len(new) > 10


def test_the_page_shows_every_command() -> None:
    assert len(SHOWN) == 3
