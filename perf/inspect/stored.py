"""Rows on disk: what `--json` writes, and the rows that the pages in docs/kernels are made from.

A line a row, so that a difference between two builds reads as one. `python -m mhc_tilelang.perf.inspect.stored KERNEL…`
(`make inspect-kernels`) builds what CI builds of some kernels, and puts the rows in the place of theirs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import MHCError
from .row import Row

# Beside this folder in a checkout; a wheel has no results.
FOLDER = Path(__file__).resolve().parents[1] / "results" / "inspect"
KERNELS, TILE_KERNELS = FOLDER / "kernels.json", FOLDER / "tile-kernels.json"
# `python -m mhc_tilelang.perf.inspect.stored --other-streams`: CI compares it with nothing but the calls.
OTHER_STREAMS = FOLDER / "other-streams.json"


def write(path: Path | None, rows: Iterable[Row], more_versions: Mapping[str, str] | None = None) -> None:
    """Write rows and the versions that they were built with; do nothing when no file was asked for."""
    from .compiler import versions

    if path is None:
        return
    lines = ",\n".join(f"    {json.dumps(facts_of(row))}" for row in rows)
    facts = json.dumps({**versions(), **(more_versions or {})})
    try:
        path.write_text(f'{{\n  "versions": {facts},\n  "rows": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    except OSError as error:
        raise MHCError(f"cannot write --json {path}: {error.strerror or error}") from error


def facts_of(row: Row) -> dict[str, Any]:
    """A row's fields, without the hash where it has none."""
    return {name: value for name, value in asdict(row).items() if name != "made_from" or value}


def read(path: Path) -> tuple[dict[str, str], list[Row]]:
    """Return the versions and rows of a file. Raises MHCError for a file that is missing or something else."""
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return facts["versions"], [Row(**row) for row in facts["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MHCError(f"expected stored rows in {path}, got {type(error).__name__}: {error}") from error


def renew(kernels: Sequence[str], path: Path = KERNELS) -> None:
    """Build the representative rows of some kernels, and write them where theirs stand, new ones last."""
    from . import matrix
    from .built import build_all

    _, rows = read(path)
    found = {row.key: row for row in rows}
    for row in build_all(matrix.representative(matrix.chosen_kernels(kernels))):
        if found.get(row.key) != row:
            print(f"{row.label} {row.arch} n = {row.num_streams}, C = {row.hidden_size}, {row.dtype}: new")
        found[row.key] = row
    write(path, found.values())


def renew_other_streams() -> None:
    """Build what is stored beside CI's builds, anew where the kernel is another one, or a tool."""
    from ...compiler import tracing
    from . import matrix
    from .built import build_all
    from .compiler import versions
    from .row import hash_source

    made_with, rows = read(OTHER_STREAMS)
    found = {row.key: row for row in rows} if made_with == versions() else {}
    asked, stale = matrix.other_streams(), []
    for subject, arch in asked:
        made_from = hash_source(tracing.trace(subject.kernel, subject.parameters(arch)), subject, arch)
        row = found.get(subject.key(arch))
        if row is None or row.made_from != made_from:
            stale.append((subject, arch))
    found |= {row.key: row for row in build_all(stale)}
    write(OTHER_STREAMS, [found[subject.key(arch)] for subject, arch in asked])


if __name__ == "__main__":
    renew_other_streams() if sys.argv[1:] == ["--other-streams"] else renew(sys.argv[1:])
