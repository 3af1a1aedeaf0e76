"""Random arguments that make an error visible.

Streams are standard normal. phi has standard deviation 2/√K and alpha lies around 1, so that logits have
standard deviation 2 at every K: a kernel that returned zeros, or the transpose, is far off. h_res is random
and not symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..spec import MHCSpec


@dataclass(frozen=True)
class Case:
    """One set of sizes to check a kernel at."""

    num_streams: int
    hidden_size: int
    dtype: torch.dtype
    num_tokens: int
    logit_std: float = 2.0
    seed: int = 0
    layer_dtype: torch.dtype | None = None  # of the layer's output; the stream's unless given

    @property
    def spec(self) -> MHCSpec:
        return MHCSpec.deepseek_v4(self.hidden_size, num_streams=self.num_streams)

    @property
    def identity(self) -> MHCSpec:
        """Without h_res; an eps that would be missed."""
        return replace(self.spec, residual_mapping="identity", post_eps=5e-3)


@dataclass(frozen=True)
class Inputs:
    """Every tensor that some kernel takes, for one case, on one device; each checker uses what it needs."""

    h: torch.Tensor
    x: torch.Tensor
    layer_output: torch.Tensor
    phi: torch.Tensor
    alpha: torch.Tensor
    bias: torch.Tensor
    h_pre: torch.Tensor
    h_post: torch.Tensor
    h_res: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Inputs:
        """Drawn on the CPU, so that every device sees the same numbers; on "meta" nothing is drawn."""
        generator, drawn_on = torch.Generator().manual_seed(case.seed), drawing_device(device)
        tokens, n, size = case.num_tokens, case.num_streams, case.hidden_size

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=drawn_on)

        def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
            return low + (high - low) * torch.rand(*shape, generator=generator, device=drawn_on)

        rows = case.spec.num_coefficients
        drawn = cls(
            h=normal(tokens, size).to(case.dtype),
            x=normal(tokens, n, size).to(case.dtype),
            layer_output=normal(tokens, size).to(case.layer_dtype or case.dtype),
            phi=normal(rows, n * size) * (case.logit_std / (n * size) ** 0.5),
            alpha=uniform(0.7, 1.3, 3),
            bias=normal(rows),
            h_pre=uniform(0.0, 1.0, tokens, n),
            h_post=uniform(0.0, 2.0, tokens, n),
            h_res=uniform(0.0, 2.0 / n, tokens, n, n),
            logits=normal(tokens, n, n) * case.logit_std,
        )
        return cls(**{name: tensor.to(device) for name, tensor in vars(drawn).items()})


@dataclass(frozen=True)
class Gradients:
    """Upstream gradients of everything that some function returns, for one case: standard normal, never constant.

    Of a constant gradient, rows of h_res that sum to one would return zero, and a kernel that did nothing would pass.
    """

    g_x: torch.Tensor
    g_h: torch.Tensor
    g_h_pre: torch.Tensor
    g_h_post: torch.Tensor
    g_h_res: torch.Tensor
    g_projected: torch.Tensor

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Gradients:
        """Drawn on the CPU, from another seed than the inputs; on "meta" nothing is drawn."""
        generator, drawn_on = torch.Generator().manual_seed(case.seed + 1_000_003), drawing_device(device)
        tokens, n, size = case.num_tokens, case.num_streams, case.hidden_size

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=drawn_on)

        drawn = cls(
            g_x=normal(tokens, n, size).to(case.dtype),
            g_h=normal(tokens, size).to(case.dtype),
            g_h_pre=normal(tokens, n),
            g_h_post=normal(tokens, n),
            g_h_res=normal(tokens, n, n),
            g_projected=normal(case.spec.num_coefficients + 1, tokens),
        )
        return cls(**{name: tensor.to(device) for name, tensor in vars(drawn).items()})


def drawing_device(device: torch.device) -> torch.device:
    """Return the device on which a device's random numbers are drawn."""
    return device if device.type == "meta" else torch.device("cpu")
