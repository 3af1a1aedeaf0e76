"""Sinkhorn's distance from doubly stochastic, by iterations and by the size of logits; numpy float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...reference.sinkhorn import normalize_columns, normalize_rows, softmax_columns

Matrices = NDArray[np.float64]
CLOSE = 1e-3


@dataclass(frozen=True)
class Distance:
    """Column sums' largest deviation from 1 after a number of iterations, over matrices; the effect of the order."""

    scale: float
    iters: int
    median: float
    largest: float
    order: float  # 99th percentile of the largest difference to rows first, columns last
    converged: float  # share of matrices within `CLOSE`


def draw(matrices: int, num_streams: int, seed: int) -> Matrices:
    """Standard normal logits that float32 holds, [T, n, n]."""
    normal = np.random.default_rng(seed).standard_normal((matrices, num_streams, num_streams))
    return normal.astype(np.float32).astype(np.float64)


def iterate(logits: Matrices, eps: float) -> Iterator[tuple[str, Matrices]]:
    """Yield every step without an end: its name, and the matrices after it."""
    h_res = softmax_columns(logits) + eps
    yield "columns", h_res
    while True:
        h_res = normalize_rows(h_res, eps)
        yield "rows", h_res
        h_res = normalize_columns(h_res, eps)
        yield "columns", h_res


def after(logits: Matrices, iters: Sequence[int], eps: float) -> dict[int, Matrices]:
    """Return the matrices after each of these numbers of iterations."""
    found: dict[int, Matrices] = {}
    done = 0
    for step, h_res in iterate(logits, eps):
        if step == "rows":
            done += 1
            if done in iters:
                found[done] = h_res
            if done >= max(iters):
                break
    return found


def measure(logits: Matrices, scales: Sequence[float], iters: Sequence[int], eps: float) -> list[Distance]:
    """Return a result per scale and number of iterations."""
    distances = []
    for scale in scales:
        columns_first = after(scale * logits, iters, eps)
        rows_first = after(scale * logits.swapaxes(-1, -2), iters, eps)
        for count in iters:
            h_res, other = columns_first[count], rows_first[count].swapaxes(-1, -2)
            off = np.abs(h_res.sum(-2) - 1).max(-1)
            order = np.quantile(np.abs(h_res - other).max((-2, -1)), 0.99)
            statistics = np.median(off), off.max(), order, (off < CLOSE).mean()
            distances.append(Distance(scale, count, *map(float, statistics)))
    return distances
