"""A kernel's machine code as data: instructions with their operands and control bits, from `nvdisasm -hex`.

The upper half of each 128-bit encoding says what the hardware does not find out by itself: how many cycles the warp
stalls after the instruction, which of six scoreboards it raises when its result is written or its operands are read,
and which it waits for. (Layout: as published for Volta and later; it is the same up to Blackwell.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from ...errors import MHCError

INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
)
UPPER = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
LABEL = re.compile(r"^(?:\s*)(\.L_x_\d+|\$[\w$.]+):")
REFERENCE = re.compile(r"`\(([^)]+)\)")
REMARK = re.compile(r"\(\*.*?\*\)")  # (*"SpillRefill"*)
SEPARATOR = re.compile(r",\s*(?![^\[]*\])")
BYTES = {"256": 32, "128": 16, "64": 8, "U64": 8, "S64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
NO_SCOREBOARD = 7


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: bytes from the kernel's start.
        guard: the predicate in front, as in "!P0"; empty for none.
        operands: operands as text, results first.
        target: index of the instruction that a branch or a call leads to.
        stall: cycles until the warp may issue again.
        raises_written, raises_read: scoreboards that drop when the result is written or the operands are read; 7: none.
        waits: scoreboards that must be down before it issues, a bit each.
    """

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    target: int | None
    stall: int
    raises_written: int
    raises_read: int
    waits: int

    @cached_property
    def kind(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @cached_property
    def modifiers(self) -> tuple[str, ...]:
        """Modifiers after the opcode's first word."""
        return tuple(self.opcode.split(".")[1:])

    @cached_property
    def width(self) -> int:
        """Bytes a lane, of an access."""
        return next((BYTES[name] for name in self.modifiers if name in BYTES), 4)


def parse(listing: str) -> list[Instruction]:
    """Parse the instructions of a listing with encodings. Raises MHCError for a listing without."""
    lines = listing.splitlines()
    labels: dict[str, int] = {}
    found: list[tuple[re.Match[str], int]] = []
    for number, line in enumerate(lines):
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif text := INSTRUCTION.match(line):
            upper = UPPER.match(lines[number + 1]) if number + 1 < len(lines) else None
            if upper is None:
                raise MHCError(f"predict: expected encodings (nvdisasm -hex), got none after line {number + 1}: {line}")
            found.append((text, int(upper[1], 16)))
    return [instruction(text, control, labels) for text, control in found]


def instruction(text: re.Match[str], control: int, labels: dict[str, int]) -> Instruction:
    """One line and the upper half of its encoding."""
    operands = REMARK.sub("", text["operands"]).strip()
    reference = REFERENCE.search(operands)
    return Instruction(
        int(text["address"], 16),
        text["guard"] or "",
        text["opcode"],
        tuple(operand.strip().replace(".reuse", "") for operand in SEPARATOR.split(operands)),
        labels.get(reference[1]) if reference else None,
        stall=control >> 41 & 15,
        raises_written=control >> 46 & 7,
        raises_read=control >> 49 & 7,
        waits=control >> 52 & 63,
    )
