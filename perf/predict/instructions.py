"""The integer instructions of SASS, each a function of the registers that gives the results for its leading operands.

Only what indices, trip counts and guards are computed with is here; of every other instruction the results are unknown
(`results`). Where a step needs more than a line, the pattern of its operands stands above it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .integers import (
    COMPARE,
    JOIN,
    PAIR,
    WORD,
    Value,
    by_table,
    carry,
    chosen,
    either,
    high,
    inverted,
    low,
    pair,
    permuted,
    product,
    shifted_left,
    shifted_right,
    signed,
    total,
    wide_sum,
)
from .listing import Instruction
from .registers import Registers, is_predicate

Results = list[tuple[str, int, Value]]  # operand, registers after it, value
Step = Callable[[Instruction, Registers], Results]
PREDICATES = 7  # of a lane
REGISTERS_OF = {"64": 2, "128": 4, "256": 4, "U64": 2, "S64": 2}


def leading(step: Instruction) -> tuple[str, list[str], tuple[str, ...]]:
    """The result, the predicates beside it, and the sources."""
    result, *rest = step.operands
    flags = []
    while rest and is_predicate(rest[0]):
        flags.append(rest.pop(0))
    return result, flags, tuple(rest)


def trailing(sources: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Sources, and the predicates that follow them."""
    numbers = [source for source in sources if not is_predicate(source)]
    return numbers, [source for source in sources if is_predicate(source)]


def doubled(result: str, value: Value) -> Results:
    """64 bits as two registers."""
    return [(result, 0, low(value)), (result, 1, high(value))]


def add(step: Instruction, registers: Registers) -> Results:
    """IADD3 Rd, Pcarry, Pcarry, a, b, c, Pin, Pin."""
    result, flags, sources = leading(step)
    numbers, carried = trailing(sources)
    if "64" in step.modifiers:
        value = total(*(registers.double(number) for number in numbers))
        return doubled(result, None if value is None else value & PAIR)
    ones = [chosen(registers.predicate(flag), 1, 0) for flag in carried]
    value = total(*(registers.term(number) for number in numbers), *ones)
    return [(result, 0, low(value)), *((flag, 0, carry(value, n + 1)) for n, flag in enumerate(flags))]


def multiply_add(step: Instruction, registers: Registers) -> Results:
    """IMAD Rd, a, b, c; .WIDE: 64 bits of c and Rd; .HI: their upper half; .X: and a carry."""
    result, flags, sources = leading(step)
    numbers, carried = trailing(sources)
    as_read = (lambda value: value) if "U32" in step.modifiers else signed
    left, right = (as_read(registers.word(number)) for number in numbers[:2])
    none = any(isinstance(value, int) and value == 0 for value in (left, right))
    both = 0 if none else product(left, right)  # 0 times something unknown: a move is written so
    ones = [chosen(registers.predicate(flag), 1, 0) for flag in carried]
    if "WIDE" in step.modifiers or "HI" in step.modifiers:
        value, over = wide_sum(both, registers.double(numbers[2]), *(ones or [0]))
        if "HI" in step.modifiers:
            return [(result, 0, high(value))]
        return [*doubled(result, value), *((flag, 0, over) for flag in flags)]
    value = total(both, registers.term(numbers[2]), *ones)
    return [(result, 0, low(value)), *((flag, 0, None) for flag in flags)]


def move(step: Instruction, registers: Registers) -> Results:
    """MOV Rd, a."""
    if "64" in step.modifiers:
        return doubled(step.operands[0], registers.double(step.operands[1]))
    return [(step.operands[0], 0, registers.word(step.operands[1]))]


def clear(step: Instruction, _registers: Registers) -> Results:
    """CS2R Rd, SRZ: a pair of zeros, or the clock."""
    return doubled(step.operands[0], 0 if step.operands[1] == "SRZ" else None)


