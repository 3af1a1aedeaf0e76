"""What one block of a kernel does, from the walks of its warps: the model's features that the machine code gives.

The first, the second and the last warp are walked, and all of them where those three are not alike.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields

from .listing import Instruction
from .schedule import cycles
from .walk import Entry, Walk
from .walk import walk as walk_warp

NEAR, FAR = 600.0, 1200.0  # cycles of a load from memory: twice, for what the difference shows
ALU = {
    *("IADD3", "IADD", "LOP3", "SHF", "PRMT", "SEL", "ISETP", "FSETP", "FMNMX", "FMNMX3", "LEA", "VIADD", "MOV"),
    *("VIMNMX", "VIMNMX3", "VIADDMNMX", "F2FP", "SGXT", "BMSK", "PLOP3", "I2FP", "P2R", "R2P", "FSEL", "IABS", "FLO"),
    *("POPC", "VOTE", "VOTEU", "BREV", "IMNMX"),
}
FMA = {"FFMA", "FADD", "FMUL", "HFMA2", "FFMA2", "FADD2", "FMUL2", "HADD2", "HMUL2", "IMAD"}
SPECIAL = {"MUFU", "F2F", "I2F", "F2I", "FCHK"}
TENSOR = {"HMMA", "IMMA"}
BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Block:
    """Counts of one block, all its warps together.

    Attributes:
        warps: that it has.
        cycles: that its slowest warp takes alone, without waits for memory.
        round_trips: to memory, that nothing of the same warp hides.
        issued, alu, fma, special, tensor: instructions, all and by pipe.
        shared: wavefronts of the shared-memory pipe, at the width of the accesses, without bank conflicts.
        accesses: wavefronts of global accesses at the same pipe.
        barriers: that its slowest warp comes to.
    """

    warps: float
    cycles: float
    round_trips: float
    issued: float
    alu: float
    fma: float
    special: float
    tensor: float
    shared: float
    accesses: float
    barriers: float


@dataclass(frozen=True)
class Walked:
    """A block's features, and what the checks look at.

    Attributes:
        moved: bytes that the block's warps read and write of each buffer argument, by its number and "read" or
            "written"; -1 for what is of no known buffer.
        undecided: branches that depend on data, as text.
        bulk: whether something is moved by the TMA, whose bytes the instructions do not tell.
        local: accesses to local memory.
        atomics: that are executed.
    """

    block: Block
    moved: dict[tuple[int, str], int]
    undecided: tuple[str, ...]
    bulk: bool
    local: int
    atomics: int


def walk_block(code: Sequence[Instruction], entry: Entry, block: tuple[int, int, int] | None = None) -> Walked:
    """Walk the warps of a block, the middle one by default."""
    walks = walks_of(code, entry, block or entry.middle())
    timed = [(cycles(code, walk.steps, NEAR), cycles(code, walk.steps, FAR)) for walk, _ in walks]
    slowest = max(range(len(walks)), key=lambda number: timed[number][0])
    near, far = timed[slowest]
    round_trips = (far - near) / (FAR - NEAR)
    counts: dict[str, float] = defaultdict(float)
    moved: Counter[tuple[int, str]] = Counter()
    undecided = {}
    for walk, number in walks:
        for name, count in counts_of(code, walk).items():
            counts[name] += count * number
        for index, access in walk.steps:
            if access is not None:
                side = "written" if code[index].kind in ("STG", "ST") else "read"
                moved[access.buffer, side] += access.lanes * access.width * number
        for index in walk.undecided:
            undecided[index] = f"{code[index].opcode} at {code[index].address:#x}"
    features = {field.name: float(counts[field.name]) for field in fields(Block)}
    features |= {"warps": entry.warps, "cycles": near - NEAR * round_trips, "round_trips": round_trips}
    features["barriers"] = float(counts_of(code, walks[slowest][0])["barriers"])
    return Walked(
        Block(**features),
        dict(moved),
        tuple(undecided.values()),
        counts["bulk"] > 0,
        int(counts["local"]),
        int(counts["atomics"]),
    )


def walks_of(code: Sequence[Instruction], entry: Entry, block: tuple[int, int, int]) -> list[tuple[Walk, int]]:
    """Walks of a block's warps, and of how many warps each is."""
    first = walk_warp(code, entry, 0, block)
    if entry.warps == 1:
        return [(first, 1)]
    second = walk_warp(code, entry, 1, block)
    last = second if entry.warps == 2 else walk_warp(code, entry, entry.warps - 1, block)
    if is_alike(first, second) and is_alike(second, last):
        return [(first, entry.warps)]
    between = [walk_warp(code, entry, warp, block) for warp in range(2, entry.warps - 1)]
    return [(each, 1) for each in (first, second, *between, *([last] if entry.warps > 2 else []))]


def is_alike(one: Walk, other: Walk) -> bool:
    """Whether two warps issue the same instructions, whose guards let as many lanes through."""
    return [(index, access and access.lanes) for index, access in one.steps] == [
        (index, access and access.lanes) for index, access in other.steps
    ]


def counts_of(code: Sequence[Instruction], walk: Walk) -> dict[str, float]:
    """Instructions of one warp, by pipe."""
    found: dict[str, float] = defaultdict(float)
    for index, times in Counter(index for index, _ in walk.steps).items():
        step = code[index]
        if step.kind == "NOP":
            continue
        found["issued"] += times
        for name, amount in pipe_of(step).items():
            found[name] += amount * times
    return found


def pipe_of(step: Instruction) -> dict[str, float]:
    """What one instruction takes of which pipe."""
    kind = step.kind
    width = next((BYTES[name] for name in step.modifiers if name in BYTES), 4)
    if kind in FMA:
        return {"fma": 1}
    if kind in ALU:
        return {"alu": 1}
    if kind in SPECIAL:
        return {"special": 1}
    if kind in TENSOR:
        return {"tensor": 1}
    if kind in ("LDS", "STS"):
        return {"shared": max(1, width / 4)}
    if kind in ("LDSM", "STSM"):
        return {"shared": 4 if "4" in step.modifiers else 2 if "2" in step.modifiers else 1}
    if kind == "SHFL":
        return {"shared": 1}
    if kind in ("LDG", "LD", "LDGSTS", "STG", "ST"):
        return {"accesses": max(1, width / 2)}
    if kind == "BAR":
        return {"barriers": 1}
    if kind in ("LDL", "STL"):
        return {"local": 1, "accesses": max(1, width / 2)}
    if kind.startswith(("ATOM", "RED")) and kind != "REDUX":
        return {"atomics": 1, "accesses": max(1, width / 2)}
    return {"bulk": 1} if kind.startswith(("UTMALDG", "UTMASTG", "UBLKCP")) else {}
