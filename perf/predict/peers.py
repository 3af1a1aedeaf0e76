"""TileKernels' kernels at the published shapes: published beside predicted, on the footing of our own predictions.

Each is predicted by constants that were fitted without that kernel, within the ranges of `fit`: as ours are, which no
fit has seen. Works from stored features: neither the package nor nvcc is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tabulate import tabulate

from ..inspect.tile_kernels import KERNELS
from .fit import RANGES
from .predicted import BANDS
from .validate import Bench, without_kernels


class Row(NamedTuple):
    """One kernel at one shape; `ours` is what does the same work here, or the part of it that is named."""

    name: str
    ours: str
    tokens: int
    hidden_size: int
    published_us: float
    us: float
    low: float
    high: float
    regime: str


def rows() -> list[Row]:
    """Every fitted point."""
    found = []
    for error in without_kernels(Bench(), RANGES):
        point, band = error.point, BANDS[error.regime]
        interval = error.us / band, error.us * band
        ours = KERNELS[point.kernel][2]
        found.append(
            Row(point.kernel, ours, point.tokens, point.hidden_size, point.us, error.us, *interval, error.regime)
        )
    return found


def table(found: Sequence[Row], tablefmt: str = "simple") -> str:
    """As text."""
    lines = [
        [
            *(row.name, row.ours, row.tokens, row.hidden_size, f"{row.published_us:.1f}", f"{row.us:.1f}"),
            *(
                f"{row.low:.1f}",
                f"{row.high:.1f}",
                "" if row.low <= row.published_us <= row.high else "outside",
                row.regime,
            ),
        ]
        for row in found
    ]
    headers = ("TileKernels", "ours", "tokens", "C", "published", "predicted", "from", "to", "", "regime")
    head = "B200, µs. published: mhc_bench, flushed L2. predicted: by constants fitted without the kernel."
    return f"{head}\n\n{tabulate(lines, headers, tablefmt=tablefmt, disable_numparse=True)}"
