"""Pictures of one file of `bench`: roofline, share of the copy's bandwidth, speed-up against plain torch.

The forward kernels are one picture, the backward kernels another, and those fused across a boundary a third, where they
were measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from ..calls.cases import BACKWARD_KERNELS, BOUNDARY_KERNELS, BOUNDARY_STEP, KERNELS
from ..stored.results import KernelResults, Measurement, Spread
from . import run as style
from .flops import flops
from .run import Bar, Card, Picture, bars_height, draw_bars

LEFT, AXIS = 2.65, 0.45  # inches: for the bars' names, below the axes
QUARTILES = "Whiskers: from the lower quartile of one time over the upper quartile of the other, to the reverse."
MARKERS = {"bfloat16": "o", "float16": "s", "float32": "D"}
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def draw(results: KernelResults, prefix: str) -> Iterator[Picture]:
    """Draw all pictures of a file; the names of theirs begin with `prefix`."""
    groups = (
        (KERNELS, "", "kernels"),
        (BACKWARD_KERNELS, "-backward", "backward kernels"),
        ((*BOUNDARY_KERNELS, BOUNDARY_STEP), "-boundary", "fused boundary"),
    )
    for kernels, suffix, what in groups:
        found = [one for kernel in kernels for one in results.measurements if one.kernel == kernel]
        if found:
            yield roofline(results, found, f"{prefix}-roofline{suffix}", what)
            yield bandwidth(results, found, f"{prefix}-bandwidth{suffix}", what)
        if any(one.torch for one in found):
            yield speedup(results, found, f"{prefix}-speedup{suffix}", what)


def roofline(results: KernelResults, found: Sequence[Measurement], name: str, what: str) -> Picture:
    """GFLOP/s over FLOP per byte, below the copy's bandwidth."""
    points = [(one, *place(one)) for one in found if place(one)[0]]
    bandwidth = Spread(1, 1, 1).over(results.copy_time).times(results.copy_bytes)
    kernels = list(dict.fromkeys(group(one) for one in found))
    flat = sorted({group(one) for one in found if not place(one)[0]})
    notes = ["FLOPs are those of the formulas, bytes those of every tensor once. Vertical lines: quartiles."]
    if flat:
        notes[0] += f" {', '.join(flat)}: no arithmetic, so no place here."
    notes.append(f"{results.facts.method.get('clock', '')}. {results.facts}")
    title = f"Roofline of the {what}"
    card = Card(title, "below the line a kernel moves its bytes slower than a copy does", notes, height=4.4)
    axes = card.axes(0.85, 2.35, AXIS + 0.1, 3.8)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s")
    colours = dict(zip(kernels, style.KERNEL_COLOURS, strict=False))
    for one, intensity, rate in points:
        colour, marker = colours[group(one)], MARKERS.get(one.dtype, "o")
        axes.plot([intensity] * 2, [rate.lower_quartile, rate.upper_quartile], color=colour, linewidth=1)
        face = "white" if one.in_cache else colour
        axes.plot(intensity, rate.median, marker, color=colour, markerfacecolor=face, markersize=7)
    intensities = [intensity for _, intensity, _ in points] or [1.0]
    ends = [min(intensities) / 2, max(intensities) * 2]
    axes.fill_between(
        ends,
        [bandwidth.lower_quartile * end / 1e9 for end in ends],
        [bandwidth.upper_quartile * end / 1e9 for end in ends],
        color=style.RULE,
        linewidth=0,
        zorder=0,
    )
    axes.plot(ends, [bandwidth.median * end / 1e9 for end in ends], color=style.INK, linewidth=1.3, zorder=1)
    axes.set_xlim(*ends)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid()
    copied = f"copy of {results.copy_bytes / 1e6:.0f} MB\n{bandwidth.median / 1e9:.3g} GB/s, with quartiles"
    handles = [Line2D([], [], color=style.INK, label=copied)]
    handles += [Line2D([], [], marker="o", ls="", ms=7, color=colours[k], label=k) for k in colours if k not in flat]
    dtypes = dict.fromkeys(one.dtype for one, *_ in points)
    if len(dtypes) > 1:
        handles += [Line2D([], [], marker=MARKERS.get(d, "o"), ls="", ms=6, color=style.GREY, label=d) for d in dtypes]
    if any(one.in_cache for one, *_ in points):
        hollow = "hollow: all bytes fit\nthe last-level cache"
        handles.append(Line2D([], [], marker="o", ls="", ms=7, color=style.GREY, markerfacecolor="white", label=hollow))
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.02), frameon=False, labelspacing=0.7)
    return Picture(name, title, card.figure)


