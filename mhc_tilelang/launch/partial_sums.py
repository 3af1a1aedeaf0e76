"""sum_partials: rows of partial sums added up, in an order that the sizes fix."""

from __future__ import annotations

import torch

from .. import compiler
from ..kernels import plans


def sum_partials(partial: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """partial [partials, elements] -> [elements], in an order that the sizes fix."""
    total = partial.new_empty(partial.shape[1]) if out is None else out
    lanes = plans.partial_lanes(partial.shape[0])
    target = compiler.target_of(partial.device)
    block = plans.partial_block(lanes, compiler.platform_of(partial.device))
    kernel = compiler.kernel("sum_partials", target, lanes=lanes, block=block, threads=plans.PARTIAL_THREADS)
    kernel(partial=partial, total=total)
    return total