def shift(step: Instruction, registers: Registers) -> Results:
    """SHF.L.U32 Rd, a, by, c and the rest: the 64 bits c:a, shifted, one half of them."""
    result, lower, by, upper = step.operands[:4]
    count = registers.word(by)
    names = step.modifiers
    wide = "U64" in names or "S64" in names
    if "W" in names:
        count = None if count is None else count & 31
    elif count is not None:
        count = (
            np.minimum(count, 63 if wide else 32) if isinstance(count, np.ndarray) else min(count, 63 if wide else 32)
        )
    if "L" in names:
        value = shifted_left(registers.word(lower), count)
        if "HI" not in names:
            return [(result, 0, low(value))]
        value = total(value, shifted_left(shifted_left(registers.word(upper), count), 32))
        return [(result, 0, high(value))]
    top = registers.word(upper)
    whole = pair(registers.word(lower), top)
    if "S32" in names or "S64" in names:
        top = signed(top)
    elif isinstance(whole, int):
        whole &= PAIR
    if "HI" in names or (not wide and lower in ("RZ", "URZ") and "W" not in names):
        return [(result, 0, low(shifted_right(top, count)))]
    return [(result, 0, low(shifted_right(whole, count)))]


def logic(step: Instruction, registers: Registers) -> Results:
    """LOP3.LUT [Pnonzero,] Rd, a, b, c, table, Pin."""
    operands = list(step.operands)
    flags = [operands.pop(0)] if is_predicate(operands[0]) else []
    result, a, b, c, table = operands[:5]
    value = by_table(int(table, 16), *(registers.word(source) for source in (a, b, c)))
    nonzero = None if value is None else value != 0
    return [(result, 0, value), *((flag, 0, nonzero) for flag in flags)]


def predicate_logic(step: Instruction, registers: Registers) -> Results:
    """PLOP3.LUT P, P, a, b, c, table, table."""
    first, second, *sources = step.operands
    a, b, c = (as_bits(registers.predicate(source)) for source in sources[:3])
    found: Results = []
    for result, table in zip((first, second), sources[3:5], strict=True):
        value = by_table(int(table, 16), a, b, c, ones=1)
        found.append((result, 0, None if value is None else value != 0))
    return found


def as_bits(predicate: Value) -> Value:
    """A predicate as 0 or 1."""
    return predicate.astype(int) if isinstance(predicate, np.ndarray) else predicate


def compare(step: Instruction, registers: Registers) -> Results:
    """ISETP.GE.U32.AND P, P, a, b, Pin; .EX: of the upper halves, the lower ones' result as Pex."""
    names = step.modifiers
    first, second, a, b, joined, *extended = step.operands
    if "64" in names or "U64" in names or "S64" in names:
        left, right = registers.double(a), registers.double(b)
    else:
        left, right = registers.word(a), registers.word(b)
        if "U32" not in names:
            left, right = signed(left), signed(right)
    name = next(name for name in names if name in COMPARE)
    result = COMPARE[name](left, right)
    if extended:
        below = registers.predicate(extended[0])
        if name == "EQ":
            result = JOIN["AND"](result, below)
        elif name == "NE":
            result = either(result, below)
        else:
            strict = COMPARE[name[0] + "T"](left, right)
            result = either(strict, JOIN["AND"](COMPARE["EQ"](left, right), below))
    join = JOIN[next(name for name in names if name in JOIN)]
    other = registers.predicate(joined)
    return [(first, 0, join(result, other)), (second, 0, join(inverted(result), other))]


