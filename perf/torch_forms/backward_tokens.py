"""Plain torch for the backward of the kernels of n × n matrices: coefficients, sinkhorn.

A step of Sinkhorn divides P by sums d over an axis; reference/sinkhorn.py derives the way back,
g ← (g − Σ g·P) / d. Here it runs on H = g·P, which needs neither d nor a division:

    H ← H − P · Σ H        P being what the step gave

Forms that are fast keep the tokens innermost, as in `token_forms`, and P of every step. Arguments as in
`mhc_tilelang.launch`; the last ones are outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...spec import MHCSpec
from . import backward_autograd as autograd
from . import tokens as token_forms
from .backward_streams import total
from .baselines import COMPILED, EAGER, Form
from .tokens import alpha_rows


def logits_gradient(G: Tensor, logits: Tensor, iters: int, eps: float, columns: int = 0, rows: int = 1) -> Tensor:
    """Return the logits' gradient [n, n, T], or with the axes -2 and -1 [T, n, n]; G, that of h_res, is overwritten."""
    S = torch.softmax(logits, columns)
    P_0 = P = S + eps
    axes = [rows, *[columns, rows] * (iters - 1)]
    steps = []
    for axis in axes:
        P = P / P.sum(axis, keepdim=True).add_(eps)
        steps.append(P)
    H = G.mul_(P)
    for axis, P in zip(reversed(axes), reversed(steps), strict=True):
        H.addcmul_(H.sum(axis, keepdim=True), P, value=-1)
    H.mul_(S).div_(P_0)
    return H.addcmul_(H.sum(columns, keepdim=True), S, value=-1)


def sinkhorn_backward_as_written(g_h_res: Tensor, logits: Tensor, iters: int, eps: float, g_logits: Tensor) -> None:
    """Compute Sinkhorn's backward on [T, n, n]."""
    g_logits.copy_(logits_gradient(g_h_res.clone(), logits, iters, eps, -2, -1))


def innermost(matrices: Tensor) -> Tensor:
    """[T, n, n] -> a new [n, n, T]."""
    return matrices.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)


def sinkhorn_backward_innermost(g_h_res: Tensor, logits: Tensor, iters: int, eps: float, g_logits: Tensor) -> None:
    """Tokens innermost."""
    g_logits.copy_(logits_gradient(innermost(g_h_res), innermost(logits), iters, eps).permute(2, 0, 1))


def sinkhorn_backward_blocks(g_h_res: Tensor, logits: Tensor, iters: int, eps: float, g_logits: Tensor) -> None:
    """Tokens innermost, a block of tokens at a time."""
    blocks = (tensor.split(token_forms.BLOCK_TOKENS) for tensor in (g_h_res, logits, g_logits))
    for g_block, logits_block, out in zip(*blocks, strict=True):
        sinkhorn_backward_innermost(g_block, logits_block, iters, eps, out)


Matrix = list[list[Tensor]]


def transposed(matrix: Matrix) -> Matrix:
    """Return the transpose of a matrix of variables."""
    return [list(vector) for vector in zip(*matrix, strict=True)]


def sinkhorn_backward_scalars(g_h_res: Tensor, logits: Tensor, iters: int, eps: float, g_logits: Tensor) -> None:
    """Tokens innermost, every entry of the matrices a variable of its own: a compiler can keep them in registers."""
    n = logits.shape[-1]
    S = torch.softmax(logits.permute(1, 2, 0), 0)
    P = [list(row.unbind(0)) for row in (S + eps).unbind(0)]
    steps = []
    for step in range(2 * iters - 1):  # every step normalises rows; columns are the rows of the transpose
        if step:
            P = transposed(P)
        P = [[value / (total(row) + eps) for value in row] for row in P]
        steps.append(P)
    H = [[g * value for g, value in zip(row.unbind(0), P_row, strict=True)]
         for row, P_row in zip(g_h_res.permute(1, 2, 0).unbind(0), P, strict=True)]  # fmt: skip
    for P in reversed(steps):
        sums = [total(row) for row in H]
        H = [[h - value * row_sum for h, value in zip(H_row, P_row, strict=True)]
             for H_row, P_row, row_sum in zip(H, P, sums, strict=True)]  # fmt: skip
        H = transposed(H)
    flat = torch.stack([H[i][j] for j in range(n) for i in range(n)]).view(n, n, -1) * S / (S + eps)
    g_logits.copy_((flat - S * flat.sum(0)).permute(2, 0, 1))


