"""T.copy, T.fill, T.reduce and T.gemm as C++ loops.

A region is a buffer, the first index and the extent along each axis. Copies clip what hangs over the edge
of a global buffer, as on the GPU: what would be read there is zero, what would be written is dropped.
Used by `emit` through LOWERINGS; an `Emitter` comes in as the first argument.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import arith, tirx

from ...errors import LoweringError
from .types import Array
from .views import paired_axes, same

LANES = 16  # as in runtime.h
GEMMS = {(False, True): "gemm_nt", (False, False): "gemm_nn", (True, False): "gemm_tn"}


@dataclass(frozen=True)
class Region:
    """A box within a buffer: first index and extent along each axis (TIR expressions)."""

    array: Array
    first: list
    extent: list

    @classmethod
    def of(cls, emitter, call) -> Region:
        load, _access, *extent = call.args
        view = emitter.views.get(load.buffer)
        if view is None:
            return cls(emitter.array(load.buffer), list(load.indices), extent)
        spread = [tirx.IntImm("int32", 1)] * len(view.first)
        for axis, size in zip(view.axes, extent, strict=True):
            spread[axis] = size
        return cls(emitter.array(view.buffer), view.indices(load.indices), spread)

    def hangs_over(self, axis: int, analyzer: arith.Analyzer) -> bool:
        """Whether the region may leave the buffer along `axis`."""
        end = self.first[axis] + self.extent[axis]
        return self.array.is_global and not analyzer.can_prove(end <= self.array.shape[axis])

    def element(self, emitter, offsets: dict[int, str]) -> str:
        indices = []
        for axis, first in enumerate(self.first):
            terms = [emitter.expr(first)] if not is_zero(first) or axis not in offsets else []
            indices.append(" + ".join(terms + ([offsets[axis]] if axis in offsets else [])))
        return emitter.element(self.array, indices)


def is_zero(index) -> bool:
    return isinstance(index, tirx.IntImm) and int(index) == 0


def copy(emitter, call) -> None:
    """Row by row: the last axis is contiguous on both sides and goes through `mhc::copy_row` or `copy_out`."""
    if call.args[1].args[0].buffer in emitter.views:
        return  # the tile is a view of what would be copied into it
    view = emitter.views.get(call.args[0].args[0].buffer)
    if view is not None and view.is_output:
        return  # the tile is where it would be copied to
    source, target = Region.of(emitter, call.args[0]), Region.of(emitter, call.args[1])
    pairs = paired_axes(source.extent, target.extent)
    ends = (len(source.first), len(target.first))
    if len(pairs) > 1 and pairs[-1] == (ends[0] - 1, ends[1] - 1) and is_of_ones(source) and is_of_ones(target):
        pairs, ends = pairs[:-1], pairs[-1]  # vectors of one element: a row is along the axis before
    if not pairs or (pairs[-1][0] + 1, pairs[-1][1] + 1) != ends:
        raise LoweringError(f"T.copy whose last axis is not contiguous on both sides: {call}")
    variables: list[str] = []
    is_written = target.array.is_global and source.array.dtype == target.array.dtype
    emitter.writes_rows |= is_written

    def pointer(region: Region, side: int) -> str:
        return "&" + region.element(emitter, {pair[side]: var for pair, var in zip(pairs, variables, strict=False)})

    def level(k: int, inside: bool) -> None:
        source_axis, target_axis = pairs[k]
        limit = extent = emitter.expr(source.extent[source_axis])
        clips = [
            f"mhc::inside({emitter.expr(region.first[axis])}, {emitter.expr(region.array.shape[axis])}, {extent})"
            for region, axis in ((source, source_axis), (target, target_axis))
            if inside and region.hangs_over(axis, emitter.analyzer)
        ]
        if clips:
            limit = emitter.fresh(f"n{k}")
            emitter.line(f"const int64_t {limit} = {clips[0]};")
        clear_rest = bool(clips) and not target.array.is_global  # what was not read is zero
        if k + 1 == len(pairs):
            to = pointer(target, 1)
            if inside:
                rest = f"{to}, {pointer(source, 0)}, {limit}"
                begin = f"if ({limit} > 0) " if clips and emitter.checked else ""  # a row beyond the edge has no start
                if is_written:
                    sizes = " * ".join(f"int64_t({emitter.expr(extent)})" for extent in target.array.shape)
                    emitter.line(f"{begin}mhc::copy_out({rest}, {sizes} * sizeof({target.array.c_type}));")
                else:
                    emitter.line(f"{begin}mhc::copy_row({rest});")
            if clear_rest or not inside:
                skipped = limit if inside else "0"
                emitter.line(f"mhc::clear_row({to} + {skipped}, {extent} - {skipped});")
            return
        variables.append(emitter.fresh(f"r{k}"))
        rows(k, "0", limit, inside)
        if clear_rest:
            rows(k, limit, extent, False)
        variables.pop()

    def rows(k: int, first: str, end: str, inside: bool) -> None:
        emitter.open(f"for (int64_t {variables[k]} = {first}; {variables[k]} < {end}; ++{variables[k]})")
        level(k + 1, inside)
        emitter.close()

    emitter.open("")
    level(0, inside=True)
    emitter.close()


def is_of_ones(region: Region) -> bool:
    """Whether the last axis of the region's buffer has one element, which the region covers."""
    return same(region.array.shape[-1], 1) and is_zero(region.first[-1])


