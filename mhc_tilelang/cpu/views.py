"""Tiles that need no copy: a fragment filled once from global memory is that memory, seen from an offset.

On a GPU `T.copy(x[token, 0, first], x_frag)` brings a tile into registers. A CPU reads through its cache
anyway, so the copy would only add a pass. A tile becomes a view when nothing else writes it, the copy stands
outside every loop, moves the same dtype, lies inside its source, and no output is read through it.
Used by `emit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import arith, tirx

from .types import op_name


@dataclass(frozen=True)
class View:
    """Element [i, …] of a tile is element [first[k] + i, …] of `buffer`; `axes` says which axis k an i moves."""

    buffer: tirx.Buffer
    first: tuple
    axes: tuple[int, ...]

    def indices(self, tile_indices) -> list:
        indices = list(self.first)
        for axis, index in zip(self.axes, tile_indices, strict=True):
            indices[axis] = indices[axis] + index
        return indices


def views_of(block, analyzer: arith.Analyzer) -> dict[tirx.Buffer, View]:
    """The tiles among `block.alloc_buffers` that may be read in place."""
    statements = block.body.seq if isinstance(block.body, tirx.SeqStmt) else [block.body]
    written = written_buffers(block.body)
    views = {}
    for statement in statements:
        if isinstance(statement, tirx.Bind):
            analyzer.bind(statement.var, statement.value, allow_override=True)
        for tile, view in view_of_copy(statement, analyzer).items():
            if written.count(tile) == 1 and view.buffer not in written:
                views[tile] = view
    return views


def view_of_copy(statement, analyzer: arith.Analyzer) -> dict[tirx.Buffer, View]:
    call: Any = getattr(statement, "value", None)
    if not isinstance(statement, tirx.Evaluate) or op_name(call) != "tl.tileop.copy":
        return {}
    (source, _, *extent), (tile, _, *tile_extent) = call.args[0].args, call.args[1].args
    buffer, first = source.buffer, tuple(source.indices)
    axes = tuple(axis for axis, _ in paired_axes(extent, tile_extent))
    whole = len(axes) == len(tile_extent) and all(map(same, tile_extent, tile.buffer.shape))
    if buffer.scope() != "global" or not whole or buffer.dtype != tile.buffer.dtype:
        return {}
    if not all(
        analyzer.can_prove(at + size <= full) for at, size, full in zip(first, extent, buffer.shape, strict=True)
    ):
        return {}
    return {tile.buffer: View(buffer, first, axes)}


def paired_axes(source, target) -> list[tuple[int, int]]:
    """Which axis of a copy's source goes with which of its target.

    The last with the last where all extents agree so; else, in order, those of extent other than one.
    """
    shared = min(len(source), len(target))
    aligned = [(len(source) - k, len(target) - k) for k in range(shared, 0, -1)]
    if all(same(source[a], target[b]) for a, b in aligned):
        return aligned
    moving = [[axis for axis, size in enumerate(extent) if not same(size, 1)] for extent in (source, target)]
    return list(zip(*moving, strict=True))


def written_buffers(body) -> list[tirx.Buffer]:
    """Every buffer that something in `body` writes, once per place that does."""
    written = []

    def visit(node) -> None:
        if isinstance(node, tirx.BufferStore):
            written.append(node.buffer)
        elif op_name(node) == "tl.region" and int(node.args[1]) & 2:
            written.append(node.args[0].buffer)

    tirx.stmt_functor.post_order_visit(body, visit)
    return written


def same(a, b) -> bool:
    return all(isinstance(number, int | tirx.IntImm) for number in (a, b)) and int(a) == int(b)
