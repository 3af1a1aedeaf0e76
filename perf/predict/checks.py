"""Before a number: what a walk must agree with, and what the model does not cover. Each refusal is a sentence.

loops           a branch depended on data: how often it goes which way is not in the code
bytes           of the stream tensors the walk's bytes are the audit's, which reads the TIR; every access is of a
                known buffer
products        tensor instructions executed do the multiply-adds of the TIR's T.gemm
not modelled    wgmma and tcgen05, the TMA, atomics, spills inside loops
cache           a working set that fits the last-level cache, unless it is said to be flushed
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .block import Walked
from .listing import Instruction

TOLERANCE = 0.01  # of bytes and products: blocks at an edge do less than the middle one
OTHER_TENSOR = ("HGMMA", "IGMMA", "QGMMA", "BGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA", "UTCOMMA")


def not_modelled(code: Sequence[Instruction], walked: Walked) -> list[str]:
    """What the machine code does that no published kernel resembles."""
    found = []
    if others := sorted({step.kind for step in code if step.kind.startswith(OTHER_TENSOR)}):
        found.append(f"tensor instructions that the model does not know: {', '.join(others)}")
    if walked.bulk:
        found.append("copies by the TMA, whose bytes the instructions do not tell")
    if walked.atomics:
        found.append(f"{walked.atomics:.0f} atomics a block: their order and their cost depend on timing")
    standing = sum(step.kind in ("LDL", "STL") for step in code)
    if walked.local > standing * walked.block.warps:
        found.append(
            f"spills inside a loop: {walked.local:.0f} accesses to local memory a block, {standing} in the code"
        )
    return found


def data_dependent(walked: Walked) -> list[str]:
    """Branches that the walk could not decide."""
    if not walked.undecided:
        return []
    return [f"the path depends on data: {', '.join(walked.undecided[:3])}"]


def bytes_differ(
    moved: Mapping[tuple[str, str], float], audited: Mapping[str, Any], streams: Sequence[str], edge: float
) -> list[str]:
    """Where the walk's bytes are not the audit's; `moved` of the whole launch, by buffer and side."""
    found = []
    if unknown := sum(amount for (name, _), amount in moved.items() if not name):
        found.append(f"{unknown / 1e6:.1f} MB of accesses whose buffer is not known")
    for name in streams:
        if name not in audited:
            continue
        for side, traffic in (("read", audited[name].read), ("written", audited[name].written)):
            executed, expected = moved.get((name, side), 0.0), traffic.accessed
            if abs(executed - expected) > (TOLERANCE + edge) * max(executed, expected):
                text = f"{executed / 1e6:.2f} MB executed, {expected / 1e6:.2f} MB in the TIR"
                found.append(f"{name}: bytes {side} differ: {text}")
    return found


def products_differ(executed: float, expected: int, edge: float) -> list[str]:
    """Where tensor instructions do not do what T.gemm asks for; padding of a tile counts on both sides."""
    if abs(executed - expected) <= (TOLERANCE + edge) * max(executed, expected):
        return []
    return [f"products differ: {executed / 1e9:.2f} G multiply-adds executed, {expected / 1e9:.2f} G in the TIR"]


def fits_cache(working_set: int, cache_bytes: int) -> list[str]:
    """Whether memory may not be asked at all."""
    if working_set > cache_bytes:
        return []
    sizes = f"{working_set / 2**20:.0f} MiB of {cache_bytes / 2**20:.0f} MiB"
    return [f"the working set fits the last-level cache ({sizes}): say --flushed if the cache is cold"]


def sides(moved: Mapping[tuple[int, str], float], names: Sequence[str], blocks: float) -> Counter[tuple[str, str]]:
    """A block's bytes as a launch's, by buffer name; an empty name for what is not known."""
    found: Counter[tuple[str, str]] = Counter()
    for (number, side), amount in moved.items():
        found[names[number] if number >= 0 else "", side] += amount * blocks  # type: ignore[assignment]
    return found
