"""Constants from measured times, and how far the model is off: fitted on some published points, held to the others.

    fit           least squares of log(predicted / measured) by Levenberg and Marquardt; every kernel weighs the same,
                  the loss grows as a square up to 10 % and linearly beyond (soft L1)
    held out      constants fitted on half of the shapes, errors on the other half; several random halves
    left out      constants fitted without a kernel, errors on that kernel: as they come, and within RANGES
    unfitted      points of other sources, with the constants of all of mhc_bench
    ranking       of two kernels at one shape, each predicted without itself: how often the faster one is the faster one

An error is |log(predicted / measured)|, near enough to a share. Leaving a kernel out is still optimistic: the form of
the model was chosen while looking at these points.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from .devices import DEVICES
from .model import Constants, Work, regime, rows_of, terms
from .published import Point, points, works

START = Constants(148, 1.9, 1000, 7.4, 1, 150, 3, 1.1, 12, 0.4)
LIMITS: Mapping[str, tuple[float, float]] = {
    "latency": (300, 2500),
    "bandwidth": (6.8, 8),
    "launch_us": (0.3, 4),
    "block_cycles": (10, 500),
    "overlap": (1.5, 12),
    "pace": (0.8, 2),
    "barrier_cycles": (0, 60),
    "tail": (0, 1),
}
# What microbenchmarks of the device would leave open; chosen after seeing the data.
RANGES: Mapping[str, tuple[float, float]] = {
    **LIMITS,
    "latency": (850, 1100),
    "bandwidth": (7.3, 7.9),
    "launch_us": (0.6, 1.2),
    "overlap": (2, 4),
    "pace": (1, 1.25),
    "barrier_cycles": (8, 24),
}
SQUARE_UP_TO = 0.1
MAX_STEPS, SMALL_STEP = 60, 1e-5
SPLITS, SEED = 8, 1
RATIOS = (1.0, 1.11, 1.22, 1.49, 2.23, float("inf"))


def fit(
    rows: Any, measured: np.ndarray, kernels: Sequence[str], limits: Mapping[str, tuple[float, float]]
) -> Constants:
    """Return the constants that reproduce `measured` µs best."""
    names, (low, high) = list(limits), np.array(list(limits.values()), dtype=float).T
    weights = np.array([1 / kernels.count(kernel) for kernel in kernels])

    def device(values: np.ndarray) -> Constants:
        return START._replace(**dict(zip(names, values.tolist(), strict=True)))

    def residuals(values: np.ndarray) -> np.ndarray:
        return np.log(terms(rows, device(values)).us / measured)

    def loss(residual: np.ndarray) -> float:
        return float((weights * (np.sqrt(1 + (residual / SQUARE_UP_TO) ** 2) - 1)).sum())

    values = np.clip(np.array([getattr(START, name) for name in names]), low, high)
    residual, damping = residuals(values), 1e-2
    for _ in range(MAX_STEPS):
        steps = SMALL_STEP * (high - low)
        steps = np.where(values + steps > high, -steps, steps)
        slopes = [(residuals(values + move) - residual) / move.sum() for move in np.diag(steps)]
        jacobian = np.array(slopes).T * (high - low)  # in shares of each constant's room
        pull = weights / np.sqrt(1 + (residual / SQUARE_UP_TO) ** 2)
        normal, gradient = (jacobian.T * pull) @ jacobian, (jacobian.T * pull) @ residual
        # A constant at its limit that would leave it does not move.
        free = ~(((values <= low) & (gradient > 0)) | ((values >= high) & (gradient < 0)))
        before = loss(residual)
        for _ in range(12):
            move = np.zeros(len(names))
            damped = normal + damping * np.diag(np.diag(normal) + 1e-9)
            move[free] = -np.linalg.solve(damped[np.ix_(free, free)], gradient[free])
            tried = np.clip(values + move * (high - low), low, high)
            found = residuals(tried)
            if loss(found) < before:
                damping /= 3
                break
            damping *= 4
        else:
            break
        values, residual = tried, found
        if before - loss(residual) < 1e-7 * before:
            break
    return device(values)


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
    """Results of the validation."""

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
        self.works = [stored[point.key] for point in self.points]

    def fit_on(self, wanted: Callable[[Point], bool], limits: Mapping[str, tuple[float, float]] = LIMITS) -> Constants:
        """Fit the constants on the wanted points."""
        pairs = [pair for pair in zip(self.points, self.works, strict=True) if wanted(pair[0])]
        kernels = [point.kernel for point, _ in pairs]
        return fit(rows_of([work for _, work in pairs]), np.array([point.us for point, _ in pairs]), kernels, limits)

    def without(
        self, wanted: Callable[[Point], bool], left_out: str, limits: Mapping[str, tuple[float, float]] = LIMITS
    ) -> list[Error]:
        """Errors on points that the fit on the wanted ones did not see."""
        others = [pair for pair in zip(self.points, self.works, strict=True) if not wanted(pair[0])]
        return errors_of(others, self.fit_on(wanted, limits), left_out)


def errors_of(wanted: Sequence[tuple[Point, Work]], constants: Constants, left_out: str) -> list[Error]:
    """Predictions beside points."""
    found = terms(rows_of([work for _, work in wanted]), constants)
    numbers = zip(found.us.tolist(), found.memory.tolist(), found.sm.tolist(), strict=True)
    return [Error(point, each[0], regime(*each), left_out) for (point, _), each in zip(wanted, numbers, strict=True)]


def validate() -> Validation:
    """Fit and hold out; a few seconds, on numpy alone."""
    bench = Bench()
    constants = bench.fit_on(lambda _: True)
    stored = works()
    others = [(point, stored[point.key]) for point in points() if not point.source.startswith("mhc_bench")]
    unfitted = [  # Hopper's by the clock and bandwidth of an H100 and B200's other constants
        error
        for arch, known in (("sm_100a", constants), ("sm_90a", DEVICES["h100"].constants))
        for error in errors_of([pair for pair in others if pair[0].arch == arch], known, "its source")
    ]
    return Validation(
        constants,
        held_out(bench),
        without_kernels(bench, LIMITS),
        without_kernels(bench, RANGES),
        errors_of(list(zip(bench.points, bench.works, strict=True)), constants, "nothing"),
        unfitted,
    )


def held_out(bench: Bench) -> list[Error]:
    """Errors on the shapes that a fit on the others did not see."""
    shapes = sorted({point.shape for point in bench.points}, key=lambda shape: (shape[0] * shape[1], shape[0]))
    chance, found = random.Random(SEED), []
    for _ in range(SPLITS):
        chance.shuffle(shapes)
        seen = set(shapes[: len(shapes) // 2])
        found += bench.without(lambda point, seen=seen: point.shape in seen, "half of the shapes")  # type: ignore[misc]
    return found


def without_kernels(bench: Bench, limits: Mapping[str, tuple[float, float]]) -> list[Error]:
    """Errors on each kernel by constants from the others, in the order of the points."""
    found = {
        error.point: error
        for kernel in dict.fromkeys(point.kernel for point in bench.points)
        for error in bench.without(lambda point, kernel=kernel: point.kernel != kernel, kernel, limits)  # type: ignore[misc]
    }
    return [found[point] for point in bench.points]


def quantiles(errors: Sequence[Error]) -> tuple[float, float]:
    """Median and 90th percentile of |log|."""
    sizes = np.abs([error.log for error in errors])
    return float(np.median(sizes)), float(np.quantile(sizes, 0.9))


def ranking(errors: Sequence[Error]) -> list[tuple[float, float, int, int]]:
    """Pairs at one shape by the predicted ratio: from, to, how many were ranked right, of how many."""
    found = [[0, 0] for _ in RATIOS[:-1]]
    for one, other in combinations(errors, 2):
        if one.point.shape == other.point.shape and one.point.kernel != other.point.kernel:
            predicted, measured = np.log(one.us / other.us), np.log(one.point.us / other.point.us)
            ratio = float(np.exp(abs(predicted)))
            place = next(n for n, (low, high) in enumerate(pairwise(RATIOS)) if low <= ratio < high)
            found[place][0] += bool(predicted * measured > 0)
            found[place][1] += 1
    return [(*limits, right, number) for limits, (right, number) in zip(pairwise(RATIOS), found, strict=True)]
