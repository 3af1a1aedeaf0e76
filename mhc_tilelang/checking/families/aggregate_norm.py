"""The checks of the aggregation with the layer's own RMSNorm, and of its backward.

Bounds follow u, the sum of the streams, through the formulas: e_u is how far a kernel's u may be off, and what the
mean square takes from that and from its own summation is the relative error of r.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ... import launch, reference
from ...compiler.kernel import dtype_name
from .. import plain_torch, tolerance
from ..comparison import Array, Comparison, check, compare_each, numpy64
from ..inputs import Case, Gradients, Inputs, drawing_device
from ..plain_torch import by_autograd
from ..tolerance import U32

EPS = 0.01  # of the mean square, which is about n/3: an eps left out shows in every dtype


def rms_norm_weight(case: Case, device: torch.device) -> torch.Tensor:
    """w [C], float32, around 1 and of both signs."""
    generator = torch.Generator().manual_seed(case.seed + 29)
    return (1 + torch.randn(case.hidden_size, generator=generator, device=drawing_device(device))).to(device)


@dataclass(frozen=True)
class Normed:
    """u, r and w in float64, with the magnitude of u's terms, the bound of u and the relative one of r."""

    u: Array
    scale: Array
    weight: Array
    magnitude: Array
    u_bound: Array
    scale_bound: Array

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> Normed:
        """∂r/r = −r²/C · Σ u·∂u; the sum of squares, its half, is off by 3·√C·u more, and rsqrt and eps by 4 u."""
        x, h_pre = numpy64(inputs.x), numpy64(inputs.h_pre)
        u = reference.aggregate(x, h_pre)
        squares = np.square(u).sum(-1, keepdims=True)
        scale = 1 / np.sqrt(squares / case.hidden_size + EPS)
        magnitude = reference.aggregate(np.abs(x), np.abs(h_pre))
        u_bound = case.num_streams * U32 * magnitude
        summed = (np.abs(u) * u_bound).sum(-1, keepdims=True) + tolerance.sum_squares(u)[..., None] / 2
        scale_bound = np.square(scale) / case.hidden_size * summed + 4 * U32
        return cls(u, scale, numpy64(rms_norm_weight(case, inputs.x.device)), magnitude, u_bound, scale_bound)

    @property
    def normed_bound(self) -> Array:
        """Bound of y = u · r · w in float32, not yet rounded to another dtype: u's and r's errors, and two products."""
        y = self.u * self.scale * self.weight
        carried = np.abs(self.scale * self.weight) * self.u_bound + np.abs(y) * self.scale_bound
        return carried + 2 * U32 * np.abs(y)


@check("layer_input")
def check_aggregate_norm(case: Case, inputs: Inputs) -> list[Comparison]:
    """The normalised aggregation, for a given h_pre."""
    weight, at = rms_norm_weight(case, inputs.x.device), Normed.of(case, inputs)
    got = launch.aggregate_norm(inputs.x, inputs.h_pre, weight, EPS)
    plain = plain_torch.aggregate_normed(inputs.x, inputs.h_pre, weight, EPS)
    expected = reference.rms_norm(at.u, at.weight, EPS)
    scale = np.abs(at.scale * at.weight) * at.magnitude
    bound = np.abs(at.scale * at.weight) * at.u_bound + np.abs(expected) * at.scale_bound
    bound = bound + tolerance.combination(np.abs(expected) + bound, 1, dtype_name(case.dtype))
    return [Comparison("layer_input", numpy64(got), numpy64(plain), expected, bound, scale)]


@check("g_u", "g_h_pre", "g_weight")
def check_aggregate_norm_backward(case: Case, inputs: Inputs) -> list[Comparison]:
    """The gradients of the sum before the norm, of h_pre and of the weight."""
    weight, at = rms_norm_weight(case, inputs.x.device), Normed.of(case, inputs)
    upstream = Gradients.of(case, inputs.x.device).g_h
    got = launch.aggregate_norm_backward(upstream, inputs.x, inputs.h_pre, weight, EPS)
    plain = plain_gradients(upstream, inputs, weight)

    g, x, dtype, size = numpy64(upstream), numpy64(inputs.x), dtype_name(case.dtype), case.hidden_size
    g_u, g_weight = reference.rms_norm_backward(g, at.u, at.weight, EPS)
    _, g_h_pre = reference.aggregate_backward(g_u, x, numpy64(inputs.h_pre))

    r, r_bound, weighted = at.scale, at.scale_bound, at.weight * g
    inner = (weighted * at.u).sum(-1, keepdims=True)  # D
    inner_scale = np.sqrt(np.square(weighted * at.u).sum(-1, keepdims=True))
    inner_bound = tolerance.inner_products(inner_scale, size)
    inner_bound = inner_bound + (np.abs(weighted) * at.u_bound).sum(-1, keepdims=True)
    pull = np.abs(r**3 * inner / size)
    pull_bound = r**3 / size * inner_bound + pull * (3 * r_bound + 5 * U32)

    direct, pulled = np.abs(r * weighted), pull * np.abs(at.u)
    wide = direct * (r_bound + U32) + pull * at.u_bound + pull_bound * np.abs(at.u)
    wide = wide + tolerance.combination(direct + pulled, 2, dtype)

    along = np.einsum("tc,tic->ti", np.abs(at.u), np.abs(x))  # of B, whose terms may all have one sign
    along_bound = 3 * np.sqrt(size) * U32 * along + np.einsum("tc,tic->ti", at.u_bound, np.abs(x))
    dots = np.abs(np.einsum("tc,tic->ti", weighted, x))  # A
    dot_scale = np.sqrt(np.einsum("tc,tic->ti", np.square(weighted), np.square(x)))
    narrow = r * tolerance.inner_products(dot_scale, size) + r * dots * (r_bound + 2 * U32)
    narrow = narrow + pull * along_bound + along * (pull_bound + 2 * U32 * pull)

    terms = g * at.u * r
    term_bounds = np.abs(g * r) * at.u_bound + np.abs(terms) * (r_bound + 2 * U32)
    values = (g_u, g_h_pre, g_weight)
    bounds = (wide, narrow, tolerance.sum_over_tokens(terms.T, term_bounds.T))
    scales = (direct + pulled, r * dot_scale + pull * along, np.sqrt(np.square(terms).sum(0)))
    return compare_each(("g_u", "g_h_pre", "g_weight"), got, plain, values, bounds, scales)


def plain_gradients(gradient: torch.Tensor, inputs: Inputs, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """g_u rounded to the stream's dtype, g_h_pre and g_weight by torch's autograd."""

    def normed(h_pre: torch.Tensor, offset: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return plain_torch.rms_norm((h_pre.unsqueeze(-1) * inputs.x.float()).sum(1) + offset, w, EPS)

    offset = torch.zeros(gradient.shape, device=gradient.device)
    g_h_pre, g_u, g_weight = by_autograd(normed, gradient.float(), inputs.h_pre, offset, weight)
    return g_u.to(gradient.dtype), g_h_pre, g_weight
