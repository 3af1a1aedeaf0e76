"""Traffic counted from a kernel's code: every access to global memory in its TIR, at concrete sizes.

    accesses   the walk: each place that touches a global buffer, its indices, the loops and guards around it
    values     what an index or a guard is, over the loops that it depends on
    threads    the same for thread-level kernels, whose threads are run
    counting   how often a place runs, and how many elements a set of places touches

Three numbers a buffer and direction, in bytes, each at least as large as the next:

    accessed   an element counts each time it is read or written: loops, grid and guards as they run
    per_block  an element counts once in each block that touches it: what blocks fetch that hold on to all they have
               seen; for a tensor that many blocks share, an upper bound of what memory sees
    distinct   an element counts once: what memory sees if the last-level cache serves every repetition

A stream tensor is as large as it gets, so no cache may be relied on: for it `accessed` is the number to look at, and a
kernel that reads it twice shows there. A small tensor (h_res, phi) is read again by design, as a scalar of every
channel or by every block: for it `distinct` is what memory moves, `per_block` what the second-level cache serves.

Nothing is enumerated that can be multiplied. A place runs once for every combination of its loops' values that its
guards allow; guards and indices fall into parts that share no loop, each part is counted with numpy, and the counts are
multiplied. So 4096 tokens take hardly longer than 64, and no scaling is assumed: the count is exact at the sizes given.

Loads tilelang when `audit` is called, not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Movement:
    """Bytes of one buffer in one direction; the numbers of the package's docstring."""

    accessed: int = 0
    per_block: int = 0
    distinct: int = 0


@dataclass(frozen=True)
class BufferTraffic:
    """Elements of one global buffer moved in one launch, each way."""

    read: Movement
    written: Movement


def audit(family: str, parameters: dict[str, Any], sizes: Mapping[str, float]) -> dict[str, BufferTraffic]:
    """Count the traffic of one launch of a kernel family, by the names of its buffers.

    Args:
        family: a name in `mhc_tilelang.kernels.FAMILIES`.
        parameters: compile-time parameters.
        sizes: the run-time sizes and scalars (num_tokens, chunks_per_split, …), every one of them.

    Raises:
        AuditError: a size is missing or unknown; the kernel does what cannot be counted without running it (an
            index or a guard that depends on data), or touches an element outside a buffer.
    """
    from ....compiler.tracing import trace

    return audit_function(trace(family, parameters), sizes)


def audit_function(func: Any, sizes: Mapping[str, float]) -> dict[str, BufferTraffic]:
    """Audit a TIR function that is not a family's."""
    from .values import AuditError

    try:
        return _audit(func, sizes)
    except AuditError as error:
        raise AuditError(f"audit: {func.attrs['global_symbol']}: {error}") from None


def _audit(func: Any, sizes: Mapping[str, float]) -> dict[str, BufferTraffic]:
    from .accesses import accesses_of
    from .counting import distinct, executions
    from .threads import is_thread_level

    if is_thread_level(func):
        return _run_threads(func, sizes)
    accesses, values = accesses_of(func, sizes)

    def movement(buffer: Any, is_write: bool) -> Movement:
        places = [access for access in accesses if access.buffer.same_as(buffer) and access.is_write == is_write]
        counts = (
            sum(executions(access, values) for access in places),
            distinct(places, values, values.grid),
            distinct(places, values, ()),
        )
        return Movement(*(count * buffer.dtype.itemsize for count in counts))

    return {
        buffer.name: BufferTraffic(movement(buffer, False), movement(buffer, True))
        for buffer in (func.buffer_map[param] for param in func.params if param in func.buffer_map)
    }


def _run_threads(func: Any, sizes: Mapping[str, float]) -> dict[str, BufferTraffic]:
    """Audit a thread-level kernel."""
    from .threads import run_threads

    touched = run_threads(func, tuple(sizes.items())).touched

    def movement(buffer: Any, is_write: bool) -> Movement:
        found = touched.get((buffer.data, is_write))
        counts = (found.accessed, found.per_block, found.distinct) if found else (0, 0, 0)
        return Movement(*(count * buffer.dtype.itemsize for count in counts))

    return {
        buffer.name: BufferTraffic(movement(buffer, False), movement(buffer, True))
        for buffer in (func.buffer_map[param] for param in func.params if param in func.buffer_map)
    }
