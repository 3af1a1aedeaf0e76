"""Output shared by all studies: where and with what it ran, tables, and a folder of pictures and CSVs."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cli.device import describe, versions
from ...cli.json_output import add_json_argument
from ...errors import MHCError

if TYPE_CHECKING:
    import torch

    from ..figures.run import Picture

MATPLOTLIB = "--out: expected matplotlib, which draws the pictures: pip install 'mhc-tilelang[plots]'"
Rows = Sequence[dict[str, Any]]


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """`--out DIR` and `--json FILE`."""
    text = "folder for pictures, SVG and PNG, and CSVs; created if missing (default: print only)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    add_json_argument(parser)


def prepare(out: Path | None) -> None:
    """Make the folder, and ask for what draws: before a long run, not after it. Raises MHCError."""
    if out is None:
        return
    try:
        import matplotlib  # noqa: F401  # an extra
    except ImportError as error:
        raise MHCError(f"{MATPLOTLIB} ({error})") from error
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MHCError(f"cannot write --out {out}: {error.strerror or error}") from error


def facts(device: torch.device, **setup: Any) -> dict[str, Any]:
    """Where, when and with what a study ran, and its set-up."""
    import torch

    return {
        "device": describe(device),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "setup": setup,
    }


def one_line(about: dict[str, Any]) -> str:
    """Return the device and the versions, for headers and captions."""
    names = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['device']}, {about['date']}; {names}"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """Return a table in plain text; `align` has an l or r per column."""
    from tabulate import tabulate

    sides = [{"l": "left", "r": "right"}[letter] for letter in align]
    return tabulate([list(row) for row in rows], headers=list(headers), disable_numparse=True, colalign=sides)


def write(out: Path | None, pictures: Iterable[Picture], tables: dict[str, Rows]) -> None:
    """NAME.csv of every table, the pictures; says what was written. Nothing without a folder."""
    if out is None:
        return
    written = []
    try:
        for name, rows in tables.items():
            path = out / f"{name}.csv"
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
                writer.writeheader()
                writer.writerows(rows)
            written.append(path)
    except OSError as error:
        raise MHCError(f"cannot write --out {out}: {error.strerror or error}") from error
    written += [path for picture in pictures for path in picture.save(out)]
    print(f"\nwritten to {out}: {', '.join(path.name for path in written)}")
