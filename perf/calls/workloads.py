"""A kernel ready to run: its inputs, outputs allocated beforehand, and what plain torch is to reproduce.

Kernels run through `launch`, as the public functions run them, so that what is timed is what a caller waits
for, except the allocation of the outputs. The inputs are those of the correctness check, so logits have
standard deviation 2 and no matrix is symmetric; the backward kernels' upstream gradients are standard normal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ... import launch
from ...checking import inputs as checking
from ...checking.inputs import Inputs
from ...kernels.projection_plans import ProjectionPlan
from ...spec import MHCSpec
from ..traffic.formulas import Traffic, traffic
from .cases import BOUNDARY_KERNELS, BOUNDARY_STEP, SUBLAYER_INPUT, Case, Shape

PROJECTED = ("project", "coefficients", SUBLAYER_INPUT)  # write or read partial sums of a projection
SEED = 1  # of upstream gradients; the inputs' is 0
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """One kernel at one shape.

    Attributes:
        run: the kernel, writing into the same outputs at every call.
        outputs: what it wrote, by name, as the forms of plain torch write it.
        arguments: what those forms read, by name.
        traffic: bytes of one call.
        separate: of a fused kernel the separate ones, as `run` and `outputs`.
    """

    run: Callable[[], object]
    outputs: Callable[[], Tensors]
    arguments: dict[str, Any]
    traffic: Traffic
    separate: tuple[Callable[[], object], Callable[[], Tensors]] | None = None


@dataclass(frozen=True)
class Stream:
    """What all kernels of one shape share: the inputs, and the projection of the stream where one is asked for."""

    spec: MHCSpec
    inputs: Inputs
    plan: ProjectionPlan

    @classmethod
    def of(cls, shape: Shape, device: torch.device) -> Stream:
        """Draw the inputs."""
        dtype = getattr(torch, shape.dtype)
        case = checking.Case(shape.num_streams, shape.hidden_size, dtype, shape.num_tokens)
        inputs = Inputs.of(case, device)
        plan = launch.projection_plan(inputs.x, case.spec.num_coefficients)
        return cls(case.spec, inputs, plan)

    @cached_property
    def partial(self) -> torch.Tensor:
        """The partial sums that `project` leaves."""
        return launch.project(self.inputs.x, self.inputs.phi, self.plan)

    def dots(self) -> torch.Tensor:
        """x·phi [M, T], the slabs and phi's halves added up."""
        total = self.partial.sum(0)[: self.plan.halves * self.plan.rows]
        return total.unflatten(0, (self.plan.halves, self.plan.rows)).sum(0)

    def squares(self) -> torch.Tensor:
        """Σx² [T], the slabs and lanes added up."""
        return self.partial.sum(0)[self.plan.halves * self.plan.rows :].sum(0)

    def projected(self) -> torch.Tensor:
        """What a backward keeps of the projection, [M + 1, T]: s·(x·phi), and s."""
        s = torch.rsqrt(self.squares() / self.spec.stream_size + self.spec.rms_eps)
        return torch.cat((self.dots() * s, s.unsqueeze(0)))


def workload(case: Case, stream: Stream) -> Workload:
    """The case's kernel on this stream."""
    if case.kernel in (*BOUNDARY_KERNELS, BOUNDARY_STEP):
        from . import boundary_workloads

        run, outputs, arguments, separate = boundary_workloads.BUILDERS[case.kernel](stream)
        slabs = launch.boundary_schedule(stream.inputs.x, stream.spec.num_coefficients).slabs
        return Workload(run, outputs, arguments, traffic(case, stream.plan, num_slabs=slabs), separate)
    run, outputs, arguments = BUILDERS[case.kernel](stream)
    slabs = stream.partial.shape[0] if case.kernel in PROJECTED else 0
    return Workload(run, outputs, arguments, traffic(case, stream.plan, num_slabs=slabs))


Parts = tuple[Callable[[], object], Callable[[], Tensors], dict[str, Any]]


