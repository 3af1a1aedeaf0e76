"""The boundary between two sublayers ready to run, as `workloads` has its parts: fused, and by the separate kernels.

    post_pre, post_pre_delayed    the fused forward; separate are post, project, coefficients, pre
    post_pre_backward             the fused backward; separate are the kernels of pre's and of post's backward, and the
                                  sum of the stream's gradients between them, as autograd runs them
    post_pre+post_pre_backward    both through the public functions and autograd, as a training step runs them

The outputs are named so that none has the name of an input: h_pre_next, h_post_next, h_res_next are the mappings of the
sublayer that begins. What the separate backward rounds on its way, the fused one does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ... import launch, ops
from .cases import BOUNDARY_STEP, POST_PRE, POST_PRE_BACKWARD, POST_PRE_DELAYED
from .workloads import Stream, Tensors, gradients_like

MIXING = ("x", "layer_output", "h_post", "h_res")
PARAMETERS = ("phi", "alpha", "bias")
FORWARD_RESULTS = ("x_next", "layer_input", "h_post_next", "h_res_next")
GRADIENTS = tuple(f"g_{name}" for name in (*MIXING, *PARAMETERS))
SEPARATE = "separate kernels"


class Separate(NamedTuple):
    """The same by the separate kernels: what is run, and what that wrote."""

    run: Callable[[], object]
    outputs: Callable[[], Tensors]


@dataclass(frozen=True)
class Left:
    """What a boundary's forward leaves for its backward, and the upstream gradients of its results."""

    x_next: torch.Tensor
    h_pre: torch.Tensor
    projected: torch.Tensor
    upstream: Tensors

    @classmethod
    def of(cls, stream: Stream) -> Left:
        """By the separate kernels, whose bits are those of the fused ones."""
        i = stream.inputs
        x_next = launch.post(i.x, i.layer_output, i.h_post, i.h_res)
        partial = launch.project(x_next, i.phi, stream.plan)
        h_pre, *_, projected = launch.coefficients(partial, i.alpha, i.bias, stream.spec, stream.plan)
        names = tuple(f"g_{name}" for name in FORWARD_RESULTS)
        return cls(x_next, h_pre, projected, dict(zip(names, gradients_like(i.x, i.h, i.h_post, i.h_res), strict=True)))


Parts = tuple[Callable[[], object], Callable[[], Tensors], dict[str, Any], Separate]


def inputs_of(stream: Stream, *names: str) -> dict[str, Any]:
    """The stream's inputs by name."""
    return {name: getattr(stream.inputs, name) for name in names}


def forward(stream: Stream, delayed: bool = False) -> Parts:
    """x, layer_output, h_post, h_res, phi, alpha, bias -> x_next, layer_input, h_post_next, h_res_next.

    `delayed`: with an h_pre, and h_pre_next too.
    """
    spec, arguments = stream.spec, inputs_of(stream, *MIXING, *PARAMETERS)
    mixing = inputs_of(stream, *MIXING)
    given = stream.inputs.h_pre if delayed else None
    names = (*FORWARD_RESULTS, *(["h_pre_next"] if delayed else []))

    def buffers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        i = stream.inputs
        x_next, layer_input = torch.empty_like(i.x), torch.empty_like(i.h)
        return x_next, layer_input, torch.empty_like(i.h_post), torch.empty_like(i.h_res), torch.empty_like(i.h_pre)

    fused, apart = buffers(), buffers()
    partial = torch.empty_like(stream.partial)

    def separately() -> None:
        x_next, layer_input, h_post_next, h_res_next, h_pre_next = apart
        launch.post(**mixing, out=x_next)
        launch.project(x_next, stream.inputs.phi, stream.plan, out=partial)
        of_mappings = (h_pre_next, h_post_next, h_res_next)
        launch.coefficients(partial, stream.inputs.alpha, stream.inputs.bias, spec, stream.plan, out=of_mappings)
        launch.aggregate(x_next, h_pre_next if given is None else given, out=layer_input)

    return (
        lambda: launch.post_pre(**arguments, spec=spec, h_pre=given, out=fused),
        lambda: dict(zip(names, fused, strict=False)),
        {**arguments, "spec": spec, **({"h_pre": given} if delayed else {})},
        Separate(separately, lambda: dict(zip(names, apart, strict=False))),
    )


