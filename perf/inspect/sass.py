"""What a kernel's machine code (SASS) consists of, counted from nvdisasm's listing.

Counted are instructions as they stand, each once, wherever they lie: a loop counts as long as it is written, and the
routines that a kernel calls (a division's slow path) are in. Left out are NOPs, which pad the code.

    barriers        BAR.*: places where the threads of a block, or those that share a named barrier, wait for each other
    tensor          HMMA, IMMA, HGMMA, UTC…MMA, …: a warp's or a warp group's product on the tensor cores
    global loads    LDG, LD, and LDGSTS, which is cp.async; by width in bits, "bulk" for the copies of the TMA
    global stores   STG, ST, by width
    atomics         ATOM*, RED*: there should be none
    local           LDL and STL: what ptxas spills, and arrays that it could not keep in registers
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
TENSOR = re.compile(r"(?:[BDHIOQ]MMA|[BHIQ]GMMA|UTC\w*MMA)$")  # not HFMA2.MMA, which moves a constant
LOADS, STORES = ("LDG", "LD", "LDGSTS"), ("STG", "ST")
BULK_LOADS, BULK_STORES = ("UTMALDG", "UBLKCP"), ("UTMASTG",)
WIDTHS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


@dataclass(frozen=True)
class MachineCode:
    """Counts of one kernel's instructions; accesses by their width in bits."""

    instructions: int
    barriers: int
    tensor_instructions: int
    global_loads: dict[str, int]
    global_stores: dict[str, int]
    atomics: int
    local_accesses: int


def count(listing: str) -> MachineCode:
    """Count the instructions of a listing."""
    instructions = [name for name in INSTRUCTION.findall(listing) if name != "NOP"]
    kinds = Counter(name.split(".")[0] for name in instructions)

    def total(*names: str) -> int:
        return sum(kinds[name] for name in names)

    return MachineCode(
        instructions=len(instructions),
        barriers=total("BAR"),
        tensor_instructions=sum(number for kind, number in kinds.items() if TENSOR.match(kind)),
        global_loads=accesses(instructions, LOADS, BULK_LOADS),
        global_stores=accesses(instructions, STORES, BULK_STORES),
        atomics=sum(number for kind, number in kinds.items() if kind.startswith(("ATOM", "RED")) and kind != "REDUX"),
        local_accesses=total("LDL", "STL"),
    )


def accesses(instructions: Iterable[str], kinds: tuple[str, ...], bulk: tuple[str, ...]) -> dict[str, int]:
    """Accesses by width, the widest first."""
    found: Counter[str] = Counter()
    for name in instructions:
        kind, *modifiers = name.split(".")
        if kind in kinds:
            found[str(next((WIDTHS[modifier] for modifier in modifiers if modifier in WIDTHS), 32))] += 1
        elif kind in bulk:
            found["bulk"] += 1
    return dict(sorted(found.items(), key=lambda item: (item[0] != "bulk", -int(item[0].replace("bulk", "0")))))
