"""1F1B: every stage runs some micro-batches forward, then one backward and one forward in turn, then the rest backward.

A micro-batch goes from stage to stage over a link per pair of neighbours and direction. Overlapped, a link works beside
the stages; otherwise the stage that sends waits. With p stages, m micro-batches and no sends, a step takes
(m + p − 1)·(F + B), of which the share (p − 1) / (m + p − 1) is the bubble.
"""

from __future__ import annotations

from dataclasses import dataclass

from .streams import Span, Task, run

FORWARD, BACKWARD, SEND = "forward", "backward", "send"


@dataclass(frozen=True)
class Pipeline:
    """Stages that are all alike: seconds of a micro-batch forward, backward, and of a send."""

    stages: int
    micro_batches: int
    forward: float
    backward: float
    send: float
    overlapped: bool

    @property
    def ideal(self) -> float:
        """A step without bubbles and sends."""
        return self.micro_batches * (self.forward + self.backward)

    def spans(self) -> list[Span]:
        """Schedule all tasks of a step."""
        return run([task for stage in range(self.stages) for task in self._tasks(stage)])

    def _tasks(self, stage: int) -> list[Task]:
        first = min(self.micro_batches, self.stages - stage)  # forward before the first backward
        order = [("F", i) for i in range(first)]
        for i in range(self.micro_batches):
            order.append(("B", i))
            if first + i < self.micro_batches:
                order.append(("F", first + i))
        return [task for direction, i in order for task in self._step(stage, direction, i)]

    def _step(self, stage: int, direction: str, i: int) -> list[Task]:
        """Return a micro-batch on a stage, and its way to the next one."""
        forward = direction == "F"
        previous, following = (stage - 1, stage + 1) if forward else (stage + 1, stage - 1)
        after = [f"send {direction}{i} {previous}"] if 0 <= previous < self.stages else []
        if not forward:
            after.append(f"F{i} {stage}")
        name, own = f"{direction}{i} {stage}", f"stage {stage}"
        seconds, kind = (self.forward, FORWARD) if forward else (self.backward, BACKWARD)
        tasks = [Task(name, (own,), seconds, tuple(after), kind)]
        if 0 <= following < self.stages:
            link = f"{stage} to {following}"
            streams = (link,) if self.overlapped else (own, link)
            tasks.append(Task(f"send {name}", streams, self.send, (name,), SEND))
        return tasks
