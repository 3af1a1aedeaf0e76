"""The generated part of docs/predict.md: `python -m mhc_tilelang.perf.predict.page docs/predict.md` writes it anew.

A test compares: the tables are those of `mhc-tilelang predict --validate`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from . import peers, validation_report
from .devices import DEVICES, Device
from .validate import Validation, validate

HEADING = "## How far off it is\n"
SHAPE = 4096, 8192  # of the peers' table


def refreshed(page: str, found: Validation) -> str:
    """The page with everything from HEADING on as it is now."""
    return page[: page.index(HEADING)] + HEADING + "\n" + generated(found)


def generated(found: Validation) -> str:
    """Tables of the validation, of the peers at one shape, of the devices' constants."""
    rows = [row for row in peers.rows() if (row.tokens, row.hidden_size) == SHAPE]
    parts = [
        validation_report.text(found, "github").replace("\n\n\n", "\n\n"),
        f"## TileKernels at {SHAPE[0]} tokens, C = {SHAPE[1]}\n\n{peers.table(rows, 'github')}",
        "## The constants\n\n" + "\n\n".join(constants(device) for device in DEVICES.values()),
    ]
    return "\n\n".join(parts) + "\n"


def constants(device: Device) -> str:
    """A device's table: value, range, source."""
    lines = [f"{device.name} ({device.arch}):", "", "| constant | value | range | source |", "|---|---|---|---|"]
    for name, one in device.table.items():
        span = "" if one.low == one.high else f"{one.low:.4g} to {one.high:.4g}"
        lines.append(f"| {name} | {one.value:.4g} | {span} | {one.source} |")
    return "\n".join(lines)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(refreshed(path.read_text(encoding="utf-8"), validate()), encoding="utf-8")
