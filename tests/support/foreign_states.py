"""Random states in other frameworks' shapes, with their own names: what the tests of `mhc.convert` feed it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

C = 192  # as in `helpers.crosses`, whose kernels these tests use


class Random:
    """alpha near 1, logits of standard deviation 3, at which the order of Sinkhorn's steps shows."""

    def __init__(self, n: int, seed: int = 0) -> None:
        self.n, self.generator = n, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(shape, generator=self.generator)

    def projection(self, rows: int) -> Tensor:
        return self.normal(rows, self.n * C, std=3 / (self.n * C) ** 0.5)

    def alphas(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {f"alpha_{name}": 1 + self.normal(*shape, std=0.1) for name in ("pre", "post", "res")}


def states(framework: str, n: int = 4, seed: int = 0) -> Mapping[str, Tensor]:
    """One sublayer's state."""
    random, m = Random(n, seed), n * n + 2 * n
    phi, bias = random.projection(m), random.normal(m)
    alpha = 1 + random.normal(3, std=0.1)
    if framework in ("deepseek", "transformers"):
        return {"fn": phi, "scale": alpha, "base": bias}
    if framework == "liger":
        return {"phi": phi.T.contiguous(), "b": bias, **random.alphas(())}
    if framework == "transformer_engine":
        return {"phi": phi, "alpha": alpha, "beta": bias.unsqueeze(0), "norm_weight": 1 + random.normal(n * C, std=0.1)}
    if framework == "megatron":
        return {"mapping_proj.weight": phi, "bias": bias, **random.alphas((1,))}
    static = {"static_alpha": 2 * random.normal(n, 1 + n), "static_beta": random.normal(n)}
    if framework == "lucidrains":
        scales = {"pre_branch_scale": alpha[:1], "h_post_scale": alpha[1], "residual_scale": alpha[2:]}
        zeros = {"dynamic_alpha_fn": torch.zeros(1, C, 1 + n), "dynamic_beta_fn": torch.zeros(C)}
        return {**static, **scales, **zeros, "norm.gamma": torch.zeros(C)}
    assert framework == "unconstrained"
    scales = {"dynamic_alpha_scale": alpha[0], "dynamic_beta_scale": alpha[1]}
    dynamic = {
        "dynamic_alpha_fn": random.normal(C, 1 + n, std=C**-0.5),
        "dynamic_beta_fn": random.normal(C, std=C**-0.5),
    }
    return {**static, **scales, **dynamic, "norm.gamma": torch.zeros(C)}


def heads(framework: str) -> Mapping[str, Tensor]:
    """The head's state."""
    random = Random(4, 7)
    values = (random.projection(4), 1 + random.normal(1, std=0.1), random.normal(4))
    prefix = "hc_" if framework == "transformers" else ""
    return {f"{prefix}{name}": value for name, value in zip(("fn", "scale", "base"), values, strict=True)}