def backward(stream: Stream) -> Parts:
    """The gradients of x_next, layer_input, h_post_next and h_res_next, and what the forward took and left ->
    GRADIENTS."""
    i, spec, left = stream.inputs, stream.spec, Left.of(stream)
    taken = inputs_of(stream, *MIXING, *PARAMETERS)
    kept = {"x_next": left.x_next, "h_pre": left.h_pre, "projected": left.projected}
    arguments: dict[str, Any] = {**left.upstream, **taken, **kept, "spec": spec}
    streams = torch.empty_like(i.x), torch.empty_like(i.layer_output)
    latest: list[launch.BoundaryGradients] = []

    def run() -> None:
        latest[:] = [launch.post_pre_backward(**arguments, out=streams)]

    g_next, g_h_pre, g_projected = (torch.empty_like(t) for t in (i.x, i.h_pre, left.projected))
    apart = {name: torch.empty_like(taken[name.removeprefix("g_")]) for name in GRADIENTS}

    def separately() -> None:
        launch.aggregate_backward(left.upstream["g_layer_input"], left.x_next, out=g_h_pre)
        mappings = (g_h_pre, left.upstream["g_h_post_next"], left.upstream["g_h_res_next"])
        of_parameters = (g_projected, apart["g_alpha"], apart["g_bias"])
        launch.coefficients_backward(*mappings, left.projected, i.alpha, i.bias, spec, out=of_parameters)
        aggregation: dict[str, Any] = {"h_pre": left.h_pre, "g_layer_input": left.upstream["g_layer_input"]}
        launch.project_backward(g_projected, left.x_next, i.phi, **aggregation, out=(g_next, apart["g_phi"]))
        g_next.add_(left.upstream["g_x_next"])
        mixed = tuple(apart[f"g_{name}"] for name in MIXING)
        launch.post_backward(g_next, **inputs_of(stream, *MIXING), out=mixed)  # type: ignore[arg-type]

    return (
        run,
        lambda: dict(zip(GRADIENTS, latest[0][: len(GRADIENTS)], strict=True)),  # type: ignore[arg-type]
        arguments,
        Separate(separately, lambda: apart),
    )


def step(stream: Stream) -> Parts:
    """x, layer_output, h_post, h_res, phi, alpha, bias, and upstream gradients -> the forward's results, GRADIENTS."""
    spec, upstream = stream.spec, Left.of(stream).upstream
    taken = inputs_of(stream, *MIXING, *PARAMETERS)

    def together(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, layer_output, h_post, h_res, phi, alpha, bias = tensors
        return ops.post_pre(x, layer_output, h_post, h_res, phi, alpha, bias, spec)

    def separately(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, layer_output, h_post, h_res, phi, alpha, bias = tensors
        x_next = ops.post(x, layer_output, h_post, h_res)
        return x_next, *ops.pre(x_next, phi, alpha, bias, spec)

    gradients = tuple(upstream.values())
    fused, apart = (Trained(function, taken, gradients) for function in (together, separately))
    arguments = {**upstream, **taken, "spec": spec}
    return fused.run, fused.outputs, arguments, Separate(apart.run, apart.outputs)


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
        """What the last call returned."""
        return dict(zip((*FORWARD_RESULTS, *GRADIENTS), self.latest, strict=True))


BUILDERS: dict[str, Callable[[Stream], Parts]] = {
    POST_PRE: forward,
    POST_PRE_DELAYED: lambda stream: forward(stream, delayed=True),
    POST_PRE_BACKWARD: backward,
    BOUNDARY_STEP: step,
}
