"""The integer instructions of SASS: from the registers, the values of what each writes.

Only what indices, trip counts and guards are computed with has a step; of every other instruction the results are
unknown. Where a step needs more than a line, the pattern of its operands stands above it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import takewhile
from operator import eq, ge, gt, le, lt, ne, xor

import numpy as np

from .listing import Instruction
from .registers import (
    PAIR,
    WARP,
    WORD,
    Registers,
    UnknownError,
    Value,
    exact,
    invert,
    is_predicate,
    of_lane,
    parse_operand,
    require_known,
    signed,
    where,
)

RESULTLESS = ("STG", "ST", "STS", "STL", "RED", "BAR", "DEPBAR", "LDGSTS", "LDGDEPBAR", "BRA", "CALL", "BSSY", "EXIT")
COMPARING = ("ISETP", "UISETP", "PLOP3", "UPLOP3", "FSETP")  # two predicates are all that they write
CARRYING = ("IADD3", "UIADD3", "IADD", "UIADD", "VIADD", "UVIADD", "IMAD", "UIMAD", "LEA", "ULEA")
PAIRS = ("FADD2", "FMUL2", "FFMA2", "F2F", "CS2R")
REGISTERS = {"64": 2, "128": 4, "256": 4, "U64": 2, "S64": 2, "WIDE": 2}  # each of LDG.256's two results has four


@cache
def destinations(opcode: str, operands: tuple[str, ...]) -> tuple[str, ...]:
    """Names of what is written, in the order in which a step gives it; "" for RZ and PT."""
    kind, *modifiers = opcode.split(".")
    if kind in RESULTLESS or not operands:
        return ()
    if kind == "R2P":
        return tuple(f"P{number}" for number in range(7) if int(operands[-1], 16) >> number & 1)
    leading = operands[:2] if kind in COMPARING else tuple(takewhile(is_predicate, operands))
    rest = () if kind in COMPARING else operands[len(leading) :]
    trailing = tuple(takewhile(is_predicate, rest[1:])) if kind in CARRYING else ()
    number = next((REGISTERS[name] for name in modifiers if name in REGISTERS), 1)
    if kind in ("HMMA", "IMMA"):
        number = 4
    elif kind in PAIRS or kind.startswith("D"):
        number = 2
    elif kind == "LDSM":
        number = int(modifiers[-1]) if modifiers[-1].isdigit() else 1
    elif kind in ("SHF", "USHF"):
        number = 1  # .U64 is what it reads
    results = rest[: 2 if kind in ("LDG", "LD") and "256" in modifiers else 1]
    words = [following(parse_operand(operand).name, place) for operand in results for place in range(number)]
    flags = [parse_operand(operand).name for operand in (*leading, *trailing)]
    return (*flags[: len(leading)], *words, *flags[len(leading) :])


def following(name: str, places: int) -> str:
    """Return the register `places` further."""
    space = name.rstrip("0123456789")
    return f"{space}{int(name[len(space) :]) + places}" if name else ""


def results(step: Instruction, registers: Registers, names: Sequence[str] = ()) -> dict[str, Value]:
    """Evaluate an instruction: return the values it writes, by name (`destinations` if at hand); None if unknown."""
    names = names or destinations(step.opcode, step.operands)
    found: dict[str, Value] = dict.fromkeys(names)
    if step.kind in STEPS:
        with suppress(UnknownError):
            found.update(zip(names, STEPS[step.kind](step, registers), strict=False))
    return found


Step = Callable[[Instruction, Registers], Sequence[Value]]


def both(left: Value, right: Value) -> Value:
    """Return left and right: false if one is, whatever the other."""
    if left is False or right is False:
        return False
    return None if left is None or right is None else left & right


def either(left: Value, right: Value) -> Value:
    """Return left or right: true if one is, whatever the other."""
    return invert(both(invert(left), invert(right)))


def unless_unknown(join: Callable[[Value, Value], Value], left: Value, right: Value) -> Value:
    """Join what is known."""
    return None if left is None or right is None else join(left, right)


JOIN: dict[str, Callable[[Value, Value], Value]] = {"AND": both, "OR": either, "XOR": partial(unless_unknown, xor)}
COMPARE = {"LT": lt, "LE": le, "GT": gt, "GE": ge, "EQ": eq, "NE": ne}


def sources(step: Instruction) -> tuple[list[str], list[str]]:
    """Operands after the result and the flags beside it: numbers, and predicates that follow them."""
    rest = step.operands[1:]
    if step.kind in CARRYING:
        rest = rest[len(tuple(takewhile(is_predicate, rest))) :]
    return [each for each in rest if not is_predicate(each)], [each for each in rest if is_predicate(each)]


def halves(value: Value) -> list[Value]:
    """64 bits as two registers."""
    return [value & WORD, value >> 32 & WORD]


def add(step: Instruction, r: Registers) -> Sequence[Value]:
    """IADD3 Rd, Pcarry, Pcarry, a, b, c, Pin, Pin."""
    numbers, carried = sources(step)
    if "64" in step.modifiers:
        return halves(sum(map(r.double, numbers)))
    total = sum(map(r.term, numbers)) + sum(map(r.bit, carried))
    return total & WORD, total >> 32 >= 1, total >> 32 >= 2


def multiply_add(step: Instruction, r: Registers) -> Sequence[Value]:
    """IMAD Rd, a, b, c; .WIDE: 64 bits of c and Rd; .HI: their upper half; .X: and a carry."""
    (a, b, c), carried = sources(step)
    read = r.word if "U32" in step.modifiers else r.signed
    product = 0 if {a, b} & {"RZ", "URZ"} else exact(read(a)) * exact(read(b))  # a move is written as 0 times anything
    ones = sum(map(r.bit, carried))
    if not {"WIDE", "HI"} & set(step.modifiers):
        return (product + r.term(c) + ones & WORD,)
    total = (product & PAIR) + r.double(c) + ones
    return [total >> 32 & WORD] if "HI" in step.modifiers else [*halves(total), total >> 64 != 0]


def move(step: Instruction, r: Registers) -> Sequence[Value]:
    """MOV Rd, a."""
    return halves(r.double(step.operands[1])) if "64" in step.modifiers else [r.word(step.operands[1])]


def shift(step: Instruction, r: Registers) -> Sequence[Value]:
    """SHF.L.U32 Rd, a, by, c and the rest: the 64 bits c:a, shifted, one half of them."""
    lower, by, upper = step.operands[1:4]
    names, count = set(step.modifiers), exact(r.word(by))
    wide = bool(names & {"U64", "S64"})
    most = 63 if wide else 32
    count = count & 31 if "W" in names else where(count > most, most, count)
    if "L" in names:
        value = exact(r.word(lower)) << count
        return [value + (exact(r.word(upper)) << count + 32) >> 32 & WORD if "HI" in names else value & WORD]
    top = r.signed(upper) if names & {"S32", "S64"} else r.word(upper)
    if "HI" in names or (not wide and lower in ("RZ", "URZ") and "W" not in names):
        return [top >> count & WORD]
    return [(exact(top) << 32 | exact(r.word(lower))) >> count & WORD]


def by_table(table: int, operands: Sequence[str], read: Callable[[str], Value], ones: int) -> Value:
    """LOP3 and PLOP3: bit a·4 + b·2 + c of the table, for each bit; an operand that does not matter is not read."""
    values = []
    for operand, bit in zip(operands, (4, 2, 1), strict=True):
        matters = any((table >> index & 1) != (table >> (index ^ bit) & 1) for index in range(8))
        values.append(read(operand) if matters else 0)
    result: Value = 0
    for index in range(8):
        if table >> index & 1:
            term: Value = ones
            for value, bit in zip(values, (4, 2, 1), strict=True):
                term = term & (value if index & bit else value ^ ones)
            result = result | term
    return result


def logic(step: Instruction, r: Registers) -> Sequence[Value]:
    """LOP3.LUT [Pnonzero,] Rd, a, b, c, table, Pin."""
    flags = is_predicate(step.operands[0])
    *operands, table = step.operands[1 + flags : 5 + flags]
    value = by_table(int(table, 16), operands, r.word, WORD)
    return [value != 0, value] if flags else [value]


def predicate_logic(step: Instruction, r: Registers) -> Sequence[Value]:
    """PLOP3.LUT P, P, a, b, c, table, table."""
    return [by_table(int(table, 16), step.operands[2:5], r.bit, 1) != 0 for table in step.operands[5:7]]


def compare(step: Instruction, r: Registers) -> Sequence[Value]:
    """ISETP.GE.U32.AND P, P, a, b, Pin; .EX: of the upper halves, the lower ones' result as Pex."""
    names = step.modifiers
    a, b, joined, *extended = step.operands[2:]
    read = r.word if "U32" in names else r.signed
    name = next(name for name in names if name in COMPARE)
    result: Value
    try:
        left, right = (map(r.double, (a, b))) if {"64", "U64", "S64"} & set(names) else (read(a), read(b))
        result = COMPARE[name](left, right)
        if extended:
            below = require_known(r.predicate(extended[0]))
            if name in ("EQ", "NE"):
                result = result & below if name == "EQ" else result | below
            else:
                result = COMPARE[name[0] + "T"](left, right) | ((left == right) & below)
    except UnknownError:
        result = None
    join = JOIN[next(name for name in names if name in JOIN)]
    other = r.predicate(joined)
    return join(result, other), join(invert(result), other)


