"""The checks of the backward kernels that pass through the logits z = alpha · m + bias: of a sublayer, of the head.

What the kernel gets, the reference gets: m = s·(x·phi) and s as the forward kernel left them, [M + 1, T].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ... import launch, reference
from ...spec import MHCSpec
from .. import plain_torch, tolerance
from ..comparison import Array, Comparison, check, numpy64
from ..inputs import Case, Gradients, Inputs
from ..plain_torch import by_autograd

OUTPUTS = ("g_dots", "rho", "g_alpha", "g_bias")
Mappings = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Logits:
    """Inputs of one backward through the logits: upstream gradients in the groups' order, and the forward's tensors."""

    upstream: tuple[torch.Tensor, ...]
    projected: torch.Tensor
    alpha: torch.Tensor
    bias: torch.Tensor
    spec: MHCSpec

    @property
    def sizes(self) -> list[int]:
        """Rows of each group."""
        n = self.spec.num_streams
        return [n, n, n * n][: len(self.upstream)]


@check(*OUTPUTS)
def check_coefficients_backward(case: Case, inputs: Inputs) -> list[Comparison]:
    """Check the gradients of the projection's rows, ρ, alpha and bias from those of the three mappings."""
    spec, gradients, alpha, bias = case.spec, Gradients.of(case, inputs.x.device), inputs.alpha, inputs.bias
    plan = launch.projection_plan(inputs.x, spec.num_coefficients)
    *_, projected = launch.coefficients(launch.project(inputs.x, inputs.phi, plan), alpha, bias, spec, plan)
    upstream = (gradients.g_h_pre, gradients.g_h_post, gradients.g_h_res)
    got = launch.coefficients_backward(*upstream, projected, alpha, bias, spec)
    return comparisons(Logits(upstream, projected, alpha, bias, spec), got, sublayer_mappings(spec))


