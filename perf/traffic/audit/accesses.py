"""The walk over a kernel's TIR: every place that reads or writes a global buffer.

It reads the TIR that the CPU target reads (see `mhc_tilelang.compiler.cpu`), from `@T.prim_func`, before any lowering:

    a load, a store        a place with its indices, run once per value of every loop around it
    T.copy, T.fill, …      the same, with a loop along each axis of the region; what hangs over an edge is guarded off
    if, if_then_else       a guard on what lies in either branch
    loops, the grid        an axis each; a loop whose length depends on others is as long as its longest, and guarded;
                           a grid axis of a · B blocks, with `axis // B` and `axis % B`, is two that share nothing
    T.Select               both sides are evaluated

A value that is loaded into a name counts where it is loaded, not where the name is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tilelang import tvm  # noqa: F401  (puts tilelang's tvm on the path)
from tvm import ir, tirx
from tvm.arith import Analyzer

from ....compiler.cpu.emit import BITWISE, CALLS, scalars_of, sizes_of
from ....compiler.cpu.tile_ops import LOWERINGS
from ....compiler.cpu.types import op_name
from .values import BINARY, AuditError, Loop, Values

COPY = "tl.tileop.copy"
ARITHMETIC = {*CALLS, *BITWISE, "tirx.reinterpret"}
INSTRUCTIONS = ("tl::fast_rcp",)  # functions of a GPU's code that are arithmetic
READ, WRITE = 1, 2  # bits of a region's access mask


@dataclass(frozen=True)
class Access:
    """A place in the code that reads or writes one element at a time of a global buffer.

    Attributes:
        indices: the element, an expression per axis.
        loops: everything around it that repeats, grid included.
        guards: conditions that hold when it runs.
    """

    buffer: tirx.Buffer
    is_write: bool
    indices: tuple[tirx.PrimExpr, ...]
    loops: tuple[tirx.Var, ...]
    guards: tuple[tirx.PrimExpr, ...]


def accesses_of(func: tirx.PrimFunc, sizes: Mapping[str, float]) -> tuple[list[Access], Values]:
    """Return every place, and what the variables in it stand for. Raises AuditError for a size too few or too many."""
    variables = {var.name: var for var in (*sizes_of(func), *scalars_of(func))}
    if set(variables) != set(sizes):
        raise AuditError(f"sizes: expected {sorted(variables)}, got {sorted(sizes)}")
    walk = Walk(Values({variables[name]: size for name, size in sizes.items()}))
    walk.statement(func.body)
    return walk.accesses, walk.values


@dataclass
class Walk:
    """Goes through statements and expressions; holds the loops and guards around where it is."""

    values: Values
    accesses: list[Access] = field(default_factory=list)
    loops: tuple[tirx.Var, ...] = ()
    guards: tuple[tirx.PrimExpr, ...] = ()
    analyzer: Analyzer = field(default_factory=Analyzer)
    halves: dict[tirx.Var, tirx.PrimExpr] = field(default_factory=dict)  # of grid axes that are two

    def statement(self, stmt: tirx.Stmt) -> None:
        """Dispatch on the statement's kind."""
        handler = getattr(self, f"_{type(stmt).__name__}", None)
        if handler is None:
            raise AuditError(f"expected a statement of a tile kernel, got {type(stmt).__name__}: {stmt}")
        handler(stmt)

    def _SeqStmt(self, stmt) -> None:
        for part in stmt.seq:
            self.statement(part)

    def _SBlockRealize(self, stmt) -> None:
        self.statement(stmt.block.body)

    def _AttrStmt(self, stmt) -> None:
        self.statement(stmt.body)

    def _Bind(self, stmt) -> None:
        if op_name(stmt.value) != "tl.launch_thread_idx":
            value = self.analyzer.simplify(tirx.stmt_functor.substitute(stmt.value, self.halves))
            self.values.names[stmt.var] = value
            self.expression(value)

    def _IfThenElse(self, stmt) -> None:
        self.expression(stmt.condition)
        self.visit_guarded(stmt.condition, self.statement, stmt.then_case)
        if stmt.else_case is not None:
            self.visit_guarded(tirx.Not(stmt.condition), self.statement, stmt.else_case)

    def _For(self, stmt) -> None:
        outside = self.loops, self.guards
        if stmt.kind != tirx.ForKind.THREAD_BINDING:
            self.enter(stmt.loop_var, stmt.min, stmt.extent)
        elif isinstance(stmt.extent, tirx.Mul) and isinstance(stmt.extent.b, tirx.IntImm):
            self.enter_both(stmt.loop_var, stmt.extent.a, stmt.extent.b)
        else:
            self.values.grid += (stmt.loop_var,)
            self.enter(stmt.loop_var, stmt.min, stmt.extent)
        self.statement(stmt.body)
        self.loops, self.guards = outside

    def enter_both(self, axis: tirx.Var, slow_extent, fast_extent) -> None:
        """A grid axis of slow_extent · fast_extent blocks as two loops."""
        zero = tirx.IntImm(axis.dtype, 0)
        slow, fast = (tirx.Var(f"{axis.name}_{speed}", axis.dtype) for speed in ("slow", "fast"))
        self.halves[axis] = self.values.names[axis] = slow * fast_extent + fast
        self.analyzer.bind(fast, ir.Range(zero, fast_extent))
        self.values.grid += (slow, fast)
        self.enter(slow, zero, slow_extent)
        self.enter(fast, zero, fast_extent)

    def _BufferStore(self, stmt) -> None:
        self.element(stmt, is_write=True)
        self.expression(stmt.value)

    def _Evaluate(self, stmt) -> None:
        name = op_name(stmt.value)
        if name not in LOWERINGS:
            self.expression(stmt.value)
            return
        regions = [arg for arg in stmt.value.args if op_name(arg) == "tl.region"]
        if name == COPY and all(region.args[0].buffer.scope() == "global" for region in regions):
            raise AuditError(f"expected a copy from or to a tile, got one between global buffers: {stmt.value}")
        for region in regions:
            self.region(*region.args)

    def expression(self, node) -> None:
        """Find the loads in an expression."""
        if isinstance(node, tirx.BufferLoad):
            self.element(node, is_write=False)
        elif op_name(node) == "tirx.if_then_else":
            condition, true, false = node.args
            self.expression(condition)
            self.visit_guarded(condition, self.expression, true)
            self.visit_guarded(tirx.Not(condition), self.expression, false)
        else:
            for child in children(node):
                self.expression(child)

    def element(self, access, is_write: bool) -> None:
        """A load or a store of one element."""
        if access.buffer.scope() == "global":
            self.accesses.append(Access(access.buffer, is_write, tuple(access.indices), self.loops, self.guards))
        for index in access.indices:
            self.expression(index)

    def region(self, first, mask, *extents) -> None:
        """A tile operation's box, seen as a loop per axis."""
        buffer = first.buffer
        if buffer.scope() != "global":
            return
        outside, indices = (self.loops, self.guards), []
        for axis, (start, extent) in enumerate(zip(first.indices, extents, strict=True)):
            offset = tirx.Var(f"{buffer.name}_{axis}", start.dtype)
            self.enter(offset, tirx.IntImm(start.dtype, 0), extent)
            indices.append(start + offset)
            self.guards += (indices[-1] < buffer.shape[axis],)
        for bit, is_write in ((READ, False), (WRITE, True)):
            if int(mask) & bit:
                self.accesses.append(Access(buffer, is_write, tuple(indices), self.loops, self.guards))
        self.loops, self.guards = outside

    def enter(self, loop: tirx.Var, first, extent) -> None:
        """One more loop around what follows."""
        self.values.loops[loop] = Loop(first, extent)
        self.loops += (loop,)
        if self.values.loops_of(extent):
            self.guards += (loop - first < extent,)

    def visit_guarded(self, condition, visit, node) -> None:
        """Visit the node with one more guard."""
        outside = self.guards
        self.guards += tuple(conjuncts(condition))
        visit(node)
        self.guards = outside


def conjuncts(condition) -> Iterator[tirx.PrimExpr]:
    """Yield the parts of `a and b and …`; they may depend on different loops."""
    if isinstance(condition, tirx.And):
        yield from conjuncts(condition.a)
        yield from conjuncts(condition.b)
    else:
        yield condition


def children(node) -> tuple:
    """Return the operands of arithmetic; refuse a call that could touch memory behind the walk's back."""
    kind = type(node).__name__
    if kind in BINARY or kind in ("Div", "Mod"):
        return node.a, node.b
    if kind == "Not":
        return (node.a,)
    if kind == "Cast":
        return (node.value,)
    if kind == "Select":
        return node.condition, node.true_value, node.false_value
    if kind == "Call" and op_name(node) in ARITHMETIC:
        return tuple(node.args)
    if op_name(node) == "tirx.call_extern" and node.args[0].value in INSTRUCTIONS:
        return tuple(node.args[1:])
    if kind in ("IntImm", "FloatImm", "StringImm", "Var"):
        return ()
    raise AuditError(f"expected arithmetic, got {kind}: {node}")
