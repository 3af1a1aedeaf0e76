"""The replay of a block of sublayers, launched: its streams and layer inputs again, as `post` and `pre` made them.

Tensors come flat, [T, …], and contiguous; `recompute` sees to that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from ..compiler.kernel import dtype_name
from ..kernels.plans import MAX_SUBLAYERS
from .operands import aligned, channel_kernel


class Written(NamedTuple):
    """A write that `post` merged into a stream: layer_output [T, C], h_post [T, n], h_res [T, n, n] or None, which is
    the identity.
    """

    layer_output: torch.Tensor
    h_post: torch.Tensor
    h_res: torch.Tensor | None = None


def replay(
    x: torch.Tensor, written: Sequence[Written], h_pre: Mapping[int, torch.Tensor]
) -> tuple[list[torch.Tensor], dict[int, torch.Tensor]]:
    """x_0 [T, n, C], what was written to it one after the other, and h_pre_k [T, n] for each k whose layer input is
    wanted, 0 for that of x_0 itself -> x_1, x_2, … [T, n, C], and layer_input_k [T, C] for these k.

    Bits are those of `post` and `aggregate`. A launch takes eight sublayers whose layers agree in dtype, and in
    having an h_res.
    """
    streams, layer_inputs = [x], dict[int, torch.Tensor]()
    for first, part in replay_parts(written):
        last = first + len(part)
        asked = tuple(k for k in range(first + (first > 0), last + 1) if k in h_pre)
        made = [torch.empty_like(x) for _ in part]
        layer_inputs |= {k: x.new_empty(x.shape[0], x.shape[2]) for k in asked}
        _launch(streams[-1], part, made, {k - first: (h_pre[k], layer_inputs[k]) for k in asked})
        streams += made
    return streams[1:], layer_inputs


def replay_parts(written: Sequence[Written]) -> list[tuple[int, Sequence[Written]]]:
    """Runs of at most eight sublayers with one dtype of layer outputs, all with an h_res or all without, and where each
    begins; one of none for none.
    """
    found: list[tuple[int, Sequence[Written]]] = []
    first = 0
    for _, run in groupby(written, key=lambda one: (one.layer_output.dtype, one.h_res is None)):
        same = list(run)
        found += [(first + at, same[at : at + MAX_SUBLAYERS]) for at in range(0, len(same), MAX_SUBLAYERS)]
        first += len(same)
    return found or [(0, ())]


def _launch(
    x: torch.Tensor,
    written: Sequence[Written],
    made: Sequence[torch.Tensor],
    inputs: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Launch one kernel: `made` are the streams that it writes, `inputs` h_pre and layer input by their place in it."""
    layer_outputs = [one.layer_output for one in written]
    wide = [x, *made, *layer_outputs, *(layer_input for _, layer_input in inputs.values())]
    layer_dtype = dtype_name(layer_outputs[0].dtype if written else x.dtype)
    sizes: dict[str, Any] = {"layer_dtype": layer_dtype, "sublayers": len(written), "inputs": tuple(inputs)}
    if written and written[0].h_res is None:
        sizes["has_h_res"] = False
    named = {f"x_{k}": tensor for k, tensor in enumerate([x, *made])}
    for k, one in enumerate(written):
        named |= {f"layer_output_{k}": one.layer_output, f"h_post_{k}": aligned(one.h_post)}
        if one.h_res is not None:
            named[f"h_res_{k}"] = aligned(one.h_res)
    for k, (h_pre, layer_input) in inputs.items():
        named |= {f"h_pre_{k}": aligned(h_pre), f"layer_input_{k}": layer_input}
    channel_kernel("replay", x, *wide, **sizes)(**named)
