"""Liger-Kernel (`liger-kernel`): Triton kernels, on a GPU.

Its h_res is the paper's, [out, in], but its Sinkhorn takes rows first and columns last: on transposed logits, and
transposed back, that is ours. phi is [n·C, M]. Products of a float32 phi go through `tl.dot`, which truncates to
TF32. The forward kernels write float32, which its operators cast afterwards; both are timed. The token count is a
compile-time constant there: the untimed first call compiles.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch

from ...convert import comb, swapped_rows
from ..calls.cases import SUBLAYER_INPUT
from .peer import Call, Function, Inputs, Outputs, Peer, copy_to, recorded_backward, require

RMS_EPS = 1e-6  # of the projection, whose Σx² it returns as the norm: taken out again


def load(device: torch.device) -> Peer:
    """Import its Triton kernels."""
    require(device.type == "cuda", "a GPU: its kernels are Triton's")
    return declare(import_module("liger_kernel.ops.mhc"))


def declare(ops: Any) -> Peer:
    """Return the functions, over the module `liger_kernel.ops.mhc`."""
    # TF32 has 11 bits; cut off, not rounded, an element of phi is off by 2^-10 at most and 2^-11 in the mean, which a
    # result that is rounded to bfloat16 makes √(2^-11 · 2^-8) of.
    tf32: dict[str, Any] = {"allowed": 3e-3, "because": "its product takes phi in TF32"}
    return Peer(
        {
            "project": Function("mhc_mm_norm_fwd", partial(project, ops), **tf32),
            "coefficients": Function("mhc_split_sinkhorn_fwd", partial(coefficients, ops)),
            "aggregate": Function("liger_mhc_pre", partial(pre, ops)),
            SUBLAYER_INPUT: Function("liger_mhc_coeffs, liger_mhc_pre", partial(sublayer_input, ops), **tf32),
            "post": Function("liger_mhc_post_res", partial(post, ops)),
            "sinkhorn_backward": Function("mhc_sinkhorn_bwd", partial(sinkhorn_backward, ops)),
            "post_backward": Function("liger_mhc_post_res, backward", partial(post_backward, ops)),
        },
        left_out={
            "sinkhorn": "in one kernel with the gates",
            "coefficients_backward": "not apart from the backward of its projection",
            "project_backward": "goes through the norm, which here belongs to the coefficients",
            "aggregate_backward": "its kernel computes g_x too, which is another amount of work",
        },
    )


def project(ops: Any, inputs: Inputs, outputs: Outputs) -> Call:
    """x, phi -> m·s [T, M], s [T]."""
    flat, phi = inputs["x"].flatten(1), inputs["phi"].T.contiguous()

    def convert(results: tuple[torch.Tensor, torch.Tensor]) -> None:
        mixes, s = results
        outputs["dots"].copy_(mixes / s.unsqueeze(-1))
        outputs["squares"].copy_((s.double() ** -2 - RMS_EPS) * flat.shape[1])

    return Call(lambda: ops.mhc_mm_norm_fwd(flat, phi, RMS_EPS), convert)


def coefficients(ops: Any, inputs: Inputs, outputs: Outputs) -> Call:
    """m·s [T, M] -> h_pre, h_post, h_res: the norm is its projection's."""
    spec = inputs["spec"]
    n = spec.num_streams
    s = torch.rsqrt(inputs["squares"] / spec.stream_size + spec.rms_eps)
    mixes = swapped_rows(inputs["dots"] * s, n).T.contiguous()
    bias, alpha = swapped_rows(inputs["bias"], n), inputs["alpha"].unbind()
    constants = {"tmax": spec.sinkhorn_iters, "sinkhorn_eps": spec.sinkhorn_eps}
    constants |= {"pre_eps": spec.pre_eps, "post_mult": spec.post_scale}

    def run() -> tuple[torch.Tensor, ...]:
        h_pre, h_post, transposed = ops.mhc_split_sinkhorn_fwd(mixes, bias, *alpha, **constants)
        return h_pre, h_post, transposed.mT

    return Call(run, copy_to(outputs, "h_pre", "h_post", "h_res"))


def sinkhorn_backward(ops: Any, inputs: Inputs, outputs: Outputs) -> Call:
    """g_h_res, logits -> g_logits, from the iterates that its forward stored."""
    gradient, logits = comb(inputs["g_h_res"]), comb(inputs["logits"])
    tokens, n, _ = logits.shape
    mixes = torch.cat((logits.new_zeros(tokens, 2 * n), logits.flatten(1)), 1)
    bias, one = logits.new_zeros(mixes.shape[1]), logits.new_ones(())
    constants = {"tmax": inputs["iters"], "sinkhorn_eps": inputs["eps"]}
    *_, iterates = ops.mhc_split_sinkhorn_fwd(
        mixes, bias, one, one, one, pre_eps=0.0, post_mult=2.0, return_hist=True, **constants
    )

    def run() -> torch.Tensor:
        transposed: torch.Tensor = ops.mhc_sinkhorn_bwd(mixes, bias, one, gradient, hist=iterates, **constants)
        return transposed.mT

    return Call(run, copy_to(outputs, "g_logits"))


def pre(ops: Any, inputs: Inputs, outputs: Outputs) -> Call:
    """x, h_pre -> layer_input."""
    x, h_pre = inputs["x"], inputs["h_pre"]
    return Call(lambda: ops.LigerMHCPreFunction.apply(x, h_pre), copy_to(outputs, "layer_input"))


def sublayer_input(ops: Any, inputs: Inputs, outputs: Outputs) -> Call:
    """x, phi, alpha, bias -> layer_input, h_post, h_res."""
    x, spec = inputs["x"], inputs["spec"]
    n = spec.num_streams
    phi, bias = swapped_rows(inputs["phi"], n).T.contiguous(), swapped_rows(inputs["bias"], n)
    epsilons = (spec.rms_eps, spec.pre_eps, spec.sinkhorn_eps)
    constants = (True, spec.sinkhorn_iters, *epsilons, spec.post_scale)  # allow_fp32 comes first
    parameters = (phi, bias, *inputs["alpha"].unbind())

    def run() -> tuple[torch.Tensor, ...]:
        h_pre, h_post, transposed = ops.LigerMHCCoeffsFunction.apply(x, *parameters, *constants)
        return ops.LigerMHCPreFunction.apply(x, h_pre), h_post, transposed.mT

    return Call(run, copy_to(outputs, "layer_input", "h_post", "h_res"))


def post(ops: Any, inputs: Inputs, outputs: Outputs) -> Call:
    """x, layer_output, h_post, h_res -> x_next."""
    tensors = stream_tensors(inputs)
    return Call(lambda: ops.LigerMHCPostResFunction.apply(*tensors), copy_to(outputs, "x_next"))


def post_backward(ops: Any, inputs: Inputs, outputs: Outputs) -> Call:
    """Return the call of its autograd function's backward on g_x_next."""
    backward = recorded_backward(ops.LigerMHCPostResFunction.apply, stream_tensors(inputs), inputs["g_x_next"])
    return Call(backward, copy_to(outputs, "g_x", "g_layer_output", "g_h_post", "g_h_res"))


def stream_tensors(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """x, layer_output, h_post, h_res, in its order, which is ours."""
    return inputs["x"], inputs["layer_output"], inputs["h_post"], inputs["h_res"]
