"""Calls of TileKernels' kernels, one function of ours after the other; `deepseek` declares them.

The launches, block sizes and roundings are those of the package's own operators (`tile_kernels.modeling.mhc.ops`).
`kernels(module, factory, *parameters)` makes a kernel, which takes its tensors in order. Each function raises
UnsupportedError for sizes or dtypes that the kernels do not take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...convert import comb, swapped_rows
from .peer import Call, Inputs, Outputs, copy_to, require

Kernels = Callable[..., Callable[..., Any]]
TF32_MASK = ~0x1FFF  # of the 13 bits that tensor cores ignore


def stream_sizes(x: torch.Tensor) -> tuple[int, int, int]:
    """T, n, C; of a stream that the kernels take."""
    require(x.dtype == torch.bfloat16, f"a bfloat16 stream, got {str(x.dtype).removeprefix('torch.')}")
    tokens, n, size = x.shape
    return tokens, n, size


def require_product(x: torch.Tensor, multiple: int, block: int) -> None:
    """Require shapes the product supports: 24 rows, widths of whole tiles, on a CPU whole blocks of tokens."""
    tokens, n, size = stream_sizes(x)
    require(n == 4, f"n = 4, got {n}")
    require(n * size % multiple == 0, f"n·C a multiple of {multiple}, got {n * size}")
    require(x.is_cuda or tokens % block == 0, f"tokens in multiples of {block} on a CPU, got {tokens}")


def to_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Round to TF32 as its operators do before a product: tensor cores drop the other bits, a CPU masks them here."""
    rounded = tensor.view(torch.int32) + 0x1000
    return (rounded if tensor.is_cuda else rounded & TF32_MASK).view(torch.float32)


def expand(kernels: Kernels, inputs: Inputs, outputs: Outputs) -> Call:
    """h -> x."""
    _, n, size = stream_sizes(outputs["x"])
    kernel = kernels("expand_kernel", "expand_to_mhc_fwd_tl", size, n)
    return Call(lambda: kernel(inputs["h"], outputs["x"]))


def expand_backward(kernels: Kernels, inputs: Inputs, outputs: Outputs) -> Call:
    """g_x -> g_h."""
    _, n, size = stream_sizes(inputs["g_x"])
    kernel = kernels("expand_kernel", "expand_to_mhc_bwd_tl", size, n)
    return Call(lambda: kernel(inputs["g_x"], outputs["g_h"]))


def project(kernels: Kernels, inputs: Inputs, outputs: Outputs) -> Call:
    """x, phi -> dots [T, 1, M], squares [T, 1]; phi is rounded at every call, as in its operator."""
    x, phi = inputs["x"], inputs["phi"]
    require_product(x, 256, 32)
    kernel = kernels("norm_fn_kernel", "_mhc_pre_norm_fn_fwd_mul", phi.shape[0], 1, phi.shape[1])
    flat, dots, squares = x.flatten(1), outputs["dots"].unsqueeze(1), outputs["squares"].unsqueeze(1)
    return Call(lambda: kernel(flat, to_tf32(phi), dots, squares))


def project_backward(kernels: Kernels, inputs: Inputs, outputs: Outputs) -> Call:
    """g_dots, ρ/2, x, phi -> g_x, g_phi."""
    x, phi, g_projected = inputs["x"], inputs["phi"], inputs["g_projected"]
    require_product(x, 128, 128)
    kernel = kernels("norm_fn_kernel", "_mhc_pre_norm_fn_bwd_mul", phi.shape[0], 1, phi.shape[1])
    g_dots, g_squares = g_projected[:-1].T.contiguous().unsqueeze(1), (g_projected[-1] / 2).unsqueeze(1)
    flat, fn, g_x = x.flatten(1), to_tf32(phi), outputs["g_x"].flatten(1)

    def run() -> None:
        g_x.zero_()
        kernel(to_tf32(g_dots), g_squares, flat, fn, g_x, outputs["g_phi"])

    return Call(run)


def coefficients(kernels: Kernels, inputs: Inputs, outputs: Outputs) -> Call:
    """dots [M, T], squares -> three kernels, as in its operators: norm, gates, Sinkhorn."""
    spec, alpha = inputs["spec"], inputs["alpha"]
    n, rows, tokens = spec.num_streams, spec.num_coefficients, inputs["squares"].shape[0]
    dots = swapped_rows(inputs["dots"], n).T.contiguous().view(1, tokens, 1, rows)
    squares, base = inputs["squares"].view(1, tokens, 1), swapped_rows(inputs["bias"], n)
    norm = kernels("norm_fn_kernel", "_mhc_pre_norm_fn_fwd_norm", rows, 1, spec.stream_size, spec.rms_eps, 1)
    split = kernels("pre_split_mixes_kernel", "_mhc_pre_split_mixes_fwd", n, spec.post_scale, spec.pre_eps, 32)
    normalize = kernels("sinkhorn_kernel", "_mhc_sinkhorn_fwd", n, 1, spec.sinkhorn_iters, spec.sinkhorn_eps)
    kept_dots, kept_squares = torch.empty_like(dots[0]), torch.empty_like(squares[0])
    mixes, logits, matrices = dots.new_empty(tokens, rows), dots.new_empty(tokens, n * n), dots.new_empty(tokens, n, n)

    def run() -> torch.Tensor:
        norm(dots, squares, kept_dots, kept_squares, mixes)
        split(mixes, alpha, base, outputs["h_pre"], outputs["h_post"], logits)
        normalize(logits.view(tokens, n, n), matrices)
        return matrices.mT

    return Call(run, copy_to(outputs, "h_res"))


