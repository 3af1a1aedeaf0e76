"""Pictures of whole sublayers: the overhead over a plain residual, and the traffic that it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from ..overhead.model import IN_MODE, TRAINING
from ..stored.results import OverheadResults, Spread
from ..traffic.formulas import stream_elements
from .run import BLUE, GREEN, GREY, INK, ORANGE, PALE_BLUE, PAPER, Bar, Card, Picture, bars_height, draw_bars

PAPERS_OVERHEAD = 6.7  # per cent, at n = 4; the paper states neither the model nor the hardware
LEFT, AXIS, BETWEEN = 2.9, 0.45, 0.95  # inches: the bars' names, below the axes, between two axes


def overhead(results: OverheadResults, prefix: str) -> Picture | None:
    """Bars of per cent over the plain residual, measured and predicted; None where the file has neither."""
    measured = [
        Bar(row.mode, row.connection, row.overhead, f"{row.overhead.median:+.1f} %")
        for row in results.rows
        if row.overhead is not None
    ]
    predicted = [
        Bar(one.device, one.variant, exactly(one.overhead), f"{one.overhead:+.1f} %", filled=False)
        for one in results.predictions
        if one.mode == IN_MODE[TRAINING]  # forward alone is in the table
    ]
    parts = [(name, bars) for name, bars in (("measured", measured), ("predicted", predicted)) if bars]
    if not parts:
        return None
    notes = [
        f"Line: the {PAPERS_OVERHEAD} % that the paper states for training at n = 4, of a model and on hardware "
        "that it does not name. Whiskers: quartiles. Hollow bars: a model's prediction for forward + backward.",
        *([f"Measured on this device: {results.not_comparable}"] if results.not_comparable else []),
        str(results.facts),
    ]
    title = "Overhead over a plain residual"
    heights = [bars_height(bars) for _, bars in parts]
    room = sum(heights) + AXIS + 0.3 + BETWEEN * (len(parts) - 1)
    card = Card(title, f"additional time of one layer: {results.layer}", notes, room)
    bottom = room - 0.3
    for (name, bars), height in zip(parts, heights, strict=True):
        bottom -= height
        axes = card.axes(LEFT, 0.95, bottom, height)
        bottom -= BETWEEN
        draw_bars(axes, bars)
        axes.axvline(0, color=INK, linewidth=1)
        axes.axvline(PAPERS_OVERHEAD, color=ORANGE, linewidth=1.5)
        across = axes.get_xaxis_transform()
        axes.text(
            PAPERS_OVERHEAD,
            1.0,
            f"paper: {PAPERS_OVERHEAD} %",
            transform=across,
            va="bottom",
            color=ORANGE,
            fontsize=8.5,
        )
        lowest = min(0.0, *(1.05 * bar.value.lower_quartile for bar in bars))
        axes.set_xlim(lowest, max(1.2 * PAPERS_OVERHEAD, *(1.05 * bar.value.upper_quartile for bar in bars)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.set_xlabel(name, color=GREY)
    return Picture(f"{prefix}-overhead", title, card.figure)


def exactly(value: float) -> Spread:
    """Return a value without a spread."""
    return Spread(value, value, value)


@dataclass(frozen=True)
class Stage:
    """A way to run a sublayer: elements of the stream's dtype per token in units of C."""

    name: str
    read: int
    written: int
    saving: str = ""
    here: bool = True

    @property
    def total(self) -> int:
        """Read and written."""
        return self.read + self.written


def stages(num_streams: int) -> list[Stage]:
    """Return the stages of fusion: unfused hyper-connections to the least traffic possible, then the plain residual.

    The first is the paper's Table 2, operation by operation; the rest are the kernels of `traffic`, with less and less
    of what crosses from one to the next. The third is what these kernels do.
    """
    n = num_streams
    unfused = ((n, 0), (n, 1), (1, n), (n, n), (2 * n, n))  # coefficients, pre, post, res, merge
    project, pre, post = (stream_elements(kernel, n) for kernel in ("project", "aggregate", "post"))
    return [
        Stage("unfused HC", *columns(unfused)),
        Stage("kernel by kernel", *columns((project, pre, post)), saving="post, res, merge\nin one kernel"),
        Stage("these kernels", *columns((pre, post)), saving="x_next projected\nwhile on chip"),
        Stage("floor: one pass", *columns(((0, pre[1]), post)), saving="and gathered\nin the same pass", here=False),
        Stage("plain residual", 2, 1),
    ]


def columns(parts: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Sum what is read and what is written."""
    return sum(read for read, _ in parts), sum(written for _, written in parts)


def traffic(num_streams: int, version: str) -> Picture:
    """Draw a waterfall from unfused hyper-connections down to the floor, and the plain residual beside it."""
    found = stages(num_streams)
    notes = [
        "Outlined: one pass needs h_pre before x_next is complete. In V4.1's delayed form it is there, and these "
        "kernels move 10C; otherwise they move 14C. phi, coefficients and partial sums are left out.",
        f"Counted from shapes on no device: nothing here is measured. mhc-tilelang {version}",
    ]
    title = "Traffic of a sublayer, forward"
    subtitle = f"elements of the stream's dtype per token, in units of C; n = {num_streams}"
    card = Card(title, subtitle, notes, height=3.6)
    axes = card.axes(0.5, 0.3, 0.55, 2.85)
    x = 0.0
    ticks = []
    for i, stage in enumerate(found):
        if stage.saving:
            before = found[i - 1].total
            axes.bar(
                x, before - stage.total, bottom=stage.total, width=0.72, color=PALE_BLUE, hatch="///", edgecolor=PAPER
            )
            axes.text(
                x, before + 0.4, f"−{before - stage.total}C\n{stage.saving}", ha="center", va="bottom", fontsize=8
            )
            axes.plot([x - 1, x + 1], [before, before], color=GREY, linewidth=0)
            x += 1
        for size, bottom, colour in ((stage.read, 0, BLUE), (stage.written, stage.read, GREEN)):
            axes.bar(
                x,
                size,
                bottom=bottom,
                width=0.72,
                color=colour if stage.here else PAPER,
                edgecolor=colour,
                linewidth=1.5,
            )
        axes.text(x, stage.total + 0.4, f"{stage.total}C", ha="center", va="bottom", fontsize=11, fontweight="bold")
        ticks.append((x, stage.name))
        x += 1
    axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=9)
    axes.tick_params(axis="x", length=0, colors=INK)
    axes.set_ylim(0, found[0].total * 1.12)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    handles = [Patch(color=GREEN, label="written"), Patch(color=BLUE, label="read")]
    axes.legend(handles=handles, loc="upper right", frameon=False)
    return Picture("traffic", title, card.figure)
