"""The output of `mhc-tilelang bench overhead`: the model's table, the measured one, the JSON. No torch.

The model says that it is one, and a CPU's figures that they are not comparable with the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..bench.report import milliseconds
from ..sizes import LayerSizes
from .model import FORMS, FORWARD, IN_MODE, LABELS, MODES, OURS, SUBLAYERS, TRAINING, Device, Prediction

if TYPE_CHECKING:
    from ..measure.timing import Statistics
    from .run import Measurement, Timing

PAPER = 0.067
WHAT_THE_PAPER_SAYS = """\
The paper's 6.7 % is the additional time of the whole training step of an in-house model at n = 4, communication and
recomputation overlapped (V4 report: "of the overlapped 1F1B pipeline stage"). This is one layer on one device, forward
and backward, nothing overlapped; no optimizer, embedding, head or communication."""
EVERY_NUMBER = "Every percentage beside the paper's, ours and others', and what it is of: docs/overhead.md."
NOT_COMPARABLE = """\
not comparable with 6.7 %: a CPU does about a thirtieth of a GPU's FLOPs per byte that it moves, so the layer inside
takes far longer beside its streams; and the projection and Sinkhorn are bound by arithmetic, not by memory."""
OURS_MEASURED = "mhc_kernels"


def header(facts: dict[str, Any], sizes: LayerSizes) -> str:
    """Return the machine, the layer and how it is measured."""
    layer = facts["layer"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    attention = f"causal attention with {sizes.num_heads} heads of {sizes.head_size}"
    sequences = f"{facts['num_tokens']} tokens in sequences of {facts['sequence']}"
    fewer = f" ({facts['fewest_rounds']} or more where these take {facts['seconds']} s)" if facts["seconds"] else ""
    return "\n".join(
        (
            f"{facts['device']}, {facts['date']}",
            f"{versions}, torch threads {facts['threads']}",
            f"one layer, model {layer['model']}: C {sizes.hidden_size}, {attention} (plain, not MLA), SwiGLU of "
            f"{sizes.ffn_width}",
            "(dense, as wide as all experts that a token visits; no routing), the same under every connection;",
            f"n {layer['num_streams']}, {layer['dtype']}, {sequences}; medians and quartiles of {facts['rounds']}",
            f"rounds{fewer}, connections and kernels interleaved,",
            "every other round reversed, each call from a cold cache",
            "",
        )
    )


PREDICTED_KERNELS = """\
The same for our kernels with times that mhc-tilelang predict reads from machine code, launches in it, in place of
bytes over an assumed share of the bandwidth (from, to: the prediction's interval; not measured):"""


def headline(predictions: Sequence[Prediction], device: str, sequence: int) -> str:
    """Return the model's answer for one device."""
    ours = {p.mode: f"{percent(p.overhead[OURS])} to {IN_MODE[p.mode]}" for p in predictions if p.device == device}
    said = ", ".join(ours[mode] for mode in reversed(MODES) if mode in ours)
    return (
        f"MODEL, not a measurement: on an {device}, in sequences of {sequence}, our kernels add {said}.\n"
        "The paper measured 6.7 % (see below)."
    )


def model_table(predictions: Sequence[Prediction], devices: Sequence[Device], assumptions: dict[str, float]) -> str:
    """Return a row per device and mode; below it, what went in."""
    from tabulate import tabulate

    headers = ["model: device", "mode", "layer, ns/token", *FORMS]
    align = ["left", "left", *["right"] * (1 + len(FORMS))]
    rows = [
        [p.device, IN_MODE[p.mode], three_digits(p.seconds * 1e9), *(percent(p.overhead[form]) for form in FORMS)]
        for p in predictions
    ]
    lines = [
        tabulate(rows, headers=headers, disable_numparse=True, colalign=align),
        "",
        "Counted: FLOPs of matrix products and causal scores; bytes of norms, SwiGLU and connections. No launches.",
        f"Assumed attainable: {assumptions['bandwidth_share']:.0%} of bandwidth, {assumptions['flops_share']:.0%} of "
        "FLOP/s, of",
    ]
    lines += [f"  {d.name}: {d.bandwidth / 1e12:.3g} TB/s, {d.flops / 1e12:.4g} TFLOP/s ({d.source})" for d in devices]
    return "\n".join(lines)


def predicted_kernels(predictions: Sequence[Prediction], sizes: LayerSizes, num_streams: int) -> str:
    """Return our kernels' overhead by the times of `mhc-tilelang predict`, or the reason why there is none."""
    from ..predict.stored import TOKENS, connection

    lines = [PREDICTED_KERNELS]
    for one in predictions:
        found = connection(one.device, sizes.hidden_size, num_streams)
        if isinstance(found, str):
            lines.append(f"  {one.device}, {IN_MODE[one.mode]}: as above, by bytes: {found}")
            continue
        times = [f + (0.0 if one.mode == FORWARD else b) for f, b in zip(*found, strict=True)]
        middle, low, high = (percent(one.with_connection(SUBLAYERS * us * 1e-6 / TOKENS)) for us in times)
        lines.append(f"  {one.device}, {IN_MODE[one.mode]}: {middle}, from {low} to {high}")
    return "\n".join(lines)


def measured_table(measured: Measurement, predicted: Sequence[Prediction]) -> str:
    """Return a row per mode and connection; `predicted` is for the device at hand, empty without a prediction."""
    from tabulate import tabulate

    headers = ["measured", "connection", "time, ms", "quartiles", "overhead", "quartiles"]
    headers += [*(["model"] if predicted else []), *([f"{measured.memory_kind}, MB"] if measured.memory else [])]
    align = ["left", "left", "right", "left", "right", "left", *["right"] * (len(headers) - 6)]
    rows = []
    for mode, timings in measured.modes.items():
        overhead = next((p.overhead[OURS] for p in predicted if p.mode == mode), None)
        for kind, timing in timings.items():
            row = [IN_MODE[mode], LABELS[kind], *cells(kind, timing)]
            if predicted:
                row.append(percent(overhead) if kind == OURS_MEASURED and overhead is not None else "")
            if measured.memory:
                row.append(f"{measured.memory[kind] / 1e6:.1f}" if mode == TRAINING else "")
            rows.append(row)
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=align)