def scaled_add(step: Instruction, registers: Registers) -> Results:
    """LEA Rd, [Pcarry,] a, b, by; LEA.HI[.X] Rd, a, b, c, by, [Pin]: the upper half of c:a << by, and b."""
    result, flags, sources = leading(step)
    numbers, carried = trailing(sources)
    if "HI" in step.modifiers:
        a, b = numbers[:2]
        if "SX32" in step.modifiers:
            bottom = signed(registers.word(a))
            whole, by = (None if bottom is None else bottom & PAIR if isinstance(bottom, int) else bottom), numbers[2]
        else:
            whole, by = pair(registers.word(a), registers.word(numbers[2])), numbers[3]
        value = high(shifted_left(whole, registers.word(by)))
    else:
        a, b, by = numbers[:3]
        value = low(shifted_left(registers.word(a), registers.word(by)))
    ones = [chosen(registers.predicate(flag), 1, 0) for flag in carried]
    value = total(value, registers.term(b), *ones)
    return [(result, 0, low(value)), *((flag, 0, carry(value)) for flag in flags)]


def select(step: Instruction, registers: Registers) -> Results:
    """SEL Rd, a, b, P."""
    result, a, b, condition = step.operands[:4]
    return [(result, 0, chosen(registers.predicate(condition), registers.word(a), registers.word(b)))]


def extreme(step: Instruction, registers: Registers) -> Results:
    """VIMNMX Rd, a, b, Pmin; VIADDMNMX Rd, a, b, c, Pmin: of a + b and c."""
    result, *sources = step.operands
    numbers, flags = trailing(tuple(sources))
    as_read = (lambda value: value) if "U32" in step.modifiers else signed
    words = [registers.word(number) for number in numbers]
    if step.kind.endswith("ADDMNMX"):
        words = [low(total(*words[:2])), words[2]]
    if len(words) != 2:
        return [(result, 0, None)]
    left, right = map(as_read, words)
    smaller = COMPARE["LT"](left, right)
    least, most = chosen(smaller, left, right), chosen(smaller, right, left)
    return [(result, 0, low(chosen(registers.predicate(flags[-1]), least, most)))]


def absolute(step: Instruction, registers: Registers) -> Results:
    """IABS Rd, a."""
    value = signed(registers.word(step.operands[1]))
    return [(step.operands[0], 0, None if value is None else abs(value))]


def permute(step: Instruction, registers: Registers) -> Results:
    """PRMT Rd, a, selector, b."""
    result, a, selector, b = step.operands[:4]
    return [(result, 0, permuted(*(registers.word(source) for source in (a, selector, b))))]


def extended(step: Instruction, registers: Registers) -> Results:
    """SGXT[.U32] Rd, a, bits: the lower bits, their sign extended."""
    value, bits = (registers.word(source) for source in step.operands[1:3])
    if value is None or not isinstance(bits, int) or not 0 < bits < 32:
        return [(step.operands[0], 0, value if bits == 32 else None)]
    value = value & (1 << bits) - 1
    if "U32" not in step.modifiers:
        value = ((value ^ 1 << bits - 1) - (1 << bits - 1)) & WORD
    return [(step.operands[0], 0, value)]


def constant(step: Instruction, registers: Registers) -> Results:
    """LDC[.64, .128] Rd, c[0x0][…]."""
    result, source = step.operands[:2]
    number = next((REGISTERS_OF[name] for name in step.modifiers if name in REGISTERS_OF), 1)
    found: Results = []
    for place in range(number):
        moved = source if not place else shifted_constant(source, 4 * place)
        found.append((result, place, registers.word(moved)))
    return found


def shifted_constant(source: str, by: int) -> str:
    """c[0x0][0x380] as c[0x0][0x384]; what is not such a text is left unknown."""
    head, opening, offset = source.rpartition("[0x")
    return f"{head}{opening}{int(offset[:-1], 16) + by:x}]" if opening and head.startswith("c[0x0]") else ""


def half_constant(step: Instruction, _registers: Registers) -> Results:
    """HFMA2 Rd, -RZ, RZ, upper, lower: a constant, moved by the pipe of half-precision numbers."""
    result, left, right, *halves = step.operands
    try:
        numbers = [int(np.float16(half).view(np.uint16)) for half in halves]
    except ValueError:
        numbers = []
    is_constant = {left.lstrip("-"), right.lstrip("-")} == {"RZ"} and len(numbers) == 2
    return [(result, 0, numbers[0] << 16 | numbers[1] if is_constant else None)]