def compare_floats(step: Instruction, r: Registers) -> Sequence[Value]:
    """FSETP.NEU.AND P, P, a, b, Pin, of registers and constants as they are: such as an eps of the launch."""
    a, b, joined = step.operands[2:5]
    name = next((name for name in step.modifiers if name.removesuffix("U") in COMPARE), "")
    result: Value = None
    if name and not any(sign in operand for sign in "-|~" for operand in (a, b)):
        with suppress(UnknownError):
            left, right = (float_of(r.word(one)) for one in (a, b))
            unordered = name.endswith("U") & (np.isnan(left) | np.isnan(right))
            result = COMPARE[name.removesuffix("U")](left, right) | unordered
            result = result if np.ndim(result) else bool(result)
    join, other = JOIN[next(name for name in step.modifiers if name in JOIN)], r.predicate(joined)
    return join(result, other), join(invert(result), other)


def scaled_add(step: Instruction, r: Registers) -> Sequence[Value]:
    """LEA Rd, [Pcarry,] a, b, by; LEA.HI[.X] Rd, a, b, c, by, [Pin]: the upper half of c:a << by, and b."""
    (a, b, *others), carried = sources(step)
    if "HI" not in step.modifiers:
        value = r.word(a) << r.word(others[0]) & WORD
    elif "SX32" in step.modifiers:
        value = (exact(r.signed(a)) & PAIR) << r.word(others[0]) >> 32 & WORD
    else:
        value = (exact(r.word(others[0])) << 32 | exact(r.word(a))) << r.word(others[1]) >> 32 & WORD
    total = value + r.term(b) + sum(map(r.bit, carried))
    return total & WORD, total >> 32 >= 1


