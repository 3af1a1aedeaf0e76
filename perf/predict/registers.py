"""A warp's registers and predicates, and what an operand of an instruction says about them.

R5, UR5      a register of a lane, of the warp; RZ, URZ are zero       P0, UP0     predicates; PT, UPT are true
-R5, ~R5     negated, inverted                                         0x10, -0x10 an immediate
c[0x0][0x380]  a constant: the launch's dimensions, the kernel's arguments
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np

from .integers import WORD, Value, inverted, low, pair, simplest, total

REGISTER = re.compile(r"([-~|]?)(U?R)(\d+|Z)\|?(\.\w+)*$")
PREDICATE = re.compile(r"(!?)(U?P)([0-6T])$")
IMMEDIATE = re.compile(r"(-?)0x([0-9a-f]+)$")
CONSTANT = re.compile(r"(-?)c\[0x0\]\[(?:(U?R\d+|U?RZ)(?:\+)?)?(0x[0-9a-f]+)?\]$")
TERM = re.compile(r"(-?)(U?R\d+|U?RZ|0x[0-9a-f]+)((?:\.\w+)*)")


class Operand(NamedTuple):
    """An operand taken apart.

    Attributes:
        form: "register", "predicate", "immediate", "constant" or "other".
        sign: "-", "~" or "!" in front of it.
        name: of the register or predicate; empty for RZ and PT. Of a constant, the register that is added to its place.
        upper: the register after it, its other half where it is a pair.
        number: of an immediate or a constant's place.
    """

    form: str
    sign: str = ""
    name: str = ""
    upper: str = ""
    number: int = 0


@cache
def taken_apart(text: str) -> Operand:
    """An operand, parsed."""
    if found := REGISTER.match(text):
        if found[1] == "|" or ".H" in text or ".B" in text:
            return Operand("other")
        if found[3] == "Z":
            return Operand("register", found[1])
        return Operand("register", found[1], found[2] + found[3], f"{found[2]}{int(found[3]) + 1}")
    if found := PREDICATE.match(text):
        return Operand("predicate", found[1], "" if found[3] == "T" else found[2] + found[3])
    if found := IMMEDIATE.match(text):
        return Operand("immediate", number=-int(found[2], 16) if found[1] else int(found[2], 16))
    if found := CONSTANT.match(text):
        return Operand("constant", found[1], found[2] or "", number=int(found[3] or "0", 16))
    return Operand("other")


@cache
def terms(text: str) -> tuple[tuple[Operand, bool], ...] | None:
    """What is added up between the last brackets, and which of it has 64 bits; None for what is not understood."""
    inside = text[text.rindex("[") + 1 : text.rindex("]")].replace("+-", "-").replace("-", "+-")
    wide = ".64" in inside or ".U32" in inside
    parts = []
    for part in filter(None, inside.split("+")):
        found = TERM.match(part)
        if not found:
            return None
        double = ".64" in found[3] or (wide and found[2].startswith("U"))
        parts.append((taken_apart(found[1] + found[2]), double))
    return tuple(parts)


def is_predicate(operand: str) -> bool:
    """Whether an operand is a predicate."""
    return taken_apart(operand).form == "predicate"


@cache
def named(operand: str, offset: int) -> str:
    """The register or predicate that a result goes to, some registers on; empty for one that is always the same."""
    name = taken_apart(operand).name
    if not offset or not name:
        return name
    space = name.rstrip("0123456789")
    return f"{space}{int(name[len(space) :]) + offset}"


@dataclass
class Registers:
    """What is known of them; a name that is not here has not been written.

    Attributes:
        lanes: that execute the instruction at hand.
        partly: of values that some lanes alone know, which.
    """

    constant: Callable[[int], Value]
    values: dict[str, Value] = field(default_factory=dict)
    lanes: np.ndarray = field(default_factory=lambda: np.ones(32, dtype=bool))
    partly: dict[str, np.ndarray] = field(default_factory=dict)

    def value(self, name: str) -> Value:
        """A register or predicate, as far as the lanes at hand all know it."""
        if name in self.partly and (self.lanes & ~self.partly[name]).any():
            return None
        return self.values.get(name)

    def word(self, text: str) -> Value:
        """32 bits of an operand, without a sign."""
        return low(self.term(text))

    def term(self, text: str) -> Value:
        """The same with the bit that a negated register carries out: −R is ~R + 1."""
        operand = taken_apart(text)
        if operand.form == "immediate":
            return operand.number & WORD
        if operand.form == "register":
            value = self.value(operand.name) if operand.name else 0
        elif operand.form == "constant":
            base = self.value(operand.name) if operand.name else 0
            value = self.constant(base + operand.number) if isinstance(base, int) else None
        else:
            return None
        if value is None or not operand.sign:
            return value
        return (value ^ WORD) + (operand.sign == "-")

    def double(self, text: str) -> Value:
        """64 bits: a pair of registers, of constants, or an immediate whose sign is extended."""
        return self.pair_of(taken_apart(text))

    def pair_of(self, operand: Operand) -> Value:
        """The same of an operand taken apart."""
        if operand.form == "immediate":
            return operand.number
        if operand.sign or operand.form not in ("register", "constant"):
            return None
        if operand.form == "constant":
            return pair(self.constant(operand.number), self.constant(operand.number + 4)) if not operand.name else None
        return pair(self.value(operand.name), self.value(operand.upper)) if operand.name else 0

    def predicate(self, text: str) -> Value:
        """A predicate, inverted where it says so."""
        operand = taken_apart(text)
        if operand.form != "predicate":
            return None
        value = self.value(operand.name) if operand.name else True
        return inverted(value) if operand.sign else value

    def address(self, text: str) -> Value:
        """The sum in brackets: [R4.64+UR6+0x10]; registers named .64 are pairs."""
        parts = terms(text)
        if parts is None:
            return None
        values = []
        for operand, double in parts:
            if double or operand.form == "immediate":
                values.append(self.pair_of(operand))
            else:
                values.append(self.value(operand.name) if operand.name else 0)
        return total(*values) if values else 0

    def write(self, text: str, value: Value, lanes: np.ndarray | None, offset: int = 0) -> None:
        """Set a register or predicate; of some lanes only where `lanes` is a mask."""
        name = named(text, offset)
        if not name:
            return
        known = self.partly.pop(name, None)
        if lanes is not None and name in self.values:  # what no lane has written yet is not read where it is not
            before = self.values[name]
            if known is None:
                known = np.full(lanes.shape, before is not None)
            known = known & ~lanes if value is None else known | lanes
            value = np.where(lanes, 0 if value is None else value, 0 if before is None else before)
            if not known.all():
                self.partly[name] = known
        self.values[name] = simplest(value)
