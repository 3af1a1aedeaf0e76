"""Preparation before a shape is measured: compile its kernels on all cores and compare them with float64.

Nothing of it runs while something is measured. The kernels are those that are measured, at the very width, and those
that they are made of; `verify` (in `baselines`) compares them again at the very number of tokens, with plain torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import MHCError
from ..calls.cases import Case, Shape
from ..gpu.building import Job, build_in, unique, workers

if TYPE_CHECKING:
    import torch

    from ...checking.run import Row

CHECKED_TOKENS = 127  # no multiple of any tile
FEW = 4  # kernels that are compiled where they are asked for: processes take longer to start


class FailedCheckError(MHCError):
    """Kernels that are off; `rows` are theirs."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__(f"wrong: {', '.join(dict.fromkeys(row.kernel for row in rows))}")
        self.rows = rows


class Preparation:
    """Kernels compiled and checked so far. Holds compiler processes, which sleep while nothing is to be compiled."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.processes = device, os.cpu_count() or 1
        self.pool: Executor = workers(self.processes)
        self.checked: set[tuple[object, ...]] = set()

    def prepare(self, cases: Sequence[Case]) -> None:
        """Compile and check what these cases of one shape run. Raises FailedCheckError."""
        shape = cases[0].shape
        checked = replace(shape, num_tokens=CHECKED_TOKENS)
        calls = [Case(name, checked) for name in dict.fromkeys(name for case in cases for name in case.calls)]
        calls = [call for call in calls if identity(call) not in self.checked]
        if self.device.type == "cpu":  # a GPU's kernels are compiled where they are asked for
            measured = [Case(name, shape) for case in cases for name in case.calls]
            if len(missing := missing_jobs([*calls, *measured])) >= FEW:
                self.say(f"{width(shape)}: compiling {len(missing)} kernels in {self.processes} processes")
                build_in(self.pool, missing, "cpu")  # what fails is raised when it is asked for
        self.say(f"{width(shape)}: checking {', '.join(call.kernel for call in calls)}" if calls else "")
        if failed := [row for row in check(calls, self.device) if not row.passed]:
            raise FailedCheckError(failed)
        self.checked |= set(map(identity, calls))

    def say(self, text: str) -> None:
        """A line on stderr; a progress bar that is up stays whole."""
        from tqdm import tqdm

        if text:
            tqdm.write(f"mhc-tilelang bench: {text}", file=sys.stderr)

    def close(self) -> None:
        """End the processes."""
        self.pool.shutdown()


def identity(call: Case) -> tuple[object, ...]:
    """Return the key that tells checks apart: kernel, streams, hidden size, dtype."""
    return call.kernel, call.shape.num_streams, call.hidden_size, call.shape.dtype


def width(shape: Shape) -> str:
    """Describe a shape in a line's first words."""
    return f"C = {shape.hidden_size}, {shape.dtype}"


def missing_jobs(calls: Sequence[Case]) -> list[Job]:
    """Return the CPU kernels of these calls that are not on disk."""
    from ...compiler.cpu.build import is_built
    from ..calls.launches import launches

    found = (launch for call in calls for launch in launches(call, "cpu", os.cpu_count() or 1))
    jobs = unique(Job(launch.family, launch.parameters) for launch in found)
    return [job for job in jobs if not is_built(job.family, job.parameters)]


def check(calls: Sequence[Case], device: torch.device) -> list[Row]:
    """Check the calls, all of one shape, against float64."""
    import torch

    from ...checking import inputs, run

    if not calls:
        return []
    shape = calls[0].shape
    sizes = (shape.num_streams, shape.hidden_size, getattr(torch, shape.dtype), shape.num_tokens)
    return list(run.iterate(device, [inputs.Case(*sizes)], [call.kernel for call in calls]))
