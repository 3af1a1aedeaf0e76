"""expand_pre: the boundary before the first sublayer as one operator, expand and then pre.

h [..., C], phi [M, K], alpha [3], bias [M]
-> x [..., n, C], layer_input [..., C], h_post [..., n], h_res [..., n, n], and for the backward h_pre [..., n] and
`projected` [M + 1, T]. phi says how many streams there are.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from .. import launch
from ..spec import MHCSpec
from .boundary import unflat
from .coefficients import CONSTANTS, Tensors, allocate, allocate_gradients
from .expand import collapse
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

INPUTS = "Tensor h, Tensor phi, Tensor alpha, Tensor bias"


def _spec(h: torch.Tensor, phi: torch.Tensor, constants: tuple[float, ...]) -> MHCSpec:
    return spec_of(h.shape[-1], phi.shape[1] // h.shape[-1], *constants)


def _allocate_results(h: torch.Tensor, phi: torch.Tensor) -> Tensors:
    """x, layer_input, h_post, h_res and h_pre."""
    *leading, hidden_size = h.shape
    x = h.new_empty(*leading, phi.shape[1] // hidden_size, hidden_size)
    h_pre, h_post, h_res = allocate(x)
    return x, h.new_empty(h.shape), h_post, h_res, h_pre


def _allocate(h: torch.Tensor, phi: torch.Tensor, *_: Any) -> Tensors:
    projected = h.new_empty(phi.shape[0] + 1, prod(h.shape[:-1]), dtype=torch.float32)
    return *_allocate_results(h, phi), projected


def _write(
    h: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    constants: tuple[float, ...],
    results: Tensors,
) -> torch.Tensor:
    """Write x, layer_input, h_post, h_res and h_pre; return projected."""
    out = tuple(flat(result, trailing) for result, trailing in zip(results, (2, 1, 1, 2, 1), strict=True))
    parameters = (phi.contiguous(), alpha.contiguous(), bias.contiguous())
    return launch.expand_pre(flat(h, 1), *parameters, _spec(h, phi, constants), out=out).projected


def _run(h: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, *constants: float) -> Tensors:
    results = _allocate_results(h, phi)
    return *results, _write(h, phi, alpha, bias, constants, results)


def _run_out(
    h: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    *constants: float,
    x: torch.Tensor,
    layer_input: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
) -> None:
    results = {"x": x, "layer_input": layer_input, "h_post": h_post, "h_res": h_res}
    buffers = {f"out[{k}] ({name})": buffer for k, (name, buffer) in enumerate(results.items())}
    whole = (*tuple(buffers)[:1], *tuple(buffers)[2:])
    check_buffers("expand_pre", buffers, {"h": h, "phi": phi, "alpha": alpha, "bias": bias}, whole=whole)
    h_pre = h_post.new_empty(h_post.shape)
    _write(h, phi, alpha, bias, constants, (*results.values(), h_pre))


def _allocate_backward(*arguments: Any) -> Tensors:
    h, phi, alpha, bias = arguments[4:8]
    *_, needs_h, needs_phi = arguments
    return allocate_gradients(h, phi, alpha, bias, bool(needs_h), bool(needs_phi))


def _run_backward(*arguments: Any) -> Tensors:
    *constants, needs_h, needs_phi = arguments[10:]
    h, phi, alpha, bias, h_pre, projected = arguments[4:10]
    g_x, g_layer_input, g_h_post, g_h_res = (
        flat_or_none(g, trailing) for g, trailing in zip(arguments[:4], (2, 1, 1, 2), strict=True)
    )
    g_h, g_phi, g_alpha, g_bias = launch.expand_pre_backward(
        g_x,
        g_layer_input,
        g_h_post,
        g_h_res,
        flat(h, 1),
        phi.contiguous(),
        alpha.contiguous(),
        bias.contiguous(),
        flat(h_pre, 1),
        projected.contiguous(),
        _spec(h, phi, tuple(constants)),
        needs_h=bool(needs_h),
        needs_phi=bool(needs_phi),
    )
    of_h = absent(h) if g_h is None else unflat(g_h, h.shape)
    of_phi = absent(phi) if g_phi is None else unflat(g_phi, phi.shape)
    return of_h, of_phi, g_alpha, g_bias


expand_pre = define(
    f"expand_pre({INPUTS}, {CONSTANTS}) -> "
    "(Tensor x, Tensor layer_input, Tensor h_post, Tensor h_res, Tensor h_pre, Tensor projected)",
    _run,
    _allocate,
)
expand_pre_out = define_out(
    f"expand_pre_out({INPUTS}, {CONSTANTS}, *, "
    "Tensor(a!) x, Tensor(b!) layer_input, Tensor(c!) h_post, Tensor(d!) h_res) -> ()",
    _run_out,
)
expand_pre_backward = define_backward(
    f"expand_pre_backward(Tensor? g_x, Tensor? g_layer_input, Tensor? g_h_post, Tensor? g_h_res, {INPUTS}, "
    f"Tensor h_pre, Tensor projected, {CONSTANTS}, bool needs_h, bool needs_phi) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _allocate_backward,
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
    h, phi, alpha, bias, *ctx.constants = inputs
    h_pre, projected = output[4:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(h_pre, projected)
    ctx.save_for_backward(h, phi, alpha, bias, h_pre, projected)


def _backward(ctx: Any, *g_outputs: torch.Tensor | None) -> tuple:
    g_x, *of_pre = g_outputs[:4]
    if all(g is None for g in of_pre):  # at most x was used: phi, alpha and bias have no gradient
        return needed(ctx, () if g_x is None else (collapse(g_x),))
    needs_h, needs_phi = ctx.needs_input_grad[:2]
    gradients = expand_pre_backward(g_x, *of_pre, *ctx.saved_tensors, *ctx.constants, needs_h, needs_phi)
    return needed(ctx, gradients)


differentiate(expand_pre, _backward, _setup_context)
