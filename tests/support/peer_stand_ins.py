"""Stand-ins for other implementations, written from their documented formulas, so that none has to be installed.

`stand_ins()` declares each as `mhc_tilelang.perf.peers` declares the real one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mhc_tilelang.perf.peers import deepseek, huggingface, liger, lucidrains
from mhc_tilelang.perf.peers.peer import Peer

CPU = torch.device("cpu")


# DeepSeek's formulas, as TileKernels and transformers document them.


def comb_sinkhorn(logits: Tensor, repeat: int, eps: float) -> Tensor:
    """Rows first, columns last."""
    matrix = logits.softmax(-1) + eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(repeat - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


def comb_post(comb: Tensor, residual: Tensor, post: Tensor, layer: Tensor) -> Tensor:
    mixed = torch.einsum("tij,tic->tjc", comb, residual.float())
    return (mixed + post.unsqueeze(-1) * layer.float().unsqueeze(1)).to(residual.dtype)


def apply_mix(residual: Tensor, mix: Tensor) -> Tensor:
    return torch.einsum("ti,tic->tc", mix, residual.float()).to(residual.dtype)


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*leaves), leaves, upstream)


def is_tf32(tensor: Tensor) -> bool:
    return not bool((tensor.contiguous().view(torch.int32) & 0x1FFF).any())


class TileKernels:
    """Factories as in `tile_kernels.mhc`: same names, same parameters, tensors in the same order."""

    def __call__(self, _module: str, factory: str, *parameters: Any) -> Callable[..., Any]:
        return lambda *tensors: getattr(self, factory)(parameters, *tensors)

    def expand_to_mhc_fwd_tl(self, parameters: Any, h: Tensor, x: Tensor) -> None:
        assert parameters == (x.shape[-1], x.shape[-2])
        x.copy_(h.unsqueeze(1).expand_as(x))

    def expand_to_mhc_bwd_tl(self, _: Any, g_x: Tensor, g_h: Tensor) -> None:
        g_h.copy_(g_x.float().sum(1))

    def _mhc_pre_norm_fn_fwd_mul(self, parameters: Any, x: Tensor, fn: Tensor, out: Tensor, squares: Tensor) -> None:
        assert parameters == (24, 1, x.shape[1])
        assert is_tf32(fn)
        out.copy_((x.float() @ fn.T).unsqueeze(1))
        squares.copy_(x.float().square().sum(-1, keepdim=True))

    def _mhc_pre_norm_fn_bwd_mul(
        self, _: Any, g_mul: Tensor, g_squares: Tensor, x: Tensor, fn: Tensor, g_x: Tensor, g_fn: Tensor
    ) -> None:
        assert is_tf32(fn)
        assert is_tf32(g_mul)
        g_x.copy_(g_x + g_mul[:, 0] @ fn + 2 * x.float() * g_squares)
        g_fn.copy_(g_mul[:, 0].T @ x.float())

    def _mhc_pre_norm_fn_fwd_norm(
        self, parameters: Any, dots: Tensor, squares: Tensor, kept: Tensor, kept_squares: Tensor, out: Tensor
    ) -> None:
        _, groups, size, eps, splits = parameters
        assert (groups, splits) == (1, 1)
        out.copy_(dots[0, :, 0] * torch.rsqrt(squares[0] / size + eps))
        kept.copy_(dots[0])
        kept_squares.copy_(squares[0])

    def _mhc_pre_split_mixes_fwd(
        self, parameters: Any, mixes: Tensor, scale: Tensor, base: Tensor, pre: Tensor, post: Tensor, comb: Tensor
    ) -> None:
        n, multiplier, eps, _ = parameters
        pre.copy_(torch.sigmoid(mixes[:, :n] * scale[0] + base[:n]) + eps)
        post.copy_(torch.sigmoid(mixes[:, n : 2 * n] * scale[1] + base[n : 2 * n]) * multiplier)
        comb.copy_(mixes[:, 2 * n :] * scale[2] + base[2 * n :])

    def _mhc_sinkhorn_fwd(self, parameters: Any, logits: Tensor, out: Tensor) -> None:
        out.copy_(comb_sinkhorn(logits, *parameters[2:]))

    def _mhc_sinkhorn_bwd(self, parameters: Any, gradient: Tensor, logits: Tensor, out: Tensor) -> None:
        out.copy_(gradients(lambda z: comb_sinkhorn(z, *parameters[2:]), (logits,), gradient)[0])

    def _mhc_pre_apply_mix_fwd(self, _: Any, x: Tensor, mix: Tensor, out: Tensor) -> None:
        out.copy_(apply_mix(x, mix))

    def _mhc_pre_big_fuse(
        self, parameters: Any, dots: Tensor, squares: Tensor, scale: Tensor, base: Tensor, residual: Tensor,
        post: Tensor, comb: Tensor, layer_input: Tensor,
    ) -> None:  # fmt: skip
        size, rms_eps, pre_eps, sinkhorn_eps, multiplier, repeat, splits, n = parameters
        assert splits == 1
        mixes, pre, logits = torch.empty_like(dots[0]), torch.empty_like(post), torch.empty_like(comb)
        norm = (None, 1, n * size, rms_eps, 1)
        self._mhc_pre_norm_fn_fwd_norm(norm, dots.unsqueeze(2), squares.unsqueeze(2), dots[0].clone().unsqueeze(1),
                                       squares[0].clone().unsqueeze(1), mixes)  # fmt: skip
        self._mhc_pre_split_mixes_fwd((n, multiplier, pre_eps, 32), mixes, scale, base, pre, post, logits)
        comb.copy_(comb_sinkhorn(logits.view(-1, n, n), repeat, sinkhorn_eps).flatten(1))
        layer_input.copy_(apply_mix(residual, pre))

    def _mhc_post_fwd(self, _: Any, comb: Tensor, x: Tensor, post: Tensor, layer: Tensor, out: Tensor) -> None:
        out.copy_(comb_post(comb, x, post, layer))

    def _mhc_post_bwd(
        self, _: Any, g: Tensor, comb: Tensor, x: Tensor, post: Tensor, layer: Tensor
    ) -> tuple[Tensor, ...]:
        return gradients(comb_post, (comb, x, post, layer), g)


class Function:
    """An autograd function, as far as it is called here."""

    def __init__(self, apply: Callable[..., Any]) -> None:
        self.apply = apply


def liger_ops() -> SimpleNamespace:
    """`liger_kernel.ops.mhc`: phi [K, M], h_res [out, in], rows of the logits first."""

    def mm_norm(x: Tensor, phi: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        assert phi.is_contiguous()
        s = torch.rsqrt(x.float().square().mean(-1) + eps)
        return x.float() @ phi * s.unsqueeze(-1), s

    def split(
        mix: Tensor, b: Tensor, alpha_pre: Tensor, alpha_post: Tensor, alpha_res: Tensor, *, tmax: int, pre_eps: float,
        sinkhorn_eps: float, post_mult: float, return_hist: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        n = int((1 + mix.shape[1]) ** 0.5) - 1
        pre = torch.sigmoid(mix[:, :n] * alpha_pre + b[:n]) + pre_eps
        post = torch.sigmoid(mix[:, n : 2 * n] * alpha_post + b[n : 2 * n]) * post_mult
        logits = (mix[:, 2 * n :] * alpha_res + b[2 * n :]).view(-1, n, n)
        res = comb_sinkhorn(logits, tmax, sinkhorn_eps)
        return (pre, post, res, logits) if return_hist else (pre, post, res)

    def sinkhorn_bwd(
        mix: Tensor, _b: Tensor, _alpha: Tensor, g: Tensor, *, tmax: int, sinkhorn_eps: float, hist: Tensor
    ) -> Tensor:
        logits = mix[:, -g[0].numel() :].view_as(g)
        assert torch.equal(logits, hist)
        return gradients(lambda z: comb_sinkhorn(z, tmax, sinkhorn_eps), (logits,), g)[0]

    def coefficients(x: Tensor, phi: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *alphas, allow_fp32, tmax, rms_eps, pre_eps, sinkhorn_eps, post_mult = rest
        assert allow_fp32 is True
        mix, _ = mm_norm(x.flatten(1), phi, rms_eps)
        constants = {"tmax": tmax, "pre_eps": pre_eps, "sinkhorn_eps": sinkhorn_eps, "post_mult": post_mult}
        return split(mix, b, *alphas, **constants)

    return SimpleNamespace(
        mhc_mm_norm_fwd=mm_norm,
        mhc_split_sinkhorn_fwd=split,
        mhc_sinkhorn_bwd=sinkhorn_bwd,
        LigerMHCCoeffsFunction=Function(coefficients),
        LigerMHCPreFunction=Function(apply_mix),
        LigerMHCPostResFunction=Function(lambda x, layer, post, res: comb_post(res.mT, x, post, layer)),
    )


class Connection(torch.nn.Module):
    """transformers' `DeepseekV4HyperConnection`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        n, self.config = config.hc_mult, config
        self.fn = torch.nn.Parameter(torch.empty(n * n + 2 * n, n * config.hidden_size))
        self.base = torch.nn.Parameter(torch.empty(n * n + 2 * n))
        self.scale = torch.nn.Parameter(torch.empty(3))

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config, n = self.config, self.config.hc_mult
        flat = streams.flatten(2).float()
        w = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + config.rms_norm_eps) @ self.fn.T
        pre = torch.sigmoid(w[..., :n] * self.scale[0] + self.base[:n]) + config.hc_eps
        post = 2 * torch.sigmoid(w[..., n : 2 * n] * self.scale[1] + self.base[n : 2 * n])
        logits = (w[..., 2 * n :] * self.scale[2] + self.base[2 * n :]).unflatten(-1, (n, n))
        comb = comb_sinkhorn(logits, config.hc_sinkhorn_iters, config.hc_eps)
        return post, comb, (pre.unsqueeze(-1) * streams).sum(2).to(streams.dtype)


def sinkhorn_knopps(log_alpha: Tensor, iters: int = 20) -> Tensor:
    """lucidrains': no eps, its second to last axis first."""
    alpha = (log_alpha - log_alpha.amax(-2, keepdim=True)).exp()
    for _ in range(iters):
        alpha = torch.nn.functional.normalize(alpha, p=1, dim=-2)
        alpha = torch.nn.functional.normalize(alpha, p=1, dim=-1)
    return alpha


def stand_ins() -> dict[str, Peer]:
    return {
        "tile-kernels": deepseek.declare(TileKernels()),
        "liger-kernel": liger.declare(liger_ops()),
        "hyper-connections": lucidrains.declare(sinkhorn_knopps),
        "transformers": huggingface.declare(Connection, CPU),
    }
