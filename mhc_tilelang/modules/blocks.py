"""Blocks of sublayers whose streams and layer inputs are recomputed: what a block keeps, and what stands for the rest.

    Block       a stored stream, what was written to it since, and the coefficients: all that a replay needs
    Handle      packed in the graph for a tensor that is recomputed; it owns its block
    Workspace   what was recomputed, of one block at a time

`recompute` makes blocks as a stream goes along.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import launch
from ..launch import Written
from ..operators.library import flat

Maker = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x [T, n, C], h_pre [T, n] -> layer_input [T, C]
Quantizer = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]  # the same -> values, scales
Key = tuple[str, int]  # ("x", "u", "values" or "scales", sublayer of the block)
FLOAT8 = ("values", "scales")  # of a layer's input


@dataclass(frozen=True)
class Handle:
    """Packed form of a saved tensor that is recomputed: which one, and its view of it."""

    block: Block
    key: Key
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def unpack(self) -> torch.Tensor:
        """Return the tensor."""
        with torch.no_grad():
            return self.block.workspace.take(self.block, self.key).as_strided(self.size, self.stride, self.offset)


class Watched:
    """A tensor without its graph, and whether it was changed in place since."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()  # shares the version
        self._version = tensor._version

    @property
    def is_unchanged(self) -> bool:
        """Whether it is what it was."""
        return self.tensor._version == self._version

    @property
    def storage(self) -> int:
        """Address of its storage; 0 for a tensor of no elements."""
        return self.tensor.untyped_storage().data_ptr()


class Workspace:
    """Recomputed tensors of a stream, one block at a time, until their users have had them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block: weakref.ref[Block] | None = None
        self._made: dict[Key, torch.Tensor] = {}
        self._expected: Counter[Key] = Counter()  # how often each will still be asked for
        self._pass = -1  # the backward pass that it was made in
        self._made_on: torch.cuda.Stream | None = None

    def take(self, block: Block, key: Key) -> torch.Tensor:
        """Return a tensor of the block, recomputed with all others of the block if it is not there.

        Each is held until every handle has asked for it, or the backward comes to another block, or ends.
        On a GPU a layer may have run on streams of its own, whose backward asks from there: they wait for the replay's.
        """
        with self._lock:
            current = torch._C._current_graph_task_id()
            if self._block is None or self._block() is not block or key not in self._made:
                self._made = {}
                self._made, self._expected = block.replay(), Counter(block.handles)
                self._block, self._pass = weakref.ref(block), current
                self._made_on = current_stream(block.start.tensor)
                if current != -1:
                    torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end(current))
            tensor = self._made[key]
            asks = current_stream(tensor)
            if asks is not None and self._made_on is not None and asks != self._made_on:
                asks.wait_stream(self._made_on)
                tensor.record_stream(asks)
            self._expected[key] -= 1
            if current == -1:  # the graph is inspected from outside
                self._made = {}
            elif self._expected[key] <= 0:
                del self._made[key]
            return tensor

    def _end(self, ended: int) -> None:
        with self._lock:
            if self._pass == ended:
                self._made = {}


def current_stream(tensor: torch.Tensor) -> torch.cuda.Stream | None:
    """Return the CUDA stream that work on a tensor is queued on now; None on a CPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


@dataclass(eq=False)
class Block:
    """The sublayers from a stored stream on: what makes their streams and inputs again, and what was asked for."""

    start: Watched
    workspace: Workspace
    written: list[tuple[Watched, ...]] = field(default_factory=list)  # layer_output, h_post, h_res if there is one
    h_pre: dict[int, Watched] = field(default_factory=dict)
    makers: dict[int, Maker] = field(default_factory=dict)  # of the inputs that the replay's kernel does not make
    quantizers: dict[int, Quantizer] = field(default_factory=dict)  # of the inputs in float8
    handles: Counter[Key] = field(default_factory=Counter)

    def forget(self, saved: Any, key: Key, original: torch.Tensor) -> None:
        """Pack a handle in place of what was saved, `original` or a view of it."""
        view = saved.data
        handle = Handle(self, key, view.size(), view.stride(), view.storage_offset() - original.storage_offset())
        saved.register_hooks(lambda _: handle, Handle.unpack)
        self.handles[key] += 1

    def replay(self) -> dict[Key, torch.Tensor]:
        """Recompute all tensors that have handles. Raises RuntimeError if an input of it was changed in place."""
        last = max(sublayer for _, sublayer in self.handles)
        self._check(last)
        x = self.start.tensor
        written = [
            Written(*(flat(one.tensor, t) for one, t in zip(mixed, (1, 1, 2), strict=False)))
            for mixed in self.written[:last]
        ]
        asked = {k: flat(self.h_pre[k].tensor, 1) for name, k in self.handles if name == "u"}
        aggregated = {k: h_pre for k, h_pre in asked.items() if k not in self.makers}
        streams, inputs = launch.replay(flat(x, 2), written, aggregated)
        for k in asked.keys() & self.makers.keys():
            inputs[k] = self.makers[k](streams[k - 1] if k else flat(x, 2), asked[k])
        made = {("x", k): stream.view(x.shape) for k, stream in enumerate(streams, 1)}
        made |= {("u", k): u.view(*x.shape[:-2], x.shape[-1]) for k, u in inputs.items()}
        for k in {k for name, k in self.handles if name in FLOAT8}:
            h_pre = flat(self.h_pre[k].tensor, 1)
            found = self.quantizers[k](streams[k - 1] if k else flat(x, 2), h_pre)
            made |= {(name, k): one.view(*x.shape[:-2], one.shape[-1]) for name, one in zip(FLOAT8, found, strict=True)}
        return {key: made[key] for key in self.handles}

    def _check(self, last: int) -> None:
        names = ("layer output", "h_post", "h_res")
        found = [("stream at the start", self.start)]
        for k, mixed in enumerate(self.written[:last]):
            found += [(f"{name} of sublayer {k}", one) for name, one in zip(names, mixed, strict=False)]
        found += [(f"h_pre of sublayer {k}", one) for k, one in self.h_pre.items()]
        for name, one in found:
            if not one.is_unchanged:
                raise RuntimeError(
                    f"ResidualStream: recompute: expected the {name} of a block as it was in the forward, got one that "
                    "was changed in place since; change a clone"
                )
