"""Issue times of a lone warp's instructions, in order, by the control bits; and one steady iteration.

An instruction waits for the scoreboards that it names and for the groups of cp.async that DEPBAR asks for; then the
warp stalls as long as its encoding says. Arithmetic of fixed latency is inside the stall counts; what has a varying one
raises a scoreboard for the cycles of LATENCY. Twice the time for memory gives how many round trips nothing hides.

    latencies   cycles from issue to use on an SM with nothing else to do: measured by others with microbenchmarks for
                Volta to Hopper (shared memory 29 to 33, shuffle 23, MUFU about 20, HMMA 24 to 33), not fitted here
    steady      the iteration in the middle of the loop over memory that is taken most often; without one, all of it
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from .listing import Instruction
from .walk import STORES, Step

MEMORY = ("LDG", "LDGSTS", "LD", "UTMALDG", "UBLKCP")
L1_CYCLES = 45  # of a line that the warp has loaded before
LATENCY = {
    **{"LDS": 29, "MOVM": 29, "LDSM": 33, "R2UR": 12, "VOTEU": 12, "ELECT": 12},
    **dict.fromkeys(("SHFL", "MUFU", "F2F", "HMMA", "IMMA"), 24),
    **dict.fromkeys(("S2R", "S2UR", "REDUX", "CREDUX"), 30),
    **dict.fromkeys(("LDC", "LDCU", "ULDC", "LDL"), 40),
}
OTHER_CYCLES = 20
READ_CYCLES = 12  # until operands are read
BARRIER_CYCLES = 28
TAKEN_CYCLES = 10  # of a jump, until the next instruction is there
SCOREBOARDS = 6
LONG_WAIT = 200  # cycles, from which a wait is drawn as one for memory


Issued = tuple[int, float, float, float]  # an instruction's index; its turn, when it issued, when its result is there


def schedule(code: Sequence[Instruction], steps: Sequence[Step], memory_cycles: float) -> Iterator[Issued]:
    """Go through a walk in time; `memory_cycles` is what a load from memory takes."""
    time, before = 0.0, -1
    boards: list[list[float]] = [[] for _ in range(SCOREBOARDS)]
    copies: list[float] = []  # of the group of cp.async that is open
    lines: set[int] = set()
    waited = [[boards[n] for n in range(SCOREBOARDS) if step.waits >> n & 1] for step in code]
    latencies = [float(LATENCY.get(step.kind, OTHER_CYCLES)) for step in code]
    for index, access in steps:
        step = code[index]
        if step.kind == "NOP":
            continue
        turn = time
        for raised in waited[index]:
            if raised:
                time = max(time, *raised)
                raised.clear()
        if step.kind == "DEPBAR" and len(step.operands) > 1:
            board, allowed = int(step.operands[0][2:]), int(step.operands[1], 16)
            pending = sorted(boards[board])
            if len(pending) > allowed:
                time = max(time, pending[len(pending) - allowed - 1])
                boards[board][:] = pending[len(pending) - allowed :]
        cycles = latencies[index]
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
        yield index, turn, time, ready
        time += max(1, step.stall) + (BARRIER_CYCLES if step.kind == "BAR" else 0)
        if before >= 0 and index != before + 1:
            time += TAKEN_CYCLES
        before = index


def cycles(code: Sequence[Instruction], steps: Sequence[Step], memory_cycles: float) -> float:
    """Return the cycles a lone warp takes for its walk."""
    index, _, time, _ = deque(schedule(code, steps, memory_cycles), maxlen=1).pop()
    return time + max(1, code[index].stall)


class Event(NamedTuple):
    """Something that lasts: from and to, in cycles since the iteration began; `kind` is a lane of the picture."""

    kind: str
    start: float
    end: float


class Steady(NamedTuple):
    """An iteration: its events, its length, how often it runs, how many instructions it issues."""

    events: tuple[Event, ...]
    cycles: float
    iterations: int
    instructions: int

    def total(self, kind: str) -> float:
        """Cycles of a kind of event; those of waits do not overlap."""
        return sum(event.end - event.start for event in self.events if event.kind == kind)

    @property
    def runs(self) -> str:
        """Number of iterations, in words."""
        return f"{self.iterations} times" if self.iterations > 1 else "once: there is no loop over memory"


def steady(code: Sequence[Instruction], steps: Sequence[Step], memory_cycles: float) -> Steady:
    """Cut one iteration out of a walk."""
    first, last, times = borders(code, [index for index, _ in steps if code[index].kind != "NOP"])
    issued = list(schedule(code, steps, memory_cycles))
    start, end = issued[first][1], issued[min(last, len(issued) - 1)][2]
    events = [event for one in issued for event in events_of(code[one[0]], *one[1:])]
    cut = [Event(e.kind, max(e.start, start) - start, min(e.end, end) - start) for e in events]
    return Steady(
        tuple(event for event in cut if event.end > 0 and event.start < end - start), end - start, times, last - first
    )


def borders(code: Sequence[Instruction], order: Sequence[int]) -> tuple[int, int, int]:
    """Return the first and last step of the iteration in a walk, and the number of iterations."""
    jumps = Counter((other, one) for one, other in pairwise(order) if other <= one)
    over_memory = {
        head: number
        for (head, end), number in jumps.items()
        if any(step.kind in (*MEMORY, *STORES, "UTMASTG") for step in code[head : end + 1])
    }
    if not over_memory:
        return 0, len(order) - 1, 1
    head = max(over_memory, key=lambda place: over_memory[place])
    places = [place for place, index in enumerate(order) if index == head]
    middle = len(places) // 2
    return places[middle - 1], places[middle], len(places)


def events_of(step: Instruction, turn: float, time: float, ready: float) -> Iterator[Event]:
    """Yield an instruction's events: its wait, its issue, what it has in flight."""
    yield Event("issue", time, time + 1)
    if time > turn:
        yield Event("wait for memory" if time - turn > LONG_WAIT else "wait for another result", turn, time)
    if step.kind in MEMORY:
        yield Event("load in flight", time, ready)
    if step.kind in (*STORES, "UTMASTG", "BAR"):
        yield Event("barrier" if step.kind == "BAR" else "store", time, time + max(1, step.stall))
