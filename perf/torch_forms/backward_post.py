"""Plain torch for the backward of post: two sums over streams, and n² + n dots over channels, from one gradient.

The habits are those of `backward_stream_forms`. Which loops torch.compile fuses depends on the way the sums are
written, so there are three ways. Arguments as in `mhc_tilelang.launch`; the last ones are outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backward_autograd as autograd
from .backward_streams import HALF, total
from .baselines import COMPILED, EAGER, Form
from .streams import block_tokens, widen


def post_backward_einsum(
    g_x_next: Tensor, x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor,
    g_x: Tensor, g_layer_output: Tensor, g_h_post: Tensor, g_h_res: Tensor,
) -> None:  # fmt: skip
    """Compute four batches of small products."""
    g = g_x_next.float()
    g_x.copy_(torch.einsum("tji,tjc->tic", h_res, g))
    g_layer_output.copy_(torch.einsum("tj,tjc->tc", h_post, g))
    g_h_post.copy_(torch.einsum("tjc,tc->tj", g, layer_output.float()))
    g_h_res.copy_(torch.einsum("tjc,tic->tji", g, x.float()))


def post_backward_multiply_sum(
    g_x_next: Tensor, x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor,
    g_x: Tensor, g_layer_output: Tensor, g_h_post: Tensor, g_h_res: Tensor,
) -> None:  # fmt: skip
    """Broadcast products summed over output streams, and over channels."""
    g = g_x_next.float()
    g_x.copy_((h_res.unsqueeze(-1) * g.unsqueeze(2)).sum(1))
    g_layer_output.copy_((h_post.unsqueeze(-1) * g).sum(1))
    g_h_post.copy_((g * layer_output.float().unsqueeze(1)).sum(-1))
    g_h_res.copy_((g.unsqueeze(2) * x.float().unsqueeze(1)).sum(-1))


def post_backward_streams(
    g_x_next: Tensor, x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor,
    g_x: Tensor, g_layer_output: Tensor, g_h_post: Tensor, g_h_res: Tensor,
) -> None:  # fmt: skip
    """Stream by stream: every result is a sum of products of [T, C], which one loop can compute."""
    n = x.shape[1]
    g, streams, layer = g_x_next.float().unbind(1), x.float().unbind(1), layer_output.float()
    g_h_post.copy_(torch.stack([(g[j] * layer).sum(-1) for j in range(n)], 1))
    g_h_res.copy_(torch.stack([(g[j] * streams[i]).sum(-1) for j in range(n) for i in range(n)], 1).view_as(h_res))
    g_layer_output.copy_(total([h_post[:, j, None] * g[j] for j in range(n)]))
    g_x.copy_(torch.stack([total([h_res[:, j, i, None] * g[j] for j in range(n)]) for i in range(n)], 1))


def post_backward_outputs(
    g_x_next: Tensor, x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor,
    g_x: Tensor, g_layer_output: Tensor, g_h_post: Tensor, g_h_res: Tensor,
) -> None:  # fmt: skip
    """Output stream by output stream: a dot with all input streams at a time."""
    g, wide, layer = [stream.float() for stream in g_x_next.unbind(1)], x.float(), layer_output.float()
    n = len(g)
    g_x.copy_(total([h_res[:, j, :, None] * g[j].unsqueeze(1) for j in range(n)]))
    g_h_res.copy_(torch.stack([(g[j].unsqueeze(1) * wide).sum(-1) for j in range(n)], 1))
    g_layer_output.copy_(total([h_post[:, j, None] * g[j] for j in range(n)]))
    g_h_post.copy_(torch.stack([(g[j] * layer).sum(-1) for j in range(n)], 1))


def post_backward_blocks(
    g_x_next: Tensor, x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor,
    g_x: Tensor, g_layer_output: Tensor, g_h_post: Tensor, g_h_res: Tensor,
) -> None:  # fmt: skip
    """Batched products of blocks of tokens; g_h_post as products summed, since those with a vector are slow."""
    block = min(block_tokens(x), len(x))
    n, C = x.shape[1:]
    workspace, gradients, sums = x.new_empty(3, block, n, C, dtype=torch.float32)
    vectors = x.new_empty(block, 1, C, dtype=torch.float32)
    tensors = (g_x_next, x, layer_output, h_post, h_res, g_x, g_layer_output, g_h_post, g_h_res)
    for g_b, x_b, layer_b, post_b, res_b, g_x_b, g_layer_b, g_post_b, g_res_b in zip(
        *(tensor.split(block) for tensor in tensors), strict=True
    ):
        g, layer = widen(g_b, gradients), widen(layer_b, vectors[:, 0])
        torch.sum(torch.mul(g, layer.unsqueeze(1), out=sums[: len(g)]), -1, out=g_post_b)
        torch.bmm(g, widen(x_b, workspace).mT, out=g_res_b)
        if g_x_b.dtype == torch.float32:
            torch.bmm(res_b.mT, g, out=g_x_b)
            torch.bmm(post_b.unsqueeze(1), g, out=g_layer_b.unsqueeze(1))
        else:
            g_x_b.copy_(torch.bmm(res_b.mT, g, out=sums[: len(g)]))
            g_layer_b.copy_(torch.bmm(post_b.unsqueeze(1), g, out=vectors[: len(g)])[:, 0])


def post_backward_joined(
    g_x_next: Tensor, x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor,
    g_x: Tensor, g_layer_output: Tensor, g_h_post: Tensor, g_h_res: Tensor,
) -> None:  # fmt: skip
    """The layer's output as one more stream: two batched products for the four results, block by block."""
    block = min(block_tokens(x), len(x))
    n, C = x.shape[1:]
    gradients = x.new_empty(block, n, C, dtype=torch.float32)
    workspace, sums = x.new_empty(2, block, n + 1, C, dtype=torch.float32)
    weights = torch.cat((h_res, h_post.unsqueeze(-1)), -1)
    dots = torch.empty_like(weights)
    tensors = (g_x_next, x, layer_output, weights, dots, g_x, g_layer_output)
    for g_b, x_b, layer_b, weights_b, dots_b, g_x_b, g_layer_b in zip(
        *(tensor.split(block) for tensor in tensors), strict=True
    ):
        g, wide, sums_b = widen(g_b, gradients), workspace[: len(g_b)], sums[: len(g_b)]
        wide[:, :n].copy_(x_b)
        wide[:, n].copy_(layer_b)
        torch.bmm(g, wide.mT, out=dots_b)
        torch.bmm(weights_b.mT, g, out=sums_b)
        g_x_b.copy_(sums_b[:, :n])
        g_layer_b.copy_(sums_b[:, n])
    g_h_res.copy_(dots[..., :n])
    g_h_post.copy_(dots[..., n])


