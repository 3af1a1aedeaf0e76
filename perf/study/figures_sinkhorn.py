"""Pictures of `study sinkhorn`: one matrix step by step, convergence, gradients' errors, cost."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from ..figures.run import BLUE, GREEN, GREY, INK, KERNEL_COLOURS, ORANGE, PALE_BLUE, WIDTH, Card, Picture
from .convergence import Distance, Matrices, iterate
from .cost import Times, doubtful
from .gradients import Error
from .output import one_line

STEPS = ((1, "columns"), (1, "rows"), (2, "columns"), (2, "rows"), (5, "rows"), (20, "columns"), (20, "rows"))
LEFT, RIGHT, BETWEEN = 0.75, 0.25, 0.7  # inches
NOTHING = 1e-16  # where a logarithm ends


def flow(logits: Matrices, eps: float, about: dict[str, Any]) -> Picture:
    """Draw the logits, then the matrix after some steps, with the sums of its rows and columns."""
    title = "One matrix from logits to doubly stochastic"
    notes = [
        f"Entries, with row sums to the right and column sums below; bold where they are within 0.001 of 1. Normal "
        f"logits of standard deviation {about['setup']['flow_scale']:g}, seed {about['setup']['seed']}; eps {eps:g}, "
        f"float64. Row j is output stream j, column i input stream i. mhc-tilelang {about['versions']['mhc-tilelang']}",
    ]
    reached = dict(zip(order(), (h_res for _, h_res in islice(iterate(logits[None], eps), 40)), strict=True))
    card = Card(title, "columns first, rows last: an iteration is both", notes, 4.65)
    panels = [("logits", logits)] + [(f"{name} of iteration {i}", reached[i, name][0]) for i, name in STEPS]
    side, across = 1.55, (WIDTH - 0.35) / 4
    for k, (name, matrix) in enumerate(panels):
        left = 0.3 + (k % 4) * across
        axes = card.axes(left, WIDTH - left - side, 0.35 + (1 - k // 4) * 2.45, side)
        draw_matrix(axes, matrix, sums=k > 0)
        axes.set_title(name, loc="left", fontsize=9)
    return Picture("sinkhorn-flow", title, card.figure)


def order() -> list[tuple[int, str]]:
    """Iteration and step of the first 20 iterations."""
    return [(i, name) for i in range(1, 21) for name in ("columns", "rows")]


def draw_matrix(axes: Axes, matrix: Matrices, sums: bool) -> None:
    """Numbers on a ground of blue, from 0 to 1; logits on their own range."""
    low, high = (0.0, 1.0) if sums else (matrix.min(), matrix.max())
    axes.imshow(matrix, cmap="Blues", vmin=low, vmax=high + 0.35 * (high - low))
    n = len(matrix)
    size = 8.0 if n <= 4 else 5.0
    for (j, i), value in np.ndenumerate(matrix):
        text = f"{value:.2f}" if sums else f"{value:.1f}"
        axes.text(i, j, text, ha="center", va="center", fontsize=size, color=INK)
    if sums:
        for k in range(n):
            for x, y, total in ((n - 0.35, k, matrix[k].sum()), (k, n - 0.2, matrix[:, k].sum())):
                exact = abs(total - 1) < 1e-3
                style: dict[str, Any] = {"fontweight": "bold", "color": GREEN} if exact else {"color": ORANGE}
                across = "left" if x > y or (x == n - 0.35) else "center"
                axes.text(x, y, f"{total:.3f}", ha=across, va="center", fontsize=size - 1, **style)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def by_iterations(axes: Axes, iters: list[int], title: str) -> None:
    """Logarithmic axes with the iterations below."""
    axes.set_xscale("log")
    axes.set_xticks(iters, [str(count) for count in iters])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("iterations", color=GREY)
    axes.set_title(title, loc="left", fontsize=9.5)
    axes.grid(axis="y")


def convergence(distances: list[Distance], about: dict[str, Any]) -> Picture:
    """Deviation of column sums, and what the order of steps matters, by iterations and scale."""
    title = "How close to doubly stochastic"
    scales = list(dict.fromkeys(one.scale for one in distances))
    notes = [
        f"{about['setup']['matrices']} matrices of n = {about['setup']['streams']}, normal logits, eps "
        f"{about['setup']['eps']:g}, float64. Left: solid the median over matrices, dashed the largest. Right: 99th "
        "percentile of the largest difference of an entry between columns first and rows first.",
        one_line(about),
    ]
    card = Card(title, "by Sinkhorn iterations and standard deviation of logits", notes, 3.2)
    width = (WIDTH - LEFT - 1.1 - BETWEEN) / 2
    for k, name in enumerate(("column sums off 1 by", "difference that the order makes")):
        left = LEFT + k * (width + BETWEEN)
        axes = card.axes(left, WIDTH - left - width, 0.5, 2.35)
        for scale, colour in zip(scales, KERNEL_COLOURS, strict=False):
            shown = [one for one in distances if one.scale == scale]
            iters = [one.iters for one in shown]
            first = [max(one.order if k else one.median, NOTHING) for one in shown]
            axes.plot(iters, first, color=colour, marker="o", ms=3, label=f"std {scale:g}")
            if not k:
                largest = [max(one.largest, NOTHING) for one in shown]
                axes.plot(iters, largest, color=colour, linestyle="--", linewidth=1)
        by_iterations(axes, sorted({one.iters for one in distances}), name)
        if k:
            axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=8.5)
    return Picture("sinkhorn-convergence", title, card.figure)


def gradients(errors: list[Error], about: dict[str, Any]) -> Picture:
    """Draw a panel per scale, a colour per method; medians and 99th percentiles."""
    title = "Gradients through Sinkhorn: unrolled and implicit"
    scales = list(dict.fromkeys(one.scale for one in errors))
    methods = list(dict.fromkeys(one.method for one in errors))
    notes = [
        "Relative error of each matrix's gradient by its logits, against exact unrolling in float64: solid the median, "
        "dashed the 99th percentile. Unrolled: the backward kernel, float32. Implicit: as if converged.",
        one_line(about),
    ]
    card = Card(title, "by Sinkhorn iterations, a panel for each standard deviation of logits", notes, 3.3)
    width = (WIDTH - LEFT - RIGHT - 0.2 * (len(scales) - 1)) / len(scales)
    for k, scale in enumerate(scales):
        left = LEFT + k * (width + 0.2)
        axes = card.axes(left, WIDTH - left - width, 0.85, 2.1)
        for method, colour, wide in zip(methods, (BLUE, PALE_BLUE, ORANGE), (1.4, 6, 1.4), strict=False):
            shown = [one for one in errors if (one.scale, one.method) == (scale, method)]
            iters = [one.iters for one in shown]
            axes.plot(iters, [one.median for one in shown], color=colour, linewidth=wide, label=method)
            axes.plot(iters, [one.p99 for one in shown], color=colour, linestyle="--", linewidth=wide)
        by_iterations(axes, sorted({one.iters for one in errors}), f"std {scale:g}")
        axes.set_ylim(1e-8, 1e2)
        if k:
            axes.set_yticklabels([])
    handles, labels = card.figure.axes[0].get_legend_handles_labels()
    card.figure.legend(
        handles,
        labels,
        loc="lower center",
        ncols=3,
        frameon=False,
        bbox_to_anchor=(0.5, (card.below + 0.02) / card.height),
    )
    return Picture("sinkhorn-gradients", title, card.figure)


def cost(times: Times, matrices: int, about: dict[str, Any]) -> Picture:
    """Time by iterations, forward and backward."""
    title = "What iterations cost"
    notes = [
        f"One call for {matrices} matrices of n = {about['setup']['streams']}; medians, whiskers between quartiles; "
        "all points in interleaved rounds, from a cold cache.",
        *(["The machine was busy: most calls of some points waited for a core."] if doubtful(times) else []),
        one_line(about),
    ]
    card = Card(title, "time of the Sinkhorn kernels on this device", notes, 3.0)
    axes = card.axes(LEFT, RIGHT, 0.5, 2.3)
    for (way, by_iters), colour in zip(times.items(), (BLUE, ORANGE), strict=True):
        iters = list(by_iters)
        median = np.array([time.median for time in by_iters.values()]) * 1e6
        low = np.array([time.lower_quartile for time in by_iters.values()]) * 1e6
        high = np.array([time.upper_quartile for time in by_iters.values()]) * 1e6
        errors = np.maximum([median - low, high - median], 0)
        axes.errorbar(iters, median, errors, color=colour, marker="o", ms=4, capsize=3, linewidth=1.4, label=way)
    axes.set_xticks(iters)
    axes.set_ylim(0, None)
    axes.set_xlim(0, None)
    axes.set_xlabel("iterations", color=GREY)
    axes.set_ylabel("µs")
    axes.grid(axis="y")
    axes.legend(loc="upper left", frameon=False)
    return Picture("sinkhorn-cost", title, card.figure)
