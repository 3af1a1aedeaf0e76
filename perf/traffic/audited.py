"""The traffic of a call, counted from its kernels' code: the sum of `audit` over `launches`.

A workspace that one kernel of a call writes and the next one reads counts in both. What torch copies around the
kernels is not counted (g_alpha and g_bias, 3 + M numbers).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from ..calls.cases import Case
from ..calls.launches import launches
from .audit import audit_function


@dataclass(frozen=True)
class Audited:
    """Bytes of one call.

    Attributes:
        stream_read: bytes of stream tensors, every repetition counted.
        stream_written: the same, written.
        stream_once: bytes of stream tensors, each element read once and written once. Less than the other two together
            where a kernel reads a stream tensor again.
        small: bytes of all other tensors, each element once per kernel.
        small_per_block: bytes of all other tensors, each element once per block; what caches serve is in it.
    """

    stream_read: int = 0
    stream_written: int = 0
    stream_once: int = 0
    small: int = 0
    small_per_block: int = 0

    @property
    def repeated(self) -> int:
        """Bytes of stream tensors that were moved before."""
        return self.stream_read + self.stream_written - self.stream_once

    def __add__(self, other: Audited) -> Audited:
        """Add the traffic of two calls."""
        return Audited(
            self.stream_read + other.stream_read,
            self.stream_written + other.stream_written,
            self.stream_once + other.stream_once,
            self.small + other.small,
            self.small_per_block + other.small_per_block,
        )


@cache
def audit_call(case: Case, target: str, parallel_blocks: int) -> Audited:
    """Count the traffic of one call; the arguments are those of `launches`."""
    total = Audited()
    for launch in launches(case, target, parallel_blocks):
        buffers = audit_function(launch.function, launch.sizes)
        streams = [buffers.pop(name) for name in launch.streams if name in buffers]
        small = buffers.values()
        total += Audited(
            stream_read=sum(traffic.read.accessed for traffic in streams),
            stream_written=sum(traffic.written.accessed for traffic in streams),
            stream_once=sum(traffic.read.distinct + traffic.written.distinct for traffic in streams),
            small=sum(traffic.read.distinct + traffic.written.distinct for traffic in small),
            small_per_block=sum(traffic.read.per_block + traffic.written.per_block for traffic in small),
        )
    return total
