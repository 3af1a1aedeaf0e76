"""The tuner, on a CPU: what it enumerates, what it refuses, what it calls wrong.

Would catch: a plan that is timed though it writes something else, one that is compared with its own output, a
heuristic's choice that is not among the results, an axis that a kind of plan lacks; a ranking that puts a plan
without a prediction first, or says nothing of why there is none.
"""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from helpers import CPU

from mhc_tilelang.compiler.recording import Recorded
from mhc_tilelang.compiler.toolchain import find_nvdisasm
from mhc_tilelang.errors import MHCError
from mhc_tilelang.perf.calls.cases import Case, Shape
from mhc_tilelang.perf.calls.launches import launches
from mhc_tilelang.perf.calls.table import CALLS
from mhc_tilelang.perf.gpu import tune, tune_arguments, tune_plans, tune_rank
from mhc_tilelang.perf.gpu.building import Job, build_all, unique
from mhc_tilelang.perf.gpu.tune_plans import alternatives

SHAPE = Shape(4096, 4, 2560, "bfloat16")
FEW = Shape(64, 4, 2560, "bfloat16")
WITHOUT = ("split_phi",)  # its plan is the projection's


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_every_family_has_alternatives(target: str) -> None:
    """Each differs from the heuristic's and from the others, and leaves the sizes alone."""
    found = {one.family: one for name in CALLS for s in (SHAPE, FEW) for one in launches(Case(name, s), target, 264)}
    for family, one in found.items():
        if family in WITHOUT:
            continue
        others = alternatives(one.parameters, target)
        labels = [tune_arguments.changes(other, one.parameters) for other in others]
        assert len(set(labels)) == len(labels) > 1, family
        assert all(other.get("hidden_size") == one.parameters.get("hidden_size") for other in others)


def launch_of(family: str, shape: Shape = SHAPE) -> Recorded:
    return next(one for name in CALLS for one in launches(Case(name, shape), "cuda", 264) if one.family == family)


def test_shares_are_whole_groups() -> None:
    """Of kernels by warps: what is compiled is the heuristic's, one argument is another."""
    one = launch_of("post_project")
    found = tune_plans.shares(one)
    assert [share["chunks_per_split"] for share in found] == [10, 20, 40]
    for share in found:
        assert tune_plans.compiled(share) == one.parameters
        assert tune_arguments.changes(share, one.parameters) == f"chunks_per_split={share['chunks_per_split']}"
        given = tune_arguments.adapt_arguments(one, share, [])
        assert {name for name in given if given[name] is not one.arguments[name]} == {"chunks_per_split"}
        assert given["chunks_per_split"] == share["chunks_per_split"]
    assert not tune_plans.shares(launch_of("post"))
    assert not tune_plans.shares(launch_of("project", Shape(4096, 4, 2560, "float32")))


def test_plans_are_compared_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it, tiny: the heuristic's plan is among the timed ones, and JSON has them all."""
    path = tmp_path / "tuned.json"
    sizes = ["--device", "cpu", "--tokens", "8", "--width", "48", "--dtype", "float32"]
    assert (
        tune.main(["sinkhorn", *sizes, "--plans", "2", "--processes", "1", "--repeats", "2", "--json", str(path)]) == 0
    )
    tried = json.loads(path.read_text())["families"]["sinkhorn"]
    assert [each["heuristic"] for each in tried].count(True) == 1
    assert [each["outputs"] for each in tried] == [tune.SAME] * 3
    times = [each["time"]["median"] for each in tried]
    assert times == sorted(times)
    assert "heuristic" in capsys.readouterr().out


def test_what_a_compiler_refuses_is_reported() -> None:
    """Only the refused job fails: the other compiles."""
    good = {"num_streams": 2, "block": 16}
    built = build_all([Job("sinkhorn", good), Job("sinkhorn", {**good, "num_streams": -1})], "cpu", 1)
    assert {one.job.parameters["num_streams"]: bool(one.error) for one in built} == {2: False, -1: True}


