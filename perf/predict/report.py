"""The output of `predict --validate` and `--peers`: text, JSON and the generated part of docs/predict.md.

`python -m mhc_tilelang.perf.predict.report docs/predict.md docs/tuning.md` writes both anew; tests compare. The bad
rows are in all of them. Peers are TileKernels' kernels at the published shapes, each predicted by constants that were
fitted without it, within the ranges of `fit`: as ours are, which no fit has seen. Needs neither the package nor nvcc.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from ..inspect.tile_kernels import KERNELS
from . import stored
from .devices import DEVICES, Device
from .fit import RANGES, Bench, Error, Validation, quantiles, ranking, validate, without_kernels
from .model import SHORT_US
from .predicted import BANDS, digits

HEADING = "## How far off it is\n"
MARKS = "### As predicted\n", "### In flight\n"
TUNED, NUMBERS = ("h200", "b200"), ("us", "low", "high", "memory_us", "sm_us")
SHAPE = 4096, 8192  # of the page's table of peers
WARM_TOKENS = (256, 512)  # of vLLM's points: sets of 33 and 66 MB, in a cache that was warm; the tool refuses them
LARGE_TOKENS = 1024
WORST = 12
HONESTY = """\
held out: fitted on half of the shapes, eight random halves. left out: fitted without the kernel, constants
free or within ranges that were chosen after seeing the data. Both are optimistic: the form of the model
(barriers, tail, block launch) was chosen while looking at these points, and random halves share kernels."""


def text(found: Validation, tablefmt: str = "simple") -> str:
    """Return all tables of a validation."""

    def as_table(rows: Sequence[Sequence[Any]], headers: str) -> str:
        return tabulate(rows, headers.split("; "), tablefmt=tablefmt, disable_numparse=True)

    errors = "held out; left out; left out, in ranges; in sample"
    points = "point; tokens; C; device; measured; predicted; off, %; "
    regimes = "regime; points; held out; left out, in ranges; band; covers of the left out, %"
    rank = ranking(found.without_kernel_in_ranges)
    parts = [
        "Published times against predictions: |log(predicted / measured)| in %, median / 90th percentile.",
        as_table(by_kernel(found), f"kernel; points; {errors}; bias, held out"),
        HONESTY,
        "By regime, as predicted:",
        as_table(by_regime(found), regimes),
        "Points that no fit has seen, measured and predicted, µs:",
        as_table([of_other(error) for error in found.unfitted], points),
        "Two kernels at one shape, each predicted without itself, within ranges: the faster one was the faster one",
        as_table(
            [[f"{a:.2f} to {b:.2f}", f"{right} of {n}"] for a, b, right, n in rank], "predicted ratio; ranked right"
        ),
        f"The {WORST} worst rows of the held-out half (each point's mean over the splits that held it out):",
        as_table(worst(found), "kernel; tokens; C; measured; off, %"),
        "Constants, fitted on all of mhc_bench:",
        tabulate([[n, f"{value:.4g}"] for n, value in found.constants._asdict().items()], tablefmt=tablefmt),
    ]
    return "\n\n".join(parts)


def percent(errors: Sequence[Error]) -> str:
    """Median / p90."""
    return " / ".join(f"{100 * quantile:.1f}" for quantile in quantiles(errors))


def by_kernel(found: Validation) -> list[list[Any]]:
    """Return a row a kernel, then all."""
    columns = (found.held_out, found.without_kernel, found.without_kernel_in_ranges, found.in_sample)
    rows: list[list[Any]] = []
    for kernel in [*dict.fromkeys(error.point.kernel for error in found.in_sample), ""]:
        cells = [[error for error in column if kernel in ("", error.point.kernel)] for column in columns]
        bias = np.mean([error.log for error in cells[0]])
        rows.append([kernel or "all", len(cells[-1]), *map(percent, cells), f"{100 * bias:+.1f}"])
    return rows


def by_regime(found: Validation) -> list[list[Any]]:
    """Return a row a regime: held out, left out, the share that the band covers."""
    rows: list[list[Any]] = []
    for name, band in BANDS.items():
        cells = [[e for e in column if e.regime == name] for column in (found.held_out, found.without_kernel_in_ranges)]
        if all(cells):
            covered = np.mean([abs(error.log) <= np.log(band) for error in cells[1]])
            rows.append([name, len(cells[1]), *map(percent, cells), f"× {band}", f"{100 * covered:.0f}"])
    return rows


def of_other(error: Error) -> list[Any]:
    """Return a point of another source, and what is known about it that explains its error."""
    point, note = error.point, ""
    if point.name.startswith("vllm") and point.tokens in WARM_TOKENS:
        note = "fits the L2, which was warm: refused"
    elif point.name.endswith("@quack"):
        note = "its clock includes the launch, 5 to 8 µs"
    elif point.device == "Hopper?":
        note = "device not stated; as an H100"
    off = f"{100 * (error.us / point.us - 1):+.1f}"
    return [point.name, *point.shape, point.device, f"{point.us:.1f}", f"{error.us:.1f}", off, note]


def worst(found: Validation) -> list[list[Any]]:
    """Return the points with the largest mean error."""
    logs = defaultdict(list)
    for error in found.held_out:
        logs[error.point].append(error.log)
    means = sorted(((point, float(np.mean(each))) for point, each in logs.items()), key=lambda pair: -abs(pair[1]))
    return [[p.kernel, *p.shape, f"{p.us:.1f}", f"{100 * (np.exp(mean) - 1):+.0f}"] for p, mean in means[:WORST]]


def large_vllm(found: Validation) -> list[Error]:
    """vLLM's post at 1024 tokens or more."""
    return [e for e in found.unfitted if e.point.name.startswith("vllm") and e.point.tokens >= LARGE_TOKENS]


