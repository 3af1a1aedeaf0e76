"""The checks of identity hyper-connections: the gates from partial sums, and the boundary without h_res.

A boundary's are those of `post_pre` with an identity matrix for h_res, and the first 2n rows of a sublayer's phi. As
there, every output is compared from the numbers that the launch before it left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ... import launch, reference
from ...compiler.kernel import dtype_name
from .. import plain_torch, tolerance
from ..comparison import Array, Comparison, check, numpy64
from ..inputs import Case, Gradients, Inputs
from ..plain_torch import by_autograd
from .coefficients import logits_of
from .coefficients_backward import Logits, Mappings, comparisons
from .post_pre import MIXED, compare_mixing, hold_to_one_launch, mixed

WITHOUT_RES = tuple(name for name in MIXED if name != "g_h_res")


def of_identity(case: Case, inputs: Inputs) -> Inputs:
    """The inputs with an identity connection's parameters, and the identity as h_res."""
    rows, tokens = 2 * case.num_streams, case.num_tokens
    h_res = torch.eye(case.num_streams, device=inputs.x.device).expand(tokens, -1, -1).contiguous()
    phi, alpha, bias = inputs.phi[:rows].contiguous(), inputs.alpha[:2].clone(), inputs.bias[:rows].clone()
    return replace(inputs, phi=phi, alpha=alpha, bias=bias, h_res=h_res)


def gate_sums(case: Case, inputs: Inputs) -> torch.Tensor:
    """Partial sums as a projection leaves them, a slab a chunk, drawn: dots of standard deviation 2, s about 1."""
    plan = launch.projection_plan(inputs.x, 2 * case.num_streams)
    slabs, num_dots = plan.num_chunks(case.hidden_size), plan.halves * plan.rows
    generator = torch.Generator().manual_seed(case.seed + 29)
    partial = torch.randn(slabs, plan.slab_rows, case.num_tokens, generator=generator)
    partial[:, :num_dots] *= case.logit_std / (slabs * plan.halves) ** 0.5
    partial[:, num_dots:] = partial[:, num_dots:].square() * (case.identity.stream_size / (slabs * plan.lanes))
    return partial.to(inputs.x.device)


def gate_bounds(case: Case, expected: tuple[Array, Array], z_bound: Array) -> tuple[Array, Array]:
    """How far h_pre and h_post may be off for logits [T, 2n] that are by z_bound."""
    spec, n = case.identity, case.num_streams
    pre = tolerance.sigmoid(expected[0] - spec.pre_eps, z_bound[:, :n], 1.0) + 2 * tolerance.U32
    post = tolerance.sigmoid(expected[1] - spec.post_eps, z_bound[:, n:], spec.post_scale)
    return pre, post + 2 * tolerance.U32 * spec.post_scale


def gate_mappings(case: Case) -> Mappings:
    """Plain torch's way from the logits [T, 2n] to the two gates."""
    n, spec = case.num_streams, case.identity
    return lambda z: (
        torch.sigmoid(z[:, :n]) + spec.pre_eps,
        spec.post_scale * torch.sigmoid(z[:, n:]) + spec.post_eps,
    )


