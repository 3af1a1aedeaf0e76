"""The script for a machine with a GPU, without one: order, limits, records, and what its tools say.

Would catch: a step that stops the next, a limit that is not kept, work that is done twice or dropped, more files than
come back, a column of ncu that is misread, bytes that differ and are passed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
import torch
from helpers import CPU

from mhc_tilelang import compiler
from mhc_tilelang.compiler.kernel import Kernel
from mhc_tilelang.compiler.recording import record_launches
from mhc_tilelang.compiler.tracing import signature_of, trace
from mhc_tilelang.errors import MHCError
from mhc_tilelang.kernels import FAMILIES
from mhc_tilelang.perf.calls.cases import Case, Shape
from mhc_tilelang.perf.calls.every_call import every_call
from mhc_tilelang.perf.calls.launches import launches
from mhc_tilelang.perf.calls.table import CALLS
from mhc_tilelang.perf.gpu import counters
from mhc_tilelang.perf.gpu import run as on_gpu
from mhc_tilelang.perf.gpu.counters import Launched
from mhc_tilelang.perf.inspect import matrix

SCRIPT = Path(__file__).resolve().parents[2] / "perf" / "on_gpu.sh"
# Stands for Python and for every tool: notes the call; fails, or takes too long, where its words match.
FAKE = """#!/bin/bash
echo "$(basename "$0") $*" >>"$CALLS"
case "$*" in *"gpu.run collect"*) exec "$REAL" "$@" ;; esac
[[ -n "$FAILING" && "$*" == *$FAILING* ]] && { echo "no such luck"; exit 3; }
[[ -n "$SLOW" && "$*" == *$SLOW* ]] && exec sleep 60
[ -z "${JSON:-}" ] || echo '{"measured": 1}' >"$JSON"
echo "said: $*"
"""


class Machine:
    """A checkout with the script alone, and stand-ins for all that it calls on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.root, self.out, self.calls = folder / "checkout", folder / "out", folder / "calls"
        (self.root / "perf").mkdir(parents=True)
        copy(SCRIPT, self.root / "perf")
        for name in ("python", "nvidia-smi", "nvcc", "ncu", "compute-sanitizer"):
            tool = folder / "bin" / name
            tool.parent.mkdir(exist_ok=True)
            tool.write_text(FAKE)
            tool.chmod(0o755)
        self.path = f"{folder / 'bin'}:{os.environ['PATH']}"

    def run(self, *options: str, failing: str = "", slow: str = "") -> tuple[str, dict[str, str]]:
        """Run the script; return what it printed, and the status of every step by name."""
        more = {"PATH": self.path, "PYTHON": "python", "REAL": sys.executable, "CALLS": str(self.calls)}
        command = [str(self.root / "perf" / "on_gpu.sh"), "--out", str(self.out), *options]
        env = {**os.environ, **more, "FAILING": failing, "SLOW": slow}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, {step["name"]: step["status"] for step in self.record()}

    def record(self) -> list[dict]:
        return json.loads((self.out / "on-gpu.json").read_text())["steps"]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_steps_run_in_order_and_a_failed_one_stops_nothing(machine: Machine) -> None:
    """The end of a failed step is shown, what steps measured is in one file, the table comes last."""
    printed, status = machine.run("--part", "correctness", failing="memcheck")
    assert list(status)[:3] == ["machine", "compile-small", "smoke"]
    assert {name for name, got in status.items() if got != "ok"} == {"memcheck"}
    assert "no such luck" in printed
    assert {path.name for path in machine.out.iterdir()} == {"on-gpu.json", "on-gpu.log"}
    assert next(step for step in machine.record() if step["name"] == "check")["result"] == {"measured": 1}
    assert printed.splitlines()[-len(status) - 1].startswith("step ")
    assert len(printed) < 12_000
    calls = machine.calls.read_text()
    assert "compute-sanitizer --tool racecheck --error-exitcode 9 python -m mhc_tilelang.perf.gpu.run launch" in calls


def test_what_is_done_is_not_done_again(machine: Machine) -> None:
    """The second call goes on with what was not begun; `--again` begins anew."""
    _, status = machine.run("--part", "counters", "--seconds", "20")
    assert status == {"constants": "left", "compile-counters": "ok", "counters": "left"}
    printed, status = machine.run("--part", "counters")
    assert status == dict.fromkeys(("constants", "compile-counters", "counters"), "ok")
    assert "compile-counters: done before" in printed
    assert machine.calls.read_text().count("gpu.run compile counters") == 1
    machine.run("--part", "counters", "--again")
    assert machine.calls.read_text().count("gpu.run compile counters") == 2


def test_a_step_is_stopped_when_the_time_is_up(machine: Machine) -> None:
    """The time left caps a step's limit; the step is begun again the next time."""
    printed, status = machine.run("--part", "correctness", "--seconds", "3", slow="doctor")
    assert (status.pop("machine"), set(status.values())) == ("timeout", {"left"})
    assert "machine: timeout after" in printed
    _, status = machine.run("--part", "correctness")
    assert set(status.values()) == {"ok"}


