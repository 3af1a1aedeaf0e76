"""Plain torch for the backward of the kernels that read or write the stream: expand, project, pre.

The habits are those of `stream_forms`: matrix products, sums of broadcast products or streams one by one for
torch.compile to fuse, and walks over blocks of tokens for a CPU's cache. To these come what autograd makes of
the forward (`backward_autograd`), and products of 16-bit values, summed in float32, for tensor cores.
`post` is in `backward_post_forms`. Arguments as in `mhc_tilelang.launch`; the last ones are outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backward_autograd as autograd
from .baselines import COMPILED, EAGER, Form
from .streams import block_tokens, widen

HALF = ("bfloat16", "float16")


def total(terms: list[Tensor]) -> Tensor:
    """Their sum, without an axis to sum over."""
    return sum(terms[1:], terms[0])


def expand_backward_sum(g_x: Tensor, g_h: Tensor) -> None:
    """torch.sum, which adds 16-bit values in float32."""
    torch.sum(g_x, 1, out=g_h)


def expand_backward_streams(g_x: Tensor, g_h: Tensor) -> None:
    """Stream by stream."""
    g_h.copy_(total(list(g_x.float().unbind(1))))


def expand_backward_blocks(g_x: Tensor, g_h: Tensor) -> None:
    """Stream by stream, a block of tokens at a time."""
    block = block_tokens(g_x)
    workspace = g_x.new_empty(min(block, len(g_x)), g_x.shape[2], dtype=torch.float32)
    for g_block, out in zip(g_x.split(block), g_h.split(block), strict=True):
        sums = out if out.dtype == torch.float32 else workspace[: len(out)]
        sums.copy_(g_block[:, 0])
        for stream in g_block.unbind(1)[1:]:
            sums.add_(stream)
        if sums is not out:
            out.copy_(sums)


def pre_backward_einsum(g_layer_input: Tensor, x: Tensor, g_h_pre: Tensor) -> None:
    """A batch of matrix-vector products."""
    g_h_pre.copy_(torch.einsum("tic,tc->ti", x.float(), g_layer_input.float()))


def pre_backward_multiply_sum(g_layer_input: Tensor, x: Tensor, g_h_pre: Tensor) -> None:
    """Broadcast products summed over the channels."""
    g_h_pre.copy_((x.float() * g_layer_input.float().unsqueeze(1)).sum(-1))


def pre_backward_streams(g_layer_input: Tensor, x: Tensor, g_h_pre: Tensor) -> None:
    """A dot per stream, so that one loop over the channels can feed them all."""
    g = g_layer_input.float()
    g_h_pre.copy_(torch.stack([(stream.float() * g).sum(-1) for stream in x.unbind(1)], 1))


def pre_backward_blocks(g_layer_input: Tensor, x: Tensor, g_h_pre: Tensor) -> None:
    """Broadcast products of blocks of tokens, summed: on a core 2 ms where batched products with a vector take 7."""
    block = min(block_tokens(x), len(x))
    products = x.new_empty(block, *x.shape[1:], dtype=torch.float32)
    vectors = x.new_empty(block, x.shape[2], dtype=torch.float32)
    blocks = (tensor.split(block) for tensor in (g_layer_input, x, g_h_pre))
    for g_block, x_block, out in zip(*blocks, strict=True):
        vector = widen(g_block, vectors).unsqueeze(1)
        torch.sum(torch.mul(x_block, vector, out=products[: len(out)]), -1, out=out)


def pre_backward_dots(g_layer_input: Tensor, x: Tensor, g_h_pre: Tensor) -> None:
    """The 16-bit streams as they are: their products are exact in float32."""
    torch.bmm(x, g_layer_input.unsqueeze(-1), out_dtype=torch.float32, out=g_h_pre.unsqueeze(-1))


def project_backward_matmul(g_projected: Tensor, x: Tensor, phi: Tensor, g_x: Tensor, g_phi: Tensor) -> None:
    """The formula as written."""
    flat, g_dots, rho = x.flatten(1).float(), g_projected[:-1], g_projected[-1]
    g_x.copy_((g_dots.T @ phi + rho.unsqueeze(-1) * flat).view_as(x))
    g_phi.copy_(g_dots @ flat)


def project_backward_addmm(g_projected: Tensor, x: Tensor, phi: Tensor, g_x: Tensor, g_phi: Tensor) -> None:
    """The products added in place to the scaled stream."""
    flat, g_dots, rho = x.flatten(1).float(), g_projected[:-1], g_projected[-1]
    torch.mm(g_dots, flat, out=g_phi)
    sums = g_x.flatten(1) if g_x.dtype == torch.float32 else flat
    torch.mul(flat, rho.unsqueeze(-1), out=sums).addmm_(g_dots.T, phi)
    if sums is flat:
        g_x.copy_(sums.view_as(x))


def project_backward_rows(g_projected: Tensor, x: Tensor, phi: Tensor, g_x: Tensor, g_phi: Tensor) -> None:
    """g_x as one sum over the rows of phi, each a broadcast product; g_phi as a matrix product."""
    flat, g_dots, rho = x.flatten(1).float(), g_projected[:-1], g_projected[-1]
    sums = rho.unsqueeze(-1) * flat
    for g_row, phi_row in zip(g_dots.unbind(), phi.unbind(), strict=True):
        sums = sums + g_row.unsqueeze(-1) * phi_row
    g_x.copy_(sums.view_as(x))
    g_phi.copy_(g_dots @ flat)


def project_backward_blocks(g_projected: Tensor, x: Tensor, phi: Tensor, g_x: Tensor, g_phi: Tensor) -> None:
    """Matrix products of blocks of tokens; g_phi is added up over them."""
    block = min(block_tokens(x), len(x))
    workspace = x.new_empty(block, phi.shape[1], dtype=torch.float32)
    g_phi.zero_()
    blocks = (g_projected.split(block, dim=1), x.flatten(1).split(block), g_x.flatten(1).split(block))
    for g_block, x_block, out in zip(*blocks, strict=True):
        wide, g_dots, rho = widen(x_block, workspace), g_block[:-1], g_block[-1]
        g_phi.addmm_(g_dots, wide)
        sums = out if out.dtype == torch.float32 else wide
        torch.mul(wide, rho.unsqueeze(-1), out=sums).addmm_(g_dots.T, phi)
        if sums is not out:
            out.copy_(sums)


def halves(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 values as the sum of two of 16 bits: the values rounded, and what that leaves, rounded."""
    high = values.to(dtype)
    return high, (values - high).to(dtype)


