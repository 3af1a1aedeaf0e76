"""Shared parts of the tests on a GPU: `shifted` makes a view that starts where no vector does."""

from __future__ import annotations

import torch

CUDA = torch.device("cuda", 0)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor, contiguous, but starting one element into its storage."""
    storage = tensor.new_empty(tensor.numel() + 1)
    storage[1:] = tensor.flatten()
    return storage[1:].view(tensor.shape)