def cells(kind: str, timing: Timing) -> list[str]:
    """Time and overhead with their quartiles; marked where most rounds were disturbed."""
    time, ratio = timing.time, timing.ratio
    mark = "!" if time.doubtful or ratio.doubtful else ""
    spread = f"{milliseconds(time.lower_quartile)} to {milliseconds(time.upper_quartile)}"
    line = [milliseconds(time.median) + mark, spread]
    if kind == "residual":
        return [*line, "", ""]
    return [*line, percent(ratio.median - 1), quartiles(ratio)]


def quartiles(ratio: Statistics) -> str:
    """Format the quartiles of an overhead, from those of a time ratio."""
    return f"{percent(ratio.lower_quartile - 1)} to {percent(ratio.upper_quartile - 1)}"


def kernel_table(measured: Measurement) -> str:
    """Return a row per kernel, and their sum, as shares of the step that runs them all."""
    from tabulate import tabulate

    mode = list(measured.modes)[-1]
    step = measured.modes[mode][OURS_MEASURED].time.median
    total = measured.kernel_seconds(mode)
    rows = [
        [
            name,
            milliseconds(time.median),
            milliseconds(SUBLAYERS * time.median),
            percent(SUBLAYERS * time.median / step),
        ]
        for name, time in measured.kernels.items()
    ]
    rows.append(["all", "", milliseconds(total), percent(total / step)])
    headers = ["kernel, alone, cold cache", "ms", "both sublayers, ms", f"of {IN_MODE[mode]}"]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=["left", "right", "right", "right"])