def fill(emitter, call) -> None:
    target, value = Region.of(emitter, call.args[0]), emitter.expr(call.args[1])
    loops(emitter, target, f"= {target.array.c_type}({value});")


def reduce(emitter, call) -> None:
    """dst = Σ src (or max) along one axis, in ascending order, the kept axes innermost.

    The sum of a last axis of whole registers is `mhc::sum_row`'s instead: by lanes, then pairwise.
    """
    source, target = Region.of(emitter, call.args[0]), Region.of(emitter, call.args[1])
    kind, axis, clear = call.args[2].value, int(call.args[3]), bool(call.args[4])
    if kind not in ("sum", "max"):
        raise LoweringError(f"T.reduce of kind {kind!r}; sum and max are known")
    kept = [k for k in range(len(source.extent)) if k != axis]
    variables = {k: emitter.fresh(f"r{k}") for k in range(len(source.extent))}
    is_row = kind == "sum" and axis == len(kept) and int(source.extent[axis]) % LANES == 0
    if clear:
        loops(emitter, target, f"= {identity_of(kind, target.array.dtype)};")
    for k in kept if is_row else [axis, *kept]:
        emitter.open(
            f"for (int64_t {variables[k]} = 0; {variables[k]} < {emitter.expr(source.extent[k])}; ++{variables[k]})"
        )
    into = target.element(emitter, {place: variables[k] for place, k in enumerate(kept)})
    if is_row:
        row = source.element(emitter, {**variables, axis: "0"})
        term = f"mhc::sum_row<{int(source.extent[axis])}>(&{row})"
    else:
        term = source.element(emitter, variables)
    emitter.line(
        f"{into} = {into} + {term};" if kind == "sum" else f"{into} = mhc::max<{target.array.c_type}>({into}, {term});"
    )
    for _ in range(len(kept) + (not is_row)):
        emitter.close()


def identity_of(kind: str, dtype: str) -> str:
    """Return the start value of a reduction."""
    if dtype == "int32" and kind == "max":
        return "INT32_MIN"
    return "0.0f" if kind == "sum" else "-__builtin_inff()"


def gemm(emitter, call) -> None:
    """C += A · Bᵀ, A · B or Aᵀ · B of whole tiles; the kernels use no other orientation."""
    regions = [Region.of(emitter, arg) for arg in call.args[:3]]
    a, b, c = (region.array for region in regions)
    if any(region.array.is_global for region in regions):
        raise LoweringError(f"T.gemm on global memory: {call}")
    transposed = bool(call.args[3]), bool(call.args[4])
    m, n, k = (int(arg) for arg in call.args[5:8])
    clear = bool(call.args[9])
    if transposed not in GEMMS or clear:
        raise LoweringError(f"T.gemm with transpose_A, transpose_B = {transposed}, clear_accum = {clear}")
    emitter.line(f"mhc::{GEMMS[transposed]}<{m}, {n}, {k}>({a.name}, {b.name}, {c.name});")


def loops(emitter, region: Region, statement: str) -> None:
    """`region[…] statement` for every element of the region."""
    variables = {axis: emitter.fresh(f"r{axis}") for axis in range(len(region.extent))}
    for axis, var in variables.items():
        emitter.open(f"for (int64_t {var} = 0; {var} < {emitter.expr(region.extent[axis])}; ++{var})")
    emitter.line(f"{region.element(emitter, variables)} {statement}")
    for _ in variables:
        emitter.close()


def nothing(_emitter, _call) -> None:
    """T.pdl_sync waits for the kernel before this one, which on a CPU has returned."""


LOWERINGS = {
    "tl.pdl_sync": nothing,
    "tl.tileop.copy": copy,
    "tl.tileop.fill": fill,
    "tl.tileop.reduce": reduce,
    "tl.tileop.gemm": gemm,
}
