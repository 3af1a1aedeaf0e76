"""A call ready to be timed: outputs allocated beforehand, what plain torch is to reproduce, its bytes.

Kernels run through `launch`, as the public functions run them: what is timed is what a caller waits for, except the
allocation of the outputs. Composed are:

    project+coefficients+aggregate    what precedes a layer
    post_pre, post_pre_delayed        fused; separate are post, project, coefficients, aggregate
    post_pre_quantized                fused; its launches are those of others, which are checked
    post_pre_backward                 fused; separate are the kernels of pre's and of post's backward, and the sum of
                                      the stream's gradients between them, as autograd runs them
    post_pre+post_pre_backward        both through the public functions and autograd, as a training step runs them

What the separate backward rounds on its way, the fused one does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from ... import launch, ops
from ..traffic.formulas import Traffic, traffic
from .cases import (
    BOUNDARY_KERNELS,
    BOUNDARY_STEP,
    POST_PRE_BACKWARD,
    POST_PRE_DELAYED,
    POST_PRE_QUANTIZED,
    SUBLAYER_INPUT,
    Case,
)
from .every_call import Given, function
from .table import AGGREGATED, CALLS, FORWARD_RESULTS, GRADIENTS, MIXING, PARAMETERS

PROJECTED = ("project", "coefficients", SUBLAYER_INPUT)  # write or read partial sums of a projection
OURS = ("plan", "num_streams")  # parameters of kernels alone
KEPT = ("x_next", "h_pre", "projected")  # by a forward for its backward
SEPARATE = "separate kernels"
Tensors = dict[str, torch.Tensor]


class Timed(NamedTuple):
    """A timed call: `run` writes the same outputs every time, `outputs` returns them as plain torch's forms do."""

    run: Callable[[], object]
    outputs: Callable[[], Tensors]


@dataclass(frozen=True)
class Workload:
    """One kernel at one shape.

    Attributes:
        run, outputs: as in `Timed`.
        arguments: inputs of plain torch's forms, by name.
        traffic: bytes of one call.
        separate: the separate kernels beside a fused one.
    """

    run: Callable[[], object]
    outputs: Callable[[], Tensors]
    arguments: dict[str, Any]
    traffic: Traffic
    separate: Timed | None = None


class Buffered:
    """A call that writes into the results of its first run."""

    def __init__(self, given: Given, name: str, **replaced: Any) -> None:
        self.name, self.arguments = name, given.arguments(name, **replaced)
        found = function(name)(**self.arguments)
        self.latest = found if isinstance(found, tuple) else (found,)
        buffers = CALLS[name].buffers
        out = self.latest[: len(CALLS[name].results) if buffers is None else buffers]
        self.options = {"out": out if isinstance(found, tuple) else found} if out else {}

    def run(self) -> None:
        """The call."""
        found = function(self.name)(**self.arguments, **self.options)
        self.latest = found if isinstance(found, tuple) else (found,)

    def outputs(self) -> Tensors:
        """Return the results of the last run, by name."""
        return dict(zip(CALLS[self.name].results, self.latest, strict=False))


def workload(case: Case, given: Given) -> Workload:
    """Return the case's kernel on these inputs."""
    fused = case.kernel in (*BOUNDARY_KERNELS, BOUNDARY_STEP)
    if fused or case.kernel == POST_PRE_QUANTIZED:
        slabs = launch.boundary_schedule(given.inputs.x, given.spec.num_coefficients).slabs
    else:
        slabs = given.partial.shape[0] if case.kernel in PROJECTED else 0
    separate = None
    if case.kernel == SUBLAYER_INPUT:
        timed, arguments = sublayer_input(given), inputs_of(given, "x", *PARAMETERS)
    elif case.kernel == BOUNDARY_STEP:
        timed, separate = step(given)
        arguments = {name: value for name, value in given.arguments(POST_PRE_BACKWARD).items() if name not in KEPT}
    else:
        call = Buffered(given, case.kernel)
        timed, arguments = Timed(call.run, call.outputs), call.arguments
        if fused:
            is_backward = case.kernel == POST_PRE_BACKWARD
            separate = backward_apart(given) if is_backward else forward_apart(given, case.kernel == POST_PRE_DELAYED)
    if case.kernel == "project":
        timed = Timed(timed.run, lambda: sums(given, call.latest[0]))
    return Workload(*timed, named_for_torch(given, arguments), traffic(case, given.plan, num_slabs=slabs), separate)


