"""Pictures of docs/guide that show how work is cut up: the projection's tiles and chunks, a block to replay."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from ...kernels.projection_plans import ProjectionPlan, num_slabs, tile_projection_plan
from .run import BLUE, GREEN, GREY, INK, ORANGE, PALE_BLUE, PAPER, Card

NUM_STREAMS, HIDDEN_SIZE = 4, 2560
GROUP_COLOURS = (BLUE, ORANGE, GREEN)


def projection() -> Card:
    """x as a matrix of tokens by channels; below it, how chunks become slabs."""
    n, rows = NUM_STREAMS, NUM_STREAMS**2 + 2 * NUM_STREAMS
    plan = tile_projection_plan(rows, HIDDEN_SIZE, "bfloat16", "cuda")
    chunks, size = plan.num_chunks(HIDDEN_SIZE), plan.chunks_per_group
    card = Card(
        "The projection: tile, chunk, group, slab",
        f"n = {n}, C = {HIDDEN_SIZE}, bfloat16, on a GPU",
        [
            f"A block of threads has a tile of {plan.tokens} tokens. It walks over chunks, {plan.channels} channels of "
            f"every stream, {chunks} of them; each chunk is summed from zero, {size} chunks are a group, groups are "
            "added in order. How many blocks share a tile's chunks decides which sums reach memory as slabs; the order "
            "of additions is the same in all three.",
        ],
        4.3,
    )
    axes = card.axes(0.2, 0.2, 0.1, 4.1)
    axes.set_xlim(0, 18)
    axes.set_ylim(0, 8.2)
    axes.axis("off")
    width, left = 3.6, 2.2
    for i in range(n):
        start = left + i * (width + 0.25)
        axes.text(start + width / 2, 7.85, f"x[:, {i}, :]", ha="center", fontsize=9)
        for tile in range(3):
            for chunk in range(chunks):
                draw_chunk(
                    axes, start + chunk * width / chunks, 6.7 - tile * 0.85, width / chunks, chunk // size, tile == 1
                )
    for tile in range(3):
        axes.text(
            left - 0.15,
            7.1 - tile * 0.85,
            f"tile of {plan.tokens} tokens",
            ha="right",
            va="center",
            fontsize=8,
            color=INK if tile == 1 else GREY,
        )
    for i in range(n):
        start = left + i * (width + 0.25)
        axes.add_patch(Rectangle((start + 5 * width / chunks, 5.82), width / chunks, 0.82, fill=False, ec=INK, lw=1.6))
    axes.text(
        left, 4.62, f"outlined: one chunk, {plan.channels} channels of all {n} streams, in stream order", fontsize=8.5
    )
    draw_slabs(axes, plan)
    return card


def draw_chunk(axes: Axes, x: float, y: float, width: float, group: int, lit: bool) -> None:
    """One chunk of one stream for one tile of tokens."""
    face = GROUP_COLOURS[group % 3] if lit else "#eef1f4"
    axes.add_patch(Rectangle((x, y), width, 0.72, fc=face, ec=PAPER, lw=0.8, alpha=0.75 if lit else 1))


def draw_slabs(axes: Axes, plan: ProjectionPlan) -> None:
    """Draw the slabs that reach memory with one split, with a group a split, and with half a group a split."""
    chunks, size = plan.num_chunks(HIDDEN_SIZE), plan.chunks_per_group
    groups = -(-chunks // size)
    left, width = 4.2, 10.6
    for row, per_split in enumerate((chunks, size, size // 2)):
        y = 3.35 - row * 1.25
        blocks, slabs = -(-chunks // per_split), num_slabs(per_split, chunks, plan)
        name = f"{blocks} block{'s' * (blocks > 1)} a tile"
        what = {1: "the total", groups: "a slab a group", chunks: "a slab a chunk"}[slabs]
        axes.text(left - 0.15, y + 0.3, name, ha="right", va="center", fontsize=8.5)
        for chunk in range(chunks):
            x = left + chunk * width / chunks
            axes.add_patch(
                Rectangle((x, y), width / chunks, 0.6, fc=GROUP_COLOURS[chunk // size % 3], ec=PAPER, alpha=0.75)
            )
        for first in range(0, chunks, per_split):
            last = min(first + per_split, chunks)
            x = left + first * width / chunks
            box = "round,pad=0.04,rounding_size=0.08"
            axes.add_patch(
                FancyBboxPatch((x, y), (last - first) * width / chunks, 0.6, boxstyle=box, fill=False, ec=INK, lw=1.4)
            )
        axes.text(left + width + 0.25, y + 0.3, f"{slabs} slab{'s' * (slabs > 1)}: {what}", va="center", fontsize=8.5)
    axes.text(left, 0.25, "a box is what one block of threads sums", fontsize=8, color=GREY)


def replay() -> Card:
    """Draw a block of four sublayers: what is stored, what is dropped, and what one replay gives back."""
    length = 4
    card = Card(
        "Recomputation: a block, and its replay",
        f"a block of {length} sublayers; sizes per token in units of C, n = {NUM_STREAMS}",
        [
            "Filled: stored from the forward to the backward. Hollow: not stored; a kernel rebuilds them when the "
            "block's backward begins, and they live until it ends. The layers do not run again: their outputs are "
            "stored.",
        ],
        3.5,
    )
    axes = card.axes(0.2, 0.2, 0.1, 3.3)
    axes.set_xlim(0, 18)
    axes.set_ylim(0, 6.6)
    axes.axis("off")
    axes.text(0, 6.3, "Forward", fontsize=10, fontweight="bold")
    axes.text(0, 2.45, "Replay, at the start of the block's backward", fontsize=10, fontweight="bold")
    step = 3.9
    for index in range(length + 1):
        x = 0.3 + index * step
        stored = index in (0, length)
        draw_tensor(axes, x, 5.05, 1.5, 0.8, f"x_{index}", f"{NUM_STREAMS}C", stored)
        if index == length:
            axes.text(x + 0.75, 4.8, "starts the next block", ha="center", fontsize=7, color=GREY)
            continue
        axes.annotate("", (x + step - 0.05, 5.45), (x + 1.55, 5.45), arrowprops={"arrowstyle": "->", "color": GREY})
        draw_tensor(axes, x + 0.75, 3.75, 1.2, 0.5, f"u_{index}", "1C", False)
        draw_tensor(axes, x + 2.25, 3.75, 1.2, 0.5, f"F_{index}", "1C", True)
        axes.annotate("", (x + 1.2, 4.3), (x + 1.0, 5.0), arrowprops={"arrowstyle": "->", "color": GREY})
        axes.annotate("", (x + 2.22, 4.0), (x + 1.98, 4.0), arrowprops={"arrowstyle": "->", "color": GREY})
        axes.annotate("", (x + 2.95, 5.4), (x + 2.85, 4.3), arrowprops={"arrowstyle": "->", "color": GREY})
        axes.text(x + 2.1, 3.45, "the layer", fontsize=7, color=GREY, ha="center")
    box = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((3.1, 0.75), 11.2, 1.15, boxstyle=box, fc=PAPER, ec=INK))
    axes.text(
        8.7, 1.5, "one kernel; x stays in registers from sublayer to sublayer", ha="center", va="center", fontsize=9
    )
    axes.text(8.7, 1.08, "x_0 → x_1 → x_2 → x_3", ha="center", va="center", fontsize=9, color=GREY)
    axes.annotate("", (3.05, 1.32), (2.5, 1.32), arrowprops={"arrowstyle": "->", "color": BLUE, "lw": 2})
    axes.annotate("", (14.95, 1.32), (14.35, 1.32), arrowprops={"arrowstyle": "->", "color": GREEN, "lw": 2})
    axes.text(2.4, 1.32, "x_0, F_0 … F_2\ncoefficients", ha="right", va="center", fontsize=8.5)
    axes.text(15.05, 1.32, "x_1 … x_3\nu_0 … u_3", va="center", fontsize=8.5)
    return card


def draw_tensor(
    axes: Axes, x: float, y: float, width: float, height: float, name: str, size: str, stored: bool
) -> None:
    """A tensor, filled where it is stored."""
    box = "round,pad=0,rounding_size=0.08"
    face = PALE_BLUE if stored else PAPER
    style = "-" if stored else "--"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=box, fc=face, ec=INK if stored else GREY, ls=style))
    axes.text(
        x + width / 2,
        y + height / 2,
        f"{name}\n{size}" if height > 0.6 else f"{name}  {size}",
        ha="center",
        va="center",
        fontsize=8,
    )
