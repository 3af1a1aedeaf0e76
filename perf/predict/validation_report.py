"""What `predict --validate` says: tables as text or Markdown, the JSON. The bad rows are in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tabulate import tabulate

from .model import SHORT_US
from .validate import Error, Validation, quantiles, ranking

WARM_TOKENS = (256, 512)  # of vLLM's points: sets of 33 and 66 MB, in a cache that was warm; the tool refuses them
LARGE_TOKENS = 1024
WORST = 12


def text(found: Validation, tablefmt: str = "simple") -> str:
    """All tables."""
    return "\n\n".join(
        [
            "Published times against predictions: |log(predicted / measured)| in %, median / 90th percentile.",
            by_kernel(found, tablefmt),
            HONESTY,
            "By regime, as predicted:",
            by_regime(found, tablefmt),
            "Points that no fit has seen, measured and predicted, µs:",
            of_others(found, tablefmt),
            "Two kernels at one shape, each predicted without itself, within ranges: the faster one was the faster one",
            ranks(found, tablefmt),
            f"The {WORST} worst rows of the held-out half (each point's mean over the splits that held it out):",
            worst(found, tablefmt),
            "Constants, fitted on all of mhc_bench:",
            constants(found, tablefmt),
        ]
    )


HONESTY = (
    "held out: fitted on half of the shapes, eight random halves. left out: fitted without the kernel, constants\n"
    "free or within ranges that were chosen after seeing the data. Both are optimistic: the form of the model\n"
    "(barriers, tail, block launch) was chosen while looking at these points, and random halves share kernels."
)


def percent(errors: Sequence[Error]) -> str:
    """Median / p90."""
    median, p90 = quantiles(errors)
    return f"{100 * median:.1f} / {100 * p90:.1f}"


def by_kernel(found: Validation, tablefmt: str) -> str:
    """A row a kernel."""
    columns = (found.held_out, found.without_kernel, found.without_kernel_in_ranges, found.in_sample)
    kernels = list(dict.fromkeys(error.point.kernel for error in found.in_sample))
    rows = []
    for kernel in [*kernels, ""]:
        cells = [[error for error in column if kernel in ("", error.point.kernel)] for column in columns]
        bias = np.mean([error.log for error in cells[0]])
        rows.append([kernel or "all", len(cells[-1]), *map(percent, cells), f"{100 * bias:+.1f}"])
    headers = ("kernel", "points", "held out", "left out", "left out, in ranges", "in sample", "bias, held out")
    return tabulate(rows, headers, tablefmt=tablefmt, disable_numparse=True)


def by_regime(found: Validation, tablefmt: str) -> str:
    """A row a regime: held out, left out, the share that the band covers."""
    from .predicted import BANDS

    rows = []
    for name, band in BANDS.items():
        cells = [[e for e in column if e.regime == name] for column in (found.held_out, found.without_kernel_in_ranges)]
        if all(cells):
            covered = np.mean([abs(error.log) <= np.log(band) for error in cells[1]])
            rows.append([name, len(cells[1]), *map(percent, cells), f"× {band}", f"{100 * covered:.0f}"])
    headers = ("regime", "points", "held out", "left out, in ranges", "band", "covers of the left out, %")
    return tabulate(rows, headers, tablefmt=tablefmt, disable_numparse=True)


def of_others(found: Validation, tablefmt: str) -> str:
    """A row a point."""
    rows = [
        [
            e.point.name,
            e.point.tokens,
            e.point.hidden_size,
            e.point.device,
            f"{e.point.us:.1f}",
            f"{e.us:.1f}",
            off(e),
            note(e),
        ]
        for e in found.unfitted
    ]
    headers = ("point", "tokens", "C", "device", "measured", "predicted", "off, %", "")
    return tabulate(rows, headers, tablefmt=tablefmt, disable_numparse=True)


def off(error: Error) -> str:
    """Predicted over measured, as a percentage."""
    return f"{100 * (error.us / error.point.us - 1):+.1f}"


def note(error: Error) -> str:
    """What is known about a point that explains its error."""
    if error.point.name.startswith("vllm") and error.point.tokens in WARM_TOKENS:
        return "fits the L2, which was warm: refused"
    if error.point.name.endswith("@quack"):
        return "its clock includes the launch, 5 to 8 µs"
    if error.point.device == "Hopper?":
        return "device not stated; as an H100"
    return ""


def ranks(found: Validation, tablefmt: str) -> str:
    """A row a range of predicted ratios."""
    rows = [
        [f"{low:.2f} to {high:.2f}", f"{right} of {number}"]
        for low, high, right, number in ranking(found.without_kernel_in_ranges)
    ]
    return tabulate(rows, ("predicted ratio", "ranked right"), tablefmt=tablefmt, disable_numparse=True)


def worst(found: Validation, tablefmt: str) -> str:
    """The points with the largest mean error."""
    rows = sorted(mean_errors(found.held_out), key=lambda row: -abs(row[1]))[:WORST]
    lines = [
        [e.point.kernel, e.point.tokens, e.point.hidden_size, f"{e.point.us:.1f}", f"{100 * (np.exp(mean) - 1):+.0f}"]
        for e, mean in rows
    ]
    return tabulate(lines, ("kernel", "tokens", "C", "measured", "off, %"), tablefmt=tablefmt, disable_numparse=True)


def mean_errors(errors: Sequence[Error]) -> list[tuple[Error, float]]:
    """Each point once, with the mean of its errors."""
    grouped: dict[Any, list[Error]] = {}
    for error in errors:
        grouped.setdefault(error.point, []).append(error)
    return [(group[0], float(np.mean([error.log for error in group]))) for group in grouped.values()]


def constants(found: Validation, tablefmt: str) -> str:
    """A row a constant."""
    return tabulate([[name, f"{value:.4g}"] for name, value in asdict(found.constants).items()], tablefmt=tablefmt)


def of_memory(errors: Sequence[Error]) -> list[Error]:
    """Those predicted to be bound by memory."""
    return [error for error in errors if error.regime == "memory"]


def large_vllm(found: Validation) -> list[Error]:
    """vLLM's post at 1024 tokens or more."""
    return [e for e in found.unfitted if e.point.name.startswith("vllm") and e.point.tokens >= LARGE_TOKENS]