def notes(measured: Measurement, device_type: str, predicted: bool) -> str:
    """Return the legend of the tables."""
    lines = ["overhead: additional time over the plain residual, median and quartiles of the ratios within each round."]
    if measured.memory:
        meaning = {
            "peak memory": "the most that a step allocates above what is there before it, as torch counts it.",
            "saved for backward": "what the forward keeps for the backward, weights left out; no peak.",
        }
        lines.append(f"{measured.memory_kind}: {meaning[measured.memory_kind]}")
    if any(t.time.doubtful or t.ratio.doubtful for timings in measured.modes.values() for t in timings.values()):
        lines.append("! the machine was busy: in most rounds a thread waited for a core.")
    if device_type == "cuda":
        lines.append(
            "time: where Python launches more slowly than the GPU runs, as of plain torch, launches are in it."
        )
    if not predicted:
        lines.append(
            "no prediction for this machine, whose figures are not known: --bandwidth and --flops would give one."
        )
    worst = max(measured.errors, key=lambda name: measured.errors[name])
    apart = f"at most {measured.errors[worst]:.0e} apart ({worst})"
    lines.append(f"checked before: {len(measured.errors)} tensors against mHC in plain torch, {apart}.")
    return "\n".join(lines)


def conclusion(measured: Measurement, device_type: str) -> str:
    """Our kernels' overhead in one line, with the paper's beside it."""
    mode = list(measured.modes)[-1]
    ratio = measured.modes[mode][OURS_MEASURED].ratio
    adds = f"adds {percent(ratio.median - 1)} (quartiles {quartiles(ratio)})"
    line = f"measured: mHC with our kernels {adds} to {IN_MODE[mode]} of this layer; the paper: 6.7 %."
    return f"{line}\nThis is {NOT_COMPARABLE}" if device_type == "cpu" else line


def three_digits(value: float) -> str:
    """Format a number from 1 up with three significant digits, no fewer before the point."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def percent(share: float) -> str:
    """Format a share in percent, one digit after the point."""
    return f"{share:.1%}".replace("%", " %")


def as_json(
    facts: dict[str, Any],
    measured: Measurement,
    predictions: Sequence[Prediction],
    predicted: Sequence[Prediction],
    assumptions: dict[str, float],
) -> dict[str, Any]:
    """Return the content of `--json FILE`. Times in seconds, bytes, overheads as shares of the plain residual's time.

    `predictions` are those of the table, `predicted` those for the device at hand.
    """
    doubt = one_line(NOT_COMPARABLE) if facts["device_type"] == "cpu" else None
    return {
        "kind": "overhead",
        **facts,
        "paper": {"overhead": PAPER, "what": one_line(WHAT_THE_PAPER_SAYS), "not_comparable": doubt},
        "check": measured.errors,
        "measured": {
            mode: {kind: timing_json(timing) for kind, timing in timings.items()}
            for mode, timings in measured.modes.items()
        },
        "kernels": {name: asdict(time) for name, time in measured.kernels.items()},
        "kernel_seconds": {mode: measured.kernel_seconds(mode) for mode in measured.modes},
        "memory": {"kind": measured.memory_kind, "bytes": measured.memory},
        "model": {
            "assumptions": assumptions,
            "predictions": [asdict(p) for p in predictions],
            "this_device": [asdict(p) for p in predicted],
        },
    }


def one_line(text: str) -> str:
    """Return a text without its line breaks."""
    return text.replace("\n", " ")


def timing_json(timing: Timing) -> dict[str, Any]:
    """Return a time, and the overhead with its quartiles."""
    ratio = timing.ratio
    overhead = {
        "median": ratio.median - 1,
        "lower_quartile": ratio.lower_quartile - 1,
        "upper_quartile": ratio.upper_quartile - 1,
    }
    return {"time": asdict(timing.time), "overhead": overhead}
