"""`mhc-tilelang study` at tiny sizes: what it prints follows from what it computed, its files are whole, seeds count.

Would catch: HC and mHC swapped, another Sinkhorn in the study than in the kernels, a wrong implicit gradient, runs of
a seed that differ in more than their connection, blank pictures.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mhc_tilelang import cli, reference
from mhc_tilelang.perf.measure.timing import Statistics
from mhc_tilelang.perf.study import convergence, gain, gradients, runs, sinkhorn, summary
from mhc_tilelang.perf.study.matrices import Curve, gains_by_depth, measure
from mhc_tilelang.perf.study.model import Sizes, read_text

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
EPS = 1e-6
SIZES = Sizes(width=64, depth=1, heads=2, context=16, batch=2, steps=3, rate=1e-3)


def assert_pictures(out, *names):
    """Each as SVG and PNG, and not blank."""
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    assert {path.stem for path in out.glob("*.svg")} == {path.stem for path in out.glob("*.png")} == set(names)
    for path in out.glob("*.png"):
        pixels = imread(path)[..., :3].reshape(-1, 3)
        assert (pixels < 0.99).any(1).mean() > 0.02, path.name


def lines_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# gain


def test_gain_command(tmp_path, capsys):
    """mHC stays below 2 at 20 iterations and HC passes 100, which it also prints."""
    arguments = ["--depth", "64", "--tokens", "16", "--scales", "0.01", "1", "--iters", "2", "20"]
    out, stored = tmp_path / "out", tmp_path / "gain.json"
    assert cli.main(["study", "gain", *arguments, "--out", str(out), "--json", str(stored)]) == 0
    shown = capsys.readouterr().out
    assert "mHC at 20 iterations has gained 1." in shown
    assert "HC, independent sublayers, passes 100 from a = 1 on" in shown
    assert_pictures(out, "gain-depth", "gain-iterations")
    lines = lines_of(out / "gain.csv")
    assert lines == [{k: str(v) for k, v in row.items()} for row in json.loads(stored.read_text())["results"]]
    last = [line for line in lines if line["sublayers"] == "64"]
    gains = {(one["g"], one["connection"], one["a"], one["iterations"]): float(one["backward_gain"]) for one in last}
    assert gains["independent", "HC", "1.0", ""] > 100
    assert gains["repeated", "mHC", "1.0", "20"] < gains["repeated", "mHC", "1.0", "2"] < 4


def test_gains_are_of_the_set_up():
    """The first mapping by hand from the draws, forward and backward; the same seed gives the same numbers."""
    curves = measure(2, 5, 4, [0.5], [20], 3, CPU)
    g = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(3)).double()
    plain = torch.eye(4) + 0.5 * torch.tanh(g[0])
    assert curves[0].forward[0] == pytest.approx(plain.sum(-1).abs().amax(-1).mean().item(), rel=1e-6)
    assert curves[0].backward[0] == pytest.approx(plain.sum(-2).abs().amax(-1).mean().item(), rel=1e-6)
    first, second = (torch.from_numpy(reference.sinkhorn((0.5 * one + 6 * torch.eye(4) - 3).numpy())) for one in g)
    product = second @ first
    assert curves[1].backward[1] == pytest.approx(product.sum(-2).amax(-1).mean().item(), rel=1e-5)
    assert curves[3].backward[1] == pytest.approx((first @ first).sum(-2).amax(-1).mean().item(), rel=1e-5)
    assert measure(2, 5, 4, [0.5], [20], 3, CPU) == curves
    assert measure(2, 5, 4, [0.5], [20], 4, CPU) != curves


def test_products_have_the_last_mapping_left():
    h_res = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    product = h_res[2] @ h_res[1] @ h_res[0]
    torch.testing.assert_close(gains_by_depth(h_res).forward[2], product.sum(-1).abs().amax(-1))


# sinkhorn


def test_sinkhorn_command(tmp_path, capsys):
    arguments = ["--matrices", "64", "--scales", "1", "3", "--iters", "2", "20", "--timed", "64", "--repeats", "2"]
    assert cli.main(["study", "sinkhorn", *arguments, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("implicit, float64", "forward", "backward", "order"))
    assert_pictures(tmp_path, *(f"sinkhorn-{name}" for name in ("flow", "convergence", "gradients", "cost")))
    assert len(lines_of(tmp_path / "sinkhorn-convergence.csv")) == 4
    assert len(lines_of(tmp_path / "sinkhorn-gradients.csv")) == 4 * 3
    assert len(lines_of(tmp_path / "sinkhorn-cost.csv")) == 4


def test_iterations_are_the_references():
    """Bits are the reference's, and the other order is its transpose on transposed logits."""
    logits = 3 * convergence.draw(7, 4, 0)
    found = convergence.after(logits, [1, 5, 20], EPS)
    for iters, h_res in found.items():
        assert np.array_equal(h_res, reference.sinkhorn(logits, iters, EPS))
    first, *_, last = convergence.measure(convergence.draw(200, 4, 0), [1.0], [1, 5, 20], EPS)
    assert first.median > 0.05
    assert last.median < 1e-5
    assert last.order < 1e-3 < first.order


