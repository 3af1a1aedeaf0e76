"""The picture of `study train`: losses, gradient norms, gains and activations over steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ..figures.run import BLUE, GREEN, GREY, INK, ORANGE, WIDTH, Card, Picture
from .output import one_line
from .runs import Evaluation, Run
from .summary import NAMES

COLOURS = {"residual": INK, "hc": ORANGE, "mhc": BLUE, "identity": GREEN}
LEFT, RIGHT, BETWEEN, PANEL = 0.75, 0.3, 0.75, 2.1  # inches
SMOOTHED = 20  # steps, of gradient norms


def draw(runs: Sequence[Run], about: dict[str, Any]) -> Picture:
    """Draw four panels; a colour per connection, a line per seed."""
    title = "A small GPT under several connections"
    setup = about["setup"]
    notes = [
        f"{setup['depth']} layers, width {setup['width']}, {setup['steps']} steps of {setup['batch']} × "
        f"{setup['context']} bytes of {setup['text']}; rate {setup['rate']:g}. A line per seed; runs of a seed share "
        f"first weights and batches. Gradient norm: before clipping at 1, largest of {SMOOTHED} steps. Gain: the "
        "larger of forward and backward, mean over held-out tokens, largest over depth.",
        one_line(about),
    ]
    card = Card(title, "loss in nats per byte", notes, 5.7)
    width = (WIDTH - LEFT - RIGHT - BETWEEN) / 2
    panels = [
        card.axes(left, WIDTH - left - width, bottom, PANEL)
        for bottom in (0.5 + PANEL + BETWEEN, 0.5)
        for left in (LEFT, LEFT + width + BETWEEN)
    ]
    over_evaluations(panels[0], runs, "held-out loss", lambda one: one.loss)
    top = np.nanquantile([one.loss for run in runs for one in run.evaluations], 0.9)
    lowest = np.nanmin([one.loss for run in runs for one in run.evaluations])
    if np.isfinite(top) and top > lowest:  # the first steps fall from 5.5, which would hide the rest
        panels[0].set_ylim(lowest - 0.05 * (top - lowest), top)
    gradient_norms(panels[1], runs)
    over_evaluations(panels[2], runs, "composite gain", lambda one: max(one.forward_gain, one.backward_gain))
    if max(max(one.forward_gain, one.backward_gain) for run in runs for one in run.evaluations) > 10:
        panels[2].set_yscale("log")
    over_evaluations(panels[3], runs, "activation of the last sublayer's input over the first's", ratio)
    kinds = dict.fromkeys(run.kind for run in runs)
    handles = [Line2D([], [], color=COLOURS[kind], label=NAMES[kind]) for kind in kinds]
    panels[0].legend(handles=handles, loc="upper right", frameon=False, fontsize=8.5)
    return Picture("train", title, card.figure)


def ratio(one: Evaluation) -> float:
    """Return the ratio of activations."""
    return one.activation_ratio


def over_evaluations(axes: Axes, runs: Sequence[Run], name: str, value: Callable[[Evaluation], float]) -> None:
    """A line per run through its evaluations."""
    for run in runs:
        steps, values = [one.step for one in run.evaluations], [value(one) for one in run.evaluations]
        axes.plot(steps, values, color=COLOURS[run.kind], linewidth=1.1)
    finish(axes, runs, name)


def gradient_norms(axes: Axes, runs: Sequence[Run]) -> None:
    """A line per run, the largest norm of every `SMOOTHED` steps."""
    for run in runs:
        blocks = [run.gradient_norms[i : i + SMOOTHED] for i in range(0, len(run.gradient_norms), SMOOTHED)]
        steps = [min(len(run.gradient_norms), SMOOTHED * (i + 1)) for i in range(len(blocks))]
        axes.plot(steps, [max(block) for block in blocks], color=COLOURS[run.kind], linewidth=1.1)
    axes.set_ylim(0, None)
    finish(axes, runs, "gradient norm")


def finish(axes: Axes, runs: Sequence[Run], name: str) -> None:
    """Title, grid, steps."""
    axes.set_title(name, loc="left", fontsize=9.5)
    axes.set_xlabel("steps", color=GREY, labelpad=1)
    axes.set_xlim(0, max(len(run.losses) for run in runs))
    axes.grid(axis="y")
