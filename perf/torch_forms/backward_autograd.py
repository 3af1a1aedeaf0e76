"""Backwards by torch's autograd from the forward formulas, the backward pass alone.

    recorded    eager. The forward runs and is recorded once, untimed; a call runs the recorded backward.
    vjp         compiled. The forward is traced with its backward, and the compiler drops what no gradient needs;
                of Sinkhorn it recomputes what it needs, as the kernels do.

`expand` and `pre` are missing: their gradients are the forms of `backward_stream_forms` to the letter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...checking import plain_torch
from ...spec import MHCSpec
from .tokens import alpha_rows

Forward = Callable[..., Tensor | tuple[Tensor, ...]]


def record(
    forward: Forward, inputs: Sequence[Tensor], upstream: Sequence[Tensor], outputs: Sequence[Tensor]
) -> Callable[[], None]:
    """Record `forward` of the inputs; return what runs its backward and writes the inputs' gradients."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        results = forward(*leaves)

    def run() -> None:
        write(outputs, torch.autograd.grad(results, leaves, upstream, retain_graph=True))

    return run


def write(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Copy each gradient into its output."""
    for output, gradient in zip(outputs, gradients, strict=True):
        output.copy_(gradient)


def gradients(forward: Forward, inputs: Sequence[Tensor], upstream: object) -> tuple[Tensor, ...]:
    """Return the inputs' gradients; `upstream` has the form of what `forward` returns."""
    _, backward, *_ = torch.func.vjp(forward, *inputs)
    result: tuple[Tensor, ...] = backward(upstream)
    return result


def post_einsum(x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """`post` as products of matrices, whose backward are two such products."""
    mixed = torch.einsum("tji,tic->tjc", h_res, x.float())
    return (mixed + h_post.unsqueeze(-1) * layer_output.float().unsqueeze(1)).to(x.dtype)


def post_backward_recorded(
    g_x_next: Tensor, x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor,
    g_x: Tensor, g_layer_output: Tensor, g_h_post: Tensor, g_h_res: Tensor,
) -> Callable[[], None]:  # fmt: skip
    """Record `post` as a batch of matrix products; return what runs its backward."""
    outputs = (g_x, g_layer_output, g_h_post, g_h_res)
    return record(post_einsum, (x, layer_output, h_post, h_res), (g_x_next,), outputs)


def post_backward_vjp(
    g_x_next: Tensor, x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor,
    g_x: Tensor, g_layer_output: Tensor, g_h_post: Tensor, g_h_res: Tensor,
) -> None:  # fmt: skip
    """Compute the backward of `post` as sums of broadcast products."""
    outputs = (g_x, g_layer_output, g_h_post, g_h_res)
    write(outputs, gradients(plain_torch.post, (x, layer_output, h_post, h_res), g_x_next))


def project_backward_recorded(
    g_projected: Tensor, x: Tensor, phi: Tensor, g_x: Tensor, g_phi: Tensor
) -> Callable[[], None]:
    """Record x·phi and Σx²; return what runs their backward. The gradient of Σx² is ρ/2."""
    upstream = (g_projected[:-1].T, g_projected[-1] / 2)
    return record(plain_torch.project, (x, phi), upstream, (g_x, g_phi))


def project_backward_vjp(g_projected: Tensor, x: Tensor, phi: Tensor, g_x: Tensor, g_phi: Tensor) -> None:
    """Compute the backward of x·phi and Σx²; the gradient of the latter is ρ/2."""
    upstream = (g_projected[:-1].T, g_projected[-1] / 2)
    write((g_x, g_phi), gradients(plain_torch.project, (x, phi), upstream))


def sinkhorn_backward_recorded(
    g_h_res: Tensor, logits: Tensor, iters: int, eps: float, g_logits: Tensor
) -> Callable[[], None]:
    """Record Sinkhorn's formula on [T, n, n]; return what runs its backward."""
    return record(lambda z: plain_torch.sinkhorn(z, iters, eps), (logits,), (g_h_res,), (g_logits,))


def sinkhorn_backward_vjp(g_h_res: Tensor, logits: Tensor, iters: int, eps: float, g_logits: Tensor) -> None:
    """Compute the backward of Sinkhorn's formula on [T, n, n]."""
    write((g_logits,), gradients(lambda z: plain_torch.sinkhorn(z, iters, eps), (logits,), g_h_res))


def coefficients_of(spec: MHCSpec) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return the coefficients as a function of m [T, M], s [T], alpha and bias.

    s scales m/s, a constant here, so that the gradient of s is the sum that ρ is made of.
    """
    n = spec.num_streams

    def forward(dots: Tensor, s: Tensor, alpha: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = dots * s.unsqueeze(-1) * alpha_rows(alpha, n) + bias
        h_res = plain_torch.sinkhorn(z[:, 2 * n :].unflatten(-1, (n, n)), spec.sinkhorn_iters, spec.sinkhorn_eps)
        return torch.sigmoid(z[:, :n]) + spec.pre_eps, spec.post_scale * torch.sigmoid(z[:, n : 2 * n]), h_res

    return forward


def coefficients_backward_recorded(
    g_h_pre: Tensor, g_h_post: Tensor, g_h_res: Tensor, projected: Tensor, alpha: Tensor, bias: Tensor,
    spec: MHCSpec, g_projected: Tensor, g_alpha: Tensor, g_bias: Tensor,
) -> Callable[[], None]:  # fmt: skip
    """Record the coefficients' formula on [T, M]; return what runs its backward."""
    s, g_s = projected[-1], torch.empty_like(projected[-1])
    inputs = ((projected[:-1] / s).T, s, alpha, bias)
    outputs = (g_projected[:-1].T, g_s, g_alpha, g_bias)
    backward = record(coefficients_of(spec), inputs, (g_h_pre, g_h_post, g_h_res), outputs)

    def run() -> None:
        backward()
        g_projected[-1].copy_(-(s**3) / spec.stream_size * g_s)

    return run


def coefficients_backward_vjp(
    g_h_pre: Tensor, g_h_post: Tensor, g_h_res: Tensor, projected: Tensor, alpha: Tensor, bias: Tensor,
    spec: MHCSpec, g_projected: Tensor, g_alpha: Tensor, g_bias: Tensor,
) -> None:  # fmt: skip
    """Compute the backward of the coefficients' formula on [T, M]."""
    s = projected[-1]
    inputs = ((projected[:-1] / s).T, s, alpha, bias)
    g_dots, g_s, *sums = gradients(coefficients_of(spec), inputs, (g_h_pre, g_h_post, g_h_res))
    write((g_projected[:-1], g_projected[-1]), (g_dots.T, -(s**3) / spec.stream_size * g_s))
    write((g_alpha, g_bias), sums)
