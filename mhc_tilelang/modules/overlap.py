"""Merging a write beside the model: `post` on a CUDA stream of high priority (the paper's Section 4.3.3).

`ResidualStream(…, overlap=True)` merges a write when it is made, on the side stream, and waits at the next read. What
runs on the current stream in between runs at the same time: another micro-batch, or communication. In a model that does
nothing between a write and the next read nothing is gained, and the boundary is not fused.

Autograd runs the merge's backward on the side stream too, and orders it with the rest of the backward.

Memory. The caching allocator gives a freed block back to the stream that it came from, without waiting for others. So
what the side stream reads is recorded there, and what it makes is recorded on the stream that reads it: whenever such
a block is freed, after the backward at the latest, it waits for both. In a CUDA graph the side stream is captured with
the rest; each write needs a read, `reduce` or `x` after it, or the capture ends with a branch that was not joined.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from ..operators.sharding import is_dtensor


class SideStream:
    """The CUDA stream on which a stream's writes are merged."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    @classmethod
    def of(cls, x: torch.Tensor, overlap: torch.cuda.Stream | bool, name: str = "overlap") -> SideStream | None:
        """Return the side stream for x, from ResidualStream's argument of this name; None for False and for a CPU.

        Raises:
            TypeError: overlap is neither a bool nor a torch.cuda.Stream.
            ValueError: the stream is another device's.
            RuntimeError: traced code, in which streams are lost.
        """
        if not isinstance(overlap, (bool, torch.cuda.Stream)):
            got = type(overlap).__name__
            raise TypeError(f"ResidualStream: {name}: expected a bool or a torch.cuda.Stream, got {got}")
        if overlap is False:
            return None
        if isinstance(overlap, torch.cuda.Stream) and overlap.device != x.device:
            raise ValueError(f"ResidualStream: {name}: expected a stream on {x.device}, got one on {overlap.device}")
        if not x.is_cuda:
            return None
        if torch.compiler.is_compiling():
            raise RuntimeError(f"ResidualStream: {name}: expected False under torch.compile, which drops CUDA streams")
        return cls(_stream_of(x.device) if overlap is True else overlap)

    def run(self, merge: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """merge(*tensors) on the side stream, after all that is on the current one; not waited for."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            merged = merge(*tensors)
        for tensor in tensors:
            _record(tensor, self.stream)
        return merged

    def join(self) -> None:
        """Let the current stream wait for this one."""
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def wait_for(self, merged: torch.Tensor) -> torch.Tensor:
        """Make the current stream wait for a result of `run`, and return it."""
        self.join()
        _record(merged, torch.cuda.current_stream(self.stream.device))
        return merged


def _record(tensor: torch.Tensor, stream: torch.cuda.Stream) -> None:
    """Keep a tensor's memory, once it is freed, until the stream has done what it was given by then."""
    with torch.no_grad():
        local = tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    local.record_stream(stream)


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One per device for all models: streams of one priority beyond a few share queues."""
    return torch.cuda.Stream(device, priority=-1)
