"""The plans of a kernel by what `mhc-tilelang predict` says they take: the tuner's cost model, which needs no GPU.

    python -m mhc_tilelang.perf.gpu.tune post --predict h200       ranks, and runs nothing

On a GPU whose constants are known the tuner tries the plans in this order, so `--plans N` are the N that look fastest.
A plan that predict refuses comes last, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...compiler.recording import Recorded
from ..predict.devices import Device
from .building import brief, workers
from .tune_arguments import adapt_arguments, changes, outputs_of
from .tune_plans import compiled

SHOWN = 10


class Ranked(NamedTuple):
    """A plan: its predicted time, what limits it, or why there is none."""

    parameters: Mapping[str, Any]
    us: float | None
    why: str


def rank(
    one: Recorded, plans: Sequence[Mapping[str, Any]], streams: Sequence[str], gpu: Device, processes: int
) -> list[Ranked]:
    """Predict every plan of a kernel, each in a process of its own; the fastest first."""
    written, found = outputs_of(one), []
    with workers(processes) as pool:
        jobs = []
        for plan in plans:
            try:
                arguments = adapt_arguments(one, plan, written)
            except ValueError as error:  # an argument that does not fit the plan
                found.append(Ranked(plan, None, brief(error)))
                continue
            launch = Recorded(one.family, compiled(dict(plan)), arguments, tuple(streams))
            jobs.append((plan, pool.submit(predict, launch, gpu)))
        for plan, job in jobs:
            failure = job.exception()
            found.append(Ranked(plan, None, brief(failure)) if failure else Ranked(plan, *job.result()))
    return sorted(found, key=lambda each: float("inf") if each.us is None else each.us)


def predict(launch: Any, gpu: Device) -> tuple[float | None, str]:
    """One launch: µs and what to change first, or why there is no number."""
    from ..predict.launched import walk_launch
    from ..predict.predicted import part_of

    found = walk_launch(launch, gpu.arch)
    if found.refusals:
        return None, "; ".join(found.refusals)
    part = part_of(found.family, found.work, gpu)
    return part.us, part.advice


def table(ranked: Sequence[Ranked], heuristic: Mapping[str, Any]) -> str:
    """The model's choice, then the ten that it puts first and the heuristic's wherever it stands."""
    from tabulate import tabulate

    lines = [
        (place, f"{each.us:.1f}" if each.us else "no answer", changes(each.parameters, heuristic), each.why)
        for place, each in enumerate(ranked, start=1)
        if place <= SHOWN or each.parameters == heuristic
    ]
    place = next(n for n, each in enumerate(ranked, start=1) if each.parameters == heuristic)
    chosen = f"predicted fastest: {changes(ranked[0].parameters, heuristic)}; the heuristic's is number {place}"
    return f"{chosen}\n{tabulate(lines, ('', 'predicted, µs', 'plan', 'what limits it'), disable_numparse=True)}"
