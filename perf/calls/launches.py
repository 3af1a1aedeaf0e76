"""Launches of a call on a target, from sizes alone: the call itself runs, on meta tensors.

So what `launch` decides here is what it decides on a device, for tensors that start on 16 bytes. Loads torch when
`launches` is called, not before.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from .cases import Case, Shape

if TYPE_CHECKING:
    from ...compiler.recording import Recorded

TELLING = 128  # more than there are rows of phi, slabs or splits where a stream has no more tokens or channels


def launches(case: Case, target: str, parallel_blocks: int) -> tuple[Recorded, ...]:
    """The kernels of one call, in order, each with the names of its tensors that are as wide as the stream or a layer.

    Args:
        case: a call of `table.CALLS` at a shape.
        target: "cuda" or "cpu".
        parallel_blocks: how many blocks of a projection the device runs at a time.
    """
    shape = case.shape
    # Shapes tell streams from small tensors, where neither tokens nor channels are as few as other extents.
    tokens, width = (size if size > TELLING else size + TELLING for size in (shape.num_tokens, shape.hidden_size))
    telling = replace(shape, num_tokens=tokens, hidden_size=width)
    found, told_apart = (record_calls(one, target, parallel_blocks)[case.kernel] for one in (shape, telling))
    # More tokens may be a launch more, of sums over ranges of them: kernels are paired by family, in their order.
    wide: dict[str, list[tuple[str, ...]]] = {}
    for one in reversed(told_apart):
        wide.setdefault(one.family, []).append(one.wide(tokens, width))
    # Fewer tokens may be another kernel, whose own shapes have to do.
    own = (shape.num_tokens, shape.hidden_size)
    return tuple(
        replace(one, streams=wide[one.family].pop() if one.family in wide else one.wide(*own)) for one in found
    )


@cache
def record_calls(shape: Shape, target: str, parallel_blocks: int) -> dict[str, list[Recorded]]:
    """Record the kernels of every call at these sizes."""
    import torch

    from ...compiler.recording import recording
    from .every_call import every_call

    found = {}
    with recording(target, parallel_blocks) as noted:
        for name, run in every_call(shape, torch.device("meta")).items():
            noted.clear()
            run()
            found[name] = list(noted)
    return found
