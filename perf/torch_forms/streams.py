"""Plain torch for the kernels that read or write the stream: expand, project, pre, post.

Three habits of fast torch are represented: matrix products (`einsum`, `matmul`), sums of broadcast products,
which torch.compile fuses into one loop, and, for CPUs, a walk over blocks of tokens whose float32 copy stays
in the cache, so that eager torch reads the stream once too. Arguments as in `mhc_tilelang.launch`; the last
ones are outputs.
"""

from __future__ import annotations

import torch

from ...checking import plain_torch
from ...spec import MHCSpec
from .baselines import COMPILED, EAGER, Form

BLOCK_BYTES = 4 << 20  # of float32 stream; of 1, 2, 4 and 8 MiB the fastest on a core with 1 MiB of L2


def block_tokens(x: torch.Tensor) -> int:
    """Tokens whose float32 stream takes BLOCK_BYTES."""
    return max(1, BLOCK_BYTES // (x[0].numel() * torch.float32.itemsize))


def widen(block: torch.Tensor, workspace: torch.Tensor) -> torch.Tensor:
    """Widen the block to float32: itself, or copied into the workspace."""
    return block if block.dtype == torch.float32 else workspace[: len(block)].copy_(block)


def expand_copy(h: torch.Tensor, x: torch.Tensor) -> None:
    """One copy of a broadcast view."""
    x.copy_(h.unsqueeze(1).expand_as(x))


def expand_stack(h: torch.Tensor, x: torch.Tensor) -> None:
    """Written stream by stream."""
    torch.stack([h] * x.shape[1], dim=1, out=x)


def project_matmul(x: torch.Tensor, phi: torch.Tensor, dots: torch.Tensor, squares: torch.Tensor) -> None:
    """The formula as written: x.float() @ phi.T, and a sum of squares."""
    got_dots, got_squares = plain_torch.project(x, phi)
    dots.copy_(got_dots)
    squares.copy_(got_squares)


def project_linear(x: torch.Tensor, phi: torch.Tensor, dots: torch.Tensor, squares: torch.Tensor) -> None:
    """F.linear, and the squares as a norm, which needs no temporary of the stream's size."""
    flat = x.flatten(1).float()
    dots.copy_(torch.nn.functional.linear(flat, phi))
    squares.copy_(torch.linalg.vector_norm(flat, dim=-1).square())


def project_multiply_sum(x: torch.Tensor, phi: torch.Tensor, dots: torch.Tensor, squares: torch.Tensor) -> None:
    """Broadcast products summed: a temporary of T·M·K in eager torch, none in a fused loop."""
    flat = x.flatten(1).float()
    dots.copy_((flat.unsqueeze(1) * phi).sum(-1))
    squares.copy_(flat.square().sum(-1))


def project_blocks(x: torch.Tensor, phi: torch.Tensor, dots: torch.Tensor, squares: torch.Tensor) -> None:
    """Matrix products and norms of blocks of tokens."""
    block = block_tokens(x)
    workspace = x.new_empty(block, phi.shape[1], dtype=torch.float32)
    blocks = (x.flatten(1).split(block), dots.split(block), squares.split(block))
    for x_block, dots_block, squares_block in zip(*blocks, strict=True):
        wide = widen(x_block, workspace)
        torch.mm(wide, phi.T, out=dots_block)
        torch.linalg.vector_norm(wide, dim=-1, out=squares_block)
    squares.square_()


def project_split_phi(x: torch.Tensor, phi: torch.Tensor, dots: torch.Tensor, squares: torch.Tensor) -> None:
    """The kernels' own idea: phi in two bfloat16 halves, one product on tensor cores, halves added in float32."""
    high = phi.bfloat16()
    halves = torch.cat((high, (phi - high).bfloat16()))
    flat = x.flatten(1)
    product = torch.mm(flat, halves.T, out_dtype=torch.float32)
    torch.add(*product.chunk(2, dim=1), out=dots)
    torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float32, out=squares)
    squares.square_()


def pre_einsum(x: torch.Tensor, h_pre: torch.Tensor, layer_input: torch.Tensor) -> None:
    """A batch of vector-matrix products."""
    layer_input.copy_(torch.einsum("ti,tic->tc", h_pre, x.float()))


