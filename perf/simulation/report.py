"""The output of `mhc-tilelang simulate`: every assumption, the tables, the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..overhead.model import DEVICES
from ..overhead.report import PAPER, percent
from ..predict.stored import TOKENS, Connection, connection, delayed
from ..sizes import NUM_LAYERS, SEQUENCE
from .costs import FUSED, Assumptions, Measured, costs, forms
from .overhead import Change, Solution, overhead, pipeline_of, sensitivity, solve, step_overhead
from .stage import stage_of
from .streams import makespan

NOTES = """\
mHC adds: to a stage's forward and backward micro-batch in the steady state, of which the V4 report says 6.7 %.
1F1B step: all stages and micro-batches, one direction at a time on a stage, and it waits for its experts; the bubble is
that of the plain residual's step, the wait for sends included. Taken as free: launches, imbalance, what tasks that run
side by side take from each other, the optimizer, embedding, head. The paper names neither model nor hardware."""


PREDICTED = """\
The same with kernel times that mhc-tilelang predict reads from machine code, launches in it, in place of bytes over an
assumed share of the bandwidth; from, to: the prediction's interval. Predicted, not measured. Delayed: forward alone,
with the coefficients before the layer, and beside it (overlap_coefficients), where they are taken as free."""


@dataclass(frozen=True)
class ModelRow:
    """A model under the assumptions: seconds of a plain stage's pair, shares of them, and of the step."""

    model: str
    layers: int
    stage: float
    overhead: float
    recompute: float
    step: float
    bubble: float


@dataclass(frozen=True)
class Results:
    """Everything that is printed."""

    given: Assumptions
    models: Sequence[ModelRow]
    changes: Sequence[Change]
    solutions: Mapping[str, Sequence[Solution]]


def simulate(given: Assumptions, models: Sequence[str]) -> Results:
    """Simulate the given model in detail, the others beside it."""
    each = [replace(given, model=model) for model in models]
    solutions = {one.model: list(solve(one, PAPER)) for one in each}
    return Results(given, [model_row(one) for one in each], list(sensitivity(given)), solutions)


def model_row(given: Assumptions) -> ModelRow:
    """Simulate one model."""
    whole, kept = overhead(given), overhead(replace(given, recompute=False))
    plain = pipeline_of(given, plain=True)
    return ModelRow(
        given.model,
        given.layers,
        stage_of(given, plain=True).period(),
        whole,
        whole - kept,
        step_overhead(given),
        max(0.0, 1 - plain.ideal / makespan(plain.spans())),
    )


def report(results: Results) -> str:
    """Return the assumptions first, then what follows from them."""
    given = results.given
    parts = [
        "A MODEL: a simulated schedule of tasks whose times follow from sizes and assumptions; no measurement.",
        "\n".join(list_assumptions(given)),
        models_table(results.models),
        predicted_table(results),
        f"{given.model}, one assumption changed at a time:\n\n{changes_table(results.changes)}",
        f"One assumption's value, the others kept, that gives a stage {percent(PAPER)}:\n\n{solutions_table(results)}",
        NOTES,
    ]
    return "\n\n".join(parts)


def list_assumptions(given: Assumptions) -> list[str]:
    """List every assumption, a line each."""
    device, n = DEVICES[given.device], given.num_streams
    form, cost = forms()[given.form], costs(given, plain=False)
    forward, backward = form.forward(n), form.backward(n)
    traffic = f"{given.form}, {forward}C + {backward}C a sublayer and token, at n = {n}; plain residual 3C + 3C"
    if given.measured:
        us = [1e6 * SEQUENCE * seconds for seconds in (given.measured.forward, given.measured.backward)]
        traffic = f"measured, {us[0]:.1f} + {us[1]:.1f} us a sublayer and sequence: {given.measured.source}"
    send = f"{n}C a token at {given.send_bandwidth / 1e9:g} GB/s, C of a plain residual"
    send = send if given.stages > 1 else "none"
    experts = f"{given.expert_copies} copies of C a token and way at {given.expert_bandwidth / 1e9:g} GB/s, bfloat16"
    overlap = (
        "a forward and a backward micro-batch share the stage; links run beside it"
        if given.overlapped
        else "none: compute waits for all communication"
    )
    connections = "on a stream of their own, at no cost to others" if given.own_stream else "on the compute stream"
    blocks = f"streams recomputed, in blocks of {cost.block} in {given.model}" if cost.block else "streams kept"
    pairs = [
        ("device", f"{device.name}, {device.bandwidth / 1e12:.3g} TB/s, {device.flops / 1e12:.4g} TFLOP/s bfloat16"),
        ("reached", f"{given.bandwidth_share:.0%} of the bandwidth, {given.flops_share:.0%} of the FLOP/s"),
        ("connections", traffic),
        ("", f"{connections}; phi, coefficients and partial sums left out"),
        ("recomputation", f"{blocks}; of the layers none"),
        ("pipeline", f"stages: {given.stages}; micro-batches: {given.micro_batches}, of {SEQUENCE} tokens"),
        ("stages' link", send),
        ("experts' link", experts),
        ("overlap", overlap),
        ("layer", "plain causal attention; a dense SwiGLU as wide as all experts of a token; no routing"),
    ]
    return [f"  {name:<15}{text}" for name, text in pairs]


