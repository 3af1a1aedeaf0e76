"""Pictures of `study gain`: gains over depth, and the backward gain by iterations."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from ..figures.run import GREY, INK, KERNEL_COLOURS, Card, Picture
from .matrices import STRUCTURES, Curve
from .output import one_line

LEFT, RIGHT, BETWEEN, PANEL = 0.75, 1.1, 0.75, 2.2  # inches
HIGHEST = 1e12  # of the axis; what is beyond is on its way to overflow


def by_depth(curves: list[Curve], iters: int, about: dict[str, Any]) -> Picture:
    """HC left, mHC right; above with independent mappings, below with repeated ones."""
    title = "What a signal gains over depth"
    setup = about["setup"]
    notes = [
        f"The same draws g and factors a for both: HC is I + a·tanh(g) (Eq. 5), mHC Sinkhorn(a·g + 6·I − 3) at {iters} "
        "iterations (Eq. 7-9). Products in float64, means over tokens. Nothing is trained.",
        f"{setup['tokens']} tokens, n = {setup['streams']}, seed {setup['seed']}. {one_line(about)}",
    ]
    card = Card(
        title,
        "largest |row sum| (forward) and |column sum| (backward) of the product of all mappings so far",
        notes,
        5.9,
    )
    width = (9.0 - LEFT - RIGHT - BETWEEN) / 2
    for row, structure in enumerate(STRUCTURES):
        for column, name in enumerate(("HC", "mHC")):
            left = LEFT + column * (width + BETWEEN)
            axes = card.axes(left, 9.0 - left - width, 0.5 + (1 - row) * (PANEL + BETWEEN), PANEL)
            shown = [one for one in curves if one.structure == structure and one.name == name]
            draw_curves(axes, [one for one in shown if one.iters in (None, iters)])
            axes.set_title(f"{name}, {structure} sublayers", loc="left", fontsize=9.5)
            axes.set_xlabel("sublayers", color=GREY, labelpad=1)
    handles = legend_of(curves)
    card.figure.legend(handles=handles, loc="center right", frameon=False, fontsize=8.5, handlelength=1.6)
    return Picture("gain-depth", title, card.figure)


def draw_curves(axes: Axes, curves: list[Curve]) -> None:
    """Forward solid, backward dashed; a colour per scale."""
    for curve, colour in zip(curves, KERNEL_COLOURS, strict=False):
        depths = range(1, len(curve.forward) + 1)
        axes.plot(depths, curve.forward, color=colour, linewidth=1.4)
        axes.plot(depths, curve.backward, color=colour, linewidth=1.4, linestyle=(0, (3, 2)))
    axes.axhline(1, color=INK, linewidth=0.6, zorder=0)
    axes.set_yscale("log")
    axes.set_ylim(0.5, HIGHEST)
    axes.set_yticks([10**power for power in range(0, 13, 3)])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(1, max(2, len(curves[0].forward)))
    axes.grid(axis="y")


def legend_of(curves: list[Curve]) -> list[Line2D]:
    """Return the scales' colours, the two ways' lines."""
    scales = dict.fromkeys(curve.scale for curve in curves)
    handles = [
        Line2D([], [], color=colour, label=f"a = {a:g}") for a, colour in zip(scales, KERNEL_COLOURS, strict=False)
    ]
    handles += [Line2D([], [], color=GREY, label="forward"), Line2D([], [], color=GREY, ls="--", label="backward")]
    return handles


def by_iterations(curves: list[Curve], mark: int, about: dict[str, Any]) -> Picture:
    """mHC's backward gain, and its mappings' columns, by Sinkhorn iterations."""
    title = "What Sinkhorn's iterations leave to gain"
    constrained = [one for one in curves if one.iters is not None]
    scales = list(dict.fromkeys(one.scale for one in constrained))
    notes = [
        f"mHC's backward gain after {mark} sublayers and n = {about['setup']['streams']}, which bounds it; the forward "
        "gain is 1 throughout, since rows are normalised last. Right: of single mappings, the largest over tokens.",
        one_line(about),
    ]
    card = Card(title, "H = Sinkhorn(a·g + 6·I − 3)", notes, 3.1)
    width = (9.0 - LEFT - RIGHT - 2 * BETWEEN) / 3
    for column in range(3):
        left = LEFT + column * (width + BETWEEN)
        axes = card.axes(left, 9.0 - left - width, 0.5, 2.2)
        structure = STRUCTURES[min(column, 1)] if column < 2 else "independent"
        for scale, colour in zip(scales, KERNEL_COLOURS, strict=False):
            shown = [one for one in constrained if one.structure == structure and one.scale == scale]
            values = [one.backward[mark - 1] if column < 2 else max(one.column_deviation, 1e-7) for one in shown]
            axes.plot([one.iters or 0 for one in shown], values, color=colour, marker="o", ms=3, linewidth=1.4)
        axes.set_xscale("log")
        counts = sorted({one.iters for one in constrained if one.iters is not None})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="minor", length=0)
        axes.set_xlabel("iterations", color=GREY)
        axes.grid(axis="y")
        if column == 2:
            axes.set_yscale("log")
            axes.set_title("column sums off 1 by", loc="left", fontsize=9.5)
        else:
            axes.set_ylim(0.95, about["setup"]["streams"] + 0.05)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_title(f"backward gain, {structure}", loc="left", fontsize=9.5)
    handles = legend_of(constrained)[: len(scales)]
    card.figure.legend(handles=handles, loc="center right", frameon=False, fontsize=8.5, handlelength=1.6)
    return Picture("gain-iterations", title, card.figure)
