"""The pictures of docs/guide: `python -m mhc_tilelang.perf.figures.guide FOLDER` writes them. Needs matplotlib.

    sublayer    what crosses memory forward: kernel by kernel, fused across the boundary, in one pass
    backward    the same of the boundary's backward, in two passes
    projection  tiles of tokens, chunks of channels, groups and slabs
    replay      what a block of sublayers stores, and what a replay rebuilds

Sizes are those of n = 4, C = 2560 in bfloat16; amounts come from the plans and the traffic model, not from here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from ..traffic.formulas import stream_elements
from .guide_blocks import projection, replay
from .run import BLUE, GREEN, GREY, INK, PAPER, RULE, STYLE, Card

NUM_STREAMS = 4
PANEL = 1.75  # inches


@dataclass(frozen=True)
class Box:
    """A kernel, or a layer of the model: what it reads and writes, as (tensor, units of C)."""

    name: str
    reads: Sequence[tuple[str, int]] = ()
    writes: Sequence[tuple[str, int]] = ()
    width: float = 2.0
    ours: bool = True

    @property
    def total(self) -> tuple[int, int]:
        """Reads and writes, in units of C."""
        return sum(size for _, size in self.reads), sum(size for _, size in self.writes)


def draw_panel(axes: Axes, title: str, boxes: Sequence[Box], note: str) -> None:
    """Kernels side by side above a strip of memory; an arrow's width is its share of the traffic."""
    axes.set_xlim(0, 18)
    axes.set_ylim(-0.25, 3.45)
    axes.axis("off")
    read, written = (sum(box.total[k] for box in boxes if box.ours) for k in (0, 1))
    axes.text(0, 3.15, title, fontsize=10, fontweight="bold", va="center")
    axes.text(18, 3.15, f"{read}C read + {written}C written = {read + written}C", ha="right", va="center", fontsize=10)
    axes.add_patch(FancyBboxPatch((0, 0), 18, 0.55, boxstyle="round,pad=0,rounding_size=0.12", fc="#eef1f4", ec=RULE))
    axes.text(0.15, 0.27, "memory", va="center", color=GREY, fontsize=8)
    x = 1.4
    for box in boxes:
        draw_box(axes, box, x)
        x += box.width + 0.3
    if note:
        axes.text(x, 2.2, note, fontsize=8, color=GREY, va="center")


def draw_box(axes: Axes, box: Box, x: float) -> None:
    """A kernel's box, its arrows from memory and to it."""
    style = "round,pad=0,rounding_size=0.12"
    face, edge, text = (PAPER, INK, INK) if box.ours else ("#eef1f4", RULE, GREY)
    axes.add_patch(FancyBboxPatch((x, 1.8), box.width, 0.8, boxstyle=style, fc=face, ec=edge))
    axes.text(x + box.width / 2, 2.2, box.name, ha="center", va="center", fontsize=8.5, color=text)
    arrows = [(tensor, size, BLUE, True) for tensor, size in box.reads]
    arrows += [(tensor, size, GREEN, False) for tensor, size in box.writes]
    for k, (tensor, size, colour, up) in enumerate(arrows):
        place = x + box.width * (k + 0.5) / len(arrows)
        low, high = (place, 0.58), (place, 1.78)
        axes.add_patch(
            FancyArrowPatch(
                *((low, high) if up else (high, low)),
                arrowstyle=f"simple,head_length=5,head_width={3 + 2.2 * size},tail_width={1.2 * size}",
                mutation_scale=1,
                color=colour if box.ours else RULE,
                linewidth=0,
                shrinkA=0,
                shrinkB=0,
            )
        )
        axes.text(place, 0.27, tensor, ha="center", va="center", fontsize=7.5)
        axes.text(place + 0.09 + 0.05 * size, 1.2, f"{size}C", va="center", fontsize=7.5, color=GREY)


def check(kernel: str, boxes: Sequence[Box]) -> None:
    """A drawing adds up to what the traffic model says of the kernels that are drawn."""
    drawn = tuple(sum(box.total[k] for box in boxes if box.ours) for k in (0, 1))
    counted = tuple(sum(stream_elements(name, NUM_STREAMS)[k] for name in kernel.split("+")) for k in (0, 1))
    if drawn != counted:
        raise AssertionError(f"{kernel}: drawn {drawn}, counted {counted}")


