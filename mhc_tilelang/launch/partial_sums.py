"""sum_partials: rows of partial sums added up, in an order that the sizes fix."""

from __future__ import annotations

import torch

from .. import compiler
from ..kernels import plans

ELEMENTS = 256  # of a block of `sum_partials`


def sum_partials(partial: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """partial [partials, elements] -> [elements], in an order that the sizes fix."""
    total = partial.new_empty(partial.shape[1]) if out is None else out
    lanes = plans.partial_lanes(partial.shape[0])
    kernel = compiler.kernel("sum_partials", compiler.target_of(partial.device), lanes=lanes, block=ELEMENTS)
    kernel(partial=partial, total=total)
    return total
