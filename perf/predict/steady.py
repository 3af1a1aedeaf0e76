"""One steady iteration of a kernel's slowest warp, in time: what `--timeline` draws.

The iteration lies in the middle of the loop whose backward jump is taken most often among those that touch memory; a
kernel without such a loop is shown whole. A lone warp, a load from memory at the device's latency: what others on the
SM hide of the waits is not in it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from ..calls.cases import Case
from .block import NEAR
from .devices import Device
from .listing import Instruction
from .schedule import MEMORY, Issued, cycles, schedule
from .walk import Walk, walk

STORES = ("STG", "ST", "UTMASTG")
LONG_WAIT = 200  # cycles, from which a wait is one for memory


@dataclass(frozen=True)
class Event:
    """Something that lasts: from and to, in cycles since the iteration began; `kind` is a lane of the picture."""

    kind: str
    start: float
    end: float


@dataclass(frozen=True)
class Steady:
    """An iteration: its events, its length, how often it runs, how many instructions it issues."""

    family: str
    gpu: str
    shape: tuple[int, int, str]
    events: tuple[Event, ...]
    cycles: float
    iterations: int
    instructions: int
    latency: float

    def total(self, kind: str) -> float:
        """Cycles of a kind of event; those of waits do not overlap."""
        return sum(event.end - event.start for event in self.events if event.kind == kind)

    @property
    def runs(self) -> str:
        """How often the iteration runs, in words."""
        return f"{self.iterations} times" if self.iterations > 1 else "once: there is no loop over memory"

    def summary(self) -> str:
        """The picture in a few lines."""
        tokens, width, dtype = self.shape
        waits = [(kind, self.total(kind)) for kind in ("wait for memory", "wait for another result", "barrier")]
        shares = ", ".join(f"{kind} {total:.0f}" for kind, total in waits if total)
        return (
            f"{self.family} on {self.gpu}, {tokens} tokens, C = {width}, {dtype}: an iteration of a lone warp is "
            f"predicted to take {self.cycles:.0f} cycles and runs {self.runs}; {self.instructions} "
            f"instructions; {shares}"
        )


def steady(case: Case, device: Device, family: str = "") -> Steady:
    """The steady iteration of a call's first launch, or of its first launch of a family."""
    from ...compiler.tracing import trace
    from ..calls.launches import launches
    from .built import build_function

    wanted = launches(case, "cuda", 2 * int(device.table["sms"].value))
    launch = next(launch for launch in wanted if family in ("", launch.family))
    built = build_function(trace(launch.family, launch.parameters), device.arch)
    entry = built.entry(launch.sizes)
    walks = [walk(built.code, entry, warp) for warp in {0, entry.warps - 1}]
    slowest = max(walks, key=lambda found: cycles(built.code, found.steps, NEAR))
    shape = case.shape.num_tokens, case.shape.hidden_size, case.shape.dtype
    return iteration(built.code, slowest, device, launch.family, shape)


def iteration(code: list[Instruction], found: Walk, device: Device, family: str, shape: tuple[int, int, str]) -> Steady:
    """Cut one iteration out of a walk."""
    first, last, times = borders(code, found)
    latency = device.constants.latency
    issued = list(schedule(code, [step for step in found.steps if code[step[0]].kind != "NOP"], latency))
    start, end = issued[first].turn, issued[min(last, len(issued) - 1)].time
    events: list[Event] = []
    for one in issued:
        events += [event for event in events_of(code[one.at], one) if event.end > start and event.start < end]
    cut = tuple(Event(e.kind, max(e.start, start) - start, min(e.end, end) - start) for e in events)
    return Steady(family, device.name, shape, cut, end - start, times, last - first, latency)


def borders(code: list[Instruction], found: Walk) -> tuple[int, int, int]:
    """Where the iteration starts and ends in the walk without NOPs, and how many there are."""
    order = [index for index, _ in found.steps if code[index].kind != "NOP"]
    jumps: Counter[tuple[int, int]] = Counter()
    for one, other in pairwise(order):
        if other <= one:
            jumps[other, one] += 1
    in_loop = {
        (head, end): number
        for (head, end), number in jumps.items()
        if any(step.kind in (*MEMORY, *STORES) for step in code[head : end + 1])
    }
    if not in_loop:
        return 0, len(order) - 1, 1
    head, _ = max(in_loop, key=lambda place: in_loop[place])
    places = [place for place, index in enumerate(order) if index == head]
    middle = len(places) // 2
    return places[middle - 1], places[middle], len(places)


def events_of(step: Instruction, one: Issued) -> list[Event]:
    """What an instruction shows: its wait, its issue, what it has in flight."""
    found = [Event("issue", one.time, one.time + 1)]
    if one.time > one.turn:
        kind = "wait for memory" if one.time - one.turn > LONG_WAIT else "wait for another result"
        found.append(Event(kind, one.turn, one.time))
    if step.kind in MEMORY:
        found.append(Event("load in flight", one.time, one.ready))
    if step.kind in STORES:
        found.append(Event("store", one.time, one.time + max(1, step.stall)))
    if step.kind == "BAR":
        found.append(Event("barrier", one.time, one.time + max(1, step.stall)))
    return found
