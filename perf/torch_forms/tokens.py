"""Plain torch for the kernels of n × n matrices: coefficients, sinkhorn.

Torch's loops are fast along the last axis, which is n long in [T, n, n]. So next to the formula as written
there are forms with the tokens innermost, [n, n, T], the transposes at both ends included. The coefficients
are computed from the projection's dots as the kernels leave them, [M, T], and squares [T]. The last arguments
are outputs.
"""

from __future__ import annotations

import torch

from ...checking import plain_torch
from ...spec import MHCSpec
from .baselines import COMPILED, EAGER, Form

# Tokens whose 16 values an eager operator still handles on one thread (torch: up to 32,768 elements). Waking
# the others takes longer than the work: 1.4 ms for all of 2048 tokens at once, 0.7 ms in two blocks.
BLOCK_TOKENS = 1024


def sinkhorn_as_written(logits: torch.Tensor, iters: int, eps: float, h_res: torch.Tensor) -> None:
    """The formula on [T, n, n]."""
    h_res.copy_(plain_torch.sinkhorn(logits, iters, eps))


def normalize_(P: torch.Tensor, iters: int, eps: float) -> torch.Tensor:
    """Logits P [n, n, T] to h_res, in place."""
    P.copy_(torch.softmax(P, 0)).add_(eps)
    P.div_(P.sum(1, keepdim=True).add_(eps))
    for _ in range(iters - 1):
        P.div_(P.sum(0, keepdim=True).add_(eps))
        P.div_(P.sum(1, keepdim=True).add_(eps))
    return P


def sinkhorn_innermost(logits: torch.Tensor, iters: int, eps: float, h_res: torch.Tensor) -> None:
    """Tokens innermost, in place."""
    P = logits.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
    h_res.copy_(normalize_(P, iters, eps).permute(2, 0, 1))


def sinkhorn_blocks(logits: torch.Tensor, iters: int, eps: float, h_res: torch.Tensor) -> None:
    """Tokens innermost, a block of tokens at a time."""
    for block, out in zip(logits.split(BLOCK_TOKENS), h_res.split(BLOCK_TOKENS), strict=True):
        sinkhorn_innermost(block, iters, eps, out)


def sinkhorn_scalars(logits: torch.Tensor, iters: int, eps: float, h_res: torch.Tensor) -> None:
    """Tokens innermost, every entry of the matrix a variable of its own: a compiler can keep them in registers."""
    n = logits.shape[-1]
    columns = [list(column.unbind(0)) for column in torch.softmax(logits.permute(1, 2, 0), 0).add(eps).unbind(1)]
    rows = [list(row) for row in zip(*columns, strict=True)]

    def normalize(vectors: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """Divide every vector by its sum + eps, and transpose the result."""
        scales = [1.0 / (sum(vector[1:], vector[0]) + eps) for vector in vectors]
        scaled = [[value * scale for value in vector] for vector, scale in zip(vectors, scales, strict=True)]
        return [list(vector) for vector in zip(*scaled, strict=True)]

    columns = normalize(rows)
    for _ in range(iters - 1):
        columns = normalize(normalize(columns))
    flat = torch.stack([columns[i][j] for j in range(n) for i in range(n)])
    h_res.copy_(flat.view(n, n, -1).permute(2, 0, 1))


def alpha_rows(alpha: torch.Tensor, n: int) -> torch.Tensor:
    """alpha [3] -> one for each of the M rows."""
    return torch.cat([one.expand(rows) for one, rows in zip(alpha.unbind(), (n, n, n * n), strict=True)])


def coefficients_as_written(
    dots: torch.Tensor,
    squares: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    h_pre: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
) -> None:
    """The formula on [T, M]."""
    n = spec.num_streams
    scale = torch.rsqrt(squares / spec.stream_size + spec.rms_eps)
    z = dots.T * scale.unsqueeze(-1) * alpha_rows(alpha, n) + bias
    h_pre.copy_(torch.sigmoid(z[:, :n]) + spec.pre_eps)
    h_post.copy_(spec.post_scale * torch.sigmoid(z[:, n : 2 * n]))
    h_res.copy_(plain_torch.sinkhorn(z[:, 2 * n :].unflatten(-1, (n, n)), spec.sinkhorn_iters, spec.sinkhorn_eps))


def coefficients_innermost(
    dots: torch.Tensor,
    squares: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    h_pre: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
) -> None:
    """Tokens innermost."""
    n = spec.num_streams
    scale = torch.rsqrt(squares / spec.stream_size + spec.rms_eps)
    z = dots * scale * alpha_rows(alpha, n).unsqueeze(-1) + bias.unsqueeze(-1)
    h_pre.copy_((torch.sigmoid(z[:n]) + spec.pre_eps).T)
    h_post.copy_((spec.post_scale * torch.sigmoid(z[n : 2 * n])).T)
    P = normalize_(z[2 * n :].unflatten(0, (n, n)), spec.sinkhorn_iters, spec.sinkhorn_eps)
    h_res.copy_(P.permute(2, 0, 1))


def coefficients_blocks(
    dots: torch.Tensor,
    squares: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    h_pre: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
) -> None:
    """Tokens innermost, a block of tokens at a time."""
    for first in range(0, len(squares), BLOCK_TOKENS):
        block = slice(first, first + BLOCK_TOKENS)
        inputs = (dots[:, block], squares[block], alpha, bias, spec)
        coefficients_innermost(*inputs, h_pre[block], h_post[block], h_res[block])


FORMS: dict[str, tuple[Form, ...]] = {
    "coefficients": (
        Form("as written", coefficients_as_written, beaten_on=("cpu",)),
        Form("tokens innermost", coefficients_innermost),
        Form("tokens innermost, blocks", coefficients_blocks, modes=(EAGER,), devices=("cpu",)),
    ),
    "sinkhorn": (
        Form("as written", sinkhorn_as_written, beaten_on=("cpu",)),
        Form("tokens innermost", sinkhorn_innermost),
        Form("tokens innermost, blocks", sinkhorn_blocks, modes=(EAGER,), devices=("cpu",)),
        Form("scalars", sinkhorn_scalars, modes=(COMPILED,)),
    ),
}
