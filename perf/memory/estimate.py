"""Memory that a model keeps for its backward, per token, with and without recomputation: arithmetic only.

C channels, n streams, M = n² + 2n, L sublayers (attention and FFN count one each), blocks of L_r of them. In elements
of the stream's dtype, in units of C:

    plain residual                 L                        every layer's input, which is x itself
    mHC, all kept                  (n + 2)·L + 1            every x (n), layer input (1) and layer output (1)
    mHC, recomputed: kept          n·⌈L / L_r⌉ + L + 1      x at every block's start, every layer output
    mHC, recomputed:               n·(L_r − 1) + L_r        of one block, while the backward is in it
    the paper's objective (20)     n·⌈L / L_r⌉ + (n + 2)·L_r

The 1 is the embedding, which the operator of the first read keeps. The paper's objective leaves out the layer outputs,
which no L_r changes, and counts a normalised layer input besides; here that belongs to the layer. Coefficients are
float32 and always kept: 2M + 1 numbers a token and sublayer (h_pre, h_post, h_res; m and s for their backward).

In a pipeline L is that of a stage, since blocks do not cross stages; and what is kept is there once for every
micro-batch in flight, as many as stages at the first one under 1F1B, while only one block at a time is recomputed.

Left out: parameters, their gradients, the optimizer, the embedding, the head, buffers of communication, what an
allocator wastes. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from ..overhead.model import SUBLAYERS
from ..sizes import LayerSizes

ITEMSIZE = 2  # bytes: bfloat16
FLOAT32 = 4
EMBEDDING = 1  # C


@dataclass(frozen=True)
class Stage:
    """The sublayers that one device holds: all of a model's, or a pipeline stage's.

    Attributes:
        num_sublayers: L, at least 1.
        num_streams: n.
        in_flight: micro-batches whose forward has run and whose backward has not.
    """

    num_sublayers: int
    num_streams: int
    in_flight: int = 1

    @property
    def plain(self) -> int:
        """Elements kept by a plain residual, in units of C, for one micro-batch."""
        return self.num_sublayers

    @property
    def all_kept(self) -> int:
        """Elements kept by mHC without recomputation, in units of C."""
        return (self.num_streams + 2) * self.num_sublayers + EMBEDDING

    def kept(self, length: int) -> int:
        """Return the elements mHC keeps with blocks of `length` sublayers, in units of C."""
        return self.num_streams * -(-self.num_sublayers // length) + self.num_sublayers + EMBEDDING

    def recomputed(self, length: int) -> int:
        """Return the additional elements alive while the backward is in a block, in units of C."""
        length = min(length, self.num_sublayers)
        return self.num_streams * (length - 1) + length

    def peak(self, length: int) -> int:
        """Return the most that there is: every micro-batch in flight, and a block."""
        return self.in_flight * self.kept(length) + self.recomputed(length)

    def objective(self, length: int) -> int:
        """Return the paper's objective over L_r (20), in units of C."""
        return self.num_streams * -(-self.num_sublayers // length) + (self.num_streams + 2) * length

    @property
    def lengths(self) -> range:
        """Every L_r there can be."""
        return range(1, self.num_sublayers + 1)

    @property
    def papers_length(self) -> int:
        """L_r*: the shortest that the paper's objective is least at."""
        return min(self.lengths, key=self.objective)

    @property
    def papers_root(self) -> float:
        """√(n·L / (n + 2)), which L_r* is about."""
        return sqrt(self.num_streams * self.num_sublayers / (self.num_streams + 2))

    @property
    def least_length(self) -> int:
        """The shortest that the peak is least at."""
        return min(self.lengths, key=self.peak)


def coefficient_bytes(num_streams: int) -> int:
    """Return the bytes of a sublayer's coefficients per token."""
    return FLOAT32 * (2 * (num_streams**2 + 2 * num_streams) + 1)


def layer_bytes(sizes: LayerSizes, itemsize: int = ITEMSIZE) -> int:
    """Return the bytes that attention and FFN of `layers` keep per token besides their inputs.

    Each norm keeps its float32 1/rms, its input normalised, and the product with the weight; attention q, k, v, the
    result, and a float32 number a head; the FFN gate, up, silu(gate) and the product. No routing. That is what torch
    keeps in float32 on a CPU. A fused norm keeps C less; in bfloat16 on a CPU, torch's norm keeps two float32 copies
    instead of its input and of that normalised, which no recomputation of streams gives back.
    """
    C, A, F = sizes.hidden_size, sizes.attention_width, sizes.ffn_width
    norms = SUBLAYERS * (FLOAT32 + 2 * itemsize * C)
    return norms + itemsize * (4 * A + 4 * F) + FLOAT32 * sizes.num_heads


def stage_of(num_layers: int, num_streams: int, stages: int = 1) -> Stage:
    """Return the first of `stages` pipeline stages under 1F1B, with the largest stage's number of layers."""
    return Stage(SUBLAYERS * -(-num_layers // stages), num_streams, stages)
