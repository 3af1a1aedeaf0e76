"""Work of one block of a kernel, from the walk of its warps: the model's features that the machine code gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from .listing import Instruction
from .schedule import cycles
from .walk import STORES, Entry, Step, walk

NEAR, FAR = 600.0, 1200.0  # cycles of a load from memory: twice, for what the difference shows
ALU = (
    *("IADD3", "IADD", "LOP3", "SHF", "PRMT", "SEL", "ISETP", "FSETP", "FMNMX", "FMNMX3", "LEA", "VIADD", "MOV"),
    *("VIMNMX", "VIMNMX3", "VIADDMNMX", "F2FP", "SGXT", "BMSK", "PLOP3", "I2FP", "P2R", "R2P", "FSEL", "IABS", "FLO"),
    *("POPC", "VOTE", "VOTEU", "BREV", "IMNMX"),
)
FMA = ("FFMA", "FADD", "FMUL", "HFMA2", "FFMA2", "FADD2", "FMUL2", "HADD2", "HMUL2", "IMAD")
PIPES = {
    **dict.fromkeys(ALU, "alu"),
    **dict.fromkeys(FMA, "fma"),
    **dict.fromkeys(("MUFU", "F2F", "I2F", "F2I", "FCHK"), "special"),
    **dict.fromkeys(("HMMA", "IMMA"), "tensor"),
    "BAR": "barriers",
}


class Block(NamedTuple):
    """Counts of one block, all its warps together."""

    warps: float
    cycles: float  # that its slowest warp takes alone, without waits for memory
    round_trips: float  # to memory, that nothing of the same warp hides
    issued: float  # instructions, all and by pipe
    alu: float
    fma: float
    special: float
    tensor: float
    shared: float  # wavefronts of the shared-memory pipe, at the width of the accesses, without bank conflicts
    accesses: float  # wavefronts of global accesses at the same pipe
    barriers: float  # that its slowest warp comes to


class Walked(NamedTuple):
    """A block's features, and what the checks look at.

    Attributes:
        moved: bytes that the block's warps read and write of each buffer argument, by its number and "read" or
            "written"; -1 for what is of no known buffer.
        undecided: branches that depend on data, as text.
        others: counts without a feature of the model: accesses to local memory, atomics, copies by the TMA.
    """

    block: Block
    moved: dict[tuple[int, str], float]
    undecided: tuple[str, ...]
    others: dict[str, int]


def walk_block(code: Sequence[Instruction], entry: Entry, block: tuple[int, int, int] | None = None) -> Walked:
    """Walk the warps of a block, the middle one by default."""
    found = walk(code, entry, block)
    ways: dict[object, tuple[list[Step], int]] = {}  # by instructions and lanes that guards let through: one of many
    for warp in range(entry.warps):
        steps = found.of_warp(warp)
        way = tuple((index, access and access.lanes) for index, access in steps)
        ways[way] = steps, ways[way][1] + 1 if way in ways else 1
    counts = [(counts_of(code, steps), number) for steps, number in ways.values()]
    near, slowest, steps = max(
        (cycles(code, steps, NEAR), -place, steps) for place, (steps, _) in enumerate(ways.values())
    )
    round_trips = (cycles(code, steps, FAR) - near) / (FAR - NEAR)
    moved: Counter[tuple[int, str]] = Counter()
    for index, _, accesses in found.steps:
        for access in accesses.values():
            moved[access.buffer, "written" if code[index].kind in STORES else "read"] += access.lanes * access.width
    undecided = tuple(f"{code[index].opcode} at {code[index].address:#x}" for index in found.undecided)
    total = {
        name: sum(each[name] * number for each, number in counts)
        for name in (*Block._fields, "local", "atomics", "bulk")
    }
    features = {name: float(total[name]) for name in Block._fields}
    features |= {"warps": entry.warps, "cycles": near - NEAR * round_trips, "round_trips": round_trips}
    features["barriers"] = float(counts[-slowest][0]["barriers"])
    others = {name: int(total[name]) for name in ("local", "atomics", "bulk")}
    return Walked(Block(**features), dict(moved), undecided, others)


def counts_of(code: Sequence[Instruction], steps: Sequence[Step]) -> Counter[str]:
    """Instructions of one warp, by pipe."""
    counts: Counter[str] = Counter()
    for index, times in Counter(index for index, _ in steps).items():
        if code[index].kind != "NOP":
            counts["issued"] += times
            name, amount = pipe_of(code[index])
            counts[name] += amount * times  # type: ignore[assignment]
            if name in ("local", "atomics"):
                counts["accesses"] += max(1, code[index].width / 2) * times  # type: ignore[assignment]
    return counts


def pipe_of(step: Instruction) -> tuple[str, float]:
    """Return the pipe that an instruction takes, and how much of it."""
    kind = step.kind
    if kind in PIPES:
        return PIPES[kind], 1
    if kind in ("LDS", "STS"):
        return "shared", max(1, step.width / 4)
    if kind in ("LDSM", "STSM", "SHFL"):
        return "shared", 1 if kind == "SHFL" else next((n for n in (4, 2) if str(n) in step.modifiers), 1)
    if kind in ("LDG", "LD", "LDGSTS", "STG", "ST"):
        return "accesses", max(1, step.width / 2)
    if kind in ("LDL", "STL"):
        return "local", 1
    if kind.startswith(("ATOM", "RED")) and kind != "REDUX":
        return "atomics", 1
    return "bulk" if kind.startswith(("UTMALDG", "UTMASTG", "UBLKCP")) else "", 1
