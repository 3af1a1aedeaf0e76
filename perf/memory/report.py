"""The output of `mhc-tilelang memory`: tables, legend, JSON. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..overhead.model import SUBLAYERS
from ..sizes import LayerSizes
from .estimate import ITEMSIZE, Stage, coefficient_bytes, layer_bytes

if TYPE_CHECKING:
    from .measured import Count

NOTES = """\
streams: x, layer inputs and outputs, the embedding. coefficients: h_pre, h_post, h_res, and m, s for their backward, in
float32. layers' own: what attention and FFN keep besides their inputs (plain attention; a dense SwiGLU as wide as all
experts that a token visits; none of it recomputed). peak: what all micro-batches in flight keep, and one recomputed
block. The paper's objective leaves out layer outputs and embedding, L + 1 of what is kept, and counts a normalised
input a sublayer."""


@dataclass(frozen=True)
class Row:
    """Bytes per token of one micro-batch."""

    what: str
    streams: int
    coefficients: int
    layers: int

    @property
    def total(self) -> int:
        """Sum of all bytes."""
        return self.streams + self.coefficients + self.layers


def rows(sizes: LayerSizes, stage: Stage) -> list[Row]:
    """Return the plain residual, mHC, mHC with blocks of L_r*, and what these recompute for a while."""
    unit, length = ITEMSIZE * sizes.hidden_size, stage.papers_length
    own = layer_bytes(sizes) * stage.num_sublayers // SUBLAYERS
    coefficients = coefficient_bytes(stage.num_streams) * stage.num_sublayers
    return [
        Row("plain residual", unit * stage.plain, 0, own),
        Row("mHC, all kept", unit * stage.all_kept, coefficients, own),
        Row(f"mHC, blocks of {length}", unit * stage.kept(length), coefficients, own),
        Row("and recomputed, a block at a time", unit * stage.recomputed(length), 0, 0),
    ]


def report(model: str, sizes: LayerSizes, stage: Stage, counts: Sequence[Count]) -> str:
    """Return the tables and what they count."""
    flight = f", {stage.in_flight} micro-batches in flight" if stage.in_flight > 1 else ""
    held = f"{stage.num_sublayers} sublayers of C = {sizes.hidden_size}, n = {stage.num_streams}, bfloat16{flight}"
    best = f"L_r* = {stage.papers_length}, √(nL/(n+2)) = {stage.papers_root:.2f}"
    parts = [
        f"{model}: {held}\nA model: arithmetic from shapes.",
        kinds_table(rows(sizes, stage)),
        f"The streams over L_r, in units of C per token; {best}",
        lengths_table(sizes, stage),
        NOTES,
    ]
    return "\n\n".join(parts + ([counts_table(counts)] if counts else []))


def kinds_table(found: Sequence[Row]) -> str:
    """Return a row per way to run the model."""
    from tabulate import tabulate

    plain, lines = found[0], []
    for row in found:
        cells = [kilobytes(value) for value in (row.streams, row.coefficients, row.layers, row.total)]
        ratios = [f"{row.streams / plain.streams:.2f}×", f"{row.total / plain.total:.2f}×" if row.layers else ""]
        lines.append([row.what, *cells, *ratios])
    headers = ["kept for the backward, kB/token", "streams", "coefficients", "layers' own", "all", "streams", "all"]
    return tabulate(lines, headers=headers, disable_numparse=True, colalign=["left", *["right"] * 6])


def lengths_table(sizes: LayerSizes, stage: Stage) -> str:
    """Return a row per L_r: some, and the best."""
    from tabulate import tabulate

    best = {stage.papers_length: "L_r*", stage.least_length: "least peak"}
    if len(best) == 1:
        best = {stage.papers_length: "L_r*, least peak"}
    shown = sorted({1, 2, 4, 8, 16, stage.num_sublayers, *best} & {*stage.lengths})
    unit = ITEMSIZE * sizes.hidden_size
    lines = [
        [k, *(f(k) for f in (stage.objective, stage.kept, stage.recomputed, stage.peak)), unit * stage.peak(k)]
        for k in shown
    ]
    cells = [[str(v) for v in line[:-1]] + [kilobytes(line[-1]), best.get(line[0], "")] for line in lines]
    headers = ["L_r", "the paper's (20)", "kept", "recomputed", "peak", "peak, kB/token", ""]
    return tabulate(cells, headers=headers, disable_numparse=True, colalign=[*["right"] * 6, "left"])


def counts_table(counts: Sequence[Count]) -> str:
    """Tabulate the bytes counted in the graph of a forward pass beside the formula's."""
    from tabulate import tabulate

    from .measured import SIZES

    lines = [
        ["plain residual" if one.connection == "residual" else "mHC", one.length or "", one.formula, one.measured]
        for one in counts
    ]
    sizes = f"C = {SIZES.hidden_size}, {SIZES.num_heads} heads of {SIZES.head_size}, SwiGLU of {SIZES.ffn_width}"
    table = tabulate(lines, headers=["bytes per token", "L_r", "formula", "counted"])
    return f"Counted in the graph of a forward pass of the same number of sublayers in float32, {sizes}:\n\n{table}"


def kilobytes(value: int) -> str:
    """Format bytes in units of 10³; empty for zero."""
    return f"{value / 1e3:,.1f}" if value else ""


def as_json(model: str, sizes: LayerSizes, stage: Stage, counts: Sequence[Count]) -> dict[str, Any]:
    """Return the content of `--json FILE`. Bytes per token of one micro-batch; `lengths` in units of C."""
    return {
        "kind": "memory",
        "model": model,
        "layer": asdict(sizes),
        "stage": asdict(stage),
        "kept": [{**asdict(row), "total": row.total} for row in rows(sizes, stage)],
        "papers_length": stage.papers_length,
        "papers_root": stage.papers_root,
        "least_length": stage.least_length,
        "lengths": [
            {
                "length": k,
                "papers_objective": stage.objective(k),
                "kept": stage.kept(k),
                "recomputed": stage.recomputed(k),
                "peak": stage.peak(k),
            }
            for k in stage.lengths
        ],
        "counted": [asdict(one) for one in counts],
    }
