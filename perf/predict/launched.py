"""One launch of ours as the model's `Work`: built, walked, held to its TIR.

Blocks along y and z may differ (a projection's last split is shorter), so up to four of them are walked, beyond that
the first, the middle and the last; along x, where the tokens are, the middle one stands for all.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING

from . import checks, products
from .block import Block, Walked, walk_block
from .built import Built, build_function
from .model import Work
from .walk import Entry

if TYPE_CHECKING:
    from ...compiler.recording import Recorded

FEW_BLOCKS = 4


@dataclass(frozen=True)
class Launched:
    """A launch's work, what its checks said, and the bytes that it touches at all, for the cache."""

    family: str
    work: Work
    refusals: tuple[str, ...]
    working_set: int
    l2_bytes: int


def launched(launch: Recorded, arch: str) -> Launched:
    """Build, walk and check one launch. Raises MHCError where it cannot be built or walked."""
    from ...compiler.tracing import trace
    from ..traffic.audit import audit_function

    func = trace(launch.family, launch.parameters)
    built = build_function(func, arch)
    entry = built.entry(launch.sizes)
    walked = walk_grid(built, entry)
    audited = audit_function(func, launch.sizes)
    streams = [name for name in launch.streams if name in audited]
    blocks = prod(entry.grid)
    edge = 1 / entry.grid[0]
    moved = checks.sides(walked.moved, built.source.arguments, blocks)
    executed = walked.block.tensor and blocks * multiply_adds(built, walked)
    refusals = [
        *checks.not_modelled(built.code, walked),
        *checks.data_dependent(walked),
        *checks.bytes_differ(moved, audited, streams, edge),
        *checks.products_differ(executed, products.asked(func, launch.sizes), edge),
    ]
    through_memory = caches = 0
    for name, traffic in audited.items():
        for side in (traffic.read, traffic.written):
            through_memory += side.accessed if name in streams else side.distinct
            caches += 0 if name in streams else side.per_block - side.distinct
    working_set = sum(traffic.read.distinct + traffic.written.distinct for traffic in audited.values())
    work = Work(walked.block, blocks, built.resident, through_memory)
    return Launched(launch.family, work, tuple(refusals), working_set, caches)


def multiply_adds(built: Built, walked: Walked) -> float:
    """Of one block's tensor instructions: one shape a kernel is what ours have."""
    kinds = {products.of_instruction(step) for step in built.code if step.kind in ("HMMA", "IMMA")}
    return walked.block.tensor * max(kinds, default=0) if len(kinds) == 1 else float("nan")


def walk_grid(built: Built, entry: Entry) -> Walked:
    """The blocks that stand for the grid, averaged."""
    x = entry.grid[0] // 2
    walked = [
        (walk_block(built.code, entry, (x, y, z)), of_y * of_z)
        for (y, of_y), (z, of_z) in product(positions(entry.grid[1]), positions(entry.grid[2]))
    ]
    total = sum(number for _, number in walked)
    features = [
        sum(value * number for value, number in column) / total
        for column in zip(*([(value, number) for value in astuple(each.block)] for each, number in walked), strict=True)
    ]
    moved: Counter[tuple[int, str]] = Counter()
    for each, number in walked:
        for place, amount in each.moved.items():
            moved[place] += amount * number / total  # type: ignore[assignment]
    undecided = dict.fromkeys(text for each, _ in walked for text in each.undecided)
    most = max(walked, key=lambda pair: pair[0].local)[0]
    return Walked(Block(*features), dict(moved), tuple(undecided), most.bulk, most.local, most.atomics)


def positions(extent: int) -> list[tuple[int, int]]:
    """Which blocks along an axis are walked, and how many each stands for."""
    if extent <= FEW_BLOCKS:
        return [(place, 1) for place in range(extent)]
    return [(0, 1), (extent // 2, extent - 2), (extent - 1, 1)]
