"""A pipeline stage in its steady state: pairs of a forward and a backward micro-batch, one pair after the other.

Overlapped, as DualPipe has it: a layer of the one and a layer of the other take turns on the compute stream, so that
each waits for its experts while the other computes. For layer f forward and layer b backward, in the order of issue:

    compute     …  attention f    FFN gradients b        FFN f      attention's input gradient b    its weights' b  …
    experts     combine b ····    dispatch f ·········   dispatch b ····    combine f ·············

(what is called combine b is the gradient of combine, which goes out to the experts). Connections run on the compute
stream where their operands are ready, or on a stream of their own. A block's replay comes in front of the first
gradient that needs it and waits for nothing.

Not overlapped, a forward micro-batch is followed by a backward one, and compute waits for all communication.

Neighbours are taken to be in step: what a pair needs from them was sent when this stage sent its pair before the last.
The first boundary of a stage only reads and its last one only merges; each is counted as half of a whole one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..overhead.model import SUBLAYERS
from .costs import Assumptions, Costs, costs
from .streams import Span, Task, run

COMPUTE, EXPERTS, CONNECTIONS = "compute", "experts", "connections"  # streams
SENDS = {"F": "send to next", "B": "send to previous"}
ATTENTION, FFN, CONNECTION, REPLAY, EXPERT, SEND = "attention", "FFN", "connection", "replay", "experts' link", "send"
PAIRS = 6
LAG = 2  # pairs between what a neighbour sends and the pair that needs it


@dataclass(frozen=True)
class Stage:
    """A stage: its number of layers, and how it runs."""

    layers: int
    costs: Costs
    overlapped: bool
    own_stream: bool

    def period(self) -> float:
        """Seconds from pair to pair, once all is filled."""
        ends = [0.0] * PAIRS
        for span in self.spans(PAIRS):
            j = int(span.task.name.split()[0])
            ends[j] = max(ends[j], span.end)
        return (ends[-1] - ends[-1 - LAG]) / LAG

    def spans(self, pairs: int) -> list[Span]:
        """Schedule the tasks of the first `pairs` pairs."""
        return run([task for j in range(pairs) for task in self._pair(j)])

    def _pair(self, j: int) -> Iterator[Task]:
        """Yield a pair's tasks in the order of issue; names start with the pair's number."""
        forward, backward = self._forward(j), self._backward(j)
        if not self.overlapped:
            yield from (*forward.values(), *backward.values())
            return
        last = self.layers - 1
        issued = [(backward, f"replay {2 * last + 1}"), (backward, "merge")]
        for f in range(self.layers):
            b = last - f
            issued += [
                (backward, f"combine {b}"),
                (backward, f"attention weights {b + 1}"),
                *((forward, f"{name} {f}") for name in ("read", "attention", "boundary", "dispatch")),
                *((backward, f"{name} {b}") for name in ("FFN", "FFN weights", "dispatch")),
                *((forward, f"{name} {f}") for name in ("FFN", "combine")),
                *((backward, name) for name in (f"replay {2 * b}", f"boundary {b}", f"attention {b}")),
                *((backward, name) for name in (f"replay {2 * b - 1}", f"read {b}")),
            ]
        issued += [(backward, "attention weights 0"), (forward, "merge"), (forward, "send"), (backward, "send")]
        yield from (tasks[name] for tasks, name in issued if name in tasks)

    def _forward(self, j: int) -> dict[str, Task]:
        cost, last = self.costs, self.layers - 1
        chunk = Chunk(self, "F", j)
        for f in range(self.layers):
            before = [f"combine {f - 1}"] if f else []
            chunk.add(CONNECTION, f"read {f}", cost.connection / (1 if f else 2), *before, first=not f)
            chunk.add(ATTENTION, f"attention {f}", cost.attention, f"read {f}")
            chunk.add(CONNECTION, f"boundary {f}", cost.connection, f"attention {f}")
            chunk.add(EXPERT, f"dispatch {f}", cost.experts, f"boundary {f}")
            chunk.add(FFN, f"FFN {f}", cost.ffn, f"dispatch {f}")
            chunk.add(EXPERT, f"combine {f}", cost.experts, f"FFN {f}")
        chunk.add(CONNECTION, "merge", cost.connection / 2, f"combine {last}")
        chunk.add(SEND, "send", cost.send, "merge")
        return chunk.tasks

    def _backward(self, j: int) -> dict[str, Task]:
        cost, last = self.costs, self.layers - 1
        chunk, blocks = Chunk(self, "B", j), cost.blocks(SUBLAYERS * self.layers)

        def replayed(sublayer: int) -> list[str]:
            """Recompute the block that ends with this sublayer, in front of the sublayer's first gradient."""
            if sublayer not in blocks:
                return []
            chunk.add(REPLAY, f"replay {sublayer}", blocks[sublayer])
            return [f"replay {sublayer}"]

        chunk.add(CONNECTION, "merge", cost.connection_backward / 2, *replayed(2 * last + 1), first=True)
        for b in range(last, -1, -1):
            chunk.add(EXPERT, f"combine {b}", cost.experts, "merge" if b == last else f"read {b + 1}")
            chunk.add(FFN, f"FFN {b}", cost.ffn_input, f"combine {b}")
            chunk.add(FFN, f"FFN weights {b}", cost.ffn_weights, f"combine {b}")
            chunk.add(EXPERT, f"dispatch {b}", cost.experts, f"FFN {b}")
            chunk.add(CONNECTION, f"boundary {b}", cost.connection_backward, f"dispatch {b}", *replayed(2 * b))
            chunk.add(ATTENTION, f"attention {b}", cost.attention_input, f"boundary {b}")
            chunk.add(ATTENTION, f"attention weights {b}", cost.attention_weights, f"boundary {b}")
            seconds = cost.connection_backward / (1 if b else 2)
            chunk.add(CONNECTION, f"read {b}", seconds, f"attention {b}", *replayed(2 * b - 1))
        chunk.add(SEND, "send", cost.send, "read 0")
        return chunk.tasks

    def streams(self, kind: str, direction: str) -> tuple[str, ...]:
        """Return the streams that a kind of task occupies."""
        if kind in (EXPERT, SEND):
            link = EXPERTS if kind == EXPERT else SENDS[direction]
            return (link,) if self.overlapped else (COMPUTE, link)
        return (CONNECTIONS,) if self.own_stream and kind in (CONNECTION, REPLAY) else (COMPUTE,)


class Chunk:
    """The tasks of one micro-batch in one direction, by their names without pair and direction."""

    def __init__(self, stage: Stage, direction: str, pair: int) -> None:
        self.tasks: dict[str, Task] = {}
        self._stage, self._direction, self._pair = stage, direction, pair

    def add(self, kind: str, name: str, seconds: float, *after: str, first: bool = False) -> None:
        """A task after others of the chunk; the `first` one needs what the neighbour sent."""
        before = [self._full(one) for one in after]
        if first and self._pair >= LAG:
            before.append(f"{self._pair - LAG} {self._direction} send")
        streams = self._stage.streams(kind, self._direction)
        self.tasks[name] = Task(self._full(name), streams, seconds, tuple(before), kind)

    def _full(self, name: str) -> str:
        return f"{self._pair} {self._direction} {name}"


def stage_of(given: Assumptions, *, plain: bool) -> Stage:
    """Return the stage that the assumptions describe, with mHC or with a plain residual."""
    return Stage(given.layers, costs(given, plain=plain), given.overlapped, given.own_stream)
