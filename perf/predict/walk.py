"""One warp walked through a kernel's machine code: which instructions it issues, how often, and what they touch.

Integer registers are computed (`instructions`), so that trip counts, guards and addresses are those of the launch's
sizes and nothing about a loop is guessed. What comes from memory is unknown. A branch on something unknown is recorded
in `Walk.undecided`, unless it leads around a routine for rare operands (a division's slow path): that is never entered.

Lanes that part ways run one group after the other, the one that lies first in the code first, and go on together where
they meet: as the hardware does with code that was structured once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from ...errors import MHCError
from .instructions import REGISTERS_OF, STEPS, results
from .integers import Value, both
from .listing import Instruction
from .registers import Registers, is_predicate, named

WARP = 32
MAX_STEPS = 2_000_000
BUFFER_SHIFT = 40  # addresses of a pointer argument start at (its number + 1) << 40
LINE = 128  # bytes of a cache line
SLOW_PATH = 400  # instructions, at most, that a branch around a slow path skips
STACK = 1 << 20
# Where the constant bank holds the kernel's arguments, the block's and the grid's dimensions, the stack pointer.
BANK = {
    "sm_80": (0x160, 0x0, 0xC, 0x28),
    "sm_90a": (0x210, 0x0, 0xC, 0x28),
    "sm_100a": (0x380, 0x360, 0x370, 0x37C),
    "sm_120a": (0x380, 0x360, 0x370, 0x37C),
}
GLOBAL = {"LDG", "LD", "LDGSTS", "STG", "ST"}
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
LOOKED_AT = {*GLOBAL, "BRA", "EXIT", "RET", "CALL", "BRX", "JMX", "BRXU", "S2R", "S2UR", "LDL", "STL"}
SPECIAL = {"SR_LANEID": "lane", "SR_TID.X": "x", "SR_TID.Y": "y", "SR_TID.Z": "z"}


@dataclass(frozen=True)
class Argument:
    """A parameter of the entry: `kind` "buffer", "tensor map" (128 bytes) or a number's dtype; `value` of a number."""

    name: str
    kind: str
    value: float = 0

    @property
    def size(self) -> tuple[int, int]:
        """Bytes, and what its place is a multiple of."""
        return {"int32": (4, 4), "float32": (4, 4), "tensor map": (128, 128)}.get(self.kind, (8, 8))