def sublayer() -> Card:
    """Draw the forward of one sublayer three times: kernels one by one, the fused boundary, one pass."""
    n = NUM_STREAMS
    layer = Box("the layer", [("layer_input", 1)], [("layer_output", 1)], width=2.9, ours=False)
    separate = [
        Box("project", [("x", n)]),
        Box("coefficients", width=1.9),
        Box("aggregate", [("x", n)], [("layer_input", 1)], width=2.6),
        layer,
        Box("post", [("x", n), ("layer_output", 1)], [("x_next", n)], width=4.0),
    ]
    pre = Box("aggregate", [("x_next", n)], [("layer_input", 1)], width=2.6)
    post_project = Box("post_project", [("x", n), ("layer_output", 1)], [("x_next", n)], width=4.0)
    fused = [post_project, Box("coefficients", width=1.9), pre, layer]
    one = [
        Box("one kernel", [("x", n), ("layer_output", 1)], [("x_next", n), ("layer_input", 1)], width=5.2),
        layer,
    ]
    check("project+aggregate+post", separate)
    check("post_pre", fused)
    check("post_pre_delayed", one)
    panels = [
        ("Kernel by kernel", separate, ""),
        (
            "Across the boundary: post, and the next sublayer's pre",
            fused,
            "x_next is projected\nwhile it is on the chip",
        ),
        ("The floor: one pass", one, "h_pre must be known before x_next is complete:\nthe delayed form has it"),
    ]
    return draw_panels(
        "A sublayer, forward: what crosses memory",
        f"per token, in units of C elements of the stream; n = {n}",
        panels,
        "Blue is read, green written, width is the amount. The layer itself is the model's and not counted, nor are "
        "phi, coefficients and partial sums. A plain residual moves 3C.",
    )


def backward() -> Card:
    """Draw the two passes of a boundary's backward."""
    n = NUM_STREAMS
    first = Box("pass 1: aggregate_backward", [("x_next", n), ("g_layer_input", 1)], width=3.4)
    second = Box(
        "pass 2: boundary_backward",
        [("x", n), ("layer_output", 1), ("g_x_next", n), ("g_layer_input", 1)],
        [("g_x", n), ("g_layer_output", 1)],
        width=9.0,
    )
    boxes = [first, Box("coeff.\nbackward", width=1.3), second, Box("sums", width=1.0)]
    check("post_pre_backward", boxes)
    note = (
        "Pass 1 takes g_h_pre[j] = Σ_c g_layer_input[c] · x_next[j, c], a sum over all channels that must be complete "
        "before any element of the stream's gradient can be. Pass 2 rebuilds x_next from x and the layer's output, and "
        "reads each tensor once. sums: boundary_sums adds up the partial sums of g_phi, g_h_post and g_h_res."
    )
    return draw_panels(
        "The boundary, backward, in two passes",
        f"per token, in units of C elements of the stream; n = {n}",
        [("Four launches", boxes, "")],
        note,
    )


def draw_panels(title: str, subtitle: str, panels: Sequence[tuple[str, Sequence[Box], str]], caption: str) -> Card:
    """Draw a card of panels, one below another."""
    card = Card(title, subtitle, [caption], PANEL * len(panels))
    for k, (name, boxes, note) in enumerate(panels):
        axes = card.axes(0.2, 0.2, PANEL * (len(panels) - 1 - k) + 0.1, PANEL - 0.1)
        draw_panel(axes, name, boxes, note)
    return card


FIGURES = {"sublayer": sublayer, "backward": backward, "projection": projection, "replay": replay}


def write(folder: Path, suffix: str = "svg") -> list[Path]:
    """Write every picture as NAME.SUFFIX, the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in FIGURES.items():
        paths.append(folder / f"{name}.{suffix}")
        with matplotlib.rc_context(STYLE):
            figure = draw().figure
            figure.savefig(paths[-1], **({"metadata": {"Date": None}} if suffix == "svg" else {"dpi": 110}))
    return paths


if __name__ == "__main__":
    write(Path(sys.argv[1]), *sys.argv[2:])
