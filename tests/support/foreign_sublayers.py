"""Other frameworks' sublayers in float64 torch, from their sources' formulas, so that none has to be installed.

Each takes its own state dict, a stream x [T, n, C] (ours: outermost, converted inside to its own layout and back) and
a layer's output [T, C], and returns the layer's input [T, C] and the next stream [T, n, C].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Sublayer = Callable[[State, Tensor, Tensor], tuple[Tensor, Tensor]]


def sinkhorn(logits: Tensor, axes: tuple[int, int], eps: float, iters: int = 20) -> Tensor:
    """exp, then `iters` times a division by the sums over axes[0], then axes[1]; eps as DeepSeek has it."""
    matrix = logits.softmax(axes[0]) + eps
    matrix = matrix / (matrix.sum(axes[1], keepdim=True) + eps)
    for _ in range(iters - 1):
        matrix = matrix / (matrix.sum(axes[0], keepdim=True) + eps)
        matrix = matrix / (matrix.sum(axes[1], keepdim=True) + eps)
    return matrix


def gates(z: Tensor, n: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return z[:, :n].sigmoid() + eps, 2 * z[:, n : 2 * n].sigmoid(), z[:, 2 * n :].unflatten(1, (n, n))


def logits(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [T, K], phi [M, K]."""
    n = int((1 + len(bias)) ** 0.5) - 1
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x @ phi.T * scale * alpha.repeat_interleave(torch.tensor([n, n, n * n])) + bias


def deepseek(state: State, x: Tensor, layer_output: Tensor) -> tuple[Tensor, Tensor]:
    z = logits(x.flatten(1), state["fn"], state["scale"], state["base"], 1e-6)
    pre, post, res = gates(z, x.shape[1], 1e-6)
    comb = sinkhorn(res, (-1, -2), 1e-6)
    mixed = torch.einsum("tij,tic->tjc", comb, x)
    return torch.einsum("ti,tic->tc", pre, x), mixed + post.unsqueeze(2) * layer_output.unsqueeze(1)


def liger(state: State, x: Tensor, layer_output: Tensor) -> tuple[Tensor, Tensor]:
    alpha = torch.stack([state[f"alpha_{name}"] for name in ("pre", "post", "res")])
    pre, post, res = gates(logits(x.flatten(1), state["phi"].T, alpha, state["b"], 1e-6), x.shape[1], 0.0)
    mixed = sinkhorn(res, (-1, -2), 1e-6) @ x
    return torch.einsum("ti,tic->tc", pre, x), mixed + post.unsqueeze(2) * layer_output.unsqueeze(1)


def transformer_engine(state: State, x: Tensor, layer_output: Tensor) -> tuple[Tensor, Tensor]:
    x = x.mT  # [T, C, n]
    phi = state["phi"] * state.get("norm_weight", torch.ones(()))
    z = logits(x.flatten(1), phi, state["alpha"], state["beta"][0], 2.0**-23)
    pre, post, res = gates(z, x.shape[2], 0.0)
    mixed = x @ sinkhorn(res, (-1, -2), 0.0)
    x_next = mixed + layer_output.unsqueeze(2) * post.unsqueeze(1)
    return (x @ pre.unsqueeze(2)).squeeze(2), x_next.mT


def megatron(state: State, x: Tensor, layer_output: Tensor) -> tuple[Tensor, Tensor]:
    """The main branch, its single-pass norm; the stream is packed there."""
    pre, post, res = gates(_megatron_logits(state, x), x.shape[1], 1e-6)
    mixed = sinkhorn(res, (-1, -2), 1e-6).mT @ x
    return torch.einsum("ti,tic->tc", pre, x), mixed + post.unsqueeze(2) * layer_output.unsqueeze(1)


def earlier_megatron(state: State, x: Tensor, layer_output: Tensor) -> tuple[Tensor, Tensor]:
    pre, post, res = gates(_megatron_logits(state, x), x.shape[1], 0.0)
    mixed = sinkhorn(res, (-1, -2), 0.0) @ x
    return torch.einsum("ti,tic->tc", pre, x), mixed + post.unsqueeze(2) * layer_output.unsqueeze(1)


def _megatron_logits(state: State, x: Tensor) -> Tensor:
    alpha = torch.cat([state[f"alpha_{name}"] for name in ("pre", "post", "res")])
    return logits(x.flatten(1), state["mapping_proj.weight"], alpha, state["bias"], 1e-6)


def lucidrains(state: State, x: Tensor, layer_output: Tensor) -> tuple[Tensor, Tensor]:
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * (state["norm.gamma"] + 1)
    scales = torch.cat([state["pre_branch_scale"], state["residual_scale"].expand(x.shape[1])])
    alpha = normed @ state["dynamic_alpha_fn"][0] * scales + state["static_alpha"]
    beta = 2 * (normed @ state["dynamic_beta_fn"] * state["h_post_scale"] + state["static_beta"]).sigmoid()
    mixed = torch.einsum("bst,bsc->btc", sinkhorn(alpha[..., 1:], (-2, -1), 0.0), x)
    return torch.einsum("bs,bsc->bc", alpha[..., 0].sigmoid(), x), mixed + beta.unsqueeze(2) * layer_output.unsqueeze(1)


def unconstrained_lucidrains(state: State, x: Tensor, layer_output: Tensor) -> tuple[Tensor, Tensor]:
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * (state["norm.gamma"] + 1)
    alpha = torch.tanh(normed @ state["dynamic_alpha_fn"]) * state["dynamic_alpha_scale"] + state["static_alpha"]
    beta = torch.tanh(normed @ state["dynamic_beta_fn"]) * state["dynamic_beta_scale"] + state["static_beta"]
    mix = torch.einsum("bst,bsc->btc", alpha, x)
    return mix[:, 0], mix[:, 1:] + beta.unsqueeze(2) * layer_output.unsqueeze(1)
