"""The audit of thread-level kernels (see `kernels.warps`): their threads are run, as far as addresses need it.

Such a kernel computes addresses in variables of its threads, so no expression of loops says where an access goes. Here
all threads of some blocks run at once, a numpy array a variable with an element for each thread: integers, conditions
and loops are computed, everything else is looked at for its accesses alone. Statements that neither move a global
element nor set an integer are left out before the first of them runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd, prod
from typing import Any

import numpy as np
from tilelang import tvm  # noqa: F401  (puts tilelang's tvm on the path)
from tvm import tirx

from ....compiler.cpu.emit import scalars_of, sizes_of
from ....compiler.cpu.types import op_name
from .counters import ADD, LOAD, Counters, counters_of, is_integer
from .counting import ascending
from .values import BINARY, AuditError

Array = Any
Expression = Callable[[], Array]
WARP = 32
BATCH = 256  # blocks that run at once
CALLS: dict[str, Callable[..., Array]] = {
    "tirx.if_then_else": np.where,
    "tirx.bitwise_and": np.bitwise_and,
    "tirx.bitwise_or": np.bitwise_or,
    "tirx.bitwise_xor": np.bitwise_xor,
    "tirx.shift_left": np.left_shift,
    "tirx.shift_right": np.right_shift,
}
VECTOR_BYTES = {"tl.ldg32": 4, "tl.ldg64": 8, "tl.ldg128": 16, "tl.stg32": 4, "tl.stg64": 8, "tl.stg128": 16}


@dataclass
class Touched:
    """Accesses to one buffer in one direction: elements requested, and which, in each block and in all."""

    size: int
    accessed: int = 0
    per_block: int = 0
    in_batch: list[tuple[Array, Array, int]] = field(default_factory=list)  # first elements, their blocks, width
    unit: int = 1  # elements that are only ever touched together
    ever: Array = None  # by unit

    def close_batch(self, first_block: int) -> None:
        """Count what the blocks that ran, from one on, touched."""
        if not self.in_batch:
            return
        starts, widths = [first for first, *_ in self.in_batch], {width for *_, width in self.in_batch}
        unit = gcd(self.unit if self.ever is not None else self.size, *widths, *(int(np.gcd.reduce(s)) for s in starts))
        if self.ever is None:
            self.ever, self.unit = np.zeros(self.size // unit, dtype=bool), unit
        self.ever, self.unit = np.repeat(self.ever, self.unit // unit), unit
        places = []
        for first, block, width in self.in_batch:
            units = (first // unit)[:, None] + np.arange(width // unit)
            self.ever[units] = True
            places.append((((block - first_block) * len(self.ever))[:, None] + units).ravel())
        self.per_block += len(ascending(np.concatenate(places))) * unit
        self.in_batch = []

    @property
    def distinct(self) -> int:
        """Elements touched."""
        return int(self.ever.sum()) * self.unit


class Threads(Counters):
    """A thread-level function at given sizes."""

    def __init__(self, func: Any, sizes: Mapping[str, float]) -> None:
        variables = {var.name: var for var in (*sizes_of(func), *scalars_of(func))}
        if set(variables) != set(sizes):
            raise AuditError(f"sizes: expected {sorted(variables)}, got {sorted(sizes)}")
        self.buffers = {buffer.data: buffer for buffer in func.buffer_map.values()}
        self.values: dict[Any, Array] = {variables[name]: np.int64(size) for name, size in sizes.items()}
        self.locals: dict[Any, list[Array]] = {}
        self.counters, self.memory = counters_of(func), {}
        self.mask: Array = None
        self.block: Array = None
        self.grid: list[tuple[Any, int]] = []
        self.num_threads = 1
        self.touched: dict[tuple[Any, bool], Touched] = {}
        self.multiply_adds = 0
        body = self.enter(func.body)
        run = self.statement(body)
        blocks = prod(extent for _, extent in self.grid)
        batch = blocks if self.counters else BATCH
        for first in range(0, blocks, batch):
            number = np.arange(first, min(blocks, first + batch))[:, None]
            self.block = np.broadcast_to(number, (len(number), self.num_threads))
            for axis, extent in self.grid:
                self.values[axis], number = number % extent, number // extent
            self.locals = {}
            self.mask = np.ones(self.block.shape, dtype=bool)
            if run:
                run()
            for touched in self.touched.values():
                touched.close_batch(first)

    def enter(self, stmt: Any) -> Any:
        """Return the body of a block: the grid's axes and the threads are noted on the way."""
        while True:
            kind = type(stmt).__name__
            if kind == "SBlockRealize":
                annotations = stmt.block.annotations
                if "tl.launch_threads" in annotations:
                    self.num_threads = int(annotations["tl.launch_threads"][0])
                    return stmt.block.body
                stmt = stmt.block.body
            elif kind == "For" and stmt.kind == tirx.ForKind.THREAD_BINDING:
                extent = int(self.expression(stmt.extent)())
                self.grid.append((stmt.loop_var, extent))
                stmt = stmt.body
            elif kind == "SeqStmt":
                for bind in stmt.seq[:-1]:
                    self.bind_thread(bind)
                stmt = stmt.seq[-1]
            else:
                raise AuditError(f"expected the grid of a thread-level kernel, got {kind}")

    def bind_thread(self, stmt: Any) -> None:
        """A thread's number along an axis; only the first has more than one."""
        if type(stmt).__name__ != "Bind" or op_name(stmt.value) != "tl.launch_thread_idx":
            raise AuditError(f"expected thread indices, got {stmt}")
        axis = int(stmt.value.args[0])
        self.lanes = getattr(self, "lanes", {})
        self.lanes[stmt.var] = axis

    # ---- statements: what runs, or None where nothing of it matters

    def statement(self, stmt: Any) -> Callable[[], None] | None:
        """Compile a statement."""
        handler = getattr(self, f"_{type(stmt).__name__}", None)
        if handler is None:
            raise AuditError(f"expected a statement of a thread-level kernel, got {type(stmt).__name__}: {stmt}")
        return handler(stmt)

    def _SeqStmt(self, stmt: Any) -> Callable[[], None] | None:
        parts = [part for part in map(self.statement, stmt.seq) if part]

        def run() -> None:
            for part in parts:
                part()

        return run if parts else None

    def _SBlockRealize(self, stmt: Any) -> Callable[[], None] | None:
        return self.statement(stmt.block.body)

    def _AttrStmt(self, stmt: Any) -> Callable[[], None] | None:
        return self.statement(stmt.body)

    def _AllocBuffer(self, _stmt: Any) -> None:
        return None

    _DeclBuffer = _AllocBuffer

    def _Bind(self, stmt: Any) -> Callable[[], None] | None:
        if not str(stmt.var.dtype).startswith(("int", "bool")):
            return self.seen(stmt.value)
        value, seen = self.expression(stmt.value), self.seen(stmt.value)

        def run() -> None:
            if seen:
                seen()
            self.values[stmt.var] = value()

        return run

    def _IfThenElse(self, stmt: Any) -> Callable[[], None] | None:
        then = self.statement(stmt.then_case)
        other = self.statement(stmt.else_case) if stmt.else_case is not None else None
        if not (then or other):
            return None
        condition, seen = self.expression(stmt.condition), self.seen(stmt.condition)

        def run() -> None:
            if seen:
                seen()
            outside, holds = self.mask, condition()
            for branch, mask in ((then, outside & holds), (other, outside & np.logical_not(holds))):
                if branch and mask.any():
                    self.mask = mask
                    branch()
            self.mask = outside

        return run

    def _For(self, stmt: Any) -> Callable[[], None] | None:
        body = self.statement(stmt.body)
        if not body:
            return None
        first, extent = self.expression(stmt.min), self.expression(stmt.extent)
        is_shared = stmt.kind == tirx.ForKind.PARALLEL  # by the block's threads: each step runs once

        def run() -> None:
            outside, begin, length = self.mask, first(), extent()
            if is_shared:
                self.mask = self.mask & (np.arange(self.num_threads)[None, :] == 0)
            within = self.mask
            for step in range(int(np.max(np.where(within, length, 0)))):
                self.mask = within & (step < length)
                self.values[stmt.loop_var] = begin + step
                body()
            self.mask = outside

        return run

    def _BufferStore(self, stmt: Any) -> Callable[[], None] | None:
        seen = self.seen(stmt.value)
        if self.is_computed(stmt.buffer):
            seen = self.both(seen, self.store_cell(stmt))
        if stmt.buffer.scope() == "global":
            store = self.element(stmt.buffer, stmt.indices, True, 1)
            return self.both(seen, store)
        if stmt.buffer.scope().startswith("local") and is_integer(stmt.buffer):
            value, at = self.expression(stmt.value), self.expression(stmt.indices[0])
            size = int(stmt.buffer.shape[0])

            def run() -> None:
                if seen:
                    seen()
                cells = self.locals.setdefault(stmt.buffer.data, [np.int64(0)] * size)
                place = int(np.max(at()))
                cells[place] = np.where(self.mask, value(), cells[place])

            return run
        return seen

    def _Evaluate(self, stmt: Any) -> Callable[[], None] | None:
        return self.seen(stmt.value)

    @staticmethod
    def both(one: Any, other: Any) -> Callable[[], None] | None:
        """Return a function that runs one, then the other; None where neither is given."""
        if one and other:
            return lambda: (one(), other(), None)[-1]
        return one or other

    # ---- accesses

    def seen(self, node: Any) -> Callable[[], None] | None:
        """Return the accesses of an expression or a call."""
        name = op_name(node)
        if isinstance(node, tirx.BufferLoad):
            if node.buffer.scope() == "global":
                return self.element(node.buffer, node.indices, False, 1)
            return None
        if name in (ADD, LOAD):
            return self.seen_atomic(node)
        if name in VECTOR_BYTES:
            inside = node.args[-1] if len(node.args) > (2 if ".stg" in name else 1) else None
            return self.access_through(node.args[0], ".stg" in name, VECTOR_BYTES[name], inside)
        if name == "tl.ptx_cp_async" or name.endswith("ptx_cp_async"):
            elements = int(node.args[2])
            inside = node.args[3] if len(node.args) > 3 else None
            return self.access_through(node.args[1], False, elements, inside, counts_elements=True)
        if name.endswith("ptx_mma"):
            m, n, k = map(int, re.findall(r"\d+", next(text for text in map(str, node.args) if "m16n8k" in text)))

            def run_product() -> None:
                self.multiply_adds += int(self.mask.sum()) // WARP * m * n * k

            return run_product
        if name == "tirx.if_then_else":
            condition, true, false = node.args
            then, other = self.seen(true), self.seen(false)
            return self._guarded(condition, then, other)
        run = None
        for child in operands(node):
            run = self.both(run, self.seen(child))
        return run

    def _guarded(self, condition: Any, then: Any, other: Any) -> Callable[[], None] | None:
        if not (then or other):
            return None
        holds = self.expression(condition)

        def run() -> None:
            outside, value = self.mask, holds()
            for branch, mask in ((then, outside & value), (other, outside & np.logical_not(value))):
                if branch:
                    self.mask = mask
                    branch()
            self.mask = outside

        return run

    def access_through(
        self, pointer: Any, is_write: bool, size: int, inside: Any, counts_elements: bool = False
    ) -> Callable[[], None] | None:
        """Return the access through a pointer, `size` bytes or elements where `inside` holds; None if not global."""
        load = pointer.args[0]
        if isinstance(load, tirx.BufferLoad):
            buffer, indices = load.buffer, load.indices
        else:
            buffer, indices = self.buffers[pointer.args[1]], [pointer.args[2]]
        if buffer.scope() != "global":
            return None
        width = size if counts_elements else size // buffer.dtype.itemsize
        access = self.element(buffer, indices, is_write, width)
        return access if inside is None else self._guarded(inside, access, None)

    def element(self, buffer: Any, indices: Any, is_write: bool, width: int) -> Callable[[], None]:
        """Return an access of `width` elements from one on."""
        at = [self.expression(index) for index in indices]
        shape = [self.expression(extent) for extent in buffer.shape]
        touched: list[Touched] = []

        def run() -> None:
            sizes = [int(extent()) for extent in shape]
            if not touched:
                key = buffer.data, is_write
                touched.append(self.touched.setdefault(key, Touched(prod(sizes))))
            place: Array = np.int64(0)
            for index, size in zip(at, sizes if len(at) == len(sizes) else [prod(sizes)], strict=True):
                value = index()
                place = place * size + value
            mask = self.mask
            if not mask.any():
                return
            first = np.broadcast_to(place, mask.shape)[mask]
            if first.min() < 0 or first.max() + width > touched[0].size:
                raise AuditError(
                    f"{buffer.name}: expected elements from 0 to {touched[0].size - 1}, got {first.min()} to "
                    f"{first.max() + width - 1}"
                )
            touched[0].accessed += len(first) * width
            touched[0].in_batch.append((first, self.block[mask], width))

        return run

    # ---- integers

    def expression(self, node: Any) -> Expression:
        """Compile an integer or a condition."""
        kind = type(node).__name__
        if kind == "IntImm":
            number = np.bool_(int(node)) if str(node.dtype) == "bool" else np.int64(int(node))
            return lambda: number
        if kind == "Var":
            if (axis := getattr(self, "lanes", {}).get(node)) is not None:
                lanes = np.arange(self.num_threads)[None, :] if axis == 0 else np.int64(0)
                return lambda: lanes
            return lambda: self.values[node]
        if kind in BINARY:
            one, other, apply = self.expression(node.a), self.expression(node.b), BINARY[kind]
            return lambda: apply(one(), other())
        if kind in ("Not", "Cast"):
            inner = self.expression(node.a if kind == "Not" else node.value)
            return (lambda: np.logical_not(inner())) if kind == "Not" else inner
        if kind == "BufferLoad" and node.buffer.scope().startswith("local"):
            at, data = self.expression(node.indices[0]), node.buffer.data
            return lambda: self.locals[data][int(np.max(at()))]
        if kind == "Call" and op_name(node) in CALLS:
            arguments, call = [self.expression(argument) for argument in node.args], CALLS[op_name(node)]
            return lambda: call(*(argument() for argument in arguments))
        if kind == "BufferLoad" and self.is_computed(node.buffer):
            return self.load_cell(node.buffer, node.indices)
        if kind == "Call" and (atomic := self.atomic(node)):
            return atomic
        raise AuditError(f"expected integers of sizes, threads and variables, got {kind}: {node}")


def operands(node: Any) -> tuple[Any, ...]:
    """Return the operands of an expression."""
    kind = type(node).__name__
    if kind in BINARY or kind in ("Div", "Mod"):
        return node.a, node.b
    if kind in ("Not",):
        return (node.a,)
    if kind == "Cast":
        return (node.value,)
    if kind == "Select":
        return node.condition, node.true_value, node.false_value
    if kind == "Call":
        return tuple(node.args)
    return ()


def is_thread_level(func: Any) -> bool:
    """Whether a function is for this module."""
    return "mhc.pass_configs" in (func.attrs or {})


@lru_cache(maxsize=4)
def run_threads(func: Any, sizes: tuple[tuple[str, float], ...]) -> Threads:
    """Run the threads of a function at these sizes."""
    return Threads(func, dict(sizes))