@pytest.mark.parametrize("options", [("--part", "speed"), ("--seconds", "soon"), ("--fast",), ("--part",)])
def test_bad_options_are_named(machine: Machine, options: tuple[str, ...]) -> None:
    done = subprocess.run([machine.root / "perf" / "on_gpu.sh", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert options[0] in done.stderr


def test_every_step_can_be_told_from_the_others(machine: Machine) -> None:
    """Names are files' names, estimates lie within limits, and a part's steps fit into calls of nine minutes each."""
    done = subprocess.run([machine.root / "perf" / "on_gpu.sh", "--list"], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()[1:-1]]
    assert len({name for name, *_ in rows}) == len(rows)
    assert all(int(estimate) <= int(limit) <= 540 for *_, limit, estimate in rows)
    assert {part for _, part, *_ in rows} | {"smoke"} == set(on_gpu.PARTS)


def test_parts_compile_what_they_launch() -> None:
    """Each kernel once, those first that take longest; all families by the small launch alone."""
    jobs = on_gpu.jobs_of("smoke")
    assert {job.family for job in jobs} == {one for one in FAMILIES if matrix.studied_shape(one) == matrix.STUDIED}
    assert [job.seconds for job in jobs] == sorted((job.seconds for job in jobs), reverse=True)
    assert len(on_gpu.jobs_of("counters")) < len(on_gpu.jobs_of("overhead"))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels with the signatures of their code, which do nothing: nothing is compiled."""

    def load(family: str, _target: str, parameters: dict[str, Any]) -> Kernel:
        return Kernel(family, signature_of(trace(family, parameters)), lambda *_: None)

    monkeypatch.setattr(compiler, "_load", load)
    monkeypatch.setattr(compiler, "_kernels", {})


@pytest.mark.full
@pytest.mark.usefixtures("traced")
def test_every_call_is_launched_and_listed(tmp_path: Path) -> None:
    """Every call of `launches` with what it launches, and the bytes of each kernel."""
    shape = Shape(5, 4, 48, "bfloat16")
    runs = every_call(shape, CPU)
    assert set(runs) == set(CALLS)
    for name, run in runs.items():
        families = [one.family for one in launches(Case(name, shape), "cpu", torch.get_num_threads())]
        assert [one.family for one in record_launches(run)] == families
    manifest = tmp_path / "launches.json"
    counters.launch(shape, CPU, manifest)
    listed = json.loads(manifest.read_text())
    assert {one["family"] for one in listed} == {counters.PROBE, *FAMILIES} - {
        "split_phi",
        "aggregate_mappings",
        "coefficients_aggregate",
        "coefficients_aggregate_backward",
        "boundary_backward",
        "boundary_sums",
    }  # a GPU's
    post = next(one for one in listed if one["family"] == "post")
    unit = 5 * 48 * 2
    assert (post["read"], post["written"]) == (5 * unit + 5 * (4 + 16) * 4, 4 * unit)


LAUNCHED = [Launched("post", "post", 1000, 800, 1000), Launched("aggregate", "aggregate", 2000, 100, 2000)]
HEAD = ["ID", "Kernel Name", counters.READ, counters.WRITTEN, counters.TIME, counters.LEFT]


def ncu_says(*rows: tuple[str, ...]) -> str:
    """Return the output of `ncu --csv --page raw` around the rows: its own lines, names, units."""
    lines = [",".join(f'"{cell}"' for cell in row) for row in (HEAD, ("", "", "byte", "byte", "ns", "byte"), *rows)]
    return "\n".join(["==PROF== Connected to process 7", *lines, "==PROF== Disconnected"])


def test_counters_are_read_and_compared() -> None:
    """Thousands with commas; a write that stays in the cache; bytes that are 10 % too many."""
    text = ncu_says(
        ("0", "post_kernel", "1,040", "500", "2000", "810"),
        ("1", "aggregate_kernel", "2,200", "100", "2000", "100"),
    )
    post, pre = counters.compare_all(LAUNCHED, counters.parse(text), cache_bytes=300)
    assert (post.agrees, pre.agrees) == (True, False)
    assert (round(post.read_error, 2), round(pre.read_error, 2)) == (0.04, 0.1)
    assert "DIFFERS" in counters.table([post, pre])
    assert "+10.0%" in counters.table([post, pre])


@pytest.mark.parametrize(
    ("read", "written", "left"),
    [
        ("1000", "400", "800"),
        ("1000", "900", "800"),
        ("1000", "800", "900"),
        ("940", "800", "800"),
        ("nan", "800", "8"),
    ],
)
def test_bytes_that_differ_are_not_passed(read: str, written: str, left: str) -> None:
    """Less written than the cache can hold back, more than there is, more that leaves the multiprocessors."""
    row = dict(zip(HEAD, ("0", "post_kernel", read, written, "2000", left), strict=True))
    assert not counters.compare_one(LAUNCHED[0], row, cache_bytes=300).agrees


@pytest.mark.parametrize(("text", "message"), [("==ERROR== no permission", "no permission"), (ncu_says(), "got 0")])
def test_what_ncu_refuses_is_said(text: str, message: str) -> None:
    with pytest.raises(MHCError, match=message):
        counters.compare_all(LAUNCHED, counters.parse(text), 0)