def test_jobs_are_unique_and_the_longest_comes_first() -> None:
    jobs = unique([Job("post", {"n": 4}), Job("boundary_backward", {"n": 4}), Job("post", {"n": 4})])
    assert [job.family for job in jobs] == ["boundary_backward", "post"]


EXPECTED = {"a": torch.tensor([1.0, 2.0, 4.0]), "unused": torch.tensor([float("nan")])}


@pytest.mark.parametrize(
    ("got", "verdict"),
    [
        ([1.0, 2.0, 4.0], tune.SAME),
        ([1.0, 2.0, 4.00001], tune.CLOSE),
        ([1.0, 2.0, 4.01], tune.WRONG),
        ([1.0, 2.0, float("nan")], tune.WRONG),
    ],
)
def test_outputs_are_told_apart(got: list[float], verdict: str) -> None:
    assert tune.compare({"a": torch.tensor(got)}, EXPECTED, ["a"]) == verdict


def test_numbers_of_partial_sums_may_differ() -> None:
    """They are added up first."""
    parts, whole = {"a": torch.tensor([[1.0], [2.0]])}, {"a": torch.tensor([[3.0]])}
    assert tune.compare(parts, whole, ["a"]) == tune.SAME


def test_outputs_start_as_nan() -> None:
    """An output that a plan leaves unwritten must not be the heuristic's, left over."""
    one = tune.find("sinkhorn", Shape(8, 4, 48, "float32"), CPU)
    assert tune_arguments.outputs_of(one) == ["h_res"]
    given = tune_arguments.adapt_arguments(one, one.parameters, ["h_res"])
    assert given["h_res"].isnan().all()
    assert not one.arguments["h_res"].isnan().any()
    assert given["logits"] is one.arguments["logits"]


class AtOnce:
    """A pool of processes that is this one."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, *arguments):
        job = Future()
        try:
            job.set_result(function(*arguments))
        except Exception as error:
            job.set_exception(error)
        return job


def test_plans_are_ranked_by_what_they_are_predicted_to_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fastest first, then those without a number; and the choice is said."""

    def stand_in(launch, gpu):
        assert isinstance(launch, Recorded)  # or it has no function to build
        assert (gpu.name, launch.sizes["num_tokens"], "x" in launch.streams) == ("h200", 4096, True)
        threads = launch.parameters["tile"].threads
        if threads == 64:
            raise MHCError("too large")
        return (None, "spills") if threads == 96 else (1e3 / launch.parameters["tile"].channels, "bytes")

    monkeypatch.setattr(tune_rank, "workers", lambda _: AtOnce())
    monkeypatch.setattr(tune_rank, "predict", stand_in)
    path = tmp_path / "ranked.json"
    options = ["--predict", "h200", "--tokens", "4096", "--processes", "1", "--json", str(path)]
    assert tune.main(["aggregate", *options]) == 0
    ranked = json.loads(path.read_text())["families"]["aggregate"]
    times = [us for _, us, _ in ranked if us]
    assert times == sorted(times)
    assert 0 < len(times) < len(ranked)
    assert all(us is None for _, us, _ in ranked[len(times) :])
    assert {why for _, us, why in ranked if us is None} == {"spills", "MHCError: too large"}
    assert "predicted fastest: " in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.nvcc
@pytest.mark.skipif(find_nvdisasm() is None, reason="no nvdisasm")
def test_a_plan_is_predicted(tmp_path: Path) -> None:
    path = tmp_path / "ranked.json"
    options = ["--predict", "b200", "--tokens", "32768", "--width", "2560", "--plans", "1", "--processes", "1"]
    assert tune.main(["expand", *options, "--json", str(path)]) == 0
    ranked = json.loads(path.read_text())["families"]["expand"]
    assert [len(ranked), all(us > 20 for _, us, _ in ranked)] == [2, True]
