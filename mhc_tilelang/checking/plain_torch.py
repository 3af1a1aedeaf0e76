"""The kernels' functions in plain torch, float32 inside: what one would write without kernels.

Their error against float64 stands beside the kernels', so that a reader sees what the arithmetic costs
anyone. Arguments as in `mhc_tilelang.ops`, flat; one rounding at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..spec import MHCSpec


def expand(h: torch.Tensor, num_streams: int) -> torch.Tensor:
    """h [T, C] -> [T, n, C]."""
    return h.unsqueeze(1).expand(-1, num_streams, -1).contiguous()


def project(x: torch.Tensor, phi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, n, C], phi [M, K] -> x·phi [T, M], Σx² [T]."""
    flat = x.flatten(1).float()
    return flat @ phi.T, flat.square().sum(-1)


def sinkhorn(logits: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    """logits [T, n, n] -> h_res [T, n, n]."""
    if eps:
        matrix = torch.softmax(logits, -2) + eps
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
    else:
        matrix = torch.softmax(torch.log_softmax(logits, -2), -1)
    for _ in range(iters - 1):
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
    return matrix


def coefficients(
    x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, spec: MHCSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, n, C], phi [M, K], alpha [3], bias [M] -> h_pre [T, n], h_post [T, n], h_res [T, n, n]."""
    n = spec.num_streams
    dots, squares = project(x, phi)
    scaled = dots * torch.rsqrt(squares / spec.stream_size + spec.rms_eps).unsqueeze(-1)
    z = scaled * alpha.repeat_interleave(torch.tensor([n, n, n * n], device=alpha.device)) + bias
    h_pre = torch.sigmoid(z[:, :n]) + spec.pre_eps
    h_post = spec.post_scale * torch.sigmoid(z[:, n : 2 * n])
    return h_pre, h_post, sinkhorn(z[:, 2 * n :].view(-1, n, n), spec.sinkhorn_iters, spec.sinkhorn_eps)


def aggregate(x: torch.Tensor, h_pre: torch.Tensor) -> torch.Tensor:
    """x [T, n, C], h_pre [T, n] -> [T, C]."""
    return (h_pre.unsqueeze(-1) * x.float()).sum(1).to(x.dtype)


def rms_norm(u: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """u [T, C] float32, weight [C] -> its RMSNorm [T, C], float32."""
    return u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps) * weight.float()


def aggregate_normed(x: torch.Tensor, h_pre: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, n, C], h_pre [T, n], weight [C] -> the aggregate's RMSNorm [T, C], rounded once."""
    return aggregate_normed32(x, h_pre, weight, eps).to(x.dtype)


def aggregate_normed32(x: torch.Tensor, h_pre: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute the aggregate's RMSNorm, in float32."""
    return rms_norm((h_pre.unsqueeze(-1) * x.float()).sum(1), weight, eps)


def quantize(y: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """y [T, C] float32 -> its e4m3 numbers [T, C], in float32, and their scales [T, ⌈C / 128⌉]."""
    groups = -(-y.shape[-1] // 128)
    padded = torch.nn.functional.pad(y, (0, groups * 128 - y.shape[-1])).unflatten(-1, (groups, 128))
    scales = padded.abs().amax(-1).clamp(1e-4) / 448
    if power_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    values = (padded / scales.unsqueeze(-1)).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return values.flatten(-2)[:, : y.shape[-1]], scales


def pre(
    x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, spec: MHCSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return layer_input [T, C], h_post and h_res: `coefficients`, then the aggregation."""
    h_pre, h_post, h_res = coefficients(x, phi, alpha, bias, spec)
    return aggregate(x, h_pre), h_post, h_res


def post(x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor) -> torch.Tensor:
    """x [T, n, C], layer_output [T, C], h_post [T, n], h_res [T, n, n] -> x_next [T, n, C]."""
    mixed = (h_res.unsqueeze(-1) * x.float().unsqueeze(1)).sum(2)
    return (mixed + h_post.unsqueeze(-1) * layer_output.float().unsqueeze(1)).to(x.dtype)


def head(x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, spec: MHCSpec) -> torch.Tensor:
    """x [T, n, C], phi [n, K], alpha [1], bias [n] -> [T, C]."""
    dots, squares = project(x, phi)
    scaled = dots * torch.rsqrt(squares / spec.stream_size + spec.rms_eps).unsqueeze(-1)
    return aggregate(x, torch.sigmoid(alpha * scaled + bias) + spec.pre_eps)


def by_autograd(
    function: Callable[..., torch.Tensor], gradient: torch.Tensor, *arguments: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The gradients of a function by all its arguments, for one of its output, from torch's own autograd."""
    leaves = [argument.detach().clone().requires_grad_() for argument in arguments]
    with torch.enable_grad():
        return torch.autograd.grad(function(*leaves), leaves, gradient)
