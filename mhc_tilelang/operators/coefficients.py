"""coefficients: x [..., n, C], phi [M, K], alpha [3], bias [M] -> h_pre [..., n], h_post [..., n], h_res [..., n, n].

The operator also returns `projected` [M + 1, T], a projection's scaled dots and the scale of every token, which
the backward starts from.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from .. import launch
from .library import (
    absent,
    check_buffers,
    define,
    define_backward,
    define_out,
    differentiate,
    flat,
    flat_or_none,
    needed,
    spec_of,
)

Tensors = tuple[torch.Tensor, ...]
INPUTS = "Tensor x, Tensor phi, Tensor alpha, Tensor bias"
CONSTANTS = "int iters, float sinkhorn_eps, float pre_eps, float rms_eps, float post_scale"


def allocate(x: torch.Tensor) -> Tensors:
    """h_pre, h_post and h_res of a stream."""
    *leading, n, _C = x.shape
    return tuple(x.new_empty(*leading, *rest, dtype=torch.float32) for rest in ((n,), (n,), (n, n)))


def allocate_projected(x: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
    """What `projected` of a stream and any phi looks like: [rows + 1, T]."""
    return x.new_empty(phi.shape[0] + 1, prod(x.shape[:-2]), dtype=torch.float32)


def write(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    constants: tuple[float, ...],
    outputs: Tensors,
    layer_input: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write h_pre, h_post, h_res, and a layer_input that is aggregated with this h_pre; return projected. x is flat."""
    spec = spec_of(x.shape[-1], x.shape[-2], *constants)
    plan = launch.projection_plan(x, spec.num_coefficients)
    partial = launch.project(x, phi.contiguous(), plan)
    h_pre, h_post, h_res = outputs
    out = (flat(h_pre, 1), flat(h_post, 1), flat(h_res, 2))
    parameters = (alpha.contiguous(), bias.contiguous(), spec, plan)
    if layer_input is None:
        return launch.coefficients(partial, *parameters, out=out)[3]
    return launch.coefficients_and_aggregate(x, partial, *parameters, out=(flat(layer_input, 1), *out))


def allocate_gradients(
    x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, needs_x: bool, needs_phi: bool
) -> Tensors:
    """g_x, g_phi, g_alpha and g_bias; what is not needed is empty."""
    g_x = x.new_empty(x.shape) if needs_x else absent(x)
    g_phi = phi.new_empty(phi.shape) if needs_phi else absent(phi)
    return g_x, g_phi, alpha.new_empty(alpha.shape), bias.new_empty(bias.shape)


def project_backward(
    g_projected: torch.Tensor,
    x: torch.Tensor,
    phi: torch.Tensor,
    needs_x: bool,
    needs_phi: bool,
    h_pre: torch.Tensor | None = None,
    g_layer_input: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """g_x in x's shape and g_phi, empty where not needed; launches nothing if neither is.

    With flat h_pre and g_layer_input, g_x has the aggregation's share too, so that x is not read once more for it.
    """
    g_x = g_phi = None
    if needs_x or needs_phi:
        g_x, g_phi = launch.project_backward(
            g_projected,
            flat(x, 2),
            phi.contiguous(),
            h_pre=h_pre,
            g_layer_input=g_layer_input,
            needs_x=needs_x,
            needs_phi=needs_phi,
        )
    return absent(x) if g_x is None else g_x.view(x.shape), absent(phi) if g_phi is None else g_phi


def _allocate(x: torch.Tensor, phi: torch.Tensor, *_: object) -> Tensors:
    return *allocate(x), allocate_projected(x, phi)


def _run(x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, *constants: float) -> Tensors:
    outputs = allocate(x)
    return *outputs, write(flat(x, 2), phi, alpha, bias, constants, outputs)


def _run_out(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    *constants: float,
    h_pre: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
) -> None:
    buffers = {"out[0] (h_pre)": h_pre, "out[1] (h_post)": h_post, "out[2] (h_res)": h_res}
    check_buffers("coefficients", buffers, {"x": x, "phi": phi, "alpha": alpha, "bias": bias}, whole=tuple(buffers))
    write(flat(x, 2), phi, alpha, bias, constants, (h_pre, h_post, h_res))


def _allocate_backward(
    g_h_pre: torch.Tensor | None,
    g_h_post: torch.Tensor | None,
    g_h_res: torch.Tensor | None,
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    projected: torch.Tensor,
    *constants_and_needs: float,
) -> Tensors:
    *_, needs_x, needs_phi = constants_and_needs
    return allocate_gradients(x, phi, alpha, bias, bool(needs_x), bool(needs_phi))


def _run_backward(
    g_h_pre: torch.Tensor | None,
    g_h_post: torch.Tensor | None,
    g_h_res: torch.Tensor | None,
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    projected: torch.Tensor,
    *constants_and_needs: float,
) -> Tensors:
    *constants, needs_x, needs_phi = constants_and_needs
    g_projected, g_alpha, g_bias = launch.coefficients_backward(
        flat_or_none(g_h_pre, 1),
        flat_or_none(g_h_post, 1),
        flat_or_none(g_h_res, 2),
        projected.contiguous(),
        alpha.contiguous(),
        bias.contiguous(),
        spec_of(x.shape[-1], x.shape[-2], *constants),
    )
    return (*project_backward(g_projected, x, phi, bool(needs_x), bool(needs_phi)), g_alpha, g_bias)


coefficients = define(
    f"coefficients({INPUTS}, {CONSTANTS}) -> (Tensor h_pre, Tensor h_post, Tensor h_res, Tensor projected)",
    _run,
    _allocate,
)
coefficients_out = define_out(
    f"coefficients_out({INPUTS}, {CONSTANTS}, *, Tensor(a!) h_pre, Tensor(b!) h_post, Tensor(c!) h_res) -> ()",
    _run_out,
)
coefficients_backward = define_backward(
    f"coefficients_backward(Tensor? g_h_pre, Tensor? g_h_post, Tensor? g_h_res, {INPUTS}, Tensor projected, "
    f"{CONSTANTS}, bool needs_x, bool needs_phi) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _allocate_backward,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
    x, phi, alpha, bias, *ctx.constants = inputs
    projected = output[3]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(projected)
    ctx.save_for_backward(x, phi, alpha, bias, projected)


def _backward(ctx: Any, *g_outputs: torch.Tensor | None) -> tuple:
    if all(g is None for g in g_outputs):
        return needed(ctx, ())
    needs_x, needs_phi = ctx.needs_input_grad[:2]
    gradients = coefficients_backward(*g_outputs[:3], *ctx.saved_tensors, *ctx.constants, needs_x, needs_phi)
    return needed(ctx, gradients)


differentiate(coefficients, _backward, _setup_context)
