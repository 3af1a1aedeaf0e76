"""Compile many kernels at once, each in a process of its own, into the disk caches that later runs load from."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

# CPU seconds of one build for sm_90a on an AMD EPYC, bfloat16, n = 4, C = 2560, for families that take longer than
# USUAL_SECONDS: what a budget is estimated from, and what is begun first, so that nothing long is left for the end.
SECONDS = {
    "boundary_backward": 29.0,
    "post_project": 9.3,
    "expand_project": 4.8,
    "coefficients_backward": 8.5,
    "project": 6.4,
    "coefficients": 6.2,
    "project_backward": 4.6,
    "sinkhorn_backward": 2.6,
    "boundary_sums": 3.3,
    "head_coefficients": 2.7,
    "aggregate_norm_backward": 2.2,
}
USUAL_SECONDS = 1.2


@dataclass(frozen=True)
class Job:
    """A kernel to compile: a family, and what it is compiled with."""

    family: str
    parameters: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Rough compile time in seconds."""
        return SECONDS.get(self.family, USUAL_SECONDS)


@dataclass(frozen=True)
class Built:
    """Outcome of a job: seconds, and an error that is empty where it compiled."""

    job: Job
    seconds: float
    error: str = ""


def unique(jobs: Iterable[Job]) -> list[Job]:
    """Return each kernel once, those first that take longest."""
    found = {(job.family, *job.parameters.items()): job for job in jobs}
    return sorted(found.values(), key=lambda job: -job.seconds)


def workers(processes: int) -> ProcessPoolExecutor:
    """Processes that start when there is a job, and sleep when there is none."""
    context = multiprocessing.get_context("spawn")  # a fork would share what tilelang and CUDA hold
    return ProcessPoolExecutor(processes, mp_context=context)


def build_all(jobs: Iterable[Job], target: str, processes: int) -> list[Built]:
    """Compile every job for "cpu" or a CUDA architecture."""
    with workers(processes) as pool:
        return build_in(pool, jobs, target)


def build_in(pool: Executor, jobs: Iterable[Job], target: str) -> list[Built]:
    """Build in workers that run already. A job that fails is reported, and the others go on."""
    results = []
    futures = {pool.submit(build_one, job, target): job for job in unique(jobs)}
    for future in as_completed(futures):
        error = future.exception()  # a process that died, with all that were waiting for it
        results.append(Built(futures[future], 0.0, brief(error)) if error else future.result())
    return results


def build_one(job: Job, target: str) -> Built:
    """One job, in the process that it is given."""
    from ... import compiler

    start = time.monotonic()
    try:
        compiler.kernel(job.family, target, **job.parameters)
    except Exception as error:  # whatever a compiler raises, it is this job's alone
        return Built(job, time.monotonic() - start, brief(error))
    return Built(job, time.monotonic() - start)


def brief(error: BaseException) -> str:
    """Return an exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