@dataclass(frozen=True)
class Entry:
    """How a kernel is launched: what its registers start from."""

    arch: str
    arguments: tuple[Argument, ...]
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]

    @property
    def warps(self) -> int:
        """Of a block."""
        return -(-prod(self.threads) // WARP)

    def middle(self) -> tuple[int, int, int]:
        """A block that is at no edge, if there is one."""
        x, y, z = self.grid
        return x // 2, y // 2, z // 2

    def constants(self) -> dict[int, int]:
        """The constant bank, word by word."""
        place, block, grid, stack = BANK[self.arch]
        bank = {stack: STACK}
        for axis in range(3):
            bank[block + 4 * axis], bank[grid + 4 * axis] = self.threads[axis], self.grid[axis]
        for number, argument in enumerate(self.arguments):
            size, alignment = argument.size
            place = -(-place // alignment) * alignment
            value = (number + 1) << BUFFER_SHIFT if argument.kind == "buffer" else int(argument.value)
            if argument.kind not in ("tensor map", "float32"):  # what is computed with a float is not followed
                for offset in range(0, size, 4):
                    bank[place + offset] = value >> 8 * offset & 0xFFFFFFFF
            place += size
        return bank


@dataclass(frozen=True)
class Access:
    """What a global access touches: the argument's number, -1 if not known, lanes, bytes a lane, lines of 128 bytes."""

    buffer: int
    lanes: int
    width: int
    lines: tuple[int, ...]


Step = tuple[int, "Access | None"]  # index of an instruction, and what it touches of global memory


@dataclass
class Walk:
    """A warp's way: each instruction that it issued, in order."""

    steps: list[Step] = field(default_factory=list)
    undecided: Counter[int] = field(default_factory=Counter)


def no_constant(_place: int) -> None:
    """A constant bank without an entry."""


def unknown_results(step: Instruction) -> tuple[str, ...] | None:
    """What an instruction leaves unknown, where that is all it does; None for one that has to be looked at."""
    if step.guard or step.kind in LOOKED_AT or step.kind in STEPS:
        return None
    return tuple(
        name for operand, offset, _ in results(step, Registers(no_constant)) if (name := named(operand, offset))
    )


def walk(code: Sequence[Instruction], entry: Entry, warp: int, block: tuple[int, int, int] | None = None) -> Walk:
    """Walk one warp of a block, the middle one by default. Raises MHCError where it comes to no end."""
    return Walker(code, entry, warp, block or entry.middle()).run()


class Walker:
    """The registers and where the lanes are: groups by the index of their next instruction."""

    def __init__(self, code: Sequence[Instruction], entry: Entry, warp: int, block: tuple[int, int, int]) -> None:
        self.code, self.block = code, block
        bank = entry.constants()
        self.registers = Registers(bank.get)
        self.places = {step.address: index for index, step in enumerate(code)}
        self.forgotten = [unknown_results(step) for step in code]
        thread = warp * WARP + np.arange(WARP)
        x, y, _ = entry.threads
        self.own = {"lane": np.arange(WARP), "x": thread % x, "y": thread // x % y, "z": thread // (x * y)}
        self.groups: dict[int, np.ndarray] = {0: thread < prod(entry.threads)}
        self.local: dict[int, Value] = {}
        self.found = Walk()

    def run(self) -> Walk:
        """Until no lane is left."""
        while self.groups:
            index = min(self.groups)
            lanes = self.groups.pop(index)
            if not self.groups:
                index = self.hurry(index)
            if len(self.found.steps) >= MAX_STEPS:
                raise MHCError(f"predict: expected a warp to end within {MAX_STEPS} instructions, got none that does")
            self.step(index, lanes)
        return self.found

    def hurry(self, index: int) -> int:
        """Go on, all lanes together, as long as instructions give nothing but data: most do."""
        values, partly, steps = self.registers.values, self.registers.partly, self.found.steps
        while (names := self.forgotten[index]) is not None:
            steps.append((index, None))
            for name in names:
                values[name] = None
                if partly:
                    partly.pop(name, None)
            index += 1
        return index

    def step(self, index: int, lanes: np.ndarray) -> None:
        """One instruction of a group of lanes."""
        step, registers = self.code[index], self.registers
        # Lanes that have left write nothing that a later instruction reads: a mask is needed while some wait.
        mask = lanes if self.groups else None
        registers.lanes = lanes
        guard = registers.predicate(step.guard) if step.guard else True
        if isinstance(guard, np.ndarray):
            registers.lanes = lanes & guard
        self.issue(index, step, guard, lanes)
        for next_index, going in self.next(index, step, guard, lanes):
            before = self.groups.get(next_index)
            self.groups[next_index] = going if before is None else before | going
        if guard is not False and step.kind not in ("BRA", "EXIT"):
            self.execute(step, guard, mask)

    def issue(self, index: int, step: Instruction, guard: Value, lanes: np.ndarray) -> None:
        """Note the instruction, and what it touches."""
        access = None
        if step.kind in GLOBAL and guard is not False:
            active = lanes if guard is None or guard is True else lanes & guard
            if step.kind == "LDGSTS" and is_predicate(step.operands[-1]):  # where it is false, zeros are written
                fetched = self.registers.predicate(step.operands[-1])
                active = active if fetched is None else active & fetched
            if number := int(active.sum()):
                access = self.touched(step, active, number)
        self.found.steps.append((index, access))

    def touched(self, step: Instruction, active: np.ndarray, number: int) -> Access:
        """The lines of a global access."""
        width = next((WIDTHS[name] for name in step.modifiers if name in WIDTHS), 4)
        operand = next((o for o in reversed(step.operands) if "[" in o), None)
        # LDGSTS names its shared address first, then the global one behind the descriptor.
        address = self.registers.address(operand) if operand else None
        if address is None:
            return Access(-1, number, width, ())
        places = np.broadcast_to(address, (WARP,))[active]
        buffers = places >> BUFFER_SHIFT
        lines = tuple(np.unique(places // LINE).tolist())
        return Access(int(buffers[0]) - 1 if (buffers == buffers[0]).all() else -1, number, width, lines)

    def execute(self, step: Instruction, guard: Value, mask: np.ndarray | None) -> None:
        """Write what the instruction gives, in the lanes that its guard allows."""
        registers = self.registers
        if step.kind in ("S2R", "S2UR"):
            written = [(step.operands[0], 0, self.special(step.operands[1], step.kind))]
        elif step.kind == "LDL":
            written = self.loaded(step)
        elif step.kind == "STL":
            self.stored(step)
            return
        else:
            written = results(step, registers)
        if guard is not True:
            if guard is None:  # written or not: unknown afterwards
                written = [(operand, offset, None) for operand, offset, _ in written]
            else:
                mask = guard if mask is None else mask & guard
        for operand, offset, value in written:
            registers.write(operand, value, mask, offset)

    def special(self, name: str, kind: str) -> Value:
        """A special register: thread, block, lane; rank in a cluster of one."""
        if name in SPECIAL:
            value = self.own[SPECIAL[name]]
            return value if kind == "S2R" else int(value[0])
        if name.startswith("SR_CTAID."):
            return self.block["XYZ".index(name[-1])]
        return 0 if name in ("SR_CgaCtaId", "SR_CLUSTERID.X", "SR_SWINHI") else None

    def loaded(self, step: Instruction) -> list[tuple[str, int, Value]]:
        """Spilled registers come back."""
        address = self.registers.address(step.operands[1])
        number = next((REGISTERS_OF[name] for name in step.modifiers if name in REGISTERS_OF), 1)
        if not isinstance(address, int):
            return [(step.operands[0], place, None) for place in range(number)]
        return [(step.operands[0], place, self.local.get(address + 4 * place)) for place in range(number)]

    def stored(self, step: Instruction) -> None:
        """Spill registers."""
        address, source = self.registers.address(step.operands[0]), step.operands[1]
        number = next((REGISTERS_OF[name] for name in step.modifiers if name in REGISTERS_OF), 1)
        if isinstance(address, int):
            for place in range(number):
                name = named(source, place)
                self.local[address + 4 * place] = self.registers.value(name) if name else 0
        else:
            self.local.clear()

    def next(self, index: int, step: Instruction, guard: Value, lanes: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Where the lanes go on."""
        if step.kind == "EXIT":
            return self.parted(index + 1, None, guard, lanes, index)
        if step.kind == "RET":
            address = self.registers.word(step.operands[0].split(" ")[0])
            place = self.places.get(address) if isinstance(address, int) else None
            if place is None:
                raise MHCError(f"predict: expected a return to a known place, got {step.operands[0]}")
            return [(place, lanes)]
        if step.kind in ("BRX", "JMX", "BRXU"):
            raise MHCError(f"predict: expected branches to known places, got {step.opcode} at {step.address:#x}")
        if step.kind not in ("BRA", "CALL") or step.target is None or "DIV" in step.modifiers:
            return [(index + 1, lanes)]
        condition = guard
        for operand in step.operands:
            if is_predicate(operand):
                condition = both(condition, self.registers.predicate(operand))
        return self.parted(index + 1, step.target, condition, lanes, index)

    def parted(
        self, after: int, target: int | None, condition: Value, lanes: np.ndarray, index: int
    ) -> list[tuple[int, np.ndarray]]:
        """The lanes for which a condition holds go to the target, which is None for the end, the others on."""
        if condition is None:
            condition = target is not None and self.skips_slow_path(index, target)
            if not condition:
                self.found.undecided[index] += 1
        going = lanes & condition
        staying = lanes & ~going
        ways = [(after, staying)] if staying.any() else []
        if target is not None and going.any():
            ways.append((target, going))
        return ways

    def skips_slow_path(self, index: int, target: int) -> bool:
        """Whether a branch leads around a call of a routine."""
        skipped = self.code[index + 1 : target]
        return 0 < len(skipped) < SLOW_PATH and any(step.kind == "CALL" for step in skipped)