def sublayer_mappings(spec: MHCSpec) -> Mappings:
    """Plain torch's way from a sublayer's logits [T, M] to its three mappings."""
    n = spec.num_streams

    def mappings(z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z_pre, z_post, z_res = z.split([n, n, n * n], dim=1)
        h_res = plain_torch.sinkhorn(z_res.unflatten(1, (n, n)), spec.sinkhorn_iters, spec.sinkhorn_eps)
        return torch.sigmoid(z_pre), spec.post_scale * torch.sigmoid(z_post), h_res.flatten(1)

    return mappings


@check(*OUTPUTS)
def check_head_coefficients_backward(case: Case, inputs: Inputs) -> list[Comparison]:
    """Check a head's gradients, of the projection's rows, ρ, alpha and bias, from h_pre's, its only group."""
    n, spec = case.num_streams, case.spec
    phi, alpha, bias = inputs.phi[:n].contiguous(), inputs.alpha[:1], inputs.bias[:n]
    plan = launch.projection_plan(inputs.x, n)
    _, projected = launch.head_coefficients(launch.project(inputs.x, phi, plan), alpha, bias, spec, plan)
    upstream = (Gradients.of(case, inputs.x.device).g_h_pre,)
    got = launch.head_coefficients_backward(*upstream, projected, alpha, bias, spec)
    return comparisons(Logits(upstream, projected, alpha, bias, spec), got, lambda z: (torch.sigmoid(z),))


def comparisons(
    at: Logits, got: tuple[torch.Tensor, torch.Tensor, torch.Tensor], mappings: Mappings
) -> list[Comparison]:
    """Compare the kernel's gradients at `at`; `mappings` maps z [T, rows] to the mappings in plain torch."""
    m, s = numpy64(at.projected[:-1]), numpy64(at.projected[-1])
    alpha = np.repeat(numpy64(at.alpha), at.sizes)[:, None]
    z = alpha * m + numpy64(at.bias)[:, None]
    g_z, bound = logit_gradients(at, z, 2 * tolerance.U32 * (np.abs(alpha * m) + np.abs(z)))

    u, factor = tolerance.U32, s**2 / at.spec.stream_size
    through = np.abs(g_z * alpha * m)  # what ρ adds up
    starts = np.cumsum([0, *at.sizes[:-1]])
    reach, gates = bound * np.abs(alpha * m), sum(at.sizes[:2])
    # A bound of Sinkhorn's holds for a whole matrix's errors added up (see `tolerance.sinkhorn`).
    through_bound = reach[:gates].sum(0) + reach[gates:].max(0, initial=0.0)
    by_row = [tolerance.sum_over_tokens(*terms) for terms in ((g_z, bound), (g_z * m, bound * np.abs(m)))]
    expected = (
        g_z * alpha * s,
        -factor * (g_z * alpha * m).sum(0),
        np.add.reduceat((g_z * m).sum(1), starts),
        g_z.sum(1),
    )
    bounds = (
        (bound + 3 * u * np.abs(g_z)) * np.abs(alpha) * s,
        factor * (through_bound + (len(z) + 6) * u * through.sum(0)),
        np.add.reduceat(by_row[1], starts),
        by_row[0],
    )
    scales = (
        np.broadcast_to(np.abs(alpha) * s, g_z.shape),
        factor * through.sum(0),
        np.add.reduceat(np.sqrt(np.square(g_z * m).sum(1)), starts),
        np.sqrt(np.square(g_z).sum(1)),
    )
    found = (got[0][:-1], got[0][-1], got[1], got[2])
    return [
        Comparison(name, numpy64(g).T, numpy64(p).T, e.T, b.T, scale.T)  # tokens first, as everywhere
        for name, g, p, e, b, scale in zip(
            OUTPUTS, found, plain_gradients(at, mappings), expected, bounds, scales, strict=True
        )
    ]


def logit_gradients(at: Logits, z: Array, z_bound: Array) -> tuple[Array, Array]:
    """g_z [rows, T], and how far a kernel's may be off."""
    spec, n, tokens = at.spec, at.spec.num_streams, z.shape[1]
    upstream = [numpy64(gradient) for gradient in at.upstream]
    g_z, bounds = np.zeros_like(z), np.zeros_like(z)
    for group, (gradient, factor) in enumerate(zip(upstream[:2], (1.0, spec.post_scale), strict=False)):
        rows = slice(group * n, (group + 1) * n)
        slope = 1 / (1 + np.exp(-z[rows])) / (1 + np.exp(z[rows]))
        g_z[rows] = factor * gradient.T * slope
        bounds[rows] = tolerance.sigmoid_slope(factor * gradient.T, g_z[rows], z_bound[rows])
    if len(upstream) == 3:
        logits, logits_bound = (values[2 * n :].T.reshape(tokens, n, n) for values in (z, z_bound))
        g_res = reference.sinkhorn_backward(upstream[2], logits, spec.sinkhorn_iters, spec.sinkhorn_eps)
        res_bound = tolerance.sinkhorn_backward(upstream[2], logits_bound, logits, spec.sinkhorn_iters)
        g_z[2 * n :], bounds[2 * n :] = (values.reshape(tokens, n * n).T for values in (g_res, res_bound))
    return g_z, bounds


def plain_gradients(at: Logits, mappings: Mappings) -> tuple[torch.Tensor, ...]:
    """Return the outputs by torch's autograd: g_dots = g_m · s and ρ = −s³/K · g_s, since m = s · dots."""

    def outputs(m: torch.Tensor, s: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        dots = m / s.detach()
        rows = alpha.repeat_interleave(torch.tensor(at.sizes, device=alpha.device))
        return torch.cat(mappings(rows * (s * dots).T + bias), 1)

    m, s = at.projected[:-1], at.projected[-1]
    upstream = torch.cat([gradient.flatten(1) for gradient in at.upstream], 1)
    g_m, g_s, g_alpha, g_bias = by_autograd(outputs, upstream, m, s, at.alpha, at.bias)
    return g_m * s, -g_s * s**3 / at.spec.stream_size, g_alpha, g_bias
