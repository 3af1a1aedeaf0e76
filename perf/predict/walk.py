"""A block's warps walked through the machine code: which instructions each issues, how often, and what they touch.

Integer registers are computed (`instructions`), so that trip counts, guards and addresses are those of the launch's
sizes and nothing about a loop is guessed. What comes from memory is unknown. A branch on something unknown is recorded
in `Walk.undecided`, unless it leads around a routine for rare operands (a division's slow path): that is never entered.

Lanes that part ways run one group after the other, the one that lies first in the code first, and go on together where
they meet: as the hardware does with code that was structured once. So do warps, which changes nothing for any of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np

from ...errors import MHCError
from .instructions import REGISTERS, STEPS, both, destinations, following, results
from .listing import Instruction
from .registers import WARP, Registers, UnknownError, Value, is_predicate, of_lane, parse_operand

MAX_STEPS = 2_000_000
BUFFER_SHIFT = 40  # addresses of a pointer argument start at (its number + 1) << 40
LINE = 128  # bytes of a cache line
SLOW_PATH = 400  # instructions, at most, that a branch around a slow path skips
# Where the constant bank holds the kernel's arguments, the block's and the grid's dimensions, the stack pointer.
BANK = {
    "sm_80": (0x160, 0x0, 0xC, 0x28),
    "sm_90a": (0x210, 0x0, 0xC, 0x28),
    "sm_100a": (0x380, 0x360, 0x370, 0x37C),
    "sm_120a": (0x380, 0x360, 0x370, 0x37C),
}
GLOBAL = {"LDG", "LD", "LDGSTS", "STG", "ST"}
STORES = ("STG", "ST")
LOOKED_AT = {*GLOBAL, *STEPS, "BRA", "EXIT", "RET", "CALL", "BRX", "JMX", "BRXU", "S2R", "S2UR", "LDL", "STL"}
SPECIAL = {"SR_LANEID": "lane", "SR_TID.X": "x", "SR_TID.Y": "y", "SR_TID.Z": "z"}
SIZES = {"int32": 4, "float32": 4, "tensor map": 128}  # bytes of an argument, and what its place is a multiple of


class Argument(NamedTuple):
    """A parameter of the entry: `kind` "buffer", "tensor map" or a number's dtype; `value` of a number."""

    name: str
    kind: str
    value: float = 0