def post_backward_dots(
    g_x_next: Tensor, x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor,
    g_x: Tensor, g_layer_output: Tensor, g_h_post: Tensor, g_h_res: Tensor,
) -> None:  # fmt: skip
    """The dots of the 16-bit streams as they are, exact in float32; the rest as two batched products."""
    torch.bmm(g_x_next, x.mT, out_dtype=torch.float32, out=g_h_res)
    torch.bmm(g_x_next, layer_output.unsqueeze(-1), out_dtype=torch.float32, out=g_h_post.unsqueeze(-1))
    g = g_x_next.float()
    g_x.copy_(torch.bmm(h_res.mT, g))
    g_layer_output.copy_(torch.bmm(h_post.unsqueeze(1), g)[:, 0])


FORMS: dict[str, tuple[Form, ...]] = {
    "post_backward": (
        Form("autograd", autograd.post_backward_recorded, modes=(EAGER,), binds=True, beaten_on=("cpu",)),
        Form("autograd", autograd.post_backward_vjp, modes=(COMPILED,)),
        Form("einsum", post_backward_einsum, beaten_on=("cpu",)),
        Form("multiply and sum", post_backward_multiply_sum, modes=(COMPILED,)),
        Form("stream by stream", post_backward_streams, modes=(COMPILED,)),
        Form("output by output", post_backward_outputs, modes=(COMPILED,)),
        Form("bmm in blocks", post_backward_blocks, modes=(EAGER,), devices=("cpu",)),
        Form("joined bmm in blocks", post_backward_joined, modes=(EAGER,), devices=("cpu",)),
        Form("bmm of 16 bits", post_backward_dots, modes=(EAGER,), devices=("cuda",), dtypes=HALF),
    ),
}
