"""When a lone warp issues each instruction of its walk: in order, as the control bits say.

An instruction waits for the scoreboards that it names and for the groups of cp.async that DEPBAR asks for; then the
warp stalls as long as its encoding says. Arithmetic of fixed latency is inside the stall counts; what has a varying one
raises a scoreboard for the cycles of LATENCY. Twice the time for memory gives how many round trips nothing hides.

    latencies   cycles from issue to use on an SM with nothing else to do: measured by others with microbenchmarks for
                Volta to Hopper (shared memory 29 to 33, shuffle 23, MUFU about 20, HMMA 24 to 33), not fitted here
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .listing import Instruction
from .walk import Step

MEMORY = ("LDG", "LDGSTS", "LD", "UTMALDG", "UBLKCP")
L1_CYCLES = 45  # of a line that the warp has loaded before
LATENCY = {
    **dict.fromkeys(("LDS", "MOVM"), 29),
    **dict.fromkeys(("LDSM",), 33),
    **dict.fromkeys(("SHFL", "MUFU", "F2F", "HMMA", "IMMA"), 24),
    **dict.fromkeys(("S2R", "S2UR", "REDUX", "CREDUX"), 30),
    **dict.fromkeys(("LDC", "LDCU", "ULDC", "LDL"), 40),
    **dict.fromkeys(("R2UR", "VOTEU", "ELECT"), 12),
}
OTHER_CYCLES = 20
READ_CYCLES = 12  # until operands are read
BARRIER_CYCLES = 28
TAKEN_CYCLES = 10  # of a jump, until the next instruction is there
SCOREBOARDS = 6


class Issued(NamedTuple):
    """One instruction of the walk: when it was its turn, when it issued, and when its result is there."""

    at: int  # the instruction's index
    turn: float
    time: float
    ready: float


def schedule(code: Sequence[Instruction], steps: Sequence[Step], memory_cycles: float) -> Iterator[Issued]:
    """Go through a walk in time; `memory_cycles` is what a load from memory takes."""
    time, before = 0.0, -1
    boards: list[list[float]] = [[] for _ in range(SCOREBOARDS)]
    copies: list[float] = []  # of the group of cp.async that is open
    lines: set[int] = set()
    for index, access in steps:
        step = code[index]
        if step.kind == "NOP":
            continue
        turn = time
        for board in range(SCOREBOARDS):
            if step.waits >> board & 1 and boards[board]:
                time = max(time, *boards[board])
                boards[board] = []
        if step.kind == "DEPBAR" and len(step.operands) > 1:
            board, allowed = int(step.operands[0][2:]), int(step.operands[1], 16)
            pending = sorted(boards[board])
            if len(pending) > allowed:
                time = max(time, pending[len(pending) - allowed - 1])
                boards[board] = pending[len(pending) - allowed :]
        cycles = float(LATENCY.get(step.kind, OTHER_CYCLES))
        if step.kind in MEMORY:
            is_near = access is None or (step.kind != "LDGSTS" and access.lines and lines.issuperset(access.lines))
            cycles = L1_CYCLES if is_near and step.kind in ("LDG", "LD", "LDGSTS") else memory_cycles
            if access is not None:
                lines.update(access.lines)
        ready = time + cycles
        if step.kind == "LDGSTS":
            copies.append(ready)
        elif step.kind == "LDGDEPBAR":
            boards[0].append(max(copies, default=time))
            copies = []
        if step.raises_written < SCOREBOARDS:
            boards[step.raises_written].append(ready)
        if step.raises_read < SCOREBOARDS:
            boards[step.raises_read].append(time + READ_CYCLES)
        yield Issued(index, turn, time, ready)
        time += max(1, step.stall) + (BARRIER_CYCLES if step.kind == "BAR" else 0)
        if before >= 0 and index != before + 1:
            time += TAKEN_CYCLES
        before = index


def cycles(code: Sequence[Instruction], steps: Sequence[Step], memory_cycles: float) -> float:
    """What a lone warp takes for its walk."""
    last = 0.0
    for issued in schedule(code, steps, memory_cycles):
        last = issued.time + max(1, code[issued.at].stall)
    return last