@dataclass(frozen=True)
class Entry:
    """A kernel's launch: architecture, arguments, grid and threads, from which its registers start."""

    arch: str
    arguments: tuple[Argument, ...]
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return -(-prod(self.threads) // WARP)

    @property
    def middle(self) -> tuple[int, int, int]:
        """A block that is at no edge, if there is one."""
        x, y, z = self.grid
        return x // 2, y // 2, z // 2

    def constants(self) -> dict[int, int]:
        """Return the constant bank, word by word."""
        place, block, grid, stack = BANK[self.arch]
        bank = {stack: 1 << 20}
        for axis in range(3):
            bank[block + 4 * axis], bank[grid + 4 * axis] = self.threads[axis], self.grid[axis]
        for number, argument in enumerate(self.arguments):
            size = SIZES.get(argument.kind, 8)
            place = -(-place // size) * size
            if argument.kind == "float32":  # looked at by comparisons; what is computed with it is not followed
                value = int(np.float32(argument.value).view(np.uint32))
            else:
                value = (number + 1) << BUFFER_SHIFT if argument.kind == "buffer" else int(argument.value)
            if argument.kind != "tensor map":
                bank |= {place + offset: value >> 8 * offset & 0xFFFFFFFF for offset in range(0, size, 4)}
            place += size
        return bank


class Access(NamedTuple):
    """A global access: the argument's number (-1: not known), lanes, bytes a lane, lines of 128 bytes."""

    buffer: int
    lanes: int
    width: int
    lines: tuple[int, ...]


Step = tuple[int, "Access | None"]  # index of an instruction, and what a warp touches of global memory
NOTHING: dict[int, Access] = {}
Groups = list[tuple[int, np.ndarray]]  # index of the next instruction, and lanes


class EndlessError(MHCError):
    """A walk that comes to no end."""


@dataclass
class Walk:
    """The way of a block's warps: each instruction, which warps issued it, what each touched; undecided branches."""

    steps: list[tuple[int, tuple[int, ...], dict[int, Access]]] = field(default_factory=list)
    undecided: Counter[int] = field(default_factory=Counter)

    def of_warp(self, warp: int) -> list[Step]:
        """Return the steps of one warp, in order."""
        return [(index, accesses.get(warp)) for index, warps, accesses in self.steps if warp in warps]


def walk(code: Sequence[Instruction], entry: Entry, block: tuple[int, int, int] | None = None) -> Walk:
    """Walk the warps of a block, the middle one by default. Raises EndlessError where they come to none."""
    return Walker(code, entry, block or entry.middle).run()


class Walker:
    """The registers and where the lanes are: groups by the index of their next instruction."""

    def __init__(self, code: Sequence[Instruction], entry: Entry, block: tuple[int, int, int]) -> None:
        self.code, self.block = code, block
        self.registers = Registers(entry.constants().get)
        self.places = {step.address: index for index, step in enumerate(code)}
        self.names = [destinations(step.opcode, step.operands) for step in code]
        # What an instruction leaves unknown, where that is all it does: most give nothing but data.
        looked_at = (step.guard or step.kind in LOOKED_AT for step in code)
        self.forgotten = [None if looked else names for looked, names in zip(looked_at, self.names, strict=True)]
        thread = np.arange(entry.warps * WARP)
        x, y, _ = entry.threads
        self.own = {"lane": thread % WARP, "x": thread % x, "y": thread // x % y, "z": thread // (x * y)}
        self.known_warps: dict[bytes, tuple[int, ...]] = {}
        self.groups: dict[int, np.ndarray] = {0: thread < prod(entry.threads)}
        self.local: dict[int, Value] = {}
        self.found = Walk()

    def run(self) -> Walk:
        """Walk until no lane is left."""
        while self.groups:
            index = min(self.groups)
            lanes = self.groups.pop(index)
            if not self.groups:
                index = self.hurry(index, self.warps_of(lanes))
            if len(self.found.steps) >= MAX_STEPS:
                raise EndlessError(f"expected a warp to end within {MAX_STEPS} instructions, got none that does")
            self.step(index, lanes)
        return self.found

    def warps_of(self, lanes: np.ndarray) -> tuple[int, ...]:
        """Return the warps that have lanes in a group."""
        key = lanes.tobytes()
        if key not in self.known_warps:
            self.known_warps[key] = tuple(np.flatnonzero(lanes.reshape(-1, WARP).any(axis=1)).tolist())
        return self.known_warps[key]

    def hurry(self, index: int, warps: tuple[int, ...]) -> int:
        """Go on, all lanes together, as long as instructions give nothing but data."""
        values, partly, steps = self.registers.values, self.registers.partly, self.found.steps
        while (names := self.forgotten[index]) is not None:
            steps.append((index, warps, NOTHING))
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
        touched = self.touch(step, guard, lanes) if step.kind in GLOBAL else NOTHING
        self.found.steps.append((index, self.warps_of(lanes), touched))
        for next_index, going in self.next(index, step, guard, lanes):
            before = self.groups.get(next_index)
            self.groups[next_index] = going if before is None else before | going
        if guard is not False and step.kind not in ("BRA", "EXIT"):
            self.execute(index, guard, mask)

    def touch(self, step: Instruction, guard: Value, lanes: np.ndarray) -> dict[int, Access]:
        """Return the lines that a global access touches, by warp."""
        active = lanes if guard is None else lanes & guard
        if step.kind == "LDGSTS" and is_predicate(step.operands[-1]):  # where it is false, zeros are written
            fetched = self.registers.predicate(step.operands[-1])
            active = active if fetched is None else active & fetched
        warps, active = self.warps_of(active), active.reshape(-1, WARP)
        lanes = active.sum(axis=1).tolist()
        # LDGSTS names its shared address first, then the global one behind the descriptor.
        operand = next((o for o in reversed(step.operands) if "[" in o), "[?]")
        try:
            address = self.registers.address(operand)
        except UnknownError:
            return {warp: Access(-1, lanes[warp], step.width, ()) for warp in warps}
        places = np.broadcast_to(in_64_bits(address), active.size).reshape(-1, WARP)
        buffers = np.unique(places[active] >> BUFFER_SHIFT)
        buffer = int(buffers[0]) - 1 if len(buffers) == 1 else -1
        touched = (tuple(sorted(set((places[warp][active[warp]] // LINE).tolist()))) for warp in warps)
        return {
            warp: Access(buffer, lanes[warp], step.width, lines) for warp, lines in zip(warps, touched, strict=True)
        }

    def execute(self, index: int, guard: Value, mask: np.ndarray | None) -> None:
        """Write what the instruction gives, in the lanes that its guard allows."""
        step = self.code[index]
        if step.kind in ("S2R", "S2UR"):
            written = {parse_operand(step.operands[0]).name: self.special(step.operands[1], step.kind)}
        elif step.kind in ("LDL", "STL"):
            written = self.spill(step)
        else:
            written = results(step, self.registers, self.names[index])
        if guard is None:  # written or not: unknown afterwards
            written = dict.fromkeys(written)
        elif guard is not True:
            mask = guard if mask is None else mask & guard
        for name, value in written.items():
            self.registers.write(name, value, mask)

    def special(self, name: str, kind: str) -> Value:
        """Return a special register: thread, block, lane; rank in a cluster of one."""
        if name in SPECIAL:
            value = self.own[SPECIAL[name]]
            return value if kind == "S2R" else of_lane(value, 0)
        if name.startswith("SR_CTAID."):
            return self.block["XYZ".index(name[-1])]
        return 0 if name in ("SR_CgaCtaId", "SR_CLUSTERID.X", "SR_SWINHI") else None

    def spill(self, step: Instruction) -> dict[str, Value]:
        """Store registers to local memory, or return those that come back, by name."""
        is_load = step.kind == "LDL"
        data, place = step.operands[:2] if is_load else reversed(step.operands[:2])
        number = next((REGISTERS[name] for name in step.modifiers if name in REGISTERS), 1)
        names = [following(parse_operand(data).name, n) for n in range(number)]
        try:
            address = self.registers.address(place)
        except UnknownError:
            address = None
        if isinstance(address, int):
            places = {name: address + 4 * n for n, name in enumerate(names)}
            if is_load:
                return {name: self.local.get(at) for name, at in places.items()}
            self.local |= {at: self.registers.value(name) if name else 0 for name, at in places.items()}
        elif not is_load:
            self.local.clear()
        return dict.fromkeys(names) if is_load else {}

    def next(self, index: int, step: Instruction, guard: Value, lanes: np.ndarray) -> Groups:
        """Return the groups of lanes after an instruction, each with the index where it continues."""
        if step.kind == "EXIT":
            return self.part(index, None, guard, lanes)
        if step.kind == "RET":
            address = self.registers.values.get(parse_operand(step.operands[0].split(" ")[0]).name)
            if not isinstance(address, int) or address not in self.places:
                raise MHCError(f"predict: expected a return to a known place, got {step.operands[0]}")
            return [(self.places[address], lanes)]
        if step.kind in ("BRX", "JMX", "BRXU"):
            raise MHCError(f"predict: expected branches to known places, got {step.opcode} at {step.address:#x}")
        if step.kind not in ("BRA", "CALL") or step.target is None or "DIV" in step.modifiers:
            return [(index + 1, lanes)]
        condition = guard
        for operand in filter(is_predicate, step.operands):
            condition = both(condition, self.registers.predicate(operand))
        return self.part(index, step.target, condition, lanes)

    def part(self, index: int, target: int | None, condition: Value, lanes: np.ndarray) -> Groups:
        """Part the lanes: those for which a condition holds go to the target, None for the end, the others on."""
        if condition is None:
            skipped = self.code[index + 1 : target] if target is not None else ()
            condition = 0 < len(skipped) < SLOW_PATH and any(step.kind == "CALL" for step in skipped)
            if not condition:
                self.found.undecided[index] += 1
        going = lanes & condition
        staying = lanes & ~going
        ways = [(index + 1, staying)] if staying.any() else []
        return [*ways, (target, going)] if target is not None and going.any() else ways


def in_64_bits(address: Value) -> np.ndarray:
    """Addresses as signed words: one that no lane accesses may lie below zero, which is above 2^63."""
    values = np.asarray(address)
    if values.dtype == object:
        values = (values + (1 << 63)) % (1 << 64) - (1 << 63)
    return values.astype(np.int64)
