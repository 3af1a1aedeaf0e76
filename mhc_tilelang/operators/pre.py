"""pre: x [..., n, C], phi [M, K], alpha [3], bias [M] -> layer_input [..., C], h_post [..., n], h_res [..., n, n].

The operator also returns h_pre and `projected`, which the backward starts from.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import launch, launch_backward
from .coefficients import (
    CONSTANTS,
    INPUTS,
    Tensors,
    allocate,
    allocate_gradients,
    allocate_projected,
    project_backward,
    write,
)
from .library import (
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


def _allocate(x: torch.Tensor, phi: torch.Tensor, *_: object) -> Tensors:
    h_pre, h_post, h_res = allocate(x)
    return x.new_empty(*x.shape[:-2], x.shape[-1]), h_post, h_res, h_pre, allocate_projected(x, phi)


def _write(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    constants: tuple[float, ...],
    outputs: Tensors,
) -> torch.Tensor:
    """Write layer_input, h_pre, h_post and h_res; return projected."""
    layer_input, *mappings = outputs
    x = flat(x, 2)
    projected = write(x, phi, alpha, bias, constants, tuple(mappings))
    launch.aggregate(x, flat(mappings[0], 1), out=flat(layer_input, 1))
    return projected


def _run(x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, *constants: float) -> Tensors:
    layer_input = x.new_empty(*x.shape[:-2], x.shape[-1])
    h_pre, h_post, h_res = allocate(x)
    projected = _write(x, phi, alpha, bias, constants, (layer_input, h_pre, h_post, h_res))
    return layer_input, h_post, h_res, h_pre, projected


def _run_out(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    *constants: float,
    layer_input: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
) -> None:
    buffers = {"out[0] (layer_input)": layer_input, "out[1] (h_post)": h_post, "out[2] (h_res)": h_res}
    inputs = {"x": x, "phi": phi, "alpha": alpha, "bias": bias}
    check_buffers("pre", buffers, inputs, whole=tuple(buffers)[1:])
    h_pre = phi.new_empty(x.shape[:-1])
    _write(x, phi, alpha, bias, constants, (layer_input, h_pre, h_post, h_res))


def _allocate_backward(
    g_layer_input: torch.Tensor | None,
    g_h_post: torch.Tensor | None,
    g_h_res: torch.Tensor | None,
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    h_pre: torch.Tensor,
    projected: torch.Tensor,
    *constants_and_needs: float,
) -> Tensors:
    *_, needs_x, needs_phi = constants_and_needs
    return allocate_gradients(x, phi, alpha, bias, bool(needs_x), bool(needs_phi))


def _run_backward(
    g_layer_input: torch.Tensor | None,
    g_h_post: torch.Tensor | None,
    g_h_res: torch.Tensor | None,
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    h_pre: torch.Tensor,
    projected: torch.Tensor,
    *constants_and_needs: float,
) -> Tensors:
    *constants, needs_x, needs_phi = constants_and_needs
    g_h_pre, g_layer_input = None, flat_or_none(g_layer_input, 1)
    if g_layer_input is not None:
        g_h_pre = launch_backward.pre_backward(g_layer_input, flat(x, 2))
    g_projected, g_alpha, g_bias = launch_backward.coefficients_backward(
        g_h_pre,
        flat_or_none(g_h_post, 1),
        flat_or_none(g_h_res, 2),
        projected.contiguous(),
        alpha.contiguous(),
        bias.contiguous(),
        spec_of(x.shape[-1], x.shape[-2], *constants),
    )
    aggregation = (None, None) if g_layer_input is None else (flat(h_pre, 1), g_layer_input)
    return (*project_backward(g_projected, x, phi, bool(needs_x), bool(needs_phi), *aggregation), g_alpha, g_bias)


pre = define(
    f"pre({INPUTS}, {CONSTANTS}) -> (Tensor layer_input, Tensor h_post, Tensor h_res, Tensor h_pre, Tensor projected)",
    _run,
    _allocate,
)
pre_out = define_out(
    f"pre_out({INPUTS}, {CONSTANTS}, *, Tensor(a!) layer_input, Tensor(b!) h_post, Tensor(c!) h_res) -> ()",
    _run_out,
)
pre_backward = define_backward(
    f"pre_backward(Tensor? g_layer_input, Tensor? g_h_post, Tensor? g_h_res, {INPUTS}, Tensor h_pre, "
    f"Tensor projected, {CONSTANTS}, bool needs_x, bool needs_phi) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _allocate_backward,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
    x, phi, alpha, bias, *ctx.constants = inputs
    h_pre, projected = output[3:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(h_pre, projected)
    ctx.save_for_backward(x, phi, alpha, bias, h_pre, projected)


def _backward(ctx: Any, *g_outputs: torch.Tensor | None) -> tuple:
    if all(g is None for g in g_outputs):
        return needed(ctx, ())
    needs_x, needs_phi = ctx.needs_input_grad[:2]
    gradients = pre_backward(*g_outputs[:3], *ctx.saved_tensors, *ctx.constants, needs_x, needs_phi)
    return needed(ctx, gradients)


differentiate(pre, _backward, _setup_context)