def packed(step: Instruction, registers: Registers) -> Results:
    """P2R[.B1] Rd, PR, a, mask: predicates as bits of a byte, the others from a."""
    result, _, source, mask = step.operands
    shift, bits = byte_of(step.opcode), int(mask, 16)
    value = registers.word(source)
    value = None if value is None else value & (WORD ^ bits << shift)
    for number in range(PREDICATES):
        if bits >> number & 1:
            value = total(value, chosen(registers.predicate(f"P{number}"), 1 << number + shift, 0))
    return [(result, 0, value)]


def unpacked(step: Instruction, registers: Registers) -> Results:
    """R2P PR, a[.B1], mask: the way back."""
    _, source, mask = step.operands
    value = registers.word(source.split(".")[0])
    found: Results = []
    for number in range(PREDICATES):
        if int(mask, 16) >> number & 1:
            found.append((f"P{number}", 0, None if value is None else value >> number + byte_of(source) & 1 != 0))
    return found


def byte_of(text: str) -> int:
    """The bit that a byte starts at: 8 of R4.B1."""
    return 8 * next((number for number in range(1, 4) if f".B{number}" in text), 0)


def to_float(step: Instruction, registers: Registers) -> Results:
    """I2F[.RP][.U32] Rd, a: a division of integers starts so, .RP rounds up."""
    value = registers.word(step.operands[-1])
    value = value if "U32" in step.modifiers else signed(value)
    if value is None:
        return [(step.operands[0], 0, None)]
    number = np.asarray(value, dtype=np.float64).astype(np.float32)
    if "RP" in step.modifiers:
        number = np.where(number < value, np.nextafter(number, np.float32(np.inf)), number)
    return [(step.operands[0], 0, bits_of(number))]


def special(step: Instruction, registers: Registers) -> Results:
    """MUFU.RCP Rd, a: of a known number, as in a division of integers; the last bit is corrected there anyway."""
    value = registers.word(step.operands[1]) if "RCP" in step.modifiers else None
    if value is None:
        return [(step.operands[0], 0, None)]
    with np.errstate(divide="ignore"):
        return [(step.operands[0], 0, bits_of(np.float32(1) / float_of(value)))]


def to_integer(step: Instruction, registers: Registers) -> Results:
    """F2I.U32.TRUNC Rd, a."""
    value = registers.word(step.operands[-1])
    if value is None or not {"U32", "TRUNC"} <= set(step.modifiers):
        return [(step.operands[0], 0, None)]
    number = np.clip(np.nan_to_num(float_of(value).astype(np.float64)), 0, WORD)
    return [(step.operands[0], 0, scalar_or_lanes(number.astype(np.int64)))]


def float_of(value: Value) -> np.ndarray:
    """32 bits as a float."""
    return np.asarray(value, dtype=np.int64).astype(np.uint32).view(np.float32)


def bits_of(number: np.ndarray) -> Value:
    """A float as 32 bits."""
    return scalar_or_lanes(np.asarray(number, dtype=np.float32).view(np.uint32).astype(np.int64))


def scalar_or_lanes(value: np.ndarray) -> Value:
    """An array of no axis as a number."""
    return value if value.ndim else int(value)


def exchange(step: Instruction, registers: Registers) -> Results:
    """SHFL.IDX P, Rd, a, lane, …: one lane's value in all; the other forms move what is data."""
    flag, result, source, lane = step.operands[:4]
    value, place = registers.word(source), registers.word(lane)
    if "IDX" not in step.modifiers or not isinstance(place, int) or value is None:
        return [(result, 0, value if isinstance(value, int) else None), (flag, 0, None)]
    return [(result, 0, int(value[place & 31]) if isinstance(value, np.ndarray) else value), (flag, 0, True)]


