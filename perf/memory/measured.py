"""Bytes that a forward pass keeps for its backward, counted in its graph, beside `memory`'s formulas.

Run are sublayers of small sizes, as many as the model has: bytes per token do not depend on how many tokens there are,
and scale with C, heads and widths as the formulas say, or the counts differ. They are the difference of two batches
that are a sequence apart, so that parameters drop out, which the graph keeps too. In float32, in which torch's norm on
a CPU keeps its input as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...modules.connections import Connection, HyperConnection, ResidualConnection
from ...modules.residual_stream import ResidualStream
from ...modules.saved import saved_bytes
from ...spec import MHCSpec
from ..overhead.layers import Attention, FeedForward
from ..overhead.model import SUBLAYERS
from ..sizes import LayerSizes
from .estimate import FLOAT32, Stage, coefficient_bytes, layer_bytes

SIZES = LayerSizes(64, 3, 96, head_size=16)  # measured; no two widths are equal, which a formula could mix up
SEQUENCE = 16
Layer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Count:
    """Bytes per token of all sublayers. `length` is L_r; 0 where nothing is recomputed."""

    connection: str
    length: int
    formula: int
    measured: int


def count(stage: Stage, lengths: Sequence[int]) -> list[Count]:
    """Return the plain residual, mHC with everything kept, and mHC with blocks of each of `lengths`."""
    layers = (Attention(SIZES), FeedForward(SIZES))
    unit = FLOAT32 * SIZES.hidden_size
    own = layer_bytes(SIZES, FLOAT32) * stage.num_sublayers // SUBLAYERS
    coefficients = coefficient_bytes(stage.num_streams) * stage.num_sublayers

    def counted(kind: str, length: int, elements: int) -> Count:
        formula = unit * elements + own + (coefficients if kind == "mhc" else 0)
        return Count(kind, length, formula, bytes_per_token(layers, stage, kind, length))

    rows = [counted("residual", 0, stage.plain), counted("mhc", 0, stage.all_kept)]
    return rows + [counted("mhc", length, stage.kept(length)) for length in lengths]


def bytes_per_token(layers: Sequence[Layer], stage: Stage, kind: str, length: int) -> int:
    """Return the bytes a token adds to the sublayers' graph; layers take turns. `length` 0: no recomputation."""
    spec = MHCSpec.deepseek_v4(SIZES.hidden_size, num_streams=stage.num_streams)
    connection: Connection = HyperConnection(spec) if kind == "mhc" else ResidualConnection()

    def kept(sequences: int) -> int:
        h = torch.ones(sequences, SEQUENCE, SIZES.hidden_size, requires_grad=True)
        stream = ResidualStream(h, stage.num_streams, kind, recompute=length or None)
        for k in range(stage.num_sublayers):
            stream.write(layers[k % len(layers)](stream.read(connection)))
        return saved_bytes(stream.reduce())

    return (kept(2) - kept(1)) // SEQUENCE