def expand(stream: Stream) -> Parts:
    """h -> x."""
    h, n, x = stream.inputs.h, stream.spec.num_streams, torch.empty_like(stream.inputs.x)
    return lambda: launch.expand(h, n, out=x), lambda: {"x": x}, {"h": h}


def project(stream: Stream) -> Parts:
    """x, phi -> partial sums; compared as dots [T, M] and squares [T]."""
    x, phi, plan, partial = stream.inputs.x, stream.inputs.phi, stream.plan, stream.partial
    return (
        lambda: launch.project(x, phi, plan, out=partial),
        lambda: {"dots": stream.dots().T.contiguous(), "squares": stream.squares()},
        {"x": x, "phi": phi},
    )


def coefficients(stream: Stream) -> Parts:
    """Partial sums -> h_pre, h_post, h_res."""
    inputs, spec, plan, partial = stream.inputs, stream.spec, stream.plan, stream.partial
    out = (torch.empty_like(inputs.h_pre), torch.empty_like(inputs.h_post), torch.empty_like(inputs.h_res))
    alpha_and_bias = {"alpha": inputs.alpha, "bias": inputs.bias}
    return (
        lambda: launch.coefficients(partial, inputs.alpha, inputs.bias, spec, plan, out=out),
        lambda: dict(zip(("h_pre", "h_post", "h_res"), out, strict=True)),
        {"dots": stream.dots(), "squares": stream.squares(), **alpha_and_bias, "spec": spec},
    )


def sinkhorn(stream: Stream) -> Parts:
    """Logits -> h_res."""
    logits, h_res = stream.inputs.logits, torch.empty_like(stream.inputs.h_res)
    iters, eps = stream.spec.sinkhorn_iters, stream.spec.sinkhorn_eps
    arguments = {"logits": logits, "iters": iters, "eps": eps}
    return lambda: launch.sinkhorn(logits, iters, eps, out=h_res), lambda: {"h_res": h_res}, arguments


def pre(stream: Stream) -> Parts:
    """x, h_pre -> layer_input."""
    x, h_pre, layer_input = stream.inputs.x, stream.inputs.h_pre, torch.empty_like(stream.inputs.h)
    arguments = {"x": x, "h_pre": h_pre}
    return lambda: launch.aggregate(x, h_pre, out=layer_input), lambda: {"layer_input": layer_input}, arguments


def sublayer_input(stream: Stream) -> Parts:
    """x, phi, alpha, bias -> layer_input, h_post, h_res: three launches."""
    inputs, (project_run, _, arguments) = stream.inputs, project(stream)
    coefficients_run, coefficients_outputs, _ = coefficients(stream)
    h_pre, layer_input = coefficients_outputs().pop("h_pre"), torch.empty_like(inputs.h)

    def run() -> None:
        project_run()
        coefficients_run()
        launch.aggregate(inputs.x, h_pre, out=layer_input)

    def outputs() -> Tensors:
        found = coefficients_outputs()
        return {"layer_input": layer_input, "h_post": found["h_post"], "h_res": found["h_res"]}

    parameters = {"alpha": inputs.alpha, "bias": inputs.bias, "spec": stream.spec}
    return run, outputs, {**arguments, **parameters}


def post(stream: Stream) -> Parts:
    """x, layer_output, h_post, h_res -> x_next."""
    names = ("x", "layer_output", "h_post", "h_res")
    arguments = {name: getattr(stream.inputs, name) for name in names}
    x_next = torch.empty_like(stream.inputs.x)
    return lambda: launch.post(**arguments, out=x_next), lambda: {"x_next": x_next}, arguments