def predicted_table(results: Results) -> str:
    """mHC's share with kernel times that `mhc-tilelang predict` gives, in place of bytes; why, where it gives none."""
    lines, reasons = [], []
    for model in (row.model for row in results.models):
        given = replace(results.given, model=model)
        found = connection(given.device, given.sizes.hidden_size, given.num_streams)
        if given.form != FUSED or given.measured:
            found = "connections are " + ("measured" if given.measured else f"not the {FUSED}'s")
        if isinstance(found, str):
            reasons.append(f"{model}: as above, by bytes: {found}")
            continue
        lines.append(predicted_line(model, given, found))
        for label, is_beside in ((f"{model}, delayed", False), (f"{model}, delayed, beside", True)):
            if form := delayed(found, given.device, given.sizes.hidden_size, is_beside):
                lines.append(predicted_line(label, given, form))
    headers = ["model", "post_pre, us", "post_pre_backward, us", "mHC adds", "from", "to"]
    shown = [table(headers, lines, ["left", *["right"] * 5])] if lines else []
    return "\n\n".join([PREDICTED, *shown, *(["\n".join(reasons)] if reasons else [])])


def predicted_line(label: str, given: Assumptions, found: Connection) -> list[str]:
    """Return a row of `predicted_table`."""
    shares = [
        overhead(replace(given, measured=Measured(forward * 1e-6 / TOKENS, backward * 1e-6 / TOKENS, "predicted")))
        for forward, backward in zip(*found, strict=True)
    ]
    return [label, *(f"{us[0]:.0f}" for us in found), *map(percent, shares)]


def models_table(rows: Sequence[ModelRow]) -> str:
    """Return a row per model."""
    headers = ["model", "layers", "of a stage", "plain stage, ms", "mHC adds", "of it replay", "1F1B step: mHC adds"]
    lines = [
        [
            row.model,
            str(NUM_LAYERS[row.model]),
            str(row.layers),
            f"{1e3 * row.stage:.2f}",
            percent(row.overhead),
            percent(row.recompute),
            percent(row.step),
            percent(row.bubble),
        ]
        for row in rows
    ]
    return table([*headers, "bubble"], lines, ["left", *["right"] * 7])


def changes_table(changes: Sequence[Change]) -> str:
    """Return a row per change."""
    first = changes[0].overhead
    lines = [
        [one.what, percent(one.overhead), "" if one is changes[0] else f"{100 * (one.overhead - first):+.1f}"]
        for one in changes
    ]
    return table(["assumption", "mHC adds", "points"], lines, ["left", "right", "right"])


def solutions_table(results: Results) -> str:
    """Return a row per assumption, a column per model."""
    models = list(results.solutions)
    lines = []
    for solutions in zip(*results.solutions.values(), strict=True):
        knob = solutions[0].knob
        name = f"{knob.what}, {knob.lowest * knob.scale:g} to {knob.highest * knob.scale:g} {knob.unit}"
        lines.append([name, *map(format_solution, solutions)])
    return table(["assumption, and where it was looked for", *models], lines, ["left", *["right"] * len(models)])


def format_solution(solution: Solution) -> str:
    """Format the value, or on which side of the target everything is."""
    if solution.value is not None:
        return f"{solution.value:.3g} {solution.knob.unit}"
    low, high = sorted(solution.at_ends)
    return f"at most {percent(high)}" if high < PAPER else f"at least {percent(low)}"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], align: Sequence[str]) -> str:
    """Cells as they are."""
    from tabulate import tabulate

    return tabulate(rows, headers=headers, disable_numparse=True, colalign=align)


def as_json(results: Results) -> dict[str, Any]:
    """Return the content of `--json FILE`. Seconds, and overheads as shares of the plain residual's time."""
    return {
        "kind": "simulation",
        "assumptions": asdict(results.given),
        "stage_tasks": {
            kind: asdict(costs(results.given, plain=plain)) for kind, plain in (("mhc", False), ("residual", True))
        },
        "models": [asdict(row) for row in results.models],
        "sensitivity": [asdict(one) for one in results.changes],
        "target": PAPER,
        "solutions": {
            model: [
                {
                    "assumption": one.knob.what,
                    "unit": one.knob.unit,
                    "value": one.value,
                    "overhead_at_ends": one.at_ends,
                }
                for one in found
            ]
            for model, found in results.solutions.items()
        },
    }
