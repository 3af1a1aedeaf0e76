"""The permutations between conventions. Each is its own inverse, or says which one is. They differentiate.

Sizes do not tell two orientations of n·n numbers apart: only data that is not symmetric does.
"""

from __future__ import annotations

import torch


def swapped_rows(tensor: torch.Tensor, num_streams: int) -> torch.Tensor:
    """[M, …] with the n·n res rows of one orientation -> a copy with those of the other; its own inverse.

    Of phi and of biases: [out, in] here, [in, out] in DeepSeek's fn and base.
    """
    n = num_streams
    gates, res = tensor[: 2 * n], tensor[2 * n :]
    return torch.cat((gates, res.unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)))


def comb(matrices: torch.Tensor) -> torch.Tensor:
    """h_res, its logits or its gradient [..., n, n] -> the same as DeepSeek's comb, contiguous; its own inverse.

    `comb[i, j]` is the weight of input stream i in output stream j: h_res transposed.
    """
    return matrices.mT.contiguous()


def swapped_streams(x: torch.Tensor) -> torch.Tensor:
    """Swap a stream's axes: [..., n, C] -> [..., C, n], contiguous, streams outermost to innermost; its own inverse."""
    return x.mT.contiguous()


def swapped_columns(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """Transpose the last axis as [groups, size] and flatten it again, contiguous.

    Of phi [M, K] or a norm weight [K]: with groups = n from columns for x flattened from [n, C] to columns for x
    flattened from [C, n]; with groups = C back.
    """
    return tensor.unflatten(-1, (groups, -1)).mT.flatten(-2).contiguous()
