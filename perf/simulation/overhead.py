"""The overhead of mHC in the simulated stage; how it moves with each assumption; what gives a target.

overhead       of a stage's steady state, and of a whole 1F1B step
sensitivity    the same with one assumption changed at a time
solve          the value of one assumption at which the overhead is a target, the others kept
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import sqrt

from ..overhead.model import Form
from .costs import Assumptions, forms
from .pipeline import Pipeline
from .stage import Stage, stage_of
from .streams import makespan

STEPS = 10  # of bisection; between the last two values the overhead is taken for a straight line


def overhead(given: Assumptions) -> float:
    """Return the overhead of mHC in a stage's steady state, as a share of the plain residual's period."""
    return stage_of(given, plain=False).period() / stage_of(given, plain=True).period() - 1


def step_overhead(given: Assumptions) -> float:
    """Return the overhead of mHC in a whole 1F1B step, where the experts' communication is not overlapped."""
    mhc, plain = (makespan(pipeline_of(given, plain=plain).spans()) for plain in (False, True))
    return mhc / plain - 1


def pipeline_of(given: Assumptions, *, plain: bool) -> Pipeline:
    """Return the 1F1B pipeline of such stages."""
    stage = stage_of(given, plain=plain)
    forward, backward = stage.costs.forward(stage.layers), stage.costs.backward(stage.layers)
    return Pipeline(given.stages, given.micro_batches, forward, backward, stage.costs.send, given.overlapped)


@dataclass(frozen=True)
class Change:
    """Assumptions with one of them changed, and the overhead that they give."""

    what: str
    overhead: float


def sensitivity(given: Assumptions) -> Iterator[Change]:
    """Yield one change at a time."""
    changes: list[tuple[str, dict[str, object]]] = [("as assumed", {})]
    if not given.measured:
        changes += [(f"connections: {name}", {"form": name}) for name in forms() if name != given.form]
    changes += [(f"kernels reach {share:.0%} of the bandwidth", {"bandwidth_share": share}) for share in (0.6, 0.9)]
    changes += [(f"products reach {share:.0%} of the FLOP/s", {"flops_share": share}) for share in (0.4, 0.8)]
    changes += [
        ("all kept, nothing recomputed" if given.recompute else "recomputed", {"recompute": not given.recompute}),
        ("communication waits" if given.overlapped else "overlapped", {"overlapped": not given.overlapped}),
    ]
    if not given.own_stream:
        changes.append(("connections cost no compute", {"own_stream": True}))
    changes += [(f"experts' link: {rate:g} GB/s", {"expert_bandwidth": 1e9 * rate}) for rate in (40, 80, 160)]
    changes.append(("stages' link: 10 GB/s", {"send_bandwidth": 1e10}))
    return (Change(what, overhead(replace(given, **change))) for what, change in changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Knob:
    """An assumption that `solve` may turn, between two values; `scale` is that of what is printed."""

    what: str
    unit: str
    lowest: float
    highest: float
    scale: float
    turn: Callable[[Assumptions, float], float]


def _set(name: str) -> Callable[[Assumptions, float], float]:
    return lambda given, value: overhead(replace(given, **{name: value}))  # type: ignore[arg-type]


def elements_overhead(given: Assumptions, elements: float) -> float:
    """Return the overhead if a sublayer's connection moved `elements` · C, forward and backward together."""
    form: Form = forms()[given.form]
    share = elements / form.elements(given.num_streams, "training")
    stage = stage_of(given, plain=False)
    cost = replace(
        stage.costs,
        connection=share * stage.costs.connection,
        connection_backward=share * stage.costs.connection_backward,
    )
    scaled = Stage(stage.layers, cost, stage.overlapped, stage.own_stream)
    return scaled.period() / stage_of(given, plain=True).period() - 1


KNOBS = (
    Knob("share of the bandwidth that kernels reach", "%", 0.2, 1.0, 100, _set("bandwidth_share")),
    Knob("share of the FLOP/s that products reach", "%", 0.1, 1.0, 100, _set("flops_share")),
    Knob("traffic of a sublayer's connection", "C", 1.0, 200.0, 1, elements_overhead),
    Knob("bandwidth of the experts' link", "GB/s", 1e9, 1e13, 1e-9, _set("expert_bandwidth")),
)


@dataclass(frozen=True)
class Solution:
    """The value of a knob, as printed, that gives the target; None where none in the range does."""

    knob: Knob
    value: float | None
    at_ends: tuple[float, float]


def solve(given: Assumptions, target: float) -> Iterator[Solution]:
    """Solve for each knob by bisection; the overhead is monotone in each."""
    for knob in KNOBS:
        if given.measured and knob.turn is elements_overhead:
            continue
        low, high = knob.lowest, knob.highest
        ends = knob.turn(given, low), knob.turn(given, high)
        if (ends[0] - target) * (ends[1] - target) > 0:
            yield Solution(knob, None, ends)
            continue
        at_low, at_high = ends
        for _ in range(STEPS):
            middle = sqrt(low * high)
            between = knob.turn(given, middle)
            if (between > target) == (at_low > target):
                low, at_low = middle, between
            else:
                high, at_high = middle, between
        value = low + (high - low) * (target - at_low) / (at_high - at_low)
        yield Solution(knob, value * knob.scale, ends)