def named_for_torch(given: Given, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as forms of plain torch take them: sums in place of partial sums, dots as [M, T]."""
    found = {name: value for name, value in arguments.items() if name not in OURS}
    if "partial" in found:
        whole = sums(given, found.pop("partial"))
        found |= {"dots": whole["dots"].T.contiguous(), "squares": whole["squares"]}
    return found


def sums(given: Given, partial: torch.Tensor) -> Tensors:
    """x·phi [T, M] and Σx² [T] of a projection's partial sums: slabs, phi's halves and lanes added up."""
    total, plan = partial.sum(0), given.plan
    rows = plan.halves * plan.rows
    dots = total[:rows].unflatten(0, (plan.halves, plan.rows)).sum(0)
    return {"dots": dots.T.contiguous(), "squares": total[rows:].sum(0)}


def inputs_of(given: Given, *names: str) -> dict[str, Any]:
    """Inputs by name, and the spec."""
    return {**{name: getattr(given.inputs, name) for name in names}, "spec": given.spec}


def sublayer_input(given: Given) -> Timed:
    """x, phi, alpha, bias -> layer_input, h_post, h_res: three launches."""
    project = Buffered(given, "project")
    mappings = Buffered(given, "coefficients", partial=project.latest[0])
    aggregate = Buffered(given, "aggregate", h_pre=mappings.latest[0])

    def outputs() -> Tensors:
        found = mappings.outputs()
        return {**aggregate.outputs(), "h_post": found["h_post"], "h_res": found["h_res"]}

    return Timed(in_turn(project.run, mappings.run, aggregate.run), outputs)


def in_turn(*runs: Callable[[], object]) -> Callable[[], None]:
    """Return a function that runs all of these, one after the other."""

    def run() -> None:
        for each in runs:
            each()

    return run


def forward_apart(given: Given, is_delayed: bool) -> Timed:
    """Return a boundary's forward by the separate kernels."""
    post = Buffered(given, "post")
    [x_next] = post.latest
    project = Buffered(given, "project", x=x_next)
    mappings = Buffered(given, "coefficients", partial=project.latest[0])
    h_pre, h_post, h_res, _ = mappings.latest
    aggregate = Buffered(given, "aggregate", x=x_next, h_pre=given.inputs.h_pre if is_delayed else h_pre)
    results = (x_next, aggregate.latest[0], h_post, h_res, h_pre)
    found = dict(zip((*FORWARD_RESULTS, *(["h_pre_next"] if is_delayed else [])), results, strict=False))
    return Timed(in_turn(post.run, project.run, mappings.run, aggregate.run), lambda: found)


def backward_apart(given: Given) -> Timed:
    """Return a boundary's backward by the separate kernels."""
    forward = given.after
    aggregate = Buffered(given, "aggregate_backward", x=forward.x_next)
    mappings = Buffered(given, "coefficients_backward", projected=forward.projected, g_h_pre=aggregate.latest[0])
    g_projected, g_alpha, g_bias = mappings.latest
    project = Buffered(given, AGGREGATED, g_projected=g_projected, x=forward.x_next, h_pre=forward.h_pre)
    g_next, g_phi = project.latest
    post = Buffered(given, "post_backward", g_x_next=g_next)
    found = {**post.outputs(), "g_phi": g_phi, "g_alpha": g_alpha, "g_bias": g_bias}
    add = partial(g_next.add_, given.gradients.g_x)
    return Timed(in_turn(aggregate.run, mappings.run, project.run, add, post.run), lambda: found)


def step(given: Given) -> tuple[Timed, Timed]:
    """Fused and separate: MIXING, PARAMETERS and upstream gradients -> the forward's results, GRADIENTS."""
    spec, i, g = given.spec, given.inputs, given.gradients
    taken = {name: getattr(i, name) for name in (*MIXING, *PARAMETERS)}

    def together(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, layer_output, h_post, h_res, phi, alpha, bias = tensors
        return ops.post_pre(x, layer_output, h_post, h_res, phi, alpha, bias, spec)

    def separately(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, layer_output, h_post, h_res, phi, alpha, bias = tensors
        x_next = ops.post(x, layer_output, h_post, h_res)
        return x_next, *ops.pre(x_next, phi, alpha, bias, spec)

    fused, apart = (Trained(each, taken, (g.g_x, g.g_h, g.g_h_post, g.g_h_res)) for each in (together, separately))
    return Timed(fused.run, fused.outputs), Timed(apart.run, apart.outputs)


class Trained:
    """A function of MIXING and PARAMETERS, with its backward by autograd: every call records it again."""

    def __init__(
        self, function: Callable[..., tuple[torch.Tensor, ...]], taken: Tensors, upstream: tuple[torch.Tensor, ...]
    ) -> None:
        self.function, self.upstream = function, upstream
        self.leaves = [tensor.detach().requires_grad_() for tensor in taken.values()]
        self.latest: tuple[torch.Tensor, ...] = ()

    def run(self) -> None:
        """Forward, then backward."""
        self.latest = ()  # else two calls' results would be there at once
        with torch.enable_grad():
            results = self.function(*self.leaves)
            gradients = torch.autograd.grad(results, self.leaves, self.upstream)
        self.latest = (*(result.detach() for result in results), *gradients)

    def outputs(self) -> Tensors:
        """Return the outputs and gradients of the last run, by name."""
        return dict(zip((*FORWARD_RESULTS, *GRADIENTS), self.latest, strict=True))
