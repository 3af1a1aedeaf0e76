"""The audit of thread-level kernels whose blocks hand over to each other: counters in memory, loops that poll them.

Counters are the integers in memory that atomics touch: zeros at first, and computed, as are integers in shared memory
by which a thread tells its block what it saw. All blocks run at a time, so that one that polls finds all others there:
counted is a launch in which none gives up.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from tilelang import tvm  # noqa: F401  (puts tilelang's tvm on the path)
from tvm import tirx

from ....compiler.cpu.types import op_name

Array = Any
ADD, LOAD = "tl.atomic_add_ret_elem_op", "tl.atomic_load_elem_op"


def counters_of(func: Any) -> set[Any]:
    """Return the data of buffers that atomics touch."""
    found: set[Any] = set()

    def visit(node: Any) -> None:
        if op_name(node) in (ADD, LOAD):
            found.add(node.args[0].args[0].buffer.data)

    tirx.stmt_functor.post_order_visit(func.body, visit)
    return found


def is_integer(buffer: Any) -> bool:
    """Whether a buffer's elements are computed where it is a thread's or a block's."""
    return str(buffer.dtype).startswith(("int", "bool"))


class Counters:
    """The part of `threads.Threads` for counters, integers in shared memory, and loops without an extent."""

    counters: set[Any]
    memory: dict[Any, Array]
    mask: Array
    statement: Callable[[Any], Callable[[], None] | None]
    expression: Callable[[Any], Callable[[], Array]]
    seen: Callable[[Any], Callable[[], None] | None]
    element: Callable[[Any, Any, bool, int], Callable[[], None]]

    def _While(self, stmt: Any) -> Callable[[], None] | None:
        body, condition = self.statement(stmt.body), self.expression(stmt.condition)
        if not body:
            return None

        def run() -> None:
            outside = self.mask
            while (mask := self.mask & condition()).any():
                self.mask = mask
                body()
            self.mask = outside

        return run

    def is_computed(self, buffer: Any) -> bool:
        """Whether a buffer is of counters, or of a block's integers."""
        return buffer.data in self.counters or (buffer.scope().startswith("shared") and is_integer(buffer))

    def cell(self, buffer: Any, indices: Any) -> Callable[[], tuple[Array, Array]]:
        """Return the memory and each thread's place in it: a block's own cells, or those that all blocks share."""
        at = [self.expression(index) for index in indices]
        shape = [self.expression(extent) for extent in buffer.shape]
        in_memory = buffer.data in self.counters

        def find() -> tuple[Array, Array]:
            sizes = [int(extent()) for extent in shape]
            size, place = prod(sizes), np.int64(0)
            for index, extent in zip(at, sizes, strict=True):
                place = place * extent + index()
            blocks = 1 if in_memory else len(self.mask)
            cells = self.memory.setdefault(buffer.data, np.zeros(size * blocks, dtype=np.int64))
            first = 0 if in_memory else np.arange(blocks)[:, None] * size
            return cells, np.broadcast_to(np.clip(place, 0, size - 1) + first, self.mask.shape)

        return find

    def load_cell(self, buffer: Any, indices: Any) -> Callable[[], Array]:
        """Return what each thread reads."""
        find = self.cell(buffer, indices)

        def load() -> Array:
            cells, place = find()
            return cells[place]

        return load

    def store_cell(self, stmt: Any) -> Callable[[], None]:
        """Return a store by the threads that run."""
        find, value = self.cell(stmt.buffer, stmt.indices), self.expression(stmt.value)

        def run() -> None:
            stored = np.broadcast_to(value(), self.mask.shape)
            cells, place = find()
            cells[place[self.mask]] = stored[self.mask]

        return run

    def add_to_cell(self, call: Any) -> Callable[[], Array]:
        """Return an addition, one thread after the other, and what each found."""
        load = call.args[0].args[0]
        find, added = self.cell(load.buffer, load.indices), self.expression(call.args[1])

        def run() -> Array:
            addend = np.broadcast_to(added(), self.mask.shape)
            cells, place = find()
            found = np.zeros(self.mask.shape, dtype=np.int64)
            for thread in zip(*np.nonzero(self.mask), strict=True):
                found[thread] = cells[place[thread]]
                cells[place[thread]] += addend[thread]
            return found

        return run

    def atomic(self, call: Any) -> Callable[[], Array] | None:
        """Return an atomic's result; None for another call."""
        if op_name(call) == ADD:
            return self.add_to_cell(call)
        if op_name(call) == LOAD:
            load = call.args[0].args[0]
            return self.load_cell(load.buffer, load.indices)
        return None

    def seen_atomic(self, call: Any) -> Callable[[], None]:
        """Return an atomic's accesses."""
        load = call.args[0].args[0]
        read = self.element(load.buffer, load.indices, False, 1)
        if op_name(call) == LOAD:
            return read
        write = self.element(load.buffer, load.indices, True, 1)
        return lambda: (read(), write(), None)[-1]
