"""The check of the replay: each stream and layer input of a block from the stream before, as it was rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ... import launch, reference
from ...compiler.kernel import dtype_name
from ...launch import Written
from .. import plain_torch, tolerance
from ..comparison import Array, Comparison, check, numpy64
from ..inputs import Case, Inputs

SUBLAYERS = 3  # of the block, of which the last one's output is not replayed


@check("x_next", "layer_input")
def check_replay(case: Case, inputs: Inputs) -> list[Comparison]:
    """x_1 and x_2 as of post, and the inputs of all three layers as of pre; one sublayer's tokens after another's."""
    n, dtype = case.num_streams, dtype_name(case.dtype)
    of_sublayer = [Inputs.of(replace(case, seed=case.seed + k), inputs.x.device) for k in range(SUBLAYERS)]
    written = [Written(i.layer_output, i.h_post, i.h_res) for i in of_sublayer[:-1]]
    h_pre = [i.h_pre for i in of_sublayer]
    streams, layer_inputs = launch.replay(inputs.x, written, dict(enumerate(h_pre)))
    starts, plain = [inputs.x, *streams], [inputs.x]
    for i in of_sublayer[:-1]:
        plain.append(plain_torch.post(plain[-1], i.layer_output, i.h_post, i.h_res))

    mixed = [join(starts[:-1]), *map(join, zip(*written, strict=True))]
    mixed_magnitude = reference.post(*map(np.abs, mixed))
    gathered = join(starts), join(h_pre)
    gathered_magnitude = reference.aggregate(*map(np.abs, gathered))
    return [
        Comparison(
            "x_next",
            join(streams),
            join(plain[1:]),
            reference.post(*mixed),
            tolerance.combination(mixed_magnitude, n + 1, dtype),
            mixed_magnitude,
        ),
        Comparison(
            "layer_input",
            join([layer_inputs[k] for k in range(SUBLAYERS)]),
            join([plain_torch.aggregate(x, h) for x, h in zip(plain, h_pre, strict=True)]),
            reference.aggregate(*gathered),
            tolerance.combination(gathered_magnitude, n, dtype),
            gathered_magnitude,
        ),
    ]


def join(tensors: Sequence[torch.Tensor]) -> Array:
    """Join the tokens of all, exactly."""
    return numpy64(torch.cat(tuple(tensors)))
