"""Tasks on streams, as a GPU has them: each stream runs its tasks one at a time, in the order of their issue.

A task starts when those that it waits for have ended and it is first on every stream that it occupies. So there is one
schedule for a list of tasks, and no task that takes longer makes another one end earlier.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A task to run. `after` names tasks that come first, issued before or later; `kind` is for pictures."""

    name: str
    streams: tuple[str, ...]
    seconds: float
    after: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class Span:
    """A task, and when it ran."""

    task: Task
    start: float
    end: float


def run(tasks: Sequence[Task]) -> list[Span]:
    """Schedule tasks in the order of their issue.

    Raises ValueError for two tasks of one name, and where tasks wait for each other or for one that is not there.
    """
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError("run: tasks: expected every name once, got one twice")
    queues: dict[str, deque[Task]] = {}
    for task in tasks:
        for stream in task.streams:
            queues.setdefault(stream, deque()).append(task)
    free = dict.fromkeys(queues, 0.0)
    spans: dict[str, Span] = {}

    def is_ready(task: Task) -> bool:
        return all(queues[s][0] is task for s in task.streams) and all(name in spans for name in task.after)

    while len(spans) < len(tasks):
        before = len(spans)
        for queue in queues.values():
            while queue and is_ready(queue[0]):
                task = queue[0]
                earlier = [free[s] for s in task.streams] + [spans[name].end for name in task.after]
                start = max(earlier)
                spans[task.name] = Span(task, start, start + task.seconds)
                for stream in task.streams:
                    queues[stream].popleft()
                    free[stream] = start + task.seconds
        if len(spans) == before:
            stuck = ", ".join(sorted({queue[0].name for queue in queues.values() if queue}))
            raise ValueError(f"run: tasks: expected an order in which all can run, got {stuck} waiting")
    return [spans[task.name] for task in tasks]


def makespan(spans: Iterable[Span]) -> float:
    """Return the time at which the last span ends."""
    return max(span.end for span in spans)


def busy(spans: Iterable[Span], stream: str) -> float:
    """Seconds in which a stream has a task."""
    return sum(span.task.seconds for span in spans if stream in span.task.streams)
