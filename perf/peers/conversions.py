"""DeepSeek's order of the residual coefficients, which TileKernels, transformers and (by its order) Liger use.

Their comb is h_res transposed, `comb[i, j]` the weight of input stream i in output stream j, and the res rows of fn
and base are [in, out] row-major. Their Sinkhorn takes rows first and columns last, which on the transpose is ours.
Sizes do not tell the two apart: only data that is not symmetric does.
"""

from __future__ import annotations

import torch


def swapped_rows(tensor: torch.Tensor, num_streams: int) -> torch.Tensor:
    """[M, …] with the n·n res rows of one orientation -> a copy with those of the other; its own inverse."""
    n = num_streams
    gates, res = tensor[: 2 * n], tensor[2 * n :]
    return torch.cat((gates, res.unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)))


def comb(matrices: torch.Tensor) -> torch.Tensor:
    """h_res, its logits or its gradient [T, n, n] -> the same as comb, contiguous; its own inverse."""
    return matrices.mT.contiguous()