def extreme(step: Instruction, r: Registers) -> Sequence[Value]:
    """VIMNMX Rd, a, b, Pmin; VIADDMNMX Rd, a, b, c, Pmin: of a + b and c."""
    numbers, flags = sources(step)
    words = [r.word(number) for number in numbers]
    if step.kind.endswith("ADDMNMX"):
        words = [words[0] + words[1] & WORD, words[2]]
    left, right = words if "U32" in step.modifiers else map(signed, words)
    smaller = left < right
    least, most = where(smaller, left, right), where(smaller, right, left)
    return [where(require_known(r.predicate(flags[-1])), least, most) & WORD]


def select(step: Instruction, r: Registers) -> Sequence[Value]:
    """SEL Rd, a, b, P."""
    a, b, condition = step.operands[1:4]
    return [where(require_known(r.predicate(condition)), r.word(a), r.word(b))]


def permute(step: Instruction, r: Registers) -> Sequence[Value]:
    """PRMT Rd, a, selector, b: each byte is one of the eight of b and a, or the sign of it."""
    a, selector, b = map(r.word, step.operands[1:4])
    result: Value = 0
    for byte in range(4):
        wanted = selector >> 4 * byte
        found = (exact(b) << 32 | exact(a)) >> (wanted & 7) * 8 & 0xFF
        result = result | where(wanted & 8 != 0, (found >> 7 & 1) * 0xFF, found) << 8 * byte
    return [result]


