"""Stored results, read and compared: ratios, what overlaps, what differs, and files that are not results.

Would catch: a ratio upside down, a slowdown called noise or the reverse, runs of two machines compared without a word.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mhc_tilelang import cli
from mhc_tilelang.errors import MHCError
from mhc_tilelang.perf.stored.compare import compare, differences
from mhc_tilelang.perf.stored.from_json import load
from mhc_tilelang.perf.stored.results import KernelResults, OverheadResults, Spread

STORED = Path(__file__).parents[2] / "perf" / "results" / "amd-epyc-2-cores"
KERNELS, OVERHEAD = STORED / "default.json", STORED / "overhead-3b.json"


def changed(tmp_path: Path, source: Path, change, name: str = "changed.json") -> Path:
    """A copy of a stored file, with `change` applied to its content."""
    content = json.loads(source.read_text(encoding="utf-8"))
    change(content)
    path = tmp_path / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def scale_times(factor: float):
    def change(content: dict) -> None:
        for result in content["results"]:
            if result["kernel"] == "post":
                for key in ("median", "lower_quartile", "upper_quartile"):
                    result["time"][key] *= factor

    return change


@pytest.mark.parametrize("path", sorted(STORED.glob("*.json")), ids=lambda path: path.stem)
def test_stored_results_are_read(path: Path) -> None:
    """Every file that the repository keeps."""
    results = load(path)
    assert isinstance(results, OverheadResults if path.stem.startswith("overhead") else KernelResults)
    assert all(time.lower_quartile <= time.median <= time.upper_quartile for time in results.times().values())


def test_a_run_compared_with_itself() -> None:
    for path in (KERNELS, OVERHEAD):
        for change in compare(load(path), load(path)):
            assert change.ratio.median == 1
            assert change.verdict == ""


@pytest.mark.parametrize(("factor", "verdict"), [(2.0, "slower"), (0.5, "faster"), (1.001, "")])
def test_a_kernel_that_changed(tmp_path: Path, factor: float, verdict: str) -> None:
    after = load(changed(tmp_path, KERNELS, scale_times(factor)))
    for change in compare(load(KERNELS), after):
        is_changed = change.name[0] == "post"
        assert change.ratio.median == pytest.approx(factor if is_changed else 1)
        assert change.verdict == (verdict if is_changed else "")
        assert change.copy == 1


def test_ratio_of_spreads() -> None:
    """Computed by hand: 2 (1 to 4) over 10 (5 to 20)."""
    ratio = Spread(2, 1, 4).over(Spread(10, 5, 20))
    assert (ratio.median, ratio.lower_quartile, ratio.upper_quartile) == (0.2, 0.05, 0.8)


def test_other_machines_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(content: dict) -> None:
        content["device"], content["threads"] = "another processor", 3
        content["versions"]["torch"] = "9.9"

    other = changed(tmp_path, KERNELS, change)
    assert {"device", "version of torch"} <= set(differences(load(KERNELS), load(other)))
    assert cli.main(["bench", "compare", str(KERNELS), str(other), "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "another processor" in out
    assert "9.9" in out
    assert "differs" in out
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert written["kind"] == "comparison"
    assert len(written["rows"]) == len(load(KERNELS).times())


def test_two_kinds_are_refused() -> None:
    with pytest.raises(MHCError, match="expected two files of one kind"):
        compare(load(KERNELS), load(OVERHEAD))


def drop(key: str):
    return lambda content: content.pop(key)


def set_to(key: str, value: object):
    return lambda content: content.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("device"), "'device', which is missing"),
        (set_to("kind", "recipe"), "kind: expected one of 'kernels', 'overhead', got \"recipe\""),
        (set_to("results", []), "results: expected at least one result"),
        (
            lambda c: c["results"][0]["time"].__setitem__("median", -1),
            r"results\[0\].time.median: expected a number above",
        ),
        (lambda c: c["results"][0]["time"].__setitem__("median", 1e9), "lower_quartile ≤ median ≤ upper_quartile"),
        (lambda c: c["results"][0].__setitem__("kernel", "pots"), r"results\[0\].kernel: expected one of expand"),
        (lambda c: c["results"].append(c["results"][0]), "expected each result once"),
    ],
    ids=["no-device", "kind", "empty", "negative", "disorder", "kernel", "twice"],
)
def test_files_that_are_not_results(tmp_path: Path, change, message: str) -> None:
    """The error names the file, the place, what was expected and what is there."""
    path = changed(tmp_path, KERNELS, change)
    with pytest.raises(MHCError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_unreadable_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    assert cli.main(["bench", "compare", str(broken), str(KERNELS)]) == 1
    assert "expected JSON" in capsys.readouterr().err
    assert cli.main(["bench", "compare", str(KERNELS), str(tmp_path / "absent.json")]) == 1
    assert "cannot read" in capsys.readouterr().err