def to_uniform(step: Instruction, registers: Registers) -> Results:
    """R2UR URd, a: the first lane's value."""
    result, source = step.operands[0], step.operands[-1]
    value = registers.word(source)
    return [(result, 0, int(value[0]) if isinstance(value, np.ndarray) else value)]


def elect(step: Instruction, _registers: Registers) -> Results:
    """ELECT P, URd, P: one lane of the warp."""
    return [(step.operands[0], 0, np.arange(32) == 0), (step.operands[1], 0, None)]


def arrived(step: Instruction, _registers: Registers) -> Results:
    """SYNCS.PHASECHK P, …, USETMAXREG.TRY_ALLOC P: tried until it succeeds; a walk of one warp takes it as over."""
    return [(operand, 0, True) for operand in step.operands[:1] if is_predicate(operand)]


STEPS: dict[str, Step] = {
    **dict.fromkeys(("IADD3", "UIADD3", "IADD", "UIADD", "VIADD", "UVIADD"), add),
    **dict.fromkeys(("IMAD", "UIMAD"), multiply_add),
    **dict.fromkeys(("MOV", "UMOV"), move),
    **dict.fromkeys(("SHF", "USHF"), shift),
    **dict.fromkeys(("LOP3", "ULOP3"), logic),
    **dict.fromkeys(("PLOP3", "UPLOP3"), predicate_logic),
    **dict.fromkeys(("ISETP", "UISETP"), compare),
    **dict.fromkeys(("LEA", "ULEA"), scaled_add),
    **dict.fromkeys(("SEL", "USEL"), select),
    **dict.fromkeys(("VIMNMX", "UVIMNMX", "IMNMX", "UIMNMX", "VIADDMNMX", "UVIADDMNMX"), extreme),
    **dict.fromkeys(("PRMT", "UPRMT"), permute),
    **dict.fromkeys(("LDC", "LDCU", "ULDC"), constant),
    **dict.fromkeys(("SGXT", "USGXT"), extended),
    "HFMA2": half_constant,
    "P2R": packed,
    "R2P": unpacked,
    **dict.fromkeys(("I2F", "I2FP"), to_float),
    "MUFU": special,
    "F2I": to_integer,
    "IABS": absolute,
    "CS2R": clear,
    "SHFL": exchange,
    "R2UR": to_uniform,
    "ELECT": elect,
    **dict.fromkeys(("SYNCS", "USETMAXREG"), arrived),
}
RESULTLESS = ("STG", "ST", "STS", "STL", "RED", "BAR", "DEPBAR", "LDGSTS", "LDGDEPBAR", "BRA", "CALL", "BSSY", "EXIT")


def results(step: Instruction, registers: Registers) -> Results:
    """What an instruction writes; None for values that are not known."""
    if step.kind in STEPS:
        return STEPS[step.kind](step, registers)
    if step.kind in RESULTLESS or not step.operands:
        return []
    operands = list(step.operands)
    found: Results = []
    while operands and is_predicate(operands[0]):
        found.append((operands.pop(0), 0, None))
    if step.kind in ("LDG", "LD") and "256" in step.modifiers:  # two results of four registers each
        return [*found, *((operand, place, None) for operand in operands[:2] for place in range(4))]
    return [*found, *((operand, place, None) for operand in operands[:1] for place in range(registers_of(step)))]


def registers_of(step: Instruction) -> int:
    """How many registers of a result are written, at most."""
    if step.kind in ("HMMA", "IMMA"):
        return 4
    if step.kind in ("FADD2", "FMUL2", "FFMA2", "F2F") or step.kind.startswith("D"):
        return 2
    if step.kind == "LDSM":
        return int(step.modifiers[-1]) if step.modifiers[-1].isdigit() else 1
    return next((REGISTERS_OF[name] for name in step.modifiers if name in REGISTERS_OF), 1)