def as_json(found: Validation) -> dict[str, Any]:
    """`median` and `p90` of the shapes held out, as shares; a row for every error of every table."""
    median, p90 = quantiles(found.held_out)
    tables: dict[str, Callable[[Validation], list[Error]]] = {
        "half of the shapes held out": lambda v: v.held_out,
        "kernel left out": lambda v: v.without_kernel,
        "kernel left out, constants in ranges": lambda v: v.without_kernel_in_ranges,
        "in sample": lambda v: v.in_sample,
        "never fitted": lambda v: v.unfitted,
    }
    rows = [as_row(name, error) for name, column in tables.items() for error in column(found)]
    return {
        "median": median,
        "p90": p90,
        "memory_bound_median": quantiles(of_memory(found.held_out))[0],
        "vllm_largest": max(abs(error.log) for error in large_vllm(found)),
        "ranking": [
            {"from": low, "to": None if high == float("inf") else high, "right": right, "pairs": number}
            for low, high, right, number in ranking(found.without_kernel_in_ranges)
        ],
        "constants": asdict(found.constants),
        "rows": rows,
    }


def as_row(name: str, error: Error) -> dict[str, Any]:
    """One error."""
    point = error.point
    return {
        "table": name,
        "name": point.name,
        "tokens": point.tokens,
        "hidden_size": point.hidden_size,
        "device": point.device,
        "measured_us": point.us,
        "predicted_us": error.us,
        "regime": error.regime,
        "left_out": error.left_out,
        "short": point.us < SHORT_US,
        "source": point.source,
    }
