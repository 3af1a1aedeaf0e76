"""What the integer instructions of SASS compute, over the 32 lanes of a warp at once.

A value is a Python int where all lanes agree, an int64 array [32] where they differ, None where it is not known: it
came from memory or out of floating-point arithmetic. Registers hold 32 bits without a sign. A predicate is a bool, an
array of them, or None. Every function takes and gives such values; what is unknown makes the result unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

Value = Any  # int | np.ndarray | None
WORD, PAIR = (1 << 32) - 1, (1 << 64) - 1


def known(function: Callable[..., Value]) -> Callable[..., Value]:
    """None in, None out."""

    @wraps(function)
    def of_known(*values: Value) -> Value:
        return None if any(value is None for value in values) else function(*values)

    return of_known


def simplest(value: Value) -> Value:
    """An array whose lanes agree as one number."""
    if isinstance(value, np.ndarray):
        first = value[0]
        return first.item() if (value == first).all() else value
    return value


def low(value: Value) -> Value:
    """The lower 32 bits."""
    return None if value is None else value & WORD


def high(value: Value) -> Value:
    """The upper 32 bits of 64."""
    return None if value is None else value >> 32 & WORD


@known
def pair(lower: Value, upper: Value) -> Value:
    """Two registers as one number of 64 bits with a sign, as an array holds it."""
    upper = (upper ^ 0x80000000) - 0x80000000
    return upper << 32 | lower


@known
def signed(value: Value) -> Value:
    """32 bits as a number with a sign."""
    return (value ^ 0x80000000) - 0x80000000


@known
def total(*values: Value) -> Value:
    """A sum that is not cut off."""
    return sum(values)


@known
def product(left: Value, right: Value) -> Value:
    """A product; as an array its lower 64 bits."""
    return left * right


@known
def carry(value: Value, count: Value = 1) -> Value:
    """Whether a sum of 32-bit numbers left them, `count` times at least."""
    return value >> 32 >= count


def wide_sum(left: Value, right: Value, one: Value) -> tuple[Value, Value]:
    """A sum of 64 bits, and whether it left them as a sum of numbers without a sign."""
    if left is None or right is None or one is None:
        return None, None
    if isinstance(left, int) and isinstance(right, int) and isinstance(one, int):
        whole = (left & PAIR) + (right & PAIR) + one
        return whole & PAIR, whole >> 64 != 0
    parts = [
        np.asarray(part & PAIR if isinstance(part, int) else part).astype(np.uint64) for part in (left, right, one)
    ]
    first = parts[0] + parts[1]
    both = first + parts[2]
    return both.astype(np.int64), (first < parts[0]) | (both < first)


@known
def shifted_left(value: Value, by: Value) -> Value:
    """By less than 64."""
    return value << by


@known
def shifted_right(value: Value, by: Value) -> Value:
    """By less than 64; a number without a sign."""
    return value >> by


@known
def chosen(condition: Value, true: Value, false: Value) -> Value:
    """One or the other, by lane."""
    if isinstance(condition, np.ndarray):
        return simplest(np.where(condition, true, false))
    return true if condition else false


@known
def inverted(predicate: Value) -> Value:
    """Not."""
    return ~predicate if isinstance(predicate, np.ndarray) else not predicate


COMPARE = {
    "LT": known(lambda a, b: a < b),
    "LE": known(lambda a, b: a <= b),
    "GT": known(lambda a, b: a > b),
    "GE": known(lambda a, b: a >= b),
    "EQ": known(lambda a, b: a == b),
    "NE": known(lambda a, b: a != b),
}


def both(left: Value, right: Value) -> Value:
    """And: false if one is, whatever the other."""
    if left is False or right is False:
        return False
    return None if left is None or right is None else left & right


def either(left: Value, right: Value) -> Value:
    """Or: true if one is, whatever the other."""
    if left is True or right is True:
        return True
    return None if left is None or right is None else left | right


JOIN = {"AND": both, "OR": either, "XOR": known(lambda left, right: left ^ right)}


def by_table(table: int, a: Value, b: Value, c: Value, ones: int = WORD) -> Value:
    """LOP3 and PLOP3: bit a·4 + b·2 + c of the table, for each bit; an operand that does not matter may be None."""
    operands = [a, b, c]
    for place, step in enumerate((4, 2, 1)):
        if all((table >> index & 1) == (table >> (index ^ step) & 1) for index in range(8)):
            operands[place] = 0
    if any(operand is None for operand in operands):
        return None
    result: Value = 0
    for index in range(8):
        if table >> index & 1:
            term: Value = ones
            for operand, step in zip(operands, (4, 2, 1), strict=True):
                term = term & (operand if index & step else operand ^ ones)
            result = result | term
    return result


@known
def permuted(a: Value, selector: Value, b: Value) -> Value:
    """PRMT: each byte of the result is one of the eight of b and a, or the sign of it."""
    source = b << 32 | a
    result: Value = 0
    for byte in range(4):
        wanted = selector >> 4 * byte
        found = source >> (wanted & 7) * 8 & 0xFF
        found = chosen(wanted & 8 != 0, (found >> 7 & 1) * 0xFF, found)
        result = result | found << 8 * byte
    return result
