"""pre: x [..., n, C], phi [M, K], alpha [3], bias [M] -> layer_input [..., C], h_post [..., n], h_res [..., n, n].

The operator also returns h_pre and `projected`, which the backward starts from.

The delayed form is given an h_pre and aggregates with that; the one that it returns is then a result, with a gradient.
x is read twice in either form, by the projection and by the aggregation: of a stream only the first sublayer is read
here, `boundary` reads the others.

With a rms_norm_weight [C], the layer's own RMSNorm is part of the aggregation, and of its backward.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import launch
from .coefficients import CONSTANTS, Tensors, allocate, allocate_gradients, allocate_projected, project_backward, write
from .coefficients import INPUTS as PROJECTED
from .library import (
    absent,
    check_buffers,
    contiguous,
    define,
    define_backward,
    define_out,
    differentiate,
    flat,
    flat_or_none,
    needed,
    spec_of,
)

INPUTS = f"{PROJECTED}, Tensor? h_pre, Tensor? rms_norm_weight"
FORM = f"{CONSTANTS}, float rms_norm_eps"


def _allocate(x: torch.Tensor, phi: torch.Tensor, *_: object) -> Tensors:
    h_pre, h_post, h_res = allocate(x)
    return x.new_empty(*x.shape[:-2], x.shape[-1]), h_post, h_res, h_pre, allocate_projected(x, phi)


def _write(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    h_pre: torch.Tensor | None,
    rms_norm_weight: torch.Tensor | None,
    constants: tuple[float, ...],
    outputs: Tensors,
) -> torch.Tensor:
    """Write layer_input, h_pre_next, h_post and h_res; return projected."""
    layer_input, h_pre_next, *_ = outputs
    *constants_of_spec, eps = constants
    x, weight = flat(x, 2), contiguous(rms_norm_weight)
    arguments = (x, phi, alpha, bias, tuple(constants_of_spec), outputs[1:])
    if h_pre is None and weight is None:
        return write(*arguments, layer_input)
    projected = write(*arguments)
    launch.aggregate_norm(x, flat(h_pre_next if h_pre is None else h_pre, 1), weight, eps, out=flat(layer_input, 1))
    return projected


def _run(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    h_pre: torch.Tensor | None,
    rms_norm_weight: torch.Tensor | None,
    *constants: float,
) -> Tensors:
    layer_input = x.new_empty(*x.shape[:-2], x.shape[-1])
    h_pre_next, h_post, h_res = allocate(x)
    projected = _write(x, phi, alpha, bias, h_pre, rms_norm_weight, constants, (layer_input, h_pre_next, h_post, h_res))
    return layer_input, h_post, h_res, h_pre_next, projected


def _run_out(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    h_pre: torch.Tensor | None,
    rms_norm_weight: torch.Tensor | None,
    *constants: float,
    layer_input: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    h_pre_next: torch.Tensor | None = None,
) -> None:
    buffers = {"out[0] (layer_input)": layer_input, "out[1] (h_post)": h_post, "out[2] (h_res)": h_res}
    if h_pre_next is not None:
        buffers["out[3] (h_pre)"] = h_pre_next
    inputs = {"x": x, "phi": phi, "alpha": alpha, "bias": bias}
    if h_pre is not None:
        inputs["h_pre"] = h_pre
    if rms_norm_weight is not None:
        inputs["rms_norm_weight"] = rms_norm_weight
    check_buffers("pre", buffers, inputs, whole=tuple(buffers)[rms_norm_weight is None :])
    if h_pre_next is None:
        h_pre_next = phi.new_empty(x.shape[:-1])
    _write(x, phi, alpha, bias, h_pre, rms_norm_weight, constants, (layer_input, h_pre_next, h_post, h_res))


def _allocate_backward(
    g_layer_input: torch.Tensor | None,
    g_h_post: torch.Tensor | None,
    g_h_res: torch.Tensor | None,
    g_h_pre_next: torch.Tensor | None,
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    h_pre: torch.Tensor | None,
    rms_norm_weight: torch.Tensor | None,
    h_pre_next: torch.Tensor,
    projected: torch.Tensor,
    *constants_and_needs: float,
) -> Tensors:
    *_, needs_x, needs_phi, needs_h_pre, needs_weight = constants_and_needs
    g_h_pre = h_pre_next.new_empty(h_pre_next.shape) if needs_h_pre else absent(h_pre_next)
    g_weight = absent(alpha)
    if rms_norm_weight is not None and needs_weight:
        g_weight = rms_norm_weight.new_empty(rms_norm_weight.shape)
    return *allocate_gradients(x, phi, alpha, bias, bool(needs_x), bool(needs_phi)), g_h_pre, g_weight


def _run_backward(
    g_layer_input: torch.Tensor | None,
    g_h_post: torch.Tensor | None,
    g_h_res: torch.Tensor | None,
    g_h_pre_next: torch.Tensor | None,
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    h_pre: torch.Tensor | None,
    rms_norm_weight: torch.Tensor | None,
    h_pre_next: torch.Tensor,
    projected: torch.Tensor,
    *constants_and_needs: float,
) -> Tensors:
    """needs_h_pre is false in the ordinary form, and g_h_pre_next None; needs_weight is, without a norm."""
    *constants, eps, needs_x, needs_phi, needs_h_pre, needs_weight = constants_and_needs
    g_layer_input, g_h_pre_next = flat_or_none(g_layer_input, 1), flat_or_none(g_h_pre_next, 1)
    weights, g_weights, g_weight = flat(h_pre_next if h_pre is None else h_pre, 1), None, None
    if g_layer_input is not None and rms_norm_weight is not None:
        g_layer_input, g_weights, g_weight = launch.aggregate_norm_backward(
            g_layer_input, flat(x, 2), weights, rms_norm_weight.contiguous(), eps, needs_weight=bool(needs_weight)
        )
    elif g_layer_input is not None and (h_pre is None or needs_h_pre):
        g_weights = launch.aggregate_backward(g_layer_input, flat(x, 2))
    if h_pre is None:
        g_h_pre_next = g_weights
    g_projected, g_alpha, g_bias = launch.coefficients_backward(
        g_h_pre_next,
        flat_or_none(g_h_post, 1),
        flat_or_none(g_h_res, 2),
        projected.contiguous(),
        alpha.contiguous(),
        bias.contiguous(),
        spec_of(x.shape[-1], x.shape[-2], *constants),
    )
    aggregation = (None, None) if g_layer_input is None else (weights, g_layer_input)
    g_x, g_phi = project_backward(g_projected, x, phi, bool(needs_x), bool(needs_phi), *aggregation)
    g_h_pre = absent(h_pre_next)
    if needs_h_pre:
        shape = h_pre_next.shape
        g_h_pre = h_pre_next.new_zeros(shape) if g_weights is None else g_weights.view(shape)
    if g_weight is None:
        g_weight = torch.zeros_like(rms_norm_weight) if needs_weight else absent(alpha)  # type: ignore[arg-type]
    return g_x, g_phi, g_alpha, g_bias, g_h_pre, g_weight


pre = define(
    f"pre({INPUTS}, {FORM}) -> (Tensor layer_input, Tensor h_post, Tensor h_res, Tensor h_pre_next, Tensor projected)",
    _run,
    _allocate,
)
pre_out = define_out(
    f"pre_out({INPUTS}, {FORM}, *, Tensor(a!) layer_input, Tensor(b!) h_post, Tensor(c!) h_res, "
    "Tensor(d!)? h_pre_next=None) -> ()",
    _run_out,
)
pre_backward = define_backward(
    f"pre_backward(Tensor? g_layer_input, Tensor? g_h_post, Tensor? g_h_res, Tensor? g_h_pre_next, {INPUTS}, "
    f"Tensor h_pre_next, Tensor projected, {FORM}, bool needs_x, bool needs_phi, bool needs_h_pre, bool needs_weight) "
    f"-> ({', '.join(['Tensor'] * 6)})",
    _run_backward,
    _allocate_backward,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
    x, phi, alpha, bias, h_pre, rms_norm_weight, *ctx.constants = inputs
    h_pre_next, projected = output[3:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((h_pre_next, projected) if h_pre is None else (projected,)))
    ctx.save_for_backward(x, phi, alpha, bias, h_pre, rms_norm_weight, h_pre_next, projected)


def _backward(ctx: Any, *g_outputs: torch.Tensor | None) -> tuple:
    if all(g is None for g in g_outputs):
        return needed(ctx, ())
    needs_x, needs_phi, _, _, needs_h_pre, needs_weight = ctx.needs_input_grad[:6]
    needs = needs_x, needs_phi, needs_h_pre, needs_weight
    return needed(ctx, pre_backward(*g_outputs[:4], *ctx.saved_tensors, *ctx.constants, *needs))


differentiate(pre, _backward, _setup_context)