def test_implicit_gradient_is_exact_where_sinkhorn_has_converged():
    """Against exact unrolling in float64, to 1e-9 without eps. Catches a system of another sign or side."""
    logits = convergence.draw(20, 4, 0)
    upstream = convergence.draw(20, 4, 1)
    h_res = torch.from_numpy(reference.sinkhorn(logits, 500, 0.0))
    exact = reference.sinkhorn_backward(upstream, logits, 500, 0.0)
    got = gradients.implicit(torch.from_numpy(upstream), h_res).numpy()
    assert np.abs(got - exact).max() < 1e-9 * np.abs(exact).max()


def test_gradient_errors_tell_the_methods_apart():
    """After 2 iterations at std 3 the implicit gradient is off by tens of per cent, the kernel's by float32."""
    errors = gradients.measure(convergence.draw(200, 4, 0), [3.0], [2], EPS, 0, CPU)
    found = {one.method: one.median for one in errors}
    assert found["unrolled"] < 1e-6
    assert found["implicit, float64"] > 0.1


# train


def test_train_command(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 20)
    arguments = ["--steps", "3", "--width", "64", "--depth", "1", "--heads", "2", "--context", "16", "--batch", "2"]
    arguments += ["--seeds", "2", "--text", str(text), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert cli.main(["study", "train", *arguments]) == 0
    shown = capsys.readouterr().out
    assert all(
        words in shown for words in ("text.txt (1,900,", "plain residual", "mHC", "identity HC", "2 seeds", "1.841")
    )
    assert_pictures(tmp_path / "out", "train")
    curves = lines_of(tmp_path / "out" / "train-curves.csv")
    assert len(curves) == 4 * 2 * 4
    assert {line["connection"] for line in curves} == {"residual", "hc", "mhc", "identity"}
    # Streams that are not mixed gain nothing; their gates are not those of the others.
    gains = {line["composite_forward_gain"] for line in curves if line["connection"] == "identity"}
    assert gains == {"1"}
    # A plain hyper-connection starts as the plain residual.
    starts = {(line["connection"], line["seed"]): line["held_out_loss"] for line in curves if line["step"] == "0"}
    assert starts["hc", "0"] == starts["residual", "0"] != starts["residual", "1"]


def test_runs_of_a_seed_are_equal():
    """Runs are equal to the bit, evaluations apart or not; another seed gives other losses."""
    text = read_text(None, SIZES.context)
    one, same, other = (
        runs.train("mhc", seed, SIZES, text, CPU, every=every) for seed, every in ((0, 1), (0, 3), (1, 3))
    )
    assert one.losses == same.losses
    assert one.gradient_norms == same.gradient_norms
    assert one.evaluations[-1] == same.evaluations[-1]
    assert [evaluation.step for evaluation in one.evaluations] == [0, 1, 2, 3]
    assert [evaluation.step for evaluation in same.evaluations] == [0, 3]
    assert other.losses != one.losses
    assert one.evaluations[-1].forward_gain == pytest.approx(1, abs=1e-5)


def test_summary_by_hand():
    """Means, ends and paired differences; a run that diverged has no lowest loss."""
    evaluation = runs.Evaluation(1, 2.0, 1.0, 1.0, 1.0)
    made = [
        runs.Run(kind, seed, 1, [3.0, 2.0 + shift], [1.0], [replace(evaluation, loss=2.0 + seed + shift)])
        for seed in (0, 1)
        for kind, shift in (("residual", 0.0), ("mhc", -0.25))
    ]
    rows = {(row["quantity"], row["connection"]): row for row in summary.compare(made)}
    final = rows["held-out loss, final", "mhc"]
    assert (final["mean"], final["lowest"], final["highest"]) == (2.25, 1.75, 2.75)
    assert final["difference_mean"] == final["difference_lowest"] == -0.25
    assert "difference_mean" not in rows["gradient norm, largest", "mhc"]
    made[1].losses[0] = math.nan
    rows = {(row["quantity"], row["connection"]): row for row in summary.compare(made)}
    assert math.isnan(rows["training loss, lowest", "mhc"]["mean"])
    assert "-0.2500" in summary.as_table(summary.compare(made[2:]))


# The page of a stored run


def test_page_shows_what_is_stored():
    """Every picture is there and every stored file is named."""
    page = ROOT / "docs" / "study" / "README.md"
    text = page.read_text(encoding="utf-8")
    pictures = {path.name for path in page.parent.glob("*.svg")}
    assert set(re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)) == pictures
    assert {path.stem for path in page.parent.glob("*.csv")} == {
        "gain",
        "sinkhorn-convergence",
        "sinkhorn-cost",
        "sinkhorn-gradients",
        "train-curves",
        "train-summary",
    }