def place(one: Measurement) -> tuple[float, Spread]:
    """FLOP per byte, and GFLOP/s."""
    operations = flops(one.kernel, one.num_streams, one.hidden_size, one.num_tokens)
    return operations / one.num_bytes, Spread(1, 1, 1).over(one.time).times(operations / 1e9)


def bandwidth(results: KernelResults, found: Sequence[Measurement], name: str, what: str) -> Picture:
    """Bars: bytes per second in units of the copy's."""
    bars = [
        Bar(group(one), label(one), share, f"{share.median:.0%}", style.PALE_BLUE if one.in_cache else style.BLUE)
        for one in found
        for share in (one.share_of_copy,)
    ]
    notes = [
        "A copy writes half of its bytes; a kernel that mostly reads can exceed it. " + QUARTILES,
        f"{results.facts.method.get('clock', '')}. {results.facts}",
    ]
    title = f"Bandwidth of the {what}"
    subtitle = "share of the bandwidth of a copy of equal size, in the same rounds"
    height = bars_height(bars)
    card = Card(title, subtitle, notes, height + AXIS + 0.3)
    axes = card.axes(LEFT, 0.8, AXIS, height)
    draw_bars(axes, bars)
    axes.axvline(1, color=style.INK, linewidth=1.3)
    axes.text(1, 1.0, "copy", transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8.5)
    axes.set_xlim(0, max(1.1, *(1.03 * bar.value.upper_quartile for bar in bars)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    if any(one.in_cache for one in found):
        text = "all bytes fit the last-level cache: not memory bandwidth"
        axes.legend(
            handles=[Patch(color=style.PALE_BLUE, label=text)],
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            frameon=False,
            fontsize=8.5,
            borderpad=0,
            borderaxespad=0.2,
        )
    return Picture(name, title, card.figure)


def speedup(results: KernelResults, found: Sequence[Measurement], name: str, what: str) -> Picture:
    """Bars from 1 on a logarithmic axis: the fastest form's time over the kernel's."""
    found = [one for one in found if one.torch]
    bars = []
    for one in found:
        fastest = min(one.torch, key=lambda form: form.time.median)
        ratio = fastest.time.over(one.time)
        text = f"{ratio.median:.2f}×  {fastest}"
        bars.append(Bar(group(one), label(one), ratio, text, style.BLUE if ratio.median >= 1 else style.ORANGE))
        if one.separate:
            apart = one.separate.over(one.time)
            colour = style.PALE_BLUE if apart.median >= 1 else style.ORANGE
            bars.append(Bar(group(one), label(one), apart, f"{apart.median:.2f}×  our separate kernels", colour))
    compiled = any(form.mode == "compiled" for one in found for form in one.torch)
    forms = "eager and compiled" if compiled else "eager forms only"
    notes = [
        f"To the right: the fastest form. Every form's result was compared with the kernel's first. {QUARTILES}",
        f"{results.facts.method.get('clock', '')}. {results.facts}",
    ]
    title = f"Speed-up of the {what}"
    subtitle = f"time of the fastest form of plain torch ({forms}) over the kernel's"
    height = bars_height(bars)
    card = Card(title, subtitle, notes, height + AXIS + 0.3)
    axes = card.axes(LEFT, 2.6, AXIS, height)
    axes.set_xscale("log")
    draw_bars(axes, bars, start=1)
    axes.axvline(1, color=style.INK, linewidth=1.3)
    lowest = min(0.8, *(0.95 * bar.value.lower_quartile for bar in bars))
    highest = max(1.25, *(1.05 * bar.value.upper_quartile for bar in bars))
    ticks = [m * 10.0**e for e in range(-2, 4) for m in (1, 2, 5) if lowest <= m * 10.0**e <= highest]
    axes.set_xlim(lowest, highest)
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    above: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "va": "bottom", "fontsize": 8.5}
    axes.text(1.03, 1.0, "kernel faster →", ha="left", color=style.BLUE, **above)
    axes.text(0.97, 1.0, "← torch faster", ha="right", color=style.ORANGE, **above)
    return Picture(name, title, card.figure)


def group(one: Measurement) -> str:
    """Return the kernel; the title says whether it is a backward one."""
    return one.kernel.removesuffix("_backward") if one.kernel in BACKWARD_KERNELS else one.kernel


def label(one: Measurement) -> str:
    """Below a kernel's name: tokens × streams × channels, dtype."""
    return f"{one.shape}  {SHORT.get(one.dtype, one.dtype)}"