def project_backward_halves(g_projected: Tensor, x: Tensor, phi: Tensor, g_x: Tensor, g_phi: Tensor) -> None:
    """Multiply on tensor cores: float32 factors in 16-bit halves, the product of the low halves left out.

    In g_phi, x is exact. Rows of g_dots are scaled to 2¹⁴, else their low halves underflow in float16.
    """
    flat, g_dots, rho = x.flatten(1), g_projected[:-1], g_projected[-1]
    g_high, g_low = halves(g_dots, torch.bfloat16)
    phi_high, phi_low = halves(phi, torch.bfloat16)
    left, right = torch.cat((g_high, g_high, g_low)), torch.cat((phi_high, phi_low, phi_high))
    product = torch.mm(left.T, right, out_dtype=torch.float32)
    g_x.copy_(product.addcmul_(flat.float(), rho.unsqueeze(-1)).view_as(x))
    scale = g_dots.abs().amax(1, keepdim=True).clamp_min(1e-30) / 2**14
    sums = torch.mm(torch.cat(halves(g_dots / scale, x.dtype)), flat, out_dtype=torch.float32)
    torch.add(*sums.chunk(2), out=g_phi).mul_(scale)


FORMS: dict[str, tuple[Form, ...]] = {
    "expand_backward": (
        Form("sum", expand_backward_sum, beaten_on=("cpu",)),
        Form("stream by stream", expand_backward_streams, beaten_on=("cpu",)),
        Form("stream by stream, blocks", expand_backward_blocks, modes=(EAGER,), devices=("cpu",)),
    ),
    "project_backward": (
        Form("autograd", autograd.project_backward_recorded, modes=(EAGER,), binds=True, beaten_on=("cpu",)),
        Form("autograd", autograd.project_backward_vjp, modes=(COMPILED,)),
        Form("matmul", project_backward_matmul, beaten_on=("cpu",)),
        Form("addmm", project_backward_addmm, modes=(EAGER,)),
        Form("row by row", project_backward_rows, modes=(COMPILED,)),
        Form("addmm in blocks", project_backward_blocks, modes=(EAGER,), devices=("cpu",)),
        Form("halves", project_backward_halves, modes=(EAGER,), devices=("cuda",), dtypes=HALF),
    ),
    "aggregate_backward": (
        Form("einsum", pre_backward_einsum, beaten_on=("cpu",)),
        Form("multiply and sum", pre_backward_multiply_sum, beaten_on=("cpu",)),
        Form("stream by stream", pre_backward_streams, modes=(COMPILED,)),
        Form("multiply and sum in blocks", pre_backward_blocks, modes=(EAGER,), devices=("cpu",)),
        Form("bmm of 16 bits", pre_backward_dots, modes=(EAGER,), devices=("cuda",), dtypes=HALF),
    ),
}
