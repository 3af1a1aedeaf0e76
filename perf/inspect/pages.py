"""docs/kernels: the page of every kernel, and one that sets our kernels beside TileKernels'.

`python -m mhc_tilelang.perf.inspect.pages FOLDER` writes them, as `make docs` does. They are a function of the
repository: registers and counts come from perf/results/inspect.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...kernels import FAMILIES
from . import matrix, stored
from .explain import page, resource_table
from .faults import SPLIT, faults, known_splits, with_faults
from .matrix import MAIN, STUDIED
from .row import Row
from .tile_kernels import KERNELS as PEERS

INDEX = "README.md"


def pages() -> dict[str, str]:
    """Return every page by the name of its file."""
    return {**{f"{kernel}.md": page(kernel) for kernel in FAMILIES}, INDEX: index()}


def index() -> str:
    """Return the list of pages and the tables that compare kernels."""
    versions, rows = stored.read(stored.KERNELS)
    peer_versions, peers = stored.read(stored.TILE_KERNELS)
    keys = [subject.key(MAIN) for subject in matrix.subjects(STUDIED)]
    ours = [row for key in keys for row in rows if row.key == key]
    links = "\n".join(f"- [{kernel}]({kernel}.md)" for kernel in FAMILIES)
    shape = f"n = {STUDIED.num_streams}, C = {STUDIED.hidden_size}, {STUDIED.dtype}, {MAIN}"
    return f"""# The kernels, one by one

Each page has the equation, the TileLang, the traffic, the launch, and what the kernel takes of each architecture. They
are generated (`make docs`); `mhc-tilelang inspect KERNEL --explain` prints the same.

{links}

## Beside TileKernels

What ptxas and the machine code say at {shape}, built with {list_versions(versions)}. DeepSeek's released kernels
(TileKernels {peer_versions["tile-kernels"]}) are built with the same compiler, their own passes and flags. The two
split the work differently, so under a kernel of ours stand those of theirs that do the same or a part of it: their
product reads phi in TF32, ours in two halves; their `pre_apply_mix_bwd` adds up g_x, which is `project_backward`'s
here; their norm, gates and Sinkhorn are three kernels, our `coefficients` one. Registers and instructions say what a
kernel needs, not how fast it is.

{comparison(ours, peers)}

Spills are bytes stored and loaded, of a thread. Barriers are `BAR` instructions, tensor those on tensor cores. Loads
and stores are global accesses in the machine code, how many × how many bytes; what is in a loop counts once.

## What is built

{describe_builds(rows)}
"""


def list_versions(versions: Mapping[str, str]) -> str:
    """List versions in words."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def comparison(ours: list[Row], peers: list[Row]) -> str:
    """Our kernels, each followed by its counterparts in italics, then what has none."""
    lines: list[Row] = []
    for kernel in dict.fromkeys(row.kernel for row in ours):
        lines += [row for row in ours if row.kernel == kernel]
        lines += [rename(peer) for peer in peers if PEERS[peer.kernel][2] == kernel]
    several = [rename(peer) for peer in peers if PEERS[peer.kernel][2] not in FAMILIES]
    return resource_table([*lines, *several])


def rename(peer: Row) -> Row:
    """Rename a peer's row as the table shows it."""
    counterpart = PEERS[peer.kernel][2]
    part = "" if counterpart in FAMILIES else f", {counterpart}"
    return replace(peer, kernel=f"*TileKernels: {peer.kernel}{part}*")


def describe_builds(rows: list[Row]) -> str:
    """Return the number of stored builds, and a table row for each kernel and architecture that has faulty ones."""
    counts = [f"{sum(row.arch == arch for row in rows)} for {arch}" for arch in matrix.ARCHITECTURES]
    text = f"{len(rows)} builds are stored: {', '.join(counts)}.\n\n{widths(rows)}"
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if faults(row):
            found.setdefault((row.label, row.arch), []).append(row)
    if not found:
        return f"{text}\n\nNone spills, all fit, and no other access to a tensor as wide as the stream is narrow."
    lines = [text, "", "| kernel | arch | builds with faults | the one with most |", "|---|---|---|---|"]
    for (kernel, arch), faulty in found.items():
        worst = max(faulty, key=lambda row: (row.spill_bytes, len(faults(row))))
        lines.append(f"| {kernel} | {arch} | {len(faulty)} | {with_faults(worst)} |")
    return "\n".join(lines)


def widths(rows: list[Row]) -> str:
    """List the accesses that nvcc splits."""
    found = Counter(row.kernel for row in rows if known_splits(row))
    if not found:
        return "nvcc splits no access to the stream."
    lines = [f"- {kernel}, in {number}: {SPLIT[kernel]}." for kernel, number in found.items()]
    return "\n".join(["nvcc splits 16-byte accesses to the stream into narrower ones in:", "", *lines])


def write(folder: Path) -> None:
    """Write the pages, and remove those of kernels that are no more."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for file in folder.glob("*.md"):
        if file.name not in wanted:
            file.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