def pre_multiply_sum(x: torch.Tensor, h_pre: torch.Tensor, layer_input: torch.Tensor) -> None:
    """Broadcast products summed over the streams."""
    layer_input.copy_(plain_torch.aggregate(x, h_pre))


def pre_blocks(x: torch.Tensor, h_pre: torch.Tensor, layer_input: torch.Tensor) -> None:
    """Batched products of blocks of tokens."""
    block = block_tokens(x)
    workspace = x.new_empty(block, *x.shape[1:], dtype=torch.float32)
    sums = x.new_empty(block, 1, x.shape[2], dtype=torch.float32)
    for x_block, weights, out in zip(x.split(block), h_pre.split(block), layer_input.split(block), strict=True):
        torch.bmm(weights.unsqueeze(1), widen(x_block, workspace), out=sums[: len(out)])
        out.copy_(sums[: len(out), 0])


def sublayer_input(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    layer_input: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
) -> None:
    """The formulas as written, one after the other."""
    for output, result in zip((layer_input, h_post, h_res), plain_torch.pre(x, phi, alpha, bias, spec), strict=True):
        output.copy_(result)


def post_einsum(
    x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor, x_next: torch.Tensor
) -> None:
    """A batch of n × n by n × C products, and an outer product."""
    mixed = torch.einsum("tji,tic->tjc", h_res, x.float())
    x_next.copy_(mixed + h_post.unsqueeze(-1) * layer_output.float().unsqueeze(1))


def post_multiply_sum(
    x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor, x_next: torch.Tensor
) -> None:
    """Broadcast products summed over the input streams."""
    x_next.copy_(plain_torch.post(x, layer_output, h_post, h_res))


def post_streams(
    x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor, x_next: torch.Tensor
) -> None:
    """One broadcast product per input stream, without an axis to sum over."""
    total = h_post.unsqueeze(-1) * layer_output.float().unsqueeze(1)
    for i in range(x.shape[1]):
        total = total + h_res[:, :, i, None] * x[:, None, i].float()
    x_next.copy_(total)


def post_blocks(
    x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor, x_next: torch.Tensor
) -> None:
    """Batched products of blocks of tokens, added to the outer product in place."""
    block = block_tokens(x)
    workspace, sums = x.new_empty(2, block, *x.shape[1:], dtype=torch.float32)
    blocks = (tensor.split(block) for tensor in (x, layer_output, h_post, h_res, x_next))
    for x_block, layer_block, post_block, res_block, out in zip(*blocks, strict=True):
        total = out if out.dtype == torch.float32 else sums[: len(out)]
        torch.mul(post_block.unsqueeze(-1), layer_block.unsqueeze(1), out=total)
        torch.baddbmm(total, res_block, widen(x_block, workspace), out=total)
        if total is not out:
            out.copy_(total)


FORMS: dict[str, tuple[Form, ...]] = {
    "expand": (
        Form("broadcast copy", expand_copy),
        Form("stack", expand_stack, modes=(EAGER,), beaten_on=("cpu",)),
    ),
    "project": (
        Form("matmul", project_matmul, beaten_on=("cpu",)),
        Form("linear and norm", project_linear),
        Form("multiply and sum", project_multiply_sum, modes=(COMPILED,)),
        Form("matmul in blocks", project_blocks, modes=(EAGER,), devices=("cpu",)),
        Form("split phi", project_split_phi, modes=(EAGER,), devices=("cuda",), dtypes=("bfloat16",)),
    ),
    "aggregate": (
        Form("einsum", pre_einsum),
        Form("multiply and sum", pre_multiply_sum, beaten_on=("cpu",)),
        Form("bmm in blocks", pre_blocks, modes=(EAGER,), devices=("cpu",)),
    ),
    "post": (
        Form("einsum", post_einsum, beaten_on=("cpu",)),
        Form("multiply and sum", post_multiply_sum, beaten_on=("cpu",)),
        Form("stream by stream", post_streams, modes=(COMPILED,)),
        Form("baddbmm in blocks", post_blocks, modes=(EAGER,), devices=("cpu",)),
    ),
}

SUBLAYER_INPUT_FORMS = (Form("as written", sublayer_input),)
