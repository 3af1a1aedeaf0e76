"""Plain torch for the boundary between two sublayers, put together from the fastest forms of its parts.

The forms of post, project, coefficients and pre, and of their backward, are verified and timed on their own, a few
rounds each; the fastest of every part are then run one after the other over buffers that are there beforehand. The
result is verified as a whole before it is timed. On a CPU the forward also runs block by block of tokens, so that what
a part leaves is still in the cache when the next one reads it.

    eager       the fastest eager form of every part
    compiled    the fastest of all, torch.compile included; left out where all of these are eager

Forms that autograd recorded beforehand are not among the parts: a step writes again what they have kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calls.cases import BOUNDARY_STEP, FORWARD_PARTS, POST_PRE_BACKWARD, Case, Shape
from ..calls.every_call import Given
from ..calls.table import MIXING
from ..calls.workloads import in_turn, workload
from ..measure.timing import Clock, capturable, measure
from . import backward_post as backward_post_forms
from . import backward_streams as backward_stream_forms
from . import backward_tokens as backward_token_forms
from . import streams as stream_forms
from . import tokens as token_forms
from .baselines import COMPILED, EAGER, FAST, MODES, Baseline, Form, applicable, bind, prepare, verify
from .streams import block_tokens, widen

SELECTION_ROUNDS = 5
SUM = "sum of g_x_next"  # of what came in, what came through phi, and the aggregation's share
NAME, BLOCKS = "fastest parts", "fastest parts, block by block"
FORWARD = FORWARD_PARTS
BACKWARD = ("aggregate_backward", "coefficients_backward", "project_backward", SUM, "post_backward")

Run = Callable[[], object]
Bound = tuple[str, Mapping[str, Any]]  # a part, and its arguments with its outputs
Part = tuple[Form, str]  # and its mode


def sum_as_written(g_x: Tensor, g_x_next: Tensor, h_pre: Tensor, g_layer_input: Tensor, total: Tensor) -> None:
    """Sum the three shares in float32 and round once."""
    total.copy_(g_x.float() + g_x_next.float() + h_pre.unsqueeze(-1) * g_layer_input.float().unsqueeze(1))


def sum_blocks(g_x: Tensor, g_x_next: Tensor, h_pre: Tensor, g_layer_input: Tensor, total: Tensor) -> None:
    """The sum, a block of tokens at a time."""
    block = min(block_tokens(g_x), len(g_x))
    workspace = g_x.new_empty(block, *g_x.shape[1:], dtype=torch.float32)
    vectors = g_x.new_empty(block, g_x.shape[2], dtype=torch.float32)
    blocks = (tensor.split(block) for tensor in (g_x, g_x_next, h_pre, g_layer_input, total))
    for g_block, next_block, weights, layer_block, out in zip(*blocks, strict=True):
        sums, layer = workspace[: len(out)], widen(layer_block, vectors)
        torch.mul(weights.unsqueeze(-1), layer.unsqueeze(1), out=sums)
        out.copy_(sums.add_(g_block).add_(next_block))


FORMS = {
    **stream_forms.FORMS,
    **token_forms.FORMS,
    **backward_stream_forms.FORMS,
    **backward_post_forms.FORMS,
    **backward_token_forms.FORMS,
    SUM: (
        Form("as written", sum_as_written),
        Form("in blocks", sum_blocks, modes=(EAGER,), devices=("cpu",)),
    ),
}


class Selection:
    """The forms of one shape's parts, fastest first, timed when they are first asked for."""

    def __init__(self, shape: Shape, given: Given, baselines: str, clock: Clock) -> None:
        self.shape, self.given, self.baselines, self.clock = shape, given, baselines, clock
        self.modes = MODES[baselines]
        self.ranked: dict[str, list[Part]] = {}

    def complete(self, case: Case) -> None:
        """Rank every part of a case: before anything is bound that `prepare` would have torch.compile forget."""
        for part in parts_of(case):
            self.fastest(part, EAGER)

    def fastest(self, part: str, mode: str) -> Part:
        """Return the fastest form, of all modes where `mode` is COMPILED."""
        if part not in self.ranked:
            self.ranked[part] = self.rank(part)
        return next(one for one in self.ranked[part] if mode == COMPILED or one[1] == EAGER)

    def rank(self, part: str) -> list[Part]:
        """Verify, then time."""
        arguments, outputs = self.case(part)
        device = self.given.inputs.x.device
        found = applicable(FORMS[part], device, self.shape.dtype, self.baselines)
        forms = {form.name: form for form in found if not form.binds}
        prepared = prepare(part, tuple(forms.values()), self.modes, arguments, outputs)
        runs = capturable({one.name: one.run for one in prepared}, self.clock)
        if len(runs) == 1:
            return [(forms[one.form], one.mode) for one in prepared if one.name in runs]
        times = measure(runs, self.clock, SELECTION_ROUNDS)
        timed = sorted((one for one in prepared if one.name in times), key=lambda one: times[one.name].median)
        return [(forms[one.form], one.mode) for one in timed]

    def case(self, part: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return a part's arguments and its expected outputs: its kernel's; the sum's from its first form."""
        if part != SUM:
            load = workload(Case(part, self.shape), self.given)
            load.run()
            return load.arguments, load.outputs()
        i = self.given.inputs
        arguments = {"g_x": i.x, "g_x_next": i.x, "h_pre": i.h_pre, "g_layer_input": i.h}
        total = torch.empty_like(i.x)
        sum_as_written(**arguments, total=total)
        return arguments, {"total": total}


def parts_of(case: Case) -> tuple[str, ...]:
    """Return the parts of a boundary's case, in order."""
    if case.kernel == POST_PRE_BACKWARD:
        return BACKWARD
    return FORWARD + BACKWARD if case.kernel == BOUNDARY_STEP else FORWARD


@dataclass(frozen=True)
class Buffers:
    """Buffers between the parts of a forward: dots [T, M], squares [T], h_pre [T, n]."""

    dots: Tensor
    squares: Tensor
    h_pre: Tensor

    @classmethod
    def of(cls, stream: Given) -> Buffers:
        """Allocate the buffers, uninitialised."""
        h_pre = stream.inputs.h_pre
        rows = stream.spec.num_coefficients
        return cls(h_pre.new_empty(len(h_pre), rows), h_pre.new_empty(len(h_pre)), torch.empty_like(h_pre))


def forward_parts(
    given: Mapping[str, Any], outputs: Mapping[str, Tensor], buffers: Buffers, block: slice = slice(None)
) -> list[Bound]:
    """Return the calls of FORWARD for a block of tokens; `given` and `outputs` are named as in `calls.table`."""
    mixing = {name: given[name][block] for name in MIXING}
    x_next, layer_input, h_post_next, h_res_next = (
        outputs[name][block] for name in ("x_next", "layer_input", "h_post_next", "h_res_next")
    )
    h_pre_next = outputs.get("h_pre_next", buffers.h_pre)[block]
    weights = given["h_pre"][block] if "h_pre" in given else h_pre_next
    dots, squares = buffers.dots[block], buffers.squares[block]
    parameters = {"alpha": given["alpha"], "bias": given["bias"], "spec": given["spec"]}
    mappings = {"h_pre": h_pre_next, "h_post": h_post_next, "h_res": h_res_next}
    return [
        ("post", {**mixing, "x_next": x_next}),
        ("project", {"x": x_next, "phi": given["phi"], "dots": dots, "squares": squares}),
        ("coefficients", {"dots": dots.T, "squares": squares, **parameters, **mappings}),
        ("aggregate", {"x": x_next, "h_pre": weights, "layer_input": layer_input}),
    ]


def backward_parts(given: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> list[Bound]:
    """Return the calls of BACKWARD."""
    x_next, h_pre, projected = given["x_next"], given["h_pre"], given["projected"]
    through, total, g_h_pre, g_projected = (torch.empty_like(t) for t in (x_next, x_next, h_pre, projected))
    parameters = {name: given[name] for name in ("projected", "alpha", "bias", "spec")}
    g_mappings = {"g_h_pre": g_h_pre, "g_h_post": given["g_h_post_next"], "g_h_res": given["g_h_res_next"]}
    summed = {"g_x": through, "g_x_next": given["g_x_next"], "h_pre": h_pre, "g_layer_input": given["g_layer_input"]}
    mixing = {name: given[name] for name in MIXING}
    mixing |= {f"g_{name}": outputs[f"g_{name}"] for name in MIXING}
    of_parameters = {"g_alpha": outputs["g_alpha"], "g_bias": outputs["g_bias"]}
    of_phi = {"phi": given["phi"], "g_phi": outputs["g_phi"]}
    return [
        ("aggregate_backward", {"g_layer_input": given["g_layer_input"], "x": x_next, "g_h_pre": g_h_pre}),
        ("coefficients_backward", {**g_mappings, **parameters, "g_projected": g_projected, **of_parameters}),
        ("project_backward", {"g_projected": g_projected, "x": x_next, **of_phi, "g_x": through}),
        (SUM, {**summed, "total": total}),
        ("post_backward", {"g_x_next": total, **mixing}),
    ]


def keep(buffers: Buffers, spec: Any, projected: Tensor) -> Run:
    """Return a function that writes a backward's `projected` from a forward's buffers."""

    def run() -> None:
        torch.rsqrt(buffers.squares / spec.stream_size + spec.rms_eps, out=projected[-1])
        torch.mul(buffers.dots.T, projected[-1], out=projected[:-1])

    return run


def prepare_parts(
    case: Case,
    selection: Selection,
    arguments: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    allowed: Mapping[str, float],
) -> list[Baseline]:
    """Return a boundary's fastest parts as baselines. Binds what torch.compile compiles: after every `prepare`."""
    outputs = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    names, found = parts_of(case), []
    for mode in selection.modes:
        parts = {name: selection.fastest(name, mode) for name in names}
        if mode == COMPILED and all(part_mode == EAGER for _, part_mode in parts.values()):
            continue
        runs = {NAME: chain(case, selection.given, parts, arguments, outputs)}
        x = selection.given.inputs.x
        in_turn = names == FORWARD and mode == EAGER and selection.baselines != FAST  # never the fastest in stored runs
        if in_turn and x.device.type == "cpu" and len(x) > block_tokens(x):
            runs[BLOCKS] = in_blocks(selection.given, parts, arguments, outputs)
        used = tuple(f"{name}: {form.name}, {part_mode}" for name, (form, part_mode) in parts.items())
        for name, run in runs.items():
            error = verify(f"{case.kernel}, {mode}: {name}", run, outputs, expected, allowed)
            found.append(Baseline(name, mode, run, error, used))
    return found


def chain(
    case: Case, stream: Given, parts: Mapping[str, Part], given: Mapping[str, Any], outputs: Mapping[str, Tensor]
) -> Run:
    """Return a function that runs all parts of a case, one after the other."""
    if case.kernel == POST_PRE_BACKWARD:
        return in_turn(*bound(parts, backward_parts(given, outputs)))
    buffers = Buffers.of(stream)
    forward = bound(parts, forward_parts(given, outputs, buffers))
    if case.kernel != BOUNDARY_STEP:
        return in_turn(*forward)
    rows = stream.spec.num_coefficients
    left = {
        "x_next": outputs["x_next"],
        "h_pre": buffers.h_pre,
        "projected": buffers.h_pre.new_empty(rows + 1, len(buffers.h_pre)),
    }
    backward = bound(parts, backward_parts({**given, **left}, outputs))
    return in_turn(*forward, keep(buffers, stream.spec, left["projected"]), *backward)


def in_blocks(stream: Given, parts: Mapping[str, Part], given: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> Run:
    """Return a function that runs all parts of a forward for one block of tokens, then for the next."""
    buffers, num_tokens = Buffers.of(stream), len(stream.inputs.x)
    size = block_tokens(stream.inputs.x)
    blocks = [slice(first, first + size) for first in range(0, num_tokens, size)]
    return in_turn(*(run for block in blocks for run in bound(parts, forward_parts(given, outputs, buffers, block))))


def bound(parts: Mapping[str, Part], calls: Iterable[Bound]) -> list[Run]:
    """Return the parts' forms, bound to their arguments."""
    return [bind(*parts[name], arguments) for name, arguments in calls]
