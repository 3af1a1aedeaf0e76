"""A warp's registers and predicates over its lanes, and what an operand of an instruction says about them.

A value is a Python int where all lanes of a block agree, else an array: of int64 for 32 bits, of Python's ints where it
may be wider (`exact`), so a carry is a shift. What came from memory or out of arithmetic of floats is unknown: None
in a register; to read it raises UnknownError, and then every result of the instruction is unknown. Registers hold 32
bits without a sign; a predicate is a bool or an array of them.

    R5, UR5        a register of a lane, of the warp; RZ, URZ are zero      P0, UP0     predicates; PT, UPT are true
    -R5, ~R5       negated, inverted                                        0x10, -0x10 an immediate
    c[0x0][0x380]  a constant: the launch's dimensions, the kernel's arguments
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np

Value = Any  # int | bool | np.ndarray | None
WARP, WORD, PAIR = 32, (1 << 32) - 1, (1 << 64) - 1
REGISTER = re.compile(r"([-~|]?)(U?R)(\d+|Z)\|?(\.\w+)*$")
PREDICATE = re.compile(r"(!?)(U?P)([0-6T])$")
IMMEDIATE = re.compile(r"(-?)0x([0-9a-f]+)$")
CONSTANT = re.compile(r"(-?)c\[0x0\]\[(?:(U?R\d+|U?RZ)(?:\+)?)?(0x[0-9a-f]+)?\]$")
TERM = re.compile(r"(-?)(U?R\d+|U?RZ|0x[0-9a-f]+)((?:\.\w+)*)")


class UnknownError(Exception):
    """A value was read that the code does not tell."""


class Operand(NamedTuple):
    """An operand taken apart: `name` of its register or predicate, "" for RZ and PT; `upper` the register after it."""

    form: str  # register, predicate, immediate, constant (`name`: of the register added to its place) or other
    sign: str = ""
    name: str = ""
    upper: str = ""
    number: int = 0


@cache
def parse_operand(text: str) -> Operand:
    """Parse an operand."""
    if found := REGISTER.match(text):
        if found[1] == "|" or ".H" in text or ".B" in text:
            return Operand("other")
        if found[3] == "Z":
            return Operand("register", found[1])
        return Operand("register", found[1], found[2] + found[3], f"{found[2]}{int(found[3]) + 1}")
    if found := PREDICATE.match(text):
        return Operand("predicate", found[1], "" if found[3] == "T" else found[2] + found[3])
    if found := IMMEDIATE.match(text):
        return Operand("immediate", number=int(found[1] + found[2], 16))
    if found := CONSTANT.match(text):
        return Operand("constant", found[1], found[2] or "", number=int(found[3] or "0", 16))
    return Operand("other")


@cache
def terms(text: str) -> tuple[tuple[Operand, bool], ...]:
    """Split the address in the last brackets into its terms, each with whether it has 64 bits. Raises UnknownError."""
    inside = text[text.rindex("[") + 1 : text.rindex("]")].replace("+-", "-").replace("-", "+-")
    wide, parts = ".64" in inside or ".U32" in inside, []
    for part in filter(None, inside.split("+")):
        if not (found := TERM.match(part)):
            raise UnknownError
        parts.append((parse_operand(found[1] + found[2]), ".64" in found[3] or (wide and found[2].startswith("U"))))
    return tuple(parts)


def is_predicate(operand: str) -> bool:
    """Whether an operand is a predicate."""
    return parse_operand(operand).form == "predicate"


def where(condition: Value, true: Value, false: Value, kind: type = np.int64) -> Value:
    """Select one or the other, by lane."""
    if isinstance(condition, np.ndarray):
        return np.where(condition, np.asarray(true, kind), np.asarray(false, kind))
    return true if condition else false


def invert(predicate: Value) -> Value:
    """Invert a predicate; unknown if it is unknown."""
    return ~predicate if isinstance(predicate, np.ndarray) else None if predicate is None else not predicate


@dataclass
class Registers:
    """Known values; `lanes` execute the current instruction, `partly` says which lanes know a value."""

    constant: Callable[[int], Value]
    values: dict[str, Value] = field(default_factory=dict)
    lanes: np.ndarray = field(default_factory=lambda: np.ones(WARP, dtype=bool))
    partly: dict[str, np.ndarray] = field(default_factory=dict)

    def value(self, name: str) -> Value:
        """Return a register or predicate, None unless all lanes at hand know it."""
        if name in self.partly and (self.lanes & ~self.partly[name]).any():
            return None
        return self.values.get(name)

    def known(self, name: str) -> Value:
        """Return a register or predicate, 0 for RZ. Raises UnknownError where a lane does not know it."""
        return require_known(self.value(name)) if name else 0

    def word(self, text: str) -> Value:
        """32 bits of an operand, without a sign."""
        return self.term(text) & WORD

    def signed(self, text: str) -> Value:
        """32 bits with a sign."""
        return signed(self.word(text))

    def term(self, text: str) -> Value:
        """32 bits and the one that a negated register carries out: −R is ~R + 1."""
        form, sign, name, _, number = parse_operand(text)
        if form == "immediate":
            return number & WORD
        if form not in ("register", "constant"):
            raise UnknownError
        value = self.known(name)
        if form == "constant":
            if isinstance(value, np.ndarray):
                raise UnknownError
            value = require_known(self.constant(value + number))
        return (value ^ WORD) + (sign == "-") if sign else value

    def double(self, text: str) -> Value:
        """64 bits: a pair of registers, of constants, or an immediate whose sign is extended."""
        return self.pair(parse_operand(text)) & PAIR

    def pair(self, operand: Operand) -> Value:
        """Return the 64 bits of an operand taken apart. Raises UnknownError."""
        if operand.form == "immediate":
            return operand.number
        if operand.form == "constant" and not (operand.sign or operand.name):
            lower, upper = self.constant(operand.number), self.constant(operand.number + 4)
            return require_known(upper) << 32 | require_known(lower)
        if operand.sign or operand.form != "register":
            raise UnknownError
        return exact(self.known(operand.upper)) << 32 | exact(self.known(operand.name))

    def predicate(self, text: str) -> Value:
        """Return a predicate, inverted where it says so; None for one that is not known."""
        form, sign, name, *_ = parse_operand(text)
        if form != "predicate":
            return None
        value = self.value(name) if name else True
        return invert(value) if sign else value

    def bit(self, text: str) -> Value:
        """Return a predicate as 0 or 1."""
        return where(require_known(self.predicate(text)), 1, 0)

    def address(self, text: str) -> Value:
        """Return the sum in brackets: [R4.64+UR6+0x10]; registers named .64 are pairs."""
        parts = [self.pair(o) if wide or o.form == "immediate" else self.known(o.name) for o, wide in terms(text)]
        return sum(map(exact, parts)) & PAIR

    def write(self, name: str, value: Value, lanes: np.ndarray | None = None) -> None:
        """Set a register or predicate; of some lanes only where `lanes` is a mask."""
        if not name:
            return
        known = self.partly.pop(name, None)
        if lanes is not None and name in self.values:  # what no lane has written yet is not read where it is not
            before = self.values[name]
            if known is None:
                known = np.full(lanes.shape, before is not None)
            known = known & ~lanes if value is None else known | lanes
            kind = bool if is_predicate(name) else np.int64
            value = where(lanes, 0 if value is None else value, 0 if before is None else before, kind)
            if not known.all():
                self.partly[name] = known
        if isinstance(value, np.ndarray):
            value = value if value.dtype == bool else value.astype(np.int64)
            value = value[0].item() if (value == value[0]).all() else value
        self.values[name] = value


def of_lane(value: Value, lane: int) -> Value:
    """One lane's value in all of its warp."""
    return value.reshape(-1, WARP)[:, lane].repeat(WARP) if isinstance(value, np.ndarray) else value


def exact(value: Value) -> Value:
    """Convert to Python's ints, which do not overflow."""
    return value.astype(object) if isinstance(value, np.ndarray) else value


def require_known(value: Value) -> Value:
    """Return a value that is known. Raises UnknownError for None."""
    if value is None:
        raise UnknownError
    return value


def signed(value: Value) -> Value:
    """32 bits as a number with a sign."""
    return (value ^ 0x80000000) - 0x80000000