def extend(step: Instruction, r: Registers) -> Sequence[Value]:
    """SGXT[.U32] Rd, a, bits: the lower bits, their sign extended."""
    value, bits = map(r.word, step.operands[1:3])
    if isinstance(bits, np.ndarray) or not 0 < bits <= 32:
        raise UnknownError
    value, sign = value & (1 << bits) - 1, 1 << bits - 1
    return [value if "U32" in step.modifiers else (value ^ sign) - sign & WORD]


def constant(step: Instruction, r: Registers) -> Sequence[Value]:
    """LDC[.64, .128] Rd, c[0x0][…]: word by word."""
    head, _, offset = step.operands[1].rpartition("[0x")
    number = next((REGISTERS[name] for name in step.modifiers if name in REGISTERS), 1)
    if number == 1 or not head.startswith("c[0x0]"):
        return [r.word(step.operands[1])]
    return [r.word(f"{head}[0x{int(offset[:-1], 16) + 4 * place:x}]") for place in range(number)]


def half_constant(step: Instruction, _r: Registers) -> Sequence[Value]:
    """HFMA2 Rd, -RZ, RZ, upper, lower: a constant, moved by the pipe of half-precision numbers."""
    try:
        upper, lower = (int(np.float16(half).view(np.uint16)) for half in step.operands[3:])
    except ValueError:
        raise UnknownError from None
    if {operand.lstrip("-") for operand in step.operands[1:3]} != {"RZ"}:
        raise UnknownError
    return [upper << 16 | lower]


def pack(step: Instruction, r: Registers) -> Sequence[Value]:
    """P2R[.B1] Rd, PR, a, mask: predicates as bits of a byte, the others from a."""
    place, mask = byte_of(step.opcode), int(step.operands[3], 16)
    chosen = [number for number in range(7) if mask >> number & 1]
    return [(r.word(step.operands[2]) & ~(mask << place)) + sum(r.bit(f"P{n}") << n + place for n in chosen)]


def unpack(step: Instruction, r: Registers) -> Sequence[Value]:
    """R2P PR, a[.B1], mask: the way back."""
    _, source, mask = step.operands
    value = r.word(source.split(".")[0]) >> byte_of(source)
    return [value >> number & 1 != 0 for number in range(7) if int(mask, 16) >> number & 1]


def byte_of(text: str) -> int:
    """Return the bit that a byte starts at: 8 of R4.B1."""
    return 8 * next((number for number in range(1, 4) if f".B{number}" in text), 0)


def to_float(step: Instruction, r: Registers) -> Sequence[Value]:
    """I2F[.RP][.U32] Rd, a: a division of integers starts so, .RP rounds up."""
    value = (r.word if "U32" in step.modifiers else r.signed)(step.operands[-1])
    double = np.asarray(value, dtype=np.float64)
    number = double.astype(np.float32)
    if "RP" in step.modifiers:
        number = np.where(number < double, np.nextafter(number, np.float32(np.inf)), number)
    return [bits_of(number)]


