"""The assumptions, and what a micro-batch's tasks take under them.

Per token, with C, A, F as in `model`, S the sequence, n streams, k copies of a token that leave for experts elsewhere:

                        FLOPs                    elements moved by what is no matrix product
    attention           8CA + 2A(S + 1)          2C          its norm
      input gradient    8CA + 2.5 · 2A(S + 1)    3C
      weight gradient   8CA
    FFN                 6CF                      2C + 3F     its norm, SwiGLU
      input gradient    6CF                      3C + 5F
      weight gradient   6CF
    a connection                                 of its form (`model.FORMS`, or the fused boundary's kernels)
    replay of L_r sublayers                      (n + 2)·L_r − 1 times C
    dispatch, combine   to the experts and back: k·C elements over the experts' link; in the backward the same
    send                to the next stage: n·C elements over the stages' link; of a plain residual C

FLOPs and bytes take their time one after the other, as in `model`. Everything is bfloat16. Every layer routes tokens to
experts. Left out: tensor parallelism, what overlapping tasks take from each other, launches, imbalance, the optimizer,
embedding and head.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..memory.estimate import stage_of
from ..overhead.model import BANDWIDTH_SHARE, DEVICES, FLOPS_SHARE, FORMS, RESIDUAL, SUBLAYERS, Form, Work
from ..sizes import MODELS, NUM_LAYERS, SEQUENCE, LayerSizes
from ..traffic.formulas import stream_elements

ITEMSIZE = 2
FUSED = "fused boundary"
STEPS = ("project", "aggregate", "post")


def forms() -> dict[str, Form]:
    """Connections by the elements that they move: what `ResidualStream` runs, its steps one by one, and `model`'s.

    At n = 8 the backward of the first is that of a CPU: a GPU's is not fused there.
    """
    fused = Form(
        lambda n: sum(stream_elements("post_pre", n)),
        lambda n: sum(stream_elements("post_pre_backward", n)),
    )
    # Backward: the projection also reads g_layer_input, and autograd adds two gradients of the stream.
    alone = Form(
        lambda n: sum(sum(stream_elements(kernel, n)) for kernel in STEPS),
        lambda n: sum(sum(stream_elements(f"{kernel}_backward", n)) for kernel in STEPS) + 1 + 3 * n,
    )
    others = ("paper's kernels", "unfused HC", "single-pass floor")
    return {FUSED: fused, "kernel by kernel": alone, **{name: FORMS[name] for name in others}}


@dataclass(frozen=True)
class Measured:
    """Seconds per token of one sublayer's connection, from a benchmark."""

    forward: float
    backward: float
    source: str


@dataclass(frozen=True)
class Assumptions:
    """Inputs of the simulation.

    Attributes:
        model, device: names in `sizes.MODELS` and `model.DEVICES`.
        num_streams: n.
        form: kernels of the connections, a name in `forms()`.
        stages, micro_batches: sizes of the pipeline; a micro-batch is one sequence.
        bandwidth_share, flops_share: shares of the datasheet's that kernels reach.
        expert_bandwidth, send_bandwidth: attainable bytes per second and direction, to experts and between stages.
        expert_copies: k.
        overlapped: a forward and a backward micro-batch share the stage, and communication runs beside them;
            otherwise compute waits for all communication.
        recompute: the stream is recomputed in blocks of L_r*.
        own_stream: the connections run beside everything else, and take nothing from it.
        measured: times of the connections, in place of their form's elements.
    """

    model: str = "27b"
    device: str = "H200"
    num_streams: int = 4
    form: str = FUSED
    stages: int = 8
    micro_batches: int = 32
    bandwidth_share: float = BANDWIDTH_SHARE
    flops_share: float = FLOPS_SHARE
    expert_bandwidth: float = 360e9
    send_bandwidth: float = 40e9
    expert_copies: int = 6
    overlapped: bool = True
    recompute: bool = True
    own_stream: bool = False
    measured: Measured | None = None

    @property
    def sizes(self) -> LayerSizes:
        """The layer's."""
        return MODELS[self.model]

    @property
    def layers(self) -> int:
        """Layers of the largest stage, which the others wait for."""
        return -(-NUM_LAYERS[self.model] // self.stages)


@dataclass(frozen=True)
class Costs:
    """Seconds of each task for one micro-batch. `block` is L_r; 0 where nothing is recomputed."""

    attention: float
    attention_input: float
    attention_weights: float
    ffn: float
    ffn_input: float
    ffn_weights: float
    connection: float
    connection_backward: float
    experts: float
    send: float
    block: int
    replay_sublayer: float
    replay_once: float

    def replay(self, sublayers: int) -> float:
        """Return the cost of a block of this many sublayers."""
        return self.replay_sublayer * sublayers - self.replay_once

    def blocks(self, num_sublayers: int) -> dict[int, float]:
        """Return the seconds of each block's replay, by the block's last sublayer."""
        if not self.block:
            return {}
        starts = range(0, num_sublayers, self.block)
        sizes = [min(self.block, num_sublayers - start) for start in starts]
        return {start + size - 1: self.replay(size) for start, size in zip(starts, sizes, strict=True)}

    def forward(self, layers: int) -> float:
        """Return a stage's forward, everything in series, without sends."""
        return layers * (self.attention + self.ffn + 2 * self.experts + SUBLAYERS * self.connection)

    def backward(self, layers: int) -> float:
        """Return a stage's backward, everything in series, replays included."""
        compute = self.attention_input + self.attention_weights + self.ffn_input + self.ffn_weights
        replays = sum(self.blocks(SUBLAYERS * layers).values())
        return layers * (compute + 2 * self.experts + SUBLAYERS * self.connection_backward) + replays


def costs(given: Assumptions, *, plain: bool) -> Costs:
    """Compute the costs of a micro-batch of one sequence: under mHC, or with a plain residual."""
    sizes, device = given.sizes, DEVICES[given.device]
    C, A, F, n = sizes.hidden_size, sizes.attention_width, sizes.ffn_width, given.num_streams
    scores = 2.0 * A * (SEQUENCE + 1)
    flops, bandwidth = device.flops * given.flops_share, device.bandwidth * given.bandwidth_share

    def moving(elements: float) -> float:
        return SEQUENCE * elements * ITEMSIZE / bandwidth

    def working(work: Work) -> float:
        return SEQUENCE * work.flops / flops + moving(work.elements)

    form = RESIDUAL if plain else forms()[given.form]
    connection, backward = moving(form.forward(n) * C), moving(form.backward(n) * C)
    if given.measured and not plain:
        connection, backward = SEQUENCE * given.measured.forward, SEQUENCE * given.measured.backward
    streams = 1 if plain else n
    recomputed = given.recompute and not plain
    return Costs(
        attention=working(Work(8.0 * C * A + scores, 2 * C)),
        attention_input=working(Work(8.0 * C * A + 2.5 * scores, 3 * C)),
        attention_weights=working(Work(8.0 * C * A, 0)),
        ffn=working(Work(6.0 * C * F, 2 * C + 3 * F)),
        ffn_input=working(Work(6.0 * C * F, 3 * C + 5 * F)),
        ffn_weights=working(Work(6.0 * C * F, 0)),
        connection=connection,
        connection_backward=backward,
        experts=SEQUENCE * given.expert_copies * C * ITEMSIZE / given.expert_bandwidth,
        send=SEQUENCE * streams * C * ITEMSIZE / given.send_bandwidth if given.stages > 1 else 0.0,
        block=stage_of(given.layers, n).papers_length if recomputed else 0,
        replay_sublayer=moving((n + 2) * C),
        replay_once=moving(C),
    )
