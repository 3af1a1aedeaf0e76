"""Tiles that need no copy: a fragment that only mirrors global memory is that memory, seen from an offset.

On a GPU `T.copy(x[token, 0, first], x_frag)` brings a tile into registers. A CPU reads through its cache anyway,
so the copy would only add a pass. A tile becomes a view where the copy moves the same dtype and lies inside its
global buffer, everything that touches the tile stands beside the copy, in one sequence of statements (a block's or
a serial loop's), no reduction and no product takes it (they know a tile's own rows only), and

    an input   when nothing else writes the tile, and nothing writes the buffer;
    an output  when the tile is copied out once, to a buffer that nothing else touches, and no other tile
               operation takes it.

Used by `emit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import arith, ir, tirx

from .types import op_name


@dataclass(frozen=True)
class View:
    """Element [i, …] of a tile is element [first[k] + i, …] of `buffer`; `axes` says which axis k an i moves."""

    buffer: tirx.Buffer
    first: tuple
    axes: tuple[int, ...]
    is_output: bool

    def indices(self, tile_indices) -> list:
        indices = list(self.first)
        for axis, index in zip(self.axes, tile_indices, strict=True):
            indices[axis] = indices[axis] + index
        return indices


def views_of(block, analyzer: arith.Analyzer) -> dict[tirx.Buffer, View]:
    """Return the tiles among `block.alloc_buffers` that are read or written in place."""
    views, taken = views_in(block.body, accesses_of(block.body), analyzer), operands_in(block.body)
    return {tile: view for tile, view in views.items() if tile not in taken}


def views_in(body, everywhere: list[Access], analyzer: arith.Analyzer) -> dict[tirx.Buffer, View]:
    """Find views whose copy is in the sequence `body` or a serial loop in it; `everywhere`: the block's accesses."""
    statements = list(body.seq) if isinstance(body, tirx.SeqStmt) else [body]
    accesses = [accesses_of(statement) for statement in statements]
    views: dict[tirx.Buffer, View] = {}

    def is_here(tile: tirx.Buffer) -> bool:
        return count(tile, [access for one in accesses for access in one]) == count(tile, everywhere)

    for place, statement in enumerate(statements):
        if isinstance(statement, tirx.Bind):
            analyzer.bind(statement.var, statement.value, allow_override=True)
        if isinstance(statement, tirx.For) and statement.kind == tirx.ForKind.SERIAL:
            analyzer.bind(statement.loop_var, ir.Range.from_min_extent(statement.min, statement.extent))
            views |= views_in(statement.body, everywhere, analyzer)
        call: Any = getattr(statement, "value", None)
        if not isinstance(statement, tirx.Evaluate) or op_name(call) != "tl.tileop.copy":
            continue
        source, target = call.args
        if view := view_through(source, target, False, analyzer):
            tile = target.args[0].buffer
            written = [access.buffer for access in everywhere if access.is_write]
            if written.count(tile) == 1 and view.buffer not in written and is_here(tile):
                views[tile] = view
        elif view := view_through(target, source, True, analyzer):
            tile = source.args[0].buffer
            copies = [access for access in everywhere if access.buffer.same_as(tile) and access.is_region]
            first_use = next(k for k in range(place + 1) if count(tile, accesses[k]))
            bound_late = any(isinstance(later, tirx.Bind) for later in statements[first_use:place])
            if len(copies) == count(view.buffer, everywhere) == 1 and is_here(tile) and not bound_late:
                views[tile] = view
    return views


def operands_in(body) -> set[tirx.Buffer]:
    """Return the operands of reductions and products: they address a tile by its own shape, a view has its buffer's."""
    operands: set[tirx.Buffer] = set()

    def visit(node) -> None:
        if op_name(node) in ("tl.tileop.reduce", "tl.tileop.gemm"):
            operands.update(region.args[0].buffer for region in node.args if op_name(region) == "tl.region")

    tirx.stmt_functor.post_order_visit(body, visit)
    return operands


def count(buffer: tirx.Buffer, accesses: list[Access]) -> int:
    """Count the accesses to this buffer."""
    return sum(access.buffer.same_as(buffer) for access in accesses)


def view_through(outside, inside, is_output: bool, analyzer: arith.Analyzer) -> View | None:
    """Return a tile region seen as a region of global memory, if both move the same and the latter lies inside."""
    (memory, _, *extent), (tile, _, *tile_extent) = outside.args, inside.args
    buffer, first = memory.buffer, tuple(memory.indices)
    axes = tuple(axis for axis, _ in paired_axes(extent, tile_extent))
    whole = len(axes) == len(tile_extent) and all(map(same, tile_extent, tile.buffer.shape))
    if buffer.scope() != "global" or tile.buffer.scope() == "global":
        return None
    if not whole or buffer.dtype != tile.buffer.dtype:
        return None
    ends = [at + size for at, size in zip(first, extent, strict=True)]
    if not all(analyzer.can_prove(end <= full) for end, full in zip(ends, buffer.shape, strict=True)):
        return None
    return View(buffer, first, axes, is_output)


@dataclass(frozen=True)
class Access:
    """One place that reads or writes a buffer, as an element or as a tile operation's region."""

    buffer: tirx.Buffer
    is_write: bool
    is_region: bool


def accesses_of(statement) -> list[Access]:
    """Return every access in a statement. A region's own BufferLoad, which only names it, is not one."""
    accesses: list[Access] = []
    names: list[Any] = []

    def visit(node) -> None:
        if isinstance(node, tirx.BufferStore):
            accesses.append(Access(node.buffer, is_write=True, is_region=False))
        elif op_name(node) == "tl.region":
            names.append(node.args[0])
            accesses.append(Access(node.args[0].buffer, is_write=bool(int(node.args[1]) & 2), is_region=True))
        elif isinstance(node, tirx.BufferLoad):
            accesses.append(Access(node.buffer, is_write=False, is_region=False))

    tirx.stmt_functor.post_order_visit(statement, visit)
    for name in names:
        accesses.remove(Access(name.buffer, is_write=False, is_region=False))
    return accesses


def paired_axes(source, target) -> list[tuple[int, int]]:
    """Pair the axes of a copy's source with those of its target.

    The last with the last where all extents agree so; else, in order, those of extent other than one.
    """
    shared = min(len(source), len(target))
    aligned = [(len(source) - k, len(target) - k) for k in range(shared, 0, -1)]
    if all(same(source[a], target[b]) for a, b in aligned):
        return aligned
    moving = [[axis for axis, size in enumerate(extent) if not same(size, 1)] for extent in (source, target)]
    return list(zip(*moving, strict=True))


def same(a, b) -> bool:
    return all(isinstance(number, int | tirx.IntImm) for number in (a, b)) and int(a) == int(b)
