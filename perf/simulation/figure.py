"""The pictures of `mhc-tilelang simulate`: schedules of a stage and of a step; the overhead by assumptions."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from ..figures.run import BLUE, GREY, INK, ORANGE, Bar, Card, Picture, bars_height, draw_bars
from ..figures.sublayer import exactly
from ..overhead.report import PAPER, percent
from .costs import Assumptions
from .overhead import overhead, pipeline_of, step_overhead
from .pipeline import BACKWARD, FORWARD
from .report import Results
from .stage import ATTENTION, COMPUTE, CONNECTION, CONNECTIONS, EXPERT, EXPERTS, FFN, REPLAY, SEND, SENDS, stage_of
from .streams import Span, makespan

COLOURS = {
    ATTENTION: "#56b4e9",
    FFN: "#0072b2",
    CONNECTION: "#d55e00",
    REPLAY: "#cc79a7",
    EXPERT: "#009e73",
    SEND: "#b8860b",
}
PAIRS, SHOWN = 6, 4  # simulated, and the one in the steady state that is drawn
LANE, BAR = 0.42, 0.72  # inches a stream, and how much of it is bar
STAGE_LANE = 0.17


def schedule(given: Assumptions) -> Picture:
    """Draw a pair of micro-batches in the steady state: the plain residual above mHC, on one axis of time."""
    stages = {"plain residual": stage_of(given, plain=True), "mHC": stage_of(given, plain=False)}
    periods = {name: stage.period() for name, stage in stages.items()}
    lanes = [COMPUTE, *([CONNECTIONS] if given.own_stream else []), EXPERTS, *SENDS.values()]
    height = LANE * len(lanes)
    overlap = "overlapped as in DualPipe" if given.overlapped else "nothing overlapped"
    title = f"A pipeline stage of {given.model}: mHC adds {percent(overhead(given))}"
    subtitle = f"a model: {given.layers} layers on an {given.device}, n = {given.num_streams}, {given.form}, {overlap}"
    notes = [
        "Dark: the forward micro-batch; pale: the backward one. A pair of them from its first task on, in the steady "
        "state; what is left over from the pair before and begun of the next is drawn as well. Dotted: where the next "
        "pair begins. Times follow from sizes and assumptions, which mhc-tilelang simulate prints; none is measured.",
    ]
    card = Card(title, subtitle, notes, 2 * height + 1.5)
    until = 1.04 * max(periods.values())
    for i, (name, stage) in enumerate(stages.items()):
        axes = card.axes(1.35, 0.3, 0.5 + (1 - i) * (height + 0.5), height)
        spans = stage.spans(PAIRS)
        origin = next(span.start for span in spans if span.task.name.startswith(f"{SHOWN} "))
        draw_lanes(axes, lanes, spans, origin, until)
        axes.axvline(1e3 * periods[name], color=INK, linewidth=1, linestyle=":")
        axes.set_title(f"{name}: {1e3 * periods[name]:.2f} ms a pair", loc="left", fontsize=9.5, fontweight="bold")
        axes.set_xlabel("ms" if i else "", color=GREY)
    kinds = [kind for kind in COLOURS if kind != REPLAY or given.recompute]
    axes.legend(
        handles=[Patch(color=COLOURS[kind], label=kind) for kind in kinds],
        loc="lower right",
        bbox_to_anchor=(1.0, 2.0 + 0.72 / height),
        ncols=len(kinds),
        frameon=False,
        fontsize=8.5,
        handlelength=1.0,
        columnspacing=1.2,
        borderpad=0,
    )
    return Picture(f"simulation-{given.model}-stage", title, card.figure)


def draw_lanes(axes: Axes, lanes: Sequence[str], spans: Sequence[Span], origin: float, until: float) -> None:
    """A lane per stream; only what lies in the window."""
    for span in spans:
        start, end = span.start - origin, span.end - origin
        if end <= 0 or start >= until or not span.task.seconds:
            continue
        forward = span.task.name.split()[1] == "F"
        left, right = max(start, 0.0), min(end, until)
        for stream in span.task.streams:
            axes.barh(
                lanes.index(stream),
                1e3 * (right - left),
                left=1e3 * left,
                height=BAR,
                color=COLOURS[span.task.kind],
                alpha=1.0 if forward else 0.45,
                edgecolor="white",
                linewidth=0.4,
            )
    axes.set_yticks(range(len(lanes)), lanes, fontsize=8.5)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlim(0, 1e3 * until)
    axes.tick_params(axis="y", length=0)


def step(given: Assumptions) -> Picture:
    """Draw a 1F1B step over all stages: the plain residual above mHC, on one axis of time."""
    pipelines = {"plain residual": pipeline_of(given, plain=True), "mHC": pipeline_of(given, plain=False)}
    height = STAGE_LANE * given.stages
    title = f"A 1F1B step of {given.model}: mHC adds {percent(step_overhead(given))}"
    subtitle = (
        f"a model: {given.stages} stages of {given.layers} layers, {given.micro_batches} micro-batches, "
        f"{given.device}, n = {given.num_streams}, {given.form}"
    )
    notes = [
        "A lane per stage, the first on top. Dark: forward; pale: backward; white: the stage waits, for the pipeline "
        "to fill and drain or for what a neighbour sends. A stage does one direction at a time and waits for "
        "its experts. Times follow from sizes and assumptions, which mhc-tilelang simulate prints; none is measured.",
    ]
    card = Card(title, subtitle, notes, 2 * height + 1.35)
    spans = {name: pipeline.spans() for name, pipeline in pipelines.items()}
    until = 1.02 * max(map(makespan, spans.values()))
    for i, (name, pipeline) in enumerate(pipelines.items()):
        axes = card.axes(0.75, 0.3, 0.5 + (1 - i) * (height + 0.5), height)
        for kind, alpha in ((FORWARD, 1.0), (BACKWARD, 0.45)):
            for stage in range(given.stages):
                place = str(stage)
                found = [s for s in spans[name] if s.task.kind == kind and s.task.name.split()[1] == place]
                ranges = [(1e3 * span.start, 1e3 * span.task.seconds) for span in found]
                bars = axes.broken_barh(ranges, (stage - 0.42, 0.84), facecolor=BLUE, edgecolor="white", linewidth=0.3)
                bars.set_alpha(alpha)
                bars.set_rasterized(True)  # a path for each of a thousand bars would make a large SVG
        whole = makespan(spans[name])
        text = f"{name}: {1e3 * whole:.0f} ms, idle {percent(1 - pipeline.ideal / whole)}"
        axes.set_title(text, loc="left", fontsize=9.5, fontweight="bold")
        axes.set_ylim(given.stages - 0.5, -0.5)
        axes.set_yticks([0, given.stages - 1], ["first", "last"], fontsize=8.5)
        axes.set_xlim(0, 1e3 * until)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("ms" if i else "", color=GREY)
    return Picture(f"simulation-{given.model}-step", title, card.figure)


def sensitivity(results: Results) -> Picture:
    """Bars: the overhead with one assumption changed at a time, beside the paper's."""
    given, changes = results.given, results.changes
    title = f"What the overhead of a stage depends on, {given.model}"
    subtitle = f"a model: one assumption changed at a time, {given.device}, n = {given.num_streams}"
    bars = [
        Bar("", one.what, exactly(100 * one.overhead), percent(one.overhead), BLUE if one is changes[0] else GREY)
        for one in changes
    ]
    notes = [
        f"Line: the paper's {percent(PAPER)}, of a model, hardware and overlap that it does not name. As assumed: see "
        "mhc-tilelang simulate, which prints every assumption. Nothing is measured.",
    ]
    height = bars_height(bars)
    card = Card(title, subtitle, notes, height + 0.8)
    axes = card.axes(2.9, 0.95, 0.55, height)
    draw_bars(axes, bars)
    axes.axvline(0, color=INK, linewidth=1)
    axes.axvline(100 * PAPER, color=ORANGE, linewidth=1.5)
    across = axes.get_xaxis_transform()
    style = {"va": "bottom", "color": ORANGE, "fontsize": 8.5}
    axes.text(100 * PAPER, 1.0, f"paper: {percent(PAPER)}", transform=across, **style)  # type: ignore[arg-type]
    axes.set_xlabel("per cent over the plain residual", color=GREY)
    return Picture(f"simulation-{given.model}-sensitivity", title, card.figure)
