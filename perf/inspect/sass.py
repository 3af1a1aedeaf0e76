"""Instruction counts of a kernel's machine code (SASS), from nvdisasm's listing.

Counted are instructions as they stand, each once, wherever they lie: a loop counts as long as it is written, and the
routines that a kernel calls (a division's slow path) are in. Left out are NOPs, which pad the code.

    barriers        BAR.*: places where the threads of a block, or those that share a named barrier, wait for each other
    tensor          HMMA, IMMA, HGMMA, UTC…MMA, …: a warp's or a warp group's product on the tensor cores
    global loads    LDG, LD, and LDGSTS, which is cp.async; by width in bits, "bulk" for the copies of the TMA
    global stores   STG, ST, by width
    atomics         ATOM*, RED*: there should be none
    local           LDL and STL: what ptxas spills, and arrays that it could not keep in registers

The listing also says which line of the source each instruction comes from, see `global_accesses`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

SOURCE = "kernel.cu"  # the name of what was compiled
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
LOCATION = re.compile(r"^\s*//## File ")
PLACE = re.compile(r'"([^"]+)", line (\d+)')
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
    return by_width(width for name in instructions if (width := width_of(name, kinds, bulk)))


def width_of(instruction: str, kinds: tuple[str, ...], bulk: tuple[str, ...]) -> str | None:
    """Bits that an instruction of some kinds accesses, "bulk" for the bulk ones; None for any other."""
    kind, *modifiers = instruction.split(".")
    if kind in kinds:
        return str(next((WIDTHS[modifier] for modifier in modifiers if modifier in WIDTHS), 32))
    return "bulk" if kind in bulk else None


def by_width(widths: Iterable[str]) -> dict[str, int]:
    """Count accesses by width, the widest first."""
    found = Counter(widths)
    return dict(sorted(found.items(), key=lambda item: (item[0] != "bulk", -int(item[0].replace("bulk", "0")))))


class GlobalAccess(NamedTuple):
    """An access to global memory: the line of the source, None where the listing has none; bits, or "bulk".

    `in_run`: it follows another by the same inlined function, and nvdisasm may have left out that the call is another.
    """

    line: int | None
    width: str
    writes: bool
    in_run: bool


def global_accesses(listing: str) -> Iterator[GlobalAccess]:
    """Yield every access to global memory, with the line of SOURCE that it comes from: of a function that was inlined,
    the line that calls it.
    """
    place: int | None = None
    is_inside = False  # a run of location comments, of which the last one in SOURCE counts
    is_inlined, accesses = False, 0  # whether the function's own line was told, and accesses since
    for text in listing.splitlines():
        if LOCATION.search(text):
            lines = [int(line) for name, line in PLACE.findall(text) if name == SOURCE]
            place = lines[-1] if lines else place if is_inside else None
            is_inlined, accesses = "inlined at" in text or (is_inside and is_inlined), 0
            is_inside = True
        elif found := INSTRUCTION.match(text):
            is_inside = False
            for writes, kinds in ((False, (LOADS, BULK_LOADS)), (True, (STORES, BULK_STORES))):
                if width := width_of(found.group(1), *kinds):
                    yield GlobalAccess(place, width, writes, in_run=is_inlined and accesses > 0)
                    accesses += 1
