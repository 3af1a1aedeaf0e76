"""The picture of `mhc-tilelang memory`: stream tensors over L_r, with the optimum. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..figures.run import BLUE, GREEN, GREY, INK, ORANGE, Card, Picture
from ..overhead.model import SUBLAYERS
from ..sizes import LayerSizes
from .estimate import FLOAT32, ITEMSIZE, Stage, coefficient_bytes, layer_bytes
from .report import kilobytes

if TYPE_CHECKING:
    from .measured import Count

LONGEST = 4.0  # the axis ends at so many times L_r*
LABEL = 0.055  # of the axis: a line of text


def draw(model: str, sizes: LayerSizes, stage: Stage, counts: Sequence[Count]) -> Picture:
    """Kept, recomputed, their peak and the paper's objective; the counts of `memory_measured` as diamonds."""
    best, least, flight = stage.papers_length, stage.least_length, stage.in_flight
    lengths = [k for k in stage.lengths if k <= max(8, LONGEST * best, least)]
    unit = ITEMSIZE * sizes.hidden_size
    title = f"Stream memory over the recomputed block's length, {model}"
    held = f"{stage.num_sublayers} sublayers, C = {sizes.hidden_size}, n = {stage.num_streams}, bfloat16"
    in_flight = f", {flight} micro-batches in flight" if flight > 1 else ""
    notes = [
        "Arithmetic from shapes. kept: the stream at each block's start, every layer output, the embedding. made "
        "again: the rest of one block, while the backward is in it. The paper's objective leaves the outputs out.",
        f"Without recomputation {flight * stage.all_kept}C, {kilobytes(flight * stage.all_kept * unit)} kB a token, "
        f"are kept; of a plain residual {flight * stage.plain}C. Left out: coefficients, and what layers keep."
        + (" Diamonds: counted in a forward pass's graph at small sizes, scaled by C." if counts else ""),
    ]
    card = Card(title, held + in_flight, notes, height=3.9)
    axes = card.axes(0.75, 2.3, 0.55, 3.2)
    series = (
        ("peak: kept + recomputed", [stage.peak(k) for k in lengths], BLUE, "-"),
        ("kept" + (" (all in flight)" if flight > 1 else ""), [flight * stage.kept(k) for k in lengths], GREEN, "-"),
        ("recomputed", [stage.recomputed(k) for k in lengths], GREY, "-"),
        ("the paper's objective (20)", [stage.objective(k) for k in lengths], ORANGE, "--"),
    )
    for _, values, colour, line in series:
        axes.plot(lengths, values, line, color=colour, marker="o", markersize=2.5, linewidth=1.4)
    axes.plot(best, stage.objective(best), "o", color=ORANGE, markersize=9, markerfacecolor="none", markeredgewidth=1.6)
    axes.plot(least, stage.peak(least), "o", color=BLUE, markersize=9, markerfacecolor="none", markeredgewidth=1.6)
    axes.axvline(stage.papers_root, color=INK, linewidth=0.9, linestyle=":")
    top = 1.15 * max(max(values) for _, values, *_ in series)
    place = -1.0
    for name, values, colour, _ in sorted(series, key=lambda one: one[1][-1]):
        place = max(values[-1], place + LABEL * top)  # labels of lines that end close to each other move apart
        axes.annotate(
            f"{name}: {values[-1]}C",
            (lengths[-1], place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=8.5,
        )
    text = f" L_r* = {best},  √(nL/(n+2)) = {stage.papers_root:.2f};  least peak at {least}"
    axes.text(stage.papers_root, 0.985 * top, text, va="top", fontsize=8.5)
    seen = [(one.length, flight * streams_of(one, stage)) for one in counts if one.length in lengths]
    if seen:
        axes.plot(*zip(*seen, strict=True), "D", color=INK, markersize=4.5, markerfacecolor="none", zorder=4)
    axes.set_xlim(0.5, lengths[-1] + 0.5)
    axes.set_ylim(0, top)
    axes.set_xlabel("L_r, sublayers a block", color=GREY)
    axes.set_ylabel("elements per token, in units of C", color=GREY)
    axes.grid()
    return Picture(f"memory-{model}" + (f"-{flight}-stages" if flight > 1 else ""), title, card.figure)


def streams_of(one: Count, stage: Stage) -> float:
    """Return the streams' share of what was counted, in units of C: coefficients and layers taken off."""
    from .measured import SIZES

    own = layer_bytes(SIZES, FLOAT32) * stage.num_sublayers // SUBLAYERS
    others = own + coefficient_bytes(stage.num_streams) * stage.num_sublayers
    return (one.measured - others) / (FLOAT32 * SIZES.hidden_size)
