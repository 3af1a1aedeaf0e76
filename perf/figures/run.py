"""Shared parts of all pictures of `bench report`: style, layout in inches, bars, files. Needs matplotlib.

    figures_kernels    roofline, share of the copy's bandwidth, speed-up against plain torch
    figures_sublayer   overhead of whole models, traffic of a sublayer

A picture is one card with a background of its own, so that it reads the same on a light page and on a dark one. Text
in the SVG stays text. The same results give the same bytes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...errors import MHCError
from ..stored.results import Spread

INK, GREY, RULE, PAPER = "#1f2328", "#59636e", "#d1d9e0", "#ffffff"
BLUE, PALE_BLUE, ORANGE, GREEN = "#0072b2", "#a6cee3", "#d55e00", "#009e73"  # told apart by the colour-blind, too
KERNEL_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")

WIDTH, MARGIN, ROW, GROUP_GAP = 9.0, 0.2, 0.24, 0.5  # three in inches, the gap in rows
DPI = 130
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "mhc-tilelang",
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure, the name of its files and a sentence for those who cannot see it."""

    name: str
    title: str
    figure: Figure

    def save(self, folder: Path) -> list[Path]:
        """Write NAME.svg and NAME.png. Raises MHCError when they cannot be written."""
        paths = [folder / f"{self.name}.{suffix}" for suffix in ("svg", "png")]
        try:
            with matplotlib.rc_context(STYLE):
                self.figure.savefig(paths[0], metadata={"Date": None})
                self.figure.savefig(paths[1], dpi=DPI)
        except OSError as error:
            raise MHCError(f"cannot write a picture: {error.strerror or error}: {error.filename}") from error
        return paths


@dataclass(frozen=True)
class Bar:
    """A horizontal bar: what it belongs to and is called, how long it is, what stands to its right."""

    group: str
    label: str
    value: Spread
    text: str
    colour: str = BLUE
    filled: bool = True


class Card:
    """A figure with a title, a line below it and a caption; room for axes between them."""

    def __init__(self, title: str, subtitle: str, caption: Sequence[str], height: float) -> None:
        """`height` is the room for axes in inches; a caption's lines are wrapped."""
        lines = [line for text in caption for line in textwrap.wrap(text, width=128)]
        self.above, self.below = 0.75, 0.16 * len(lines) + 0.2
        self.height = height + self.above + self.below
        with matplotlib.rc_context(STYLE):
            self.figure = Figure(figsize=(WIDTH, self.height))
            FigureCanvasAgg(self.figure)
            self.text(MARGIN, self.height - 0.32, title, fontsize=13, fontweight="bold")
            self.text(MARGIN, self.height - 0.56, subtitle, color=GREY)
            for i, line in enumerate(lines):
                self.text(MARGIN, self.below - 0.16 * (i + 1), line, fontsize=7.5, color=GREY)

    def text(self, x: float, y: float, text: str, **style: object) -> None:
        """Text at a place in inches."""
        self.figure.text(x / WIDTH, y / self.height, text, **style)  # type: ignore[arg-type]

    def axes(self, left: float, right: float, bottom: float, height: float) -> Axes:
        """Axes between margins in inches; `bottom` counts from the caption."""
        size = (WIDTH - left - right) / WIDTH, height / self.height
        with matplotlib.rc_context(STYLE):
            return self.figure.add_axes((left / WIDTH, (self.below + bottom) / self.height, *size))


def bars_height(bars: Sequence[Bar]) -> float:
    """Return the inches that `draw_bars` needs."""
    gaps = sum(one.group != other.group for one, other in pairwise(bars))
    return ROW * (len(bars) + GROUP_GAP * gaps + 0.6)


def draw_bars(axes: Axes, bars: Sequence[Bar], start: float = 0) -> None:
    """Draw the bars from top to bottom, each from `start` to its median, with a whisker between its quartiles."""
    places, place = [], 0.0
    for i, bar in enumerate(bars):
        place += (1 + GROUP_GAP * (bar.group != bars[i - 1].group)) if i else 0
        places.append(place)
    beside = axes.get_yaxis_transform()  # the axes' width across, rows down
    box = axes.get_position()
    margin = (MARGIN / WIDTH - box.x0) / box.width
    for i, (bar, y) in enumerate(zip(bars, places, strict=True)):
        value = bar.value
        face = bar.colour if bar.filled else PAPER
        axes.barh(y, value.median - start, left=start, height=0.72, color=face, edgecolor=bar.colour, linewidth=1)
        if value.lower_quartile < value.upper_quartile:
            axes.plot([value.lower_quartile, value.upper_quartile], [y, y], color=INK, linewidth=1, marker="|", ms=5)
        axes.text(1.015, y, bar.text, transform=beside, va="center", fontsize=8.5)
        if i == 0 or bar.group != bars[i - 1].group:
            axes.text(margin, y, bar.group, transform=beside, va="center", fontweight="bold")
    axes.set_yticks(places, [bar.label for bar in bars], fontsize=8.5, color=GREY)
    axes.set_ylim(places[-1] + 0.8, -0.8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