def stored_curves():
    """Return the curves of gain.csv: by index, as lists that begin with the first sublayer are."""
    found = {}
    for line in lines_of(ROOT / "docs" / "study" / "gain.csv"):
        iters = int(line["iterations"]) if line["iterations"] else None
        one = found.setdefault((line["g"], float(line["a"]), iters), ({}, {}))
        for way, name in zip(one, ("forward_gain", "backward_gain"), strict=True):
            way[int(line["sublayers"]) - 1] = float(line[name])
    return [Curve(*key, forward, backward, 0.0) for key, (forward, backward) in found.items()]


def stored_numbers(name, whole=()):
    """Rows of a CSV whose cells are numbers where they can be; empty ones are left out."""
    return [
        {
            key: (int if key in whole else float)(cell) if re.fullmatch(r"[-+.\de]+|nan", cell) else cell
            for key, cell in line.items()
            if cell
        }
        for line in lines_of(ROOT / "docs" / "study" / f"{name}.csv")
    ]


def stored_tables():
    """Return what the commands print of the stored numbers, by name."""
    curves = stored_curves()
    names = ("sinkhorn-convergence", "sinkhorn-gradients", "sinkhorn-cost")
    rows = {name: stored_numbers(name, ("iters", "samples", "disturbed")) for name in names}
    times = {}
    for row in rows["sinkhorn-cost"]:
        direction, iters = row.pop("direction"), row.pop("iters")
        times.setdefault(direction, {})[iters] = Statistics(**row)
    return {
        "gains": gain.by_depth(curves, 20, [16, 64, 128]),
        "what they say": gain.conclusion(curves, 20, 64, 4),
        "distances": sinkhorn.distance_table([convergence.Distance(**row) for row in rows["sinkhorn-convergence"]]),
        "errors": sinkhorn.error_table([gradients.Error(**row) for row in rows["sinkhorn-gradients"]]),
        "cost": sinkhorn.cost_table(times, 16384),
        "training": summary.as_table(stored_numbers("train-summary")),
    }


def words(text):
    """Return the text without alignment and line breaks."""
    return " ".join(re.sub(r"-{3,}", "", text).split())


def test_tables_of_the_page_are_those_of_the_stored_numbers():
    """Would catch a number that was changed, on the page or in a file."""
    page = words((ROOT / "docs" / "study" / "README.md").read_text(encoding="utf-8"))
    for name, table in stored_tables().items():
        assert words(table) in page, f"{name}: expected on docs/study/README.md\n{table}"
    found = {(one.structure, one.iters, one.scale): one.backward[63] for one in stored_curves() if one.iters}
    for (structure, iters), gains in itertools.groupby(sorted(found), key=lambda key: key[:2]):
        shown = re.search(rf"{structure} {iters}((?: \d\.\d{{4}} \(\S+\))+)", page)
        expected = [found[key] for key in gains]  # of six digits in the file
        assert [float(one) for one in re.findall(r"\d\.\d{4}", shown[1])] == pytest.approx(expected, abs=6e-5)


# Errors


def test_errors_by_name(tmp_path, capsys, monkeypatch):
    """Before anything runs."""
    short = tmp_path / "short.txt"
    short.write_text("too short", encoding="utf-8")
    for arguments, message in (
        (["train", "--text", str(short)], "expected at least"),
        (["train", "--text", str(tmp_path / "absent")], "cannot read --text"),
        (["train", "--width", "30", "--heads", "4"], "--width: expected a multiple of --heads 4, got 30"),
        (["gain", "--out", str(short / "below")], "cannot write --out"),
    ):
        assert cli.main(["study", *arguments]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert cli.main(["study", "sinkhorn", "--out", str(tmp_path / "out")]) == 1
    assert "mhc-tilelang[plots]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
