"""Preparation of operands for every launch: vector alignment, views by vector width, placeholders for absent ones."""

from __future__ import annotations

from typing import Any

import torch

from .. import compiler
from ..compiler.kernel import Kernel, dtype_name
from ..kernels import plans

Gradient = torch.Tensor | None


def stream_kernel(family: str, x: torch.Tensor, **parameters: Any) -> Kernel:
    """Return a family's kernel for the sizes, dtype and device of a stream x [T, n, C], and its other parameters."""
    return compiler.kernel(
        family,
        compiler.target_of(x.device),
        num_streams=x.shape[1],
        hidden_size=x.shape[2],
        dtype=dtype_name(x.dtype),
        **parameters,
    )


def channel_kernel(family: str, x: torch.Tensor, *accessed: torch.Tensor, **parameters: Any) -> Kernel:
    """`stream_kernel` of a family that walks over channels, for vectors that all `accessed` pointers allow."""
    platform = compiler.platform_of(x.device)
    tile = plans.channel_tile(x.shape[2], x.element_size(), platform, alignment(*accessed), family == "expand")
    return stream_kernel(family, x, **parameters, tile=tile)


def alignment(*tensors: torch.Tensor) -> int:
    """Return the largest power of two, up to 16 bytes, that divides every data pointer. Views can start anywhere.

    Of the first tensor's bytes: one with wider elements must start on as many of its own for the same vector.
    """
    bits = plans.MAX_ACCESS_BYTES
    for tensor in tensors:
        bits |= tensor.data_ptr() // max(1, tensor.element_size() // tensors[0].element_size())
    return bits & -bits


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or on a GPU a copy of it if it does not start on 16 bytes, which is how kernels read.

    Not for the streams of `pre`, `post` and `expand`: those kernels are built for narrower accesses instead.
    """
    starts_anywhere = compiler.platform_of(tensor.device) == "cpu" or alignment(tensor) == plans.MAX_ACCESS_BYTES
    return tensor if starts_anywhere else tensor.clone()


def by_width(tensor: torch.Tensor, tile: plans.ReductionTile) -> torch.Tensor:
    """[…, C] as […, C / width, width], where a kernel can read it."""
    return aligned(tensor).view(*tensor.shape[:-1], tensor.shape[-1] // tile.width, tile.width)


def placeholder_if_none(tensor: Gradient, like: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or the one element that a kernel takes for a tensor it does not touch."""
    return like.new_empty(1) if tensor is None else aligned(tensor)
