"""`bench report`: Markdown and pictures from stored results; FLOPs by hand; errors by name.

Would catch: an empty picture, a figure without its device, a number that is not the file's, a report of half the files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mhc_tilelang import cli
from mhc_tilelang.perf.calls.cases import BACKWARD_KERNELS, KERNELS, SUBLAYER_INPUT
from mhc_tilelang.perf.figures.flops import flops
from mhc_tilelang.perf.figures.sublayer import stages

matplotlib = pytest.importorskip("matplotlib")

STORED = Path(__file__).parents[2] / "perf" / "results" / "amd-epyc-2-cores"
FILES = [STORED / "default.json", STORED / "overhead-3b.json"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one report of both kinds of results."""
    out = tmp_path_factory.mktemp("report")
    assert cli.main(["bench", "report", *map(str, FILES), "--out", str(out)]) == 0
    return out


def test_every_picture_is_linked_and_there(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", text))
    assert linked == {path.name for path in report.glob("*.svg")}
    assert {path.stem for path in report.glob("*.png")} == {Path(name).stem for name in linked}
    groups = ("", "-backward", "-boundary")
    kinds = {f"{kind}{group}" for kind in ("roofline", "bandwidth", "speedup") for group in groups}
    assert {f"default-{kind}.svg" for kind in kinds} | {"overhead-3b-overhead.svg", "traffic.svg"} == linked


def test_pictures_are_not_blank(report: Path) -> None:
    """More than one colour, and more than the paper's."""
    from matplotlib.image import imread

    for path in report.glob("*.png"):
        pixels = imread(path)[..., :3].reshape(-1, 3)
        assert (pixels < 0.99).any(1).mean() > 0.02, path.name


def test_pictures_say_what_and_where(report: Path) -> None:
    """The text of the SVG is text: labels, the device, the paper's figure."""
    content = json.loads(FILES[0].read_text(encoding="utf-8"))
    for path in report.glob("default-*.svg"):
        text = path.read_text(encoding="utf-8")
        assert content["device"] in text
        assert content["versions"]["torch"] in text
    overhead = (report / "overhead-3b-overhead.svg").read_text(encoding="utf-8")
    for label in ("paper: 6.7 %", "mHC, kernels", "plain torch", "H200", "single-pass floor", "not comparable"):
        assert label in overhead, label
    assert "34C" in (report / "traffic.svg").read_text(encoding="utf-8")


def test_numbers_are_the_files(report: Path) -> None:
    content = json.loads(FILES[0].read_text(encoding="utf-8"))
    text = (report / "report.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(content["results"])
    first = content["results"][0]
    assert f"`{first['kernel']}`" in rows[0]
    assert f"{1e3 * first['time']['median']:.3g}" in rows[0]


@pytest.mark.parametrize("n", [2, 4, 8])
def test_traffic_stages_are_the_formulas(n: int) -> None:
    """34C, 18C, 14C, 10C and 3C at n = 4."""
    totals = [stage.total for stage in stages(n)]
    assert totals == [8 * n + 2, 4 * n + 2, 3 * n + 2, 2 * n + 2, 3]


def test_flops_by_hand() -> None:
    """n = 2, C = 3, one token."""
    assert flops("expand", 2, 3, 7) == 0
    assert flops("project", 2, 3, 1) == 2 * 8 * 6 + 2 * 6
    assert flops("aggregate", 2, 3, 5) == 5 * 2 * 2 * 3
    assert flops("post", 2, 3, 1) == (1 + 2 * 2) * 6
    assert flops("post_backward", 2, 3, 1) == 2 * (4 + 2 + 4 + 2) * 3
    assert flops(SUBLAYER_INPUT, 2, 3, 1) == sum(
        flops(kernel, 2, 3, 1) for kernel in ("project", "coefficients", "aggregate")
    )
    assert all(flops(kernel, 4, 64, 1) >= 0 for kernel in (*KERNELS, *BACKWARD_KERNELS))


def test_a_file_that_cannot_be_read_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["bench", "report", str(FILES[0]), str(tmp_path / "absent.json"), "--out", str(out)]) == 1
    assert "absent.json" in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert cli.main(["bench", "report", str(FILES[1]), "--out", str(tmp_path / "file")]) == 1
    assert "cannot write --out" in capsys.readouterr().err


def test_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An extra: its absence is an error by name, not a traceback."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert cli.main(["bench", "report", str(FILES[0]), "--out", str(tmp_path)]) == 1
    assert "mhc-tilelang[plots]" in capsys.readouterr().err