def reciprocal(step: Instruction, r: Registers) -> Sequence[Value]:
    """MUFU.RCP Rd, a: of a known number, as in a division of integers; the last bit is corrected there anyway."""
    if "RCP" not in step.modifiers:
        raise UnknownError
    with np.errstate(divide="ignore"):
        return [bits_of(np.float32(1) / float_of(r.word(step.operands[1])))]


def to_integer(step: Instruction, r: Registers) -> Sequence[Value]:
    """F2I.U32.TRUNC Rd, a."""
    if not {"U32", "TRUNC"} <= set(step.modifiers):
        raise UnknownError
    number = np.clip(np.nan_to_num(float_of(r.word(step.operands[-1])).astype(np.float64)), 0, WORD)
    return [plain(number.astype(np.int64))]


def float_of(value: Value) -> np.ndarray:
    """32 bits as a float."""
    return np.asarray(value, dtype=np.int64).astype(np.uint32).view(np.float32)


def bits_of(number: np.ndarray) -> Value:
    """Return a float as 32 bits."""
    return plain(np.asarray(number, dtype=np.float32).view(np.uint32))


def plain(value: np.ndarray) -> Value:
    """Python's numbers; an array of no axis as one of them."""
    return value.astype(np.int64) if value.ndim else int(value)


def exchange(step: Instruction, r: Registers) -> Sequence[Value]:
    """SHFL.IDX P, Rd, a, lane, …: one lane's value in all; the other forms move what is data."""
    value, lane = r.word(step.operands[2]), step.operands[3]
    place = parse_operand(lane).form != "other" and "IDX" in step.modifiers and r.word(lane)
    if not isinstance(value, np.ndarray):
        return [None, value]
    if isinstance(place, bool | np.ndarray):
        raise UnknownError
    return True, of_lane(value, place & 31)


def first_lane(step: Instruction, r: Registers) -> Sequence[Value]:
    """R2UR URd, a."""
    return [of_lane(r.word(step.operands[-1]), 0)]


STEPS: dict[str, Step] = {
    **dict.fromkeys(("IADD3", "UIADD3", "IADD", "UIADD", "VIADD", "UVIADD"), add),
    **dict.fromkeys(("IMAD", "UIMAD"), multiply_add),
    **dict.fromkeys(("MOV", "UMOV"), move),
    **dict.fromkeys(("SHF", "USHF"), shift),
    **dict.fromkeys(("LOP3", "ULOP3"), logic),
    **dict.fromkeys(("PLOP3", "UPLOP3"), predicate_logic),
    **dict.fromkeys(("ISETP", "UISETP"), compare),
    "FSETP": compare_floats,
    **dict.fromkeys(("LEA", "ULEA"), scaled_add),
    **dict.fromkeys(("SEL", "USEL"), select),
    **dict.fromkeys(("VIMNMX", "UVIMNMX", "IMNMX", "UIMNMX", "VIADDMNMX", "UVIADDMNMX"), extreme),
    **dict.fromkeys(("PRMT", "UPRMT"), permute),
    **dict.fromkeys(("LDC", "LDCU", "ULDC"), constant),
    **dict.fromkeys(("SGXT", "USGXT"), extend),
    **dict.fromkeys(("I2F", "I2FP"), to_float),
    **{"HFMA2": half_constant, "P2R": pack, "R2P": unpack, "MUFU": reciprocal, "F2I": to_integer, "SHFL": exchange},
    "IABS": lambda step, r: [abs(r.signed(step.operands[1]))],
    "CS2R": lambda step, _: [0, 0] if step.operands[1] == "SRZ" else [],  # else the clock
    "R2UR": first_lane,
    "ELECT": lambda _step, r: [np.arange(len(r.lanes)) % WARP == 0],  # one lane of a warp
    # SYNCS.PHASECHK.TRY, USETMAXREG.TRY_ALLOC: tried until it succeeds; a walk of one warp takes it as over.
    **dict.fromkeys(("SYNCS", "USETMAXREG"), lambda step, _: [True] if is_predicate(step.operands[0]) else []),
}