def as_json(found: Validation) -> dict[str, Any]:
    """`median` and `p90` of the shapes held out, as shares; a row for every error of every table."""
    median, p90 = quantiles(found.held_out)
    tables = {
        "half of the shapes held out": found.held_out,
        "kernel left out": found.without_kernel,
        "kernel left out, constants in ranges": found.without_kernel_in_ranges,
        "in sample": found.in_sample,
        "never fitted": found.unfitted,
    }
    return {
        "median": median,
        "p90": p90,
        "memory_bound_median": quantiles([error for error in found.held_out if error.regime == "memory"])[0],
        "vllm_largest": max(abs(error.log) for error in large_vllm(found)),
        "ranking": [
            {"from": low, "to": None if high == float("inf") else high, "right": right, "pairs": number}
            for low, high, right, number in ranking(found.without_kernel_in_ranges)
        ],
        "constants": found.constants._asdict(),
        "rows": [as_row(name, error) for name, column in tables.items() for error in column],
    }


def as_row(name: str, error: Error) -> dict[str, Any]:
    """Return one error as a row."""
    point = error.point
    names = ("name", "tokens", "hidden_size", "device")
    return {
        "table": name,
        **{key: getattr(point, key) for key in names},
        **{"measured_us": point.us, "predicted_us": error.us, "regime": error.regime, "left_out": error.left_out},
        **{"short": point.us < SHORT_US, "source": point.source},
    }


class Peer(NamedTuple):
    """A kernel of TileKernels at one shape; `ours` does the same work, or the part of it that is named."""

    name: str
    ours: str
    tokens: int
    hidden_size: int
    published_us: float
    us: float
    low: float
    high: float
    regime: str


def peers() -> list[Peer]:
    """Return every fitted point as a peer."""
    errors = ((error, error.point, BANDS[error.regime]) for error in without_kernels(Bench(), RANGES))
    return [
        Peer(p.kernel, KERNELS[p.kernel][2], *p.shape, p.us, error.us, error.us / band, error.us * band, error.regime)
        for error, p, band in errors
    ]


def peers_table(found: Sequence[Peer], tablefmt: str = "simple") -> str:
    """Return the table of published times beside the predicted ones, as text."""
    lines = [
        [
            *row[:4],
            *(f"{us:.1f}" for us in row[4:8]),
            "" if row.low <= row.published_us <= row.high else "outside",
            row[8],
        ]
        for row in found
    ]
    headers = ("TileKernels", "ours", "tokens", "C", "published", "predicted", "from", "to", "", "regime")
    head = "B200, µs. published: mhc_bench, flushed L2. predicted: by constants fitted without the kernel."
    return f"{head}\n\n{tabulate(lines, headers, tablefmt=tablefmt, disable_numparse=True)}"


def refresh(page: str, found: Validation) -> str:
    """Return the page with everything from HEADING on renewed."""
    shown = [row for row in peers() if (row.tokens, row.hidden_size) == SHAPE]
    parts = [
        text(found, "github").replace("\n\n\n", "\n\n"),
        f"## TileKernels at {SHAPE[0]} tokens, C = {SHAPE[1]}\n\n{peers_table(shown, 'github')}",
        "## The constants\n\n" + "\n\n".join(map(constants, DEVICES.values())),
    ]
    return page[: page.index(HEADING)] + HEADING + "\n" + "\n\n".join(parts) + "\n"


def tuning(page: str) -> str:
    """docs/tuning.md with the stored predictions between two headings as they are now."""
    before, rest = page.split(MARKS[0])
    tables = []
    for gpu in TUNED:
        lines = []
        for row in (row for (name, _, width), row in stored.rows().items() if (name, width) == (gpu, stored.WIDTH)):
            parts = row["parts"] if len(row["parts"]) > 1 else []
            said = "; ".join(filter(None, (*row["reasons"], row["change_first"])))
            lines.append([f"`{row['name']}`", *map(digits, (row[key] for key in NUMBERS)), row["regime"], said])
            lines += [[f"· {p['family']}", *map(digits, (p[key] for key in NUMBERS)), "", ""] for p in parts]
        headers = ("call", "predicted, µs", "from", "to", "memory", "SM", "regime", "what to change first")
        tables.append(f"{gpu}:\n\n{tabulate(lines, headers, tablefmt='github', disable_numparse=True)}")
    return MARKS[0].join((before, "\n" + "\n\n".join(tables) + "\n\n" + MARKS[1] + rest.split(MARKS[1])[1]))


def constants(device: Device) -> str:
    """Return a device's table: value, range, source."""
    lines = [f"{device.name} ({device.arch}):", "", "| constant | value | range | source |", "|---|---|---|---|"]
    for name, one in device.table.items():
        span = "" if one.low == one.high else f"{one.low:.4g} to {one.high:.4g}"
        lines.append(f"| {name} | {one.value:.4g} | {span} | {one.source} |")
    return "\n".join(lines)


if __name__ == "__main__":
    page, tuned = map(Path, sys.argv[1:3])
    page.write_text(refresh(page.read_text(encoding="utf-8"), validate()), encoding="utf-8")
    tuned.write_text(tuning(tuned.read_text(encoding="utf-8")), encoding="utf-8")
