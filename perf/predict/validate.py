"""How far the model is off: fitted on some of the published points, held to the others.

    held out      constants fitted on half of the shapes, errors on the other half; several random halves
    left out      constants fitted without a kernel, errors on that kernel: as they come, and within RANGES
    unfitted      points of other sources, with the constants of all of mhc_bench
    ranking       of two kernels at one shape, each predicted without itself: how often the faster one is the faster one

An error is |log(predicted / measured)|, near enough to a share. Leaving a kernel out is still optimistic: the form of
the model was chosen while looking at these points.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from .fit import LIMITS, RANGES, fit
from .model import Constants, Rows, Work, regime, rows_of, terms
from .published import Point, key_of, points, works

SPLITS, SEED = 8, 1
RATIOS = (1.0, 1.11, 1.22, 1.49, 2.23, float("inf"))


@dataclass(frozen=True)
class Error:
    """A point and what was predicted for it by constants that did not see it."""

    point: Point
    us: float
    regime: str
    left_out: str  # what was held back from the fit

    @property
    def log(self) -> float:
        """log(predicted / measured)."""
        return float(np.log(self.us / self.point.us))


@dataclass(frozen=True)
class Validation:
    """All of it."""

    constants: Constants
    held_out: list[Error]
    without_kernel: list[Error]
    without_kernel_in_ranges: list[Error]
    in_sample: list[Error]
    unfitted: list[Error]


class Bench:
    """The points that constants are fitted on, with their works."""

    def __init__(self) -> None:
        stored = works()
        self.points = [point for point in points() if point.is_fitted]
        self.works: list[Work] = [stored[key_of(point)] for point in self.points]
        self.us = np.array([point.us for point in self.points])

    def subset(self, chosen: Sequence[bool]) -> tuple[Rows, np.ndarray, list[str]]:
        """What a fit takes."""
        of_chosen = [work for work, is_in in zip(self.works, chosen, strict=True) if is_in]
        kernels = [point.kernel for point, is_in in zip(self.points, chosen, strict=True) if is_in]
        return rows_of(of_chosen), self.us[np.array(chosen)], kernels

    def fitted(self, chosen: Sequence[bool], limits: Mapping[str, tuple[float, float]] = LIMITS) -> Constants:
        """Constants from the chosen points."""
        return fit(*self.subset(chosen), limits)

    def errors(self, constants: Constants, chosen: Sequence[bool], left_out: str) -> list[Error]:
        """What they say of the chosen points."""
        wanted = [(point, work) for point, work, is_in in zip(self.points, self.works, chosen, strict=True) if is_in]
        return errors_of(wanted, constants, left_out)


def errors_of(wanted: Sequence[tuple[Point, Work]], constants: Constants, left_out: str) -> list[Error]:
    """Predictions beside points."""
    found = terms(rows_of([work for _, work in wanted]), constants)
    numbers = zip(found.us.tolist(), found.memory.tolist(), found.sm.tolist(), strict=True)
    return [
        Error(point, us, regime(us, memory, sm), left_out)
        for (point, _), (us, memory, sm) in zip(wanted, numbers, strict=True)
    ]


def validate() -> Validation:
    """Fit and hold out; a few seconds, on numpy alone."""
    bench = Bench()
    everything = [True] * len(bench.points)
    constants = bench.fitted(everything)
    return Validation(
        constants,
        held_out(bench),
        without_kernels(bench, LIMITS),
        without_kernels(bench, RANGES),
        bench.errors(constants, everything, "nothing"),
        unfitted(constants),
    )


def held_out(bench: Bench) -> list[Error]:
    """Errors on the shapes that a fit on the others did not see."""
    shapes = sorted(
        {(p.tokens, p.hidden_size) for p in bench.points}, key=lambda shape: (shape[0] * shape[1], shape[0])
    )
    chance, found = random.Random(SEED), []
    for _ in range(SPLITS):
        chance.shuffle(shapes)
        seen = set(shapes[: len(shapes) // 2])
        trained = [(point.tokens, point.hidden_size) in seen for point in bench.points]
        found += bench.errors(bench.fitted(trained), [not was for was in trained], "half of the shapes")
    return found


def without_kernels(bench: Bench, limits: Mapping[str, tuple[float, float]]) -> list[Error]:
    """Errors on each kernel by constants from the others, in the order of the points."""
    found: dict[Point, Error] = {}
    for kernel in dict.fromkeys(point.kernel for point in bench.points):
        trained = [point.kernel != kernel for point in bench.points]
        for error in bench.errors(bench.fitted(trained, limits), [not was for was in trained], kernel):
            found[error.point] = error
    return [found[point] for point in bench.points]


def unfitted(constants: Constants) -> list[Error]:
    """Points of other sources; Hopper's by the clock and bandwidth of an H100 and B200's other constants."""
    from .devices import DEVICES

    stored = works()
    wanted = [(point, stored[key_of(point)]) for point in points() if not point.source.startswith("mhc_bench")]
    blackwell = [pair for pair in wanted if pair[0].arch == "sm_100a"]
    hopper = [pair for pair in wanted if pair[0].arch == "sm_90a"]
    h100 = DEVICES["h100"].constants
    return [*errors_of(blackwell, constants, "its source"), *errors_of(hopper, h100, "its source")]


def quantiles(errors: Sequence[Error]) -> tuple[float, float]:
    """Median and 90th percentile of |log|."""
    sizes = np.abs([error.log for error in errors])
    return float(np.median(sizes)), float(np.quantile(sizes, 0.9))


def ranking(errors: Sequence[Error]) -> list[tuple[float, float, int, int]]:
    """Pairs at one shape by the predicted ratio: from, to, how many were ranked right, of how many."""
    found = [[0, 0] for _ in RATIOS[:-1]]
    for one, other in combinations(errors, 2):
        a, b = one.point, other.point
        if (a.tokens, a.hidden_size) != (b.tokens, b.hidden_size) or a.kernel == b.kernel:
            continue
        predicted, measured = np.log(one.us / other.us), np.log(a.us / b.us)
        ratio = float(np.exp(abs(predicted)))
        place = next(n for n, (low, high) in enumerate(pairwise(RATIOS)) if low <= ratio < high)
        found[place][0] += bool(predicted * measured > 0)
        found[place][1] += 1
    return [(RATIOS[n], RATIOS[n + 1], right, number) for n, (right, number) in enumerate(found)]