def gradients_like(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Upstream gradients for these tensors: normal, the same at every call, drawn on the CPU."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(tensor.shape, generator=generator).to(tensor) for tensor in tensors]


def expand_backward(stream: Stream) -> Parts:
    """g_x -> g_h."""
    [g_x], g_h = gradients_like(stream.inputs.x), torch.empty_like(stream.inputs.h)
    return lambda: launch.expand_backward(g_x, out=g_h), lambda: {"g_h": g_h}, {"g_x": g_x}


def project_backward(stream: Stream) -> Parts:
    """g_projected, x, phi -> g_x, g_phi."""
    x, phi = stream.inputs.x, stream.inputs.phi
    [g_projected] = gradients_like(stream.projected())
    g_projected[-1] *= phi.norm(dim=0).mean()  # of rho: the two terms of g_x are of one size
    out = (torch.empty_like(x), torch.empty_like(phi))
    return (
        lambda: launch.project_backward(g_projected, x, phi, out=out),
        lambda: dict(zip(("g_x", "g_phi"), out, strict=True)),
        {"g_projected": g_projected, "x": x, "phi": phi},
    )


def coefficients_backward(stream: Stream) -> Parts:
    """g_h_pre, g_h_post, g_h_res, projected, alpha, bias -> g_projected, g_alpha, g_bias."""
    inputs, projected = stream.inputs, stream.projected()
    names = ("g_h_pre", "g_h_post", "g_h_res")
    upstream = dict(zip(names, gradients_like(inputs.h_pre, inputs.h_post, inputs.h_res), strict=True))
    parameters = {"alpha": inputs.alpha, "bias": inputs.bias, "spec": stream.spec}
    arguments: dict[str, Any] = {**upstream, "projected": projected, **parameters}
    out = (torch.empty_like(projected), torch.empty_like(inputs.alpha), torch.empty_like(inputs.bias))
    return (
        lambda: launch.coefficients_backward(**arguments, out=out),
        lambda: dict(zip(("g_projected", "g_alpha", "g_bias"), out, strict=True)),
        arguments,
    )


def sinkhorn_backward(stream: Stream) -> Parts:
    """g_h_res, logits -> g_logits."""
    logits, g_logits = stream.inputs.logits, torch.empty_like(stream.inputs.logits)
    [g_h_res] = gradients_like(logits)
    iters, eps = stream.spec.sinkhorn_iters, stream.spec.sinkhorn_eps
    return (
        lambda: launch.sinkhorn_backward(g_h_res, logits, iters, eps, out=g_logits),
        lambda: {"g_logits": g_logits},
        {"g_h_res": g_h_res, "logits": logits, "iters": iters, "eps": eps},
    )


def aggregate_backward(stream: Stream) -> Parts:
    """g_layer_input, x -> g_h_pre."""
    x, g_h_pre = stream.inputs.x, torch.empty_like(stream.inputs.h_pre)
    [g_layer_input] = gradients_like(stream.inputs.h)
    return (
        lambda: launch.aggregate_backward(g_layer_input, x, out=g_h_pre),
        lambda: {"g_h_pre": g_h_pre},
        {"g_layer_input": g_layer_input, "x": x},
    )


def post_backward(stream: Stream) -> Parts:
    """g_x_next, x, layer_output, h_post, h_res -> g_x, g_layer_output, g_h_post, g_h_res."""
    names = ("x", "layer_output", "h_post", "h_res")
    inputs = {name: getattr(stream.inputs, name) for name in names}
    [g_x_next] = gradients_like(stream.inputs.x)
    x, layer_output, h_post, h_res = map(torch.empty_like, inputs.values())
    out = (x, layer_output, h_post, h_res)
    return (
        lambda: launch.post_backward(g_x_next, **inputs, out=out),
        lambda: {f"g_{name}": tensor for name, tensor in zip(names, out, strict=True)},
        {"g_x_next": g_x_next, **inputs},
    )


BUILDERS: dict[str, Callable[[Stream], Parts]] = {
    "expand": expand,
    "project": project,
    "coefficients": coefficients,
    "sinkhorn": sinkhorn,
    "aggregate": pre,
    SUBLAYER_INPUT: sublayer_input,
    "post": post,
    "expand_backward": expand_backward,
    "project_backward": project_backward,
    "coefficients_backward": coefficients_backward,
    "sinkhorn_backward": sinkhorn_backward,
    "aggregate_backward": aggregate_backward,
    "post_backward": post_backward,
}
