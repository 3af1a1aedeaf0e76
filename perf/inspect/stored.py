"""Rows on disk: what `--json` writes, and the rows that the pages in docs/kernels are made from.

A line a row, so that a difference between two builds reads as one, with a hash of the kernel it was built from. What is
stored is `matrix.representative`, CI's builds, and `matrix.other_streams`: `python -m mhc_tilelang.perf.inspect.stored
KERNEL…` (`make inspect-kernels`) builds some kernels anew, or what is of another kernel by now, and drops the rest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import MHCError
from .matrix import Subject
from .row import Row

# Beside this folder in a checkout; a wheel has no results.
FOLDER = Path(__file__).resolve().parents[1] / "results" / "inspect"
KERNELS, TILE_KERNELS = FOLDER / "kernels.json", FOLDER / "tile-kernels.json"


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


def renew(kernels: Sequence[str] = (), path: Path = KERNELS) -> None:
    """Build what is stored of some kernels anew; for none, of all, where the kernel is another one now. Drop the rest.

    To name them is for a change in how rows are counted, which a kernel's hash does not see.

    Raises MHCError where only some are named and the stored rows were built by other tools.
    """
    from tqdm import tqdm

    from . import matrix
    from .built import build_all
    from .compiler import versions

    made_with, rows = read(path)
    if kernels and made_with != versions():
        raise MHCError(f"{path}: expected rows built with {versions()}, got {made_with}: name no kernel, to build all")
    found = {row.key: row for row in rows} if made_with == versions() else {}
    chosen = matrix.chosen_kernels(kernels)
    kept = {} if kernels else found
    wanted = [(one, arch, kept.get(one.key(arch))) for one, arch in asked() if one.kernel in chosen]
    for row in tqdm(build_all(wanted), total=len(wanted), desc="inspect", unit="kernel", leave=False):
        if found.get(row.key) != row:
            tqdm.write(f"{row.label} {row.arch} n = {row.num_streams}, C = {row.hidden_size}, {row.dtype}: new")
        found[row.key] = row
    keys = [subject.key(arch) for subject, arch in asked()]
    write(path, [found[key] for key in keys if key in found])


def asked() -> list[tuple[Subject, str]]:
    """Return what is stored, in order."""
    from . import matrix

    return [*matrix.representative(), *matrix.other_streams()]


if __name__ == "__main__":
    renew(sys.argv[1:])
