"""Eight constants from measured times: least squares of log(predicted / measured), where no single point counts much.

Every kernel weighs the same, however many points it has. The loss grows as a square up to 10 % and linearly beyond
(soft L1). Levenberg and Marquardt's method on numpy; the constants stay within LIMITS, which are wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from .model import Constants, Rows, terms

START = Constants(
    sms=148,
    clock_ghz=1.9,
    latency=1000,
    bandwidth=7.4,
    launch_us=1,
    block_cycles=150,
    overlap=3,
    pace=1.1,
    barrier_cycles=12,
    tail=0.4,
)
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


def fit(
    rows: Rows, measured: np.ndarray, kernels: Sequence[str], limits: Mapping[str, tuple[float, float]]
) -> Constants:
    """The constants that reproduce `measured` µs best."""
    names = list(limits)
    low, high = (np.array([limits[name][side] for name in names]) for side in (0, 1))
    weights = np.array([1 / kernels.count(kernel) for kernel in kernels]) if kernels else np.zeros(0)

    def device(values: np.ndarray) -> Constants:
        return replace(START, **dict(zip(names, values.tolist(), strict=True)))

    def residuals(values: np.ndarray) -> np.ndarray:
        return np.log(terms(rows, device(values)).us / measured)

    def loss(residual: np.ndarray) -> float:
        return float((weights * (np.sqrt(1 + (residual / SQUARE_UP_TO) ** 2) - 1)).sum())

    values = np.clip(np.array([getattr(START, name) for name in names]), low, high)
    residual, damping = residuals(values), 1e-2
    for _ in range(MAX_STEPS):
        steps = SMALL_STEP * (high - low)
        steps = np.where(values + steps > high, -steps, steps)
        moves = np.diag(steps)
        slopes = [(residuals(values + move) - residual) / move.sum() for move in moves]
        jacobian = np.array(slopes).T * (high - low)  # in shares of each constant's room
        pull = weights / np.sqrt(1 + (residual / SQUARE_UP_TO) ** 2)
        normal, gradient = (jacobian.T * pull) @ jacobian, (jacobian.T * pull) @ residual
        # A constant at its limit that would leave it does not move.
        stuck = ((values <= low) & (gradient > 0)) | ((values >= high) & (gradient < 0))
        free = ~stuck
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
