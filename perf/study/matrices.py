"""The mappings of `study gain`, and what their products over depth do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ... import ops
from ...diagnostics import Gain, amax_gain, sum_deviation

STRUCTURES = ("independent", "repeated")


@dataclass(frozen=True)
class Curve:
    """Gains over depth, means over tokens: entry L − 1 is of the product of the first L mappings."""

    structure: str
    scale: float
    iters: int | None  # None for HC
    forward: list[float]
    backward: list[float]
    column_deviation: float  # the largest of single mappings

    @property
    def name(self) -> str:
        return "HC" if self.iters is None else "mHC"

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield a row per depth."""
        for depth, (forward, backward) in enumerate(zip(self.forward, self.backward, strict=True), start=1):
            yield {
                "g": self.structure,
                "connection": self.name,
                "iterations": "" if self.iters is None else self.iters,
                "a": self.scale,
                "sublayers": depth,
                "forward_gain": f"{forward:.6g}",
                "backward_gain": f"{backward:.6g}",
            }


@torch.no_grad()
def measure(
    depth: int,
    tokens: int,
    num_streams: int,
    scales: Sequence[float],
    iters: Sequence[int],
    seed: int,
    device: torch.device,
) -> list[Curve]:
    """HC, then mHC at every iteration count, for every structure and scale; g is the same for all of a structure."""
    shape = (depth, tokens, num_streams, num_streams)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    identity = torch.eye(num_streams, device=device)
    curves = []
    for structure in STRUCTURES:
        g = drawn if structure == "independent" else drawn[:1]
        for count in (None, *iters):
            for scale in scales:
                if count is None:
                    h_res = identity + scale * torch.tanh(g)
                else:
                    h_res = ops.sinkhorn(scale * g + (6 * identity - 3), count)
                forward, backward = (way.mean(1).tolist() for way in gains_by_depth(h_res.double().expand(shape)))
                off = sum_deviation(h_res)[1].max().item()
                curves.append(Curve(structure, scale, count, forward, backward, off))
    return curves


def gains_by_depth(h_res: torch.Tensor) -> Gain:
    """h_res [L, T, n, n] -> both gains [L, T] of H_l ··· H_0: of shallower and deeper models that begin alike."""
    product, gains = h_res[0], [amax_gain(h_res[0])]
    for mapping in h_res[1:]:
        product = mapping @ product
        gains.append(amax_gain(product))
    return Gain(*(torch.stack(way) for way in zip(*gains, strict=True)))
