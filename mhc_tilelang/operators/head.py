"""head: x [..., n, C], phi [n, K], alpha [1], bias [n] -> [..., C].

The operator also returns h_pre and `projected` [n + 1, T], which the backward starts from.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import launch
from ..spec import MHCSpec
from .coefficients import INPUTS, Tensors, allocate_gradients, allocate_projected, project_backward
from .library import check_buffers, define, define_backward, define_out, differentiate, flat, needed, spec_of

_CONSTANTS = "float pre_eps, float rms_eps"


def _spec(x: torch.Tensor, pre_eps: float, rms_eps: float) -> MHCSpec:
    return spec_of(x.shape[-1], x.shape[-2], pre_eps=pre_eps, rms_eps=rms_eps)


def _allocate(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    pre_eps: float,
    rms_eps: float,
) -> Tensors:
    output = x.new_empty(*x.shape[:-2], x.shape[-1])
    return output, x.new_empty(x.shape[:-1], dtype=torch.float32), allocate_projected(x, phi)


def _write(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    output: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the head's output; h_pre [T, n] and projected [n + 1, T]."""
    x = flat(x, 2)
    plan = launch.projection_plan(x, spec.num_streams)
    partial = launch.project(x, phi.contiguous(), plan)
    h_pre, projected = launch.head_coefficients(partial, alpha.contiguous(), bias.contiguous(), spec, plan)
    launch.aggregate(x, h_pre, out=flat(output, 1))
    return h_pre, projected


def _run(
    x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, pre_eps: float, rms_eps: float
) -> Tensors:
    output = x.new_empty(*x.shape[:-2], x.shape[-1])
    h_pre, projected = _write(x, phi, alpha, bias, _spec(x, pre_eps, rms_eps), output)
    return output, h_pre.view(x.shape[:-1]), projected


def _run_out(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    pre_eps: float,
    rms_eps: float,
    *,
    out: torch.Tensor,
) -> None:
    check_buffers("head", {"out": out}, {"x": x, "phi": phi, "alpha": alpha, "bias": bias})
    _write(x, phi, alpha, bias, _spec(x, pre_eps, rms_eps), out)


def _allocate_backward(
    g_output: torch.Tensor,
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    h_pre: torch.Tensor,
    projected: torch.Tensor,
    pre_eps: float,
    rms_eps: float,
    needs_x: bool,
    needs_phi: bool,
) -> Tensors:
    return allocate_gradients(x, phi, alpha, bias, needs_x, needs_phi)


def _run_backward(
    g_output: torch.Tensor,
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    h_pre: torch.Tensor,
    projected: torch.Tensor,
    pre_eps: float,
    rms_eps: float,
    needs_x: bool,
    needs_phi: bool,
) -> Tensors:
    g_output = flat(g_output, 1)
    g_projected, g_alpha, g_bias = launch.head_coefficients_backward(
        launch.aggregate_backward(g_output, flat(x, 2)),
        projected.contiguous(),
        alpha.contiguous(),
        bias.contiguous(),
        _spec(x, pre_eps, rms_eps),
    )
    return (*project_backward(g_projected, x, phi, needs_x, needs_phi, flat(h_pre, 1), g_output), g_alpha, g_bias)


head = define(
    f"head({INPUTS}, {_CONSTANTS}) -> (Tensor output, Tensor h_pre, Tensor projected)",
    _run,
    _allocate,
)
head_out = define_out(f"head_out({INPUTS}, {_CONSTANTS}, *, Tensor(a!) out) -> ()", _run_out)
head_backward = define_backward(
    f"head_backward(Tensor g_output, {INPUTS}, Tensor h_pre, Tensor projected, {_CONSTANTS}, "
    "bool needs_x, bool needs_phi) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _allocate_backward,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
    x, phi, alpha, bias, *ctx.constants = inputs
    _, h_pre, projected = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(h_pre, projected)
    ctx.save_for_backward(x, phi, alpha, bias, h_pre, projected)


def _backward(ctx: Any, g_output: torch.Tensor | None, *_: None) -> tuple:
    if g_output is None:
        return needed(ctx, ())
    needs_x, needs_phi = ctx.needs_input_grad[:2]
    gradients = head_backward(g_output, *ctx.saved_tensors, *ctx.constants, needs_x, needs_phi)
    return needed(ctx, gradients)


differentiate(head, _backward, _setup_context)
