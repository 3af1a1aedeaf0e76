"""The memory model: against sums done by hand, and to the byte against the graph of a forward pass.

Would catch: a stream, a layer's input or output that is kept and not counted, coefficients counted in the stream's
dtype, a transient block counted once for each micro-batch, an optimum that is not the package's own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mhc_tilelang as mhc
from mhc_tilelang import cli
from mhc_tilelang.perf.memory import command as memory_command
from mhc_tilelang.perf.memory import measured as memory_measured
from mhc_tilelang.perf.memory import report as memory_report
from mhc_tilelang.perf.memory.estimate import Stage, coefficient_bytes, layer_bytes, stage_of
from mhc_tilelang.perf.sizes import MODELS, NUM_LAYERS, LayerSizes


def test_a_stage_by_hand() -> None:
    """Seven sublayers of four streams in blocks of three: starts 0, 3, 6; seven outputs; the embedding."""
    stage = Stage(7, 4, in_flight=2)
    assert (stage.plain, stage.all_kept) == (7, 6 * 7 + 1)
    assert stage.kept(3) == 3 * 4 + 7 + 1
    assert stage.recomputed(3) == 2 * 4 + 3
    assert stage.peak(3) == 2 * 20 + 11
    assert stage.objective(3) == 4 * 3 + 6 * 3
    assert stage.recomputed(9) == stage.recomputed(7) == 6 * 4 + 7  # no block is longer than the stage


def test_bytes_by_hand() -> None:
    """n = 2: 2 + 2 + 4 coefficients and as many products, and s; two norms, six tensors of the layers."""
    assert coefficient_bytes(2) == 4 * (8 + 8 + 1)
    assert layer_bytes(LayerSizes(10, 3, 7, head_size=2)) == 2 * (4 + 2 * 2 * 10) + 2 * (4 * 6 + 4 * 7) + 4 * 3


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stages", [1, 4])
def test_the_optimum_is_the_packages(model: str, stages: int) -> None:
    """And next to the root where the blocks are many; the peak of one micro-batch is about least there, too."""
    stage = stage_of(NUM_LAYERS[model], 4, stages)
    best = stage.papers_length
    assert best == mhc.recompute_length(stage.num_sublayers, 4)
    assert abs(best - stage.papers_root) < 2
    alone = Stage(stage.num_sublayers, 4)
    assert alone.peak(best) <= 1.1 * alone.peak(alone.least_length)


def test_micro_batches_in_flight_ask_for_longer_blocks() -> None:
    """Kept tensors exist once a micro-batch, recomputed ones once."""
    assert Stage(8, 4, 1).least_length <= Stage(8, 4, 4).least_length <= Stage(8, 4, 64).least_length == 8


def test_stages_round_up() -> None:
    """The first stage of 30 layers on 8 has 4, under 1F1B with 8 micro-batches in flight."""
    assert stage_of(30, 4, 8) == Stage(8, 4, 8)


@pytest.mark.parametrize(
    ("num_streams", "sublayers"),
    [(4, 6), pytest.param(2, 5, marks=pytest.mark.full), pytest.param(8, 12, marks=pytest.mark.full)],
)
def test_formulas_are_what_a_graph_keeps(num_streams: int, sublayers: int) -> None:
    """Formulas hold to the byte: plain, all kept, and every length."""
    stage = Stage(sublayers - sublayers % 2, num_streams)
    counts = memory_measured.count(stage, stage.lengths)
    assert [(one.connection, one.length) for one in counts[:2]] == [("residual", 0), ("mhc", 0)]
    assert [one.measured for one in counts] == [one.formula for one in counts]


def test_a_count_that_differs_prints_no_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = memory_measured.Count("mhc", 3, formula=100, measured=101)
    monkeypatch.setattr(memory_measured, "count", lambda *_: [wrong])
    assert cli.main(["memory", "--measure"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "mhc, L_r 3: expected 100 bytes per token, counted 101" in captured.err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of the 27B model: 60 sublayers of C = 2560, blocks of 6."""
    file = tmp_path / "memory.json"
    assert cli.main(["memory", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "L_r* = 6, √(nL/(n+2)) = 6.32" in out
    assert "a model" in out.lower()
    content = json.loads(file.read_text(encoding="utf-8"))
    plain, kept, recomputed, again = (row["streams"] for row in content["kept"])
    unit = 2 * 2560
    assert (plain, kept, recomputed, again) == (60 * unit, 361 * unit, 101 * unit, 26 * unit)
    assert content["lengths"][5] == {"length": 6, "papers_objective": 76, "kept": 101, "recomputed": 26, "peak": 127}


def test_too_many_stages_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "--model", "3b", "--stages", "13"]) == 1
    assert "--stages: expected at most the 12 layers of 3b, got 13" in capsys.readouterr().err


@pytest.mark.parametrize("stages", [1, 8])
def test_the_picture(stages: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["memory", "--stages", str(stages), "--out", str(tmp_path)]) == 0
    [picture] = tmp_path.glob("*.svg")
    text = picture.read_text(encoding="utf-8")
    stage = stage_of(30, 4, stages)
    assert f"L_r* = {stage.papers_length}" in text
    assert f"least peak at {stage.least_length}" in text


def test_pictures_need_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An extra: its absence is an error by name, not a traceback."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert cli.main(["memory", "--out", str(tmp_path)]) == 1
    assert "memory: expected matplotlib" in capsys.readouterr().err


def test_counted_lengths_exist() -> None:
    """A stage of two sublayers has no block of 4."""
    counts = memory_command.count_checked(Stage(2, 4))
    assert [one.length for one in counts] == [0, 0, 1, 2]
    assert "counted" in memory_report.counts_table(counts)
