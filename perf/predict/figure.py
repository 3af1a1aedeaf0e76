"""The pictures of `mhc-tilelang predict`: a stack of terms a kernel, one steady iteration in time. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

from ..calls.cases import Shape
from ..figures.run import BLUE, GREEN, GREY, INK, ORANGE, PALE_BLUE, ROW, Card, Picture
from .devices import Device
from .predicted import Prediction
from .schedule import Steady

PARTS = {
    "launch": (GREY, "launch"),
    "memory": (BLUE, "bytes over bandwidth"),
    "trips": (ORANGE, "round trips that nothing hides"),
    "cycles": ("#b8860b", "instructions and their latencies"),
    "barriers": ("#cc79a7", "barriers"),
    "blocks": (GREEN, "starts of blocks"),
    "tail": (PALE_BLUE, "the end, when SMs run dry"),
}
LANES = ("load in flight", "issue", "wait for memory", "wait for another result", "barrier", "store")
LANE_COLOURS = dict(zip(LANES, (BLUE, INK, ORANGE, "#b8860b", "#cc79a7", GREEN), strict=True))


def stacks(predictions: Sequence[Prediction]) -> Picture:
    """Draw two bars a launch: its prediction by terms, and below it the time that memory alone would take."""
    lines = [(each, part) for each in predictions for part in each.parts]
    gpu = predictions[0].gpu
    shapes = ", ".join(dict.fromkeys(f"{each.tokens} × {each.hidden_size}" for each in predictions))
    notes = [
        "Predicted from machine code; nothing was measured. What SM time adds beyond memory is parted by what a block "
        "alone asks for. The line across a bar is the interval, the thin bar below what the bytes alone would take."
    ]
    if missing := [each.name for each in predictions if not each.parts]:
        notes.append(f"No answer: {', '.join(missing)}.")
    height = 2 * ROW * max(1, len(lines)) + 0.5
    card = Card(f"Predicted time by terms, {gpu}", f"{shapes}, {predictions[0].dtype}", notes, height=height + 1.25)
    axes = card.axes(2.6, 0.3, 1.1, height)
    for place, (_, part) in enumerate(lines):
        left = 0.0
        for name, (colour, _) in PARTS.items():
            axes.barh(place, part.stack[name], left=left, height=0.5, color=colour, linewidth=0)
            left += part.stack[name]
        axes.barh(place + 0.36, part.memory_us, height=0.14, color=BLUE, alpha=0.45, linewidth=0)
        axes.plot([part.low, part.high], [place, place], color=INK, linewidth=0.9, marker="|", markersize=6)
    names = [each.name if each.name == part.family else f"{each.name}: {part.family}" for each, part in lines]
    axes.set_yticks(range(len(lines)), names, fontsize=8.5)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(0, None)
    axes.set_xlabel("µs, predicted", color=GREY)
    axes.grid(axis="x")
    handles = [axes.barh(-9, 0, color=colour, label=label) for colour, label in PARTS.values()]
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.4, -0.5 / height), ncol=4, fontsize=7.5, frameon=False
    )
    return Picture(f"predict-{gpu}", "Predicted time by terms", card.figure)


def timeline(found: Steady, family: str, shape: Shape, gpu: Device) -> Picture:
    """Lanes of what happens in one steady iteration of a lone warp."""
    notes = [
        f"A lone warp, issuing as the control bits say; a load from memory takes {gpu.constants.latency:.0f} cycles. "
        "Other warps of the SM run in the waits. Predicted: nothing was measured.",
    ]
    loads = stack([(e.start, e.end) for e in found.events if e.kind == "load in flight"])
    last = max((row for *_, row in loads), default=0)
    top = max(1, last + 1) * 0.12 + 0.9
    rows = {lane: top + 0.8 * number for number, lane in enumerate(LANES[1:])}
    bottom = top + 0.8 * len(rows)
    height = bottom * 0.42 + 0.2
    title = f"One steady iteration of {family}, {gpu.name}"
    what = f"{shape.num_tokens} tokens, C = {shape.hidden_size}, {shape.dtype}: {found.cycles:.0f} cycles, {found.runs}"
    card = Card(title, f"{what}, {found.instructions} instructions", notes, height=height + 0.7)
    axes = card.axes(1.9, 0.3, 0.5, height)
    bars = [(0.12 * row, end - start, start, 0.09, LANES[0]) for start, end, row in loads]
    for e in found.events:
        if e.kind in rows:
            bars.append((rows[e.kind], max(e.end - e.start, found.cycles / 700), e.start, 0.55, e.kind))
    for place, long, start, thick, lane in bars:
        axes.barh(place, long, left=start, height=thick, color=LANE_COLOURS[lane], linewidth=0)
    totals = {kind: found.total(kind) for kind in LANES[2:5]}
    labels = [f"{lane}: {totals[lane]:.0f}" if totals.get(lane) else lane for lane in LANES]
    axes.set_yticks([last * 0.06, *rows.values()], labels, fontsize=8.5)
    axes.set_ylim(bottom - 0.2, -0.3)
    axes.set_xlim(0, found.cycles)
    axes.set_xlabel("cycles", color=GREY)
    axes.grid(axis="x")
    return Picture(f"timeline-{family}-{gpu.name}", title, card.figure)


def stack(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float, int]]:
    """Stack intervals, each in the first row that is free."""
    ends: list[float] = []
    found = []
    for start, end in sorted(intervals):
        row = next((row for row, free in enumerate(ends) if free <= start), len(ends))
        ends[row:] = [end, *ends[row + 1 :]]
        found.append((start, end, row))
    return found