def coefficients_backward_innermost(
    g_h_pre: Tensor, g_h_post: Tensor, g_h_res: Tensor, projected: Tensor, alpha: Tensor, bias: Tensor,
    spec: MHCSpec, g_projected: Tensor, g_alpha: Tensor, g_bias: Tensor,
) -> None:  # fmt: skip
    """Tokens innermost, as the projection leaves them."""
    g_alpha.zero_()
    g_bias.zero_()
    add_coefficients_backward(g_h_pre, g_h_post, g_h_res, projected, alpha, bias, spec, g_projected, g_alpha, g_bias)


def add_coefficients_backward(
    g_h_pre: Tensor, g_h_post: Tensor, g_h_res: Tensor, projected: Tensor, alpha: Tensor, bias: Tensor,
    spec: MHCSpec, g_projected: Tensor, g_alpha: Tensor, g_bias: Tensor,
) -> None:  # fmt: skip
    """Write g_projected; add these tokens' share to g_alpha and g_bias."""
    n = spec.num_streams
    m, s, alphas = projected[:-1], projected[-1], alpha_rows(alpha, n).unsqueeze(-1)
    z = m * alphas + bias.unsqueeze(-1)
    gates = torch.sigmoid(z[: 2 * n])
    upstream = torch.cat((g_h_pre.T, spec.post_scale * g_h_post.T))
    logits = z[2 * n :].unflatten(0, (n, n))
    g_res = logits_gradient(innermost(g_h_res), logits, spec.sinkhorn_iters, spec.sinkhorn_eps)
    g_z = torch.cat((upstream * gates * (1 - gates), g_res.flatten(0, 1)))
    g_scaled = g_z * alphas
    g_projected[:-1].copy_(g_scaled * s)
    g_projected[-1].copy_((g_scaled * m).sum(0) * s.square() / -spec.stream_size)
    g_alpha_rows = (g_z * m).sum(1)
    g_alpha.add_(torch.stack([rows.sum() for rows in g_alpha_rows.split((n, n, n * n))]))
    g_bias.add_(g_z.sum(1))


def coefficients_backward_blocks(
    g_h_pre: Tensor, g_h_post: Tensor, g_h_res: Tensor, projected: Tensor, alpha: Tensor, bias: Tensor,
    spec: MHCSpec, g_projected: Tensor, g_alpha: Tensor, g_bias: Tensor,
) -> None:  # fmt: skip
    """Tokens innermost, a block of tokens at a time."""
    g_alpha.zero_()
    g_bias.zero_()
    for first in range(0, len(g_h_pre), token_forms.BLOCK_TOKENS):
        block = slice(first, first + token_forms.BLOCK_TOKENS)
        add_coefficients_backward(
            g_h_pre[block], g_h_post[block], g_h_res[block], projected[:, block], alpha, bias,
            spec, g_projected[:, block], g_alpha, g_bias,
        )  # fmt: skip


FORMS: dict[str, tuple[Form, ...]] = {
    "coefficients_backward": (
        Form("autograd", autograd.coefficients_backward_recorded, modes=(EAGER,), binds=True, beaten_on=("cpu",)),
        Form("autograd", autograd.coefficients_backward_vjp, modes=(COMPILED,)),
        Form("tokens innermost", coefficients_backward_innermost, beaten_on=("cpu",)),
        Form("tokens innermost, blocks", coefficients_backward_blocks, modes=(EAGER,), devices=("cpu",)),
    ),
    "sinkhorn_backward": (
        Form("autograd", autograd.sinkhorn_backward_recorded, modes=(EAGER,), binds=True, beaten_on=("cpu",)),
        Form("autograd", autograd.sinkhorn_backward_vjp, modes=(COMPILED,)),
        Form("as written", sinkhorn_backward_as_written, beaten_on=("cpu",)),
        Form("tokens innermost", sinkhorn_backward_innermost),
        Form("tokens innermost, blocks", sinkhorn_backward_blocks, modes=(EAGER,), devices=("cpu",)),
        Form("scalars", sinkhorn_backward_scalars, modes=(COMPILED,)),
    ),
}