def sinkhorn(kernels: Kernels, inputs: Inputs, outputs: Outputs) -> Call:
    """Logits -> h_res, both transposed; one token a block, as in its operator."""
    logits = comb(inputs["logits"])
    kernel = kernels("sinkhorn_kernel", "_mhc_sinkhorn_fwd", logits.shape[-1], 1, inputs["iters"], inputs["eps"])
    matrices = torch.empty_like(logits)

    def run() -> torch.Tensor:
        kernel(logits, matrices)
        return matrices.mT

    return Call(run, copy_to(outputs, "h_res"))


def sinkhorn_backward(kernels: Kernels, inputs: Inputs, outputs: Outputs) -> Call:
    """g_h_res, logits -> g_logits, all transposed."""
    gradient, logits = comb(inputs["g_h_res"]), comb(inputs["logits"])
    kernel = kernels("sinkhorn_kernel", "_mhc_sinkhorn_bwd", logits.shape[-1], 32, inputs["iters"], inputs["eps"])
    g_logits = torch.empty_like(logits)

    def run() -> torch.Tensor:
        kernel(gradient, logits, g_logits)
        return g_logits.mT

    return Call(run, copy_to(outputs, "g_logits"))


def pre(kernels: Kernels, inputs: Inputs, outputs: Outputs) -> Call:
    """x, h_pre -> layer_input."""
    x, h_pre = inputs["x"], inputs["h_pre"]
    _, n, size = stream_sizes(x)
    kernel = kernels("pre_apply_mix_kernel", "_mhc_pre_apply_mix_fwd", n, size)
    return Call(lambda: kernel(x, h_pre, outputs["layer_input"]))


def sublayer_input(kernels: Kernels, inputs: Inputs, outputs: Outputs) -> Call:
    """x, phi, alpha, bias -> layer_input, h_post, comb: the product, then all else in one kernel."""
    x, spec, alpha = inputs["x"], inputs["spec"], inputs["alpha"]
    require_product(x, 256, 32)
    tokens, n, size = stream_sizes(x)
    rows, flat = spec.num_coefficients, x.flatten(1)
    phi, base = swapped_rows(inputs["phi"], n), swapped_rows(inputs["bias"], n)
    product = kernels("norm_fn_kernel", "_mhc_pre_norm_fn_fwd_mul", rows, 1, spec.stream_size)
    epsilons = (spec.rms_eps, spec.pre_eps, spec.sinkhorn_eps)
    constants = (*epsilons, spec.post_scale, spec.sinkhorn_iters, 1, n)
    rest = kernels("pre_big_fuse_kernel", "_mhc_pre_big_fuse", size, *constants)
    dots, squares, matrices = phi.new_empty(1, tokens, rows), phi.new_empty(1, tokens), phi.new_empty(tokens, n * n)

    def run() -> torch.Tensor:
        product(flat, to_tf32(phi), dots.view(tokens, 1, rows), squares.view(tokens, 1))
        rest(dots, squares, alpha, base, x, outputs["h_post"], matrices, outputs["layer_input"])
        return matrices.view(tokens, n, n).mT

    return Call(run, copy_to(outputs, "h_res"))


def post(kernels: Kernels, inputs: Inputs, outputs: Outputs) -> Call:
    """x, layer_output, h_post, comb -> x_next."""
    x, layer_output, h_post, matrices = inputs["x"], inputs["layer_output"], inputs["h_post"], comb(inputs["h_res"])
    _, n, size = stream_sizes(x)
    kernel = kernels("post_kernel", "_mhc_post_fwd", n, size)
    return Call(lambda: kernel(matrices, x, h_post, layer_output, outputs["x_next"]))


def post_pre(kernels: Kernels, inputs: Inputs, outputs: Outputs) -> Call:
    """post, then all that precedes the next layer: three kernels."""
    mixed = post(kernels, inputs, outputs)
    names = {"layer_input": "layer_input", "h_post": "h_post_next", "h_res": "h_res_next"}
    results = {name: outputs[ours] for name, ours in names.items()}
    following = sublayer_input(kernels, {**inputs, "x": outputs["x_next"]}, results)

    def run() -> torch.Tensor:
        mixed.run()
        return following.run()

    return Call(run, following.convert)


def post_backward(kernels: Kernels, inputs: Inputs, outputs: Outputs) -> Call:
    """g_x_next, x, layer_output, h_post, comb -> g_comb, g_x, g_h_post, g_layer_output, which it allocates."""
    x, layer_output, h_post, matrices = inputs["x"], inputs["layer_output"], inputs["h_post"], comb(inputs["h_res"])
    _, n, size = stream_sizes(x)
    require(n == 4, f"n = 4, got {n}")
    kernel = kernels("post_kernel", "_mhc_post_bwd", n, size)

    def run() -> tuple[torch.Tensor, ...]:
        g_comb, *others = kernel(inputs["g_x_next"], matrices, x, h_post, layer_output)
        return (g_comb.mT, *others)

    return Call(run, copy_to(outputs, "g_h_res", "g_x", "g_h_post", "g_layer_output"))