@check("h_pre", "h_post")
def check_gates(case: Case, inputs: Inputs) -> list[Comparison]:
    """From partial sums of a projection to the two gates."""
    spec, given, n = case.identity, of_identity(case, inputs), case.num_streams
    plan, partial = launch.projection_plan(inputs.x, 2 * n), gate_sums(case, inputs)
    *got, _ = launch.gates(partial, given.alpha, given.bias, spec, plan)
    num_dots = plan.halves * plan.rows

    def logits(sums: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = sums.sum(0)
        dots = total[:num_dots].unflatten(0, (plan.halves, plan.rows)).sum(0).T
        scale = torch.rsqrt(total[num_dots:].sum(0) / spec.stream_size + spec.rms_eps)[:, None]
        return alpha.repeat_interleave(n) * (dots * scale) + bias, dots * scale, scale

    plain = gate_mappings(case)(logits(partial, given.alpha, given.bias)[0])
    z, scaled, scale = logits(*(tensor.double().cpu() for tensor in (partial, given.alpha, given.bias)))
    expected = tuple(numpy64(gate) for gate in gate_mappings(case)(z))
    terms = plan.halves * len(partial)
    dots_bound = terms * tolerance.U32 * np.abs(numpy64(partial[:, :num_dots])).sum((0, 1))[:, None]
    alpha_rows = np.repeat(numpy64(given.alpha), n)
    z_bound = tolerance.logits(
        numpy64(z), numpy64(scaled), dots_bound, numpy64(scale), alpha_rows, len(partial) * plan.lanes
    )
    bounds = gate_bounds(case, expected, z_bound)  # type: ignore[arg-type]
    return [
        Comparison(name, numpy64(g), numpy64(p), e, b, np.ones_like(e))
        for name, g, p, e, b in zip(("h_pre", "h_post"), got, plain, expected, bounds, strict=True)
    ]


@check("g_dots", "rho", "g_alpha", "g_bias")
def check_gates_backward(case: Case, inputs: Inputs) -> list[Comparison]:
    """From the two gates to the projection's rows, ρ, alpha and bias; m and s are drawn."""
    spec, given, gradients = case.identity, of_identity(case, inputs), Gradients.of(case, inputs.x.device)
    generator = torch.Generator().manual_seed(case.seed + 31)
    projected = torch.randn(2 * case.num_streams + 1, case.num_tokens, generator=generator)
    projected[-1].exp_()
    upstream = (gradients.g_h_pre, gradients.g_h_post)
    rest: Any = (projected.to(inputs.x.device), given.alpha, given.bias, spec)
    return comparisons(Logits(upstream, *rest), launch.gates_backward(*upstream, *rest), gate_mappings(case))


@check("x_next", "layer_input", "h_pre", "h_post")
def check_identity_post_pre(case: Case, inputs: Inputs) -> list[Comparison]:
    """x_next as of post without h_res; layer_input and the gates as of pre at that x_next. For few tokens in one launch
    too.
    """
    spec, given, n, dtype = case.identity, of_identity(case, inputs), case.num_streams, dtype_name(case.dtype)
    x, layer_output, h_post, _ = mixed(given)
    arguments = (x, layer_output, h_post, given.phi, given.alpha, given.bias, spec)
    got = hold_to_one_launch(x, 2 * n, lambda schedule: launch.identity_post_pre(*arguments, schedule=schedule))
    plain_next = plain_torch.post(*mixed(given))
    exact = [numpy64(argument) for argument in (x, layer_output, h_post)]
    magnitude = reference.identity_post(*map(np.abs, exact))

    x_next = numpy64(got.x_next)
    phi, alpha, bias = map(numpy64, (given.phi, given.alpha, given.bias))
    h_pre, expected_post = reference.gates(x_next, phi, alpha, bias, spec)
    # The first 2n rows of phi are what `coefficients` has as its pre and post rows.
    _, z_bound = logits_of(replace(inputs, x=got.x_next), inputs.alpha, case)
    bounds = gate_bounds(case, (h_pre, expected_post), z_bound[:, : 2 * n])
    dots, squares = plain_torch.project(plain_next, given.phi)
    scale = torch.rsqrt(squares / spec.stream_size + spec.rms_eps)[:, None]
    plain = gate_mappings(case)(given.alpha.repeat_interleave(n) * (dots * scale) + given.bias)
    input_magnitude = reference.aggregate(np.abs(x_next), h_pre)
    input_bound = tolerance.combination(input_magnitude, n, dtype) + reference.aggregate(np.abs(x_next), bounds[0])
    plain_input = plain_torch.aggregate(plain_next, plain[0])
    bound, ones = tolerance.combination(magnitude, 2, dtype), np.ones_like(h_pre)
    return [
        Comparison("x_next", x_next, numpy64(plain_next), reference.identity_post(*exact), bound, magnitude),
        Comparison(
            "layer_input",
            numpy64(got.layer_input),
            numpy64(plain_input),
            reference.aggregate(x_next, h_pre),
            input_bound,
            input_magnitude,
        ),
        Comparison("h_pre", numpy64(got.h_pre), numpy64(plain[0]), h_pre, bounds[0], ones),
        Comparison("h_post", numpy64(got.h_post), numpy64(plain[1]), expected_post, bounds[1], ones),
    ]


@check(*WITHOUT_RES, "g_phi", "g_alpha", "g_bias")
def check_identity_post_pre_backward(case: Case, inputs: Inputs) -> list[Comparison]:
    """All six gradients."""
    spec, given, upstream = case.identity, of_identity(case, inputs), Gradients.of(case, inputs.x.device)
    taken = (given.x, given.layer_output, given.h_post, given.phi, given.alpha, given.bias)
    forward = launch.identity_post_pre(*taken, spec)
    kept = (forward.x_next, forward.h_pre, forward.projected)
    got = launch.identity_post_pre_backward(upstream.g_x, upstream.g_h, upstream.g_h_post, *taken, *kept, spec)

    def outputs(*arguments: torch.Tensor) -> torch.Tensor:
        x, layer_output, given_post, h_res, phi, alpha, bias = arguments
        x_next = plain_torch.post(x, layer_output, given_post, h_res)
        dots, squares = plain_torch.project(x_next, phi)
        scale = torch.rsqrt(squares / spec.stream_size + spec.rms_eps)[:, None]
        h_pre, h_post = gate_mappings(case)(alpha.repeat_interleave(case.num_streams) * (dots * scale) + bias)
        return torch.cat([one.float().flatten() for one in (x_next, plain_torch.aggregate(x_next, h_pre), h_post)])

    gradient = torch.cat([one.float().flatten() for one in (upstream.g_x, upstream.g_h, upstream.g_h_post)])
    plain = by_autograd(outputs, gradient, *mixed(given), given.phi, given.alpha, given.bias)
    gates = (launch.aggregate_backward(upstream.g_h, forward.x_next), upstream.g_h_post)
    rest: Any = (forward.projected, given.alpha, given.bias, spec)
    g_projected, *_ = launch.gates_backward(*gates, *rest)
    of_logits = comparisons(Logits(gates, *rest), (g_projected, got.g_alpha, got.g_bias), gate_mappings(case))[2:]
    of_logits = [replace(one, torch=numpy64(p)) for one, p in zip(of_logits, plain[5:], strict=True)]
    with_res = got._replace(g_h_res=plain[3])  # which there is none of
    of_mixing = compare_mixing(case, given, upstream, g_projected, forward, with_res, plain[:5])
    return [*(one for one in of_mixing if one.output != "g_h_res"), *of_logits]
