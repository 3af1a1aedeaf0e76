"""A layer's overhead on a device from FLOPs and traffic alone: arithmetic, no measurement.

Per token, C channels, A of all heads, F of the FFN, S tokens in a sequence:

                   forward                                backward
    FLOPs          8CA + 6CF, projections                 twice as many
                   2A(S + 1), causal scores and values    2.5 times as many: the scores are computed again
    elements       4C + 3F: two norms and SwiGLU          6C + 5F

    time = FLOPs / (FLOP/s) + bytes / (bytes/s) + bytes of the connections / (bytes/s)

A matrix product's own traffic hides behind its arithmetic; everything else is bound by memory and waits for it.
Left out: launches, small tensors (phi, partial sums, coefficients: below 0.5 C a sublayer at 4096 tokens), the
connections' arithmetic, optimizer, embedding, head, communication. So the prediction is that of kernels which do
nothing but move bytes, and a measurement lies above it.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..sizes import LayerSizes

# How tables name connections and modes.
LABELS = {
    "residual": "plain residual",
    "hc": "HC, plain torch",
    "mhc_eager": "mHC, plain torch",
    "mhc_kernels": "mHC, kernels",
}
IN_MODE = {"forward": "forward", "training": "forward + backward"}
SUBLAYERS = 2  # attention and FFN
BANDWIDTH_SHARE = 0.8  # assumption: what a kernel bound by memory reaches of the datasheet's bandwidth
FLOPS_SHARE = 0.6  # assumption: what large matrix products and attention reach of the datasheet's FLOP/s
FORWARD, TRAINING = "forward", "training"  # training: forward and backward
MODES = (FORWARD, TRAINING)


@dataclass(frozen=True)
class Device:
    """Bytes per second of memory and dense bfloat16 FLOP/s, as the datasheet has them."""

    name: str
    bandwidth: float
    flops: float
    source: str


DEVICES = {
    device.name: device
    for device in (
        Device("A100", 2.039e12, 312e12, "NVIDIA A100 datasheet, 80 GB SXM"),
        Device("H100", 3.35e12, 989e12, "NVIDIA H100 datasheet, SXM; 1979 TFLOP/s with sparsity, halved"),
        Device("H200", 4.8e12, 989e12, "NVIDIA H200 datasheet, SXM; 1979 TFLOP/s with sparsity, halved"),
        Device("B200", 8.0e12, 2250e12, "NVIDIA DGX B200 datasheet, an eighth; 4.5 PFLOP/s with sparsity, halved"),
    )
}
OTHER_EDITIONS = ("PCI", "NVL", "40GB", "MIG")  # in names of GPUs that have a datasheet's figures of their own


def known_device(name: str) -> Device | None:
    """Return the datasheet of the GPU that torch calls so; None for other GPUs and other editions of these."""
    if any(edition in name for edition in OTHER_EDITIONS):
        return None
    return next((device for key, device in DEVICES.items() if key in name), None)


@dataclass(frozen=True)
class Form:
    """A connection by the elements that it moves per token and sublayer, in units of C, as a function of n."""

    forward: Callable[[int], int]
    backward: Callable[[int], int]

    def elements(self, num_streams: int, mode: str) -> int:
        """Read and written together."""
        forward = self.forward(num_streams)
        return forward if mode == FORWARD else forward + self.backward(num_streams)


RESIDUAL = Form(lambda _: 3, lambda _: 3)
OURS, ONE_BY_ONE = "our kernels", "our kernels, one by one"
FORMS = {
    # Forward: the paper's Table 2. Backward, our count of the same operations one by one: coefficients 2n, H^pre
    # 2n + 1, H^post n + 2, H^res 3n, and 6n to add up the stream's three gradients.
    "unfused HC": Form(lambda n: 8 * n + 2, lambda n: 14 * n + 3),
    "paper's kernels": Form(lambda n: 4 * n + 2, lambda n: 9 * n + 3),
    ONE_BY_ONE: Form(lambda n: 4 * n + 2, lambda n: 9 * n + 4),
    OURS: Form(lambda n: 3 * n + 2, lambda n: 4 * n + 4),  # fused across the boundary, in two passes
    "single-pass floor": Form(lambda n: 2 * n + 2, lambda n: 3 * n + 3),
}


@dataclass(frozen=True)
class Work:
    """Per token: floating-point operations of matrix products, and elements that everything else moves."""

    flops: float
    elements: float


def layer_work(sizes: LayerSizes, sequence: int, mode: str) -> Work:
    """Return the layer between its connections, for sequences of this many tokens."""
    C, A, F = sizes.hidden_size, sizes.attention_width, sizes.ffn_width
    projections, scores = 2.0 * sizes.parameters, 2.0 * A * (sequence + 1)
    forward = Work(projections + scores, 4 * C + 3 * F)
    if mode == FORWARD:
        return forward
    return Work(forward.flops + 2 * projections + 2.5 * scores, forward.elements + 6 * C + 5 * F)


@dataclass(frozen=True)
class Prediction:
    """Seconds per token of a layer with a plain residual, and by form what share of that the form adds."""

    device: str
    mode: str
    seconds: float
    overhead: dict[str, float]
    residual: float = 0.0  # seconds of the plain residual's own adding, which a connection takes the place of

    def with_connection(self, seconds: float) -> float:
        """Return the overhead of connections that take `seconds` per token in a layer, as a share."""
        return (seconds - self.residual) / self.seconds


def predict(
    sizes: LayerSizes,
    device: Device,
    mode: str,
    *,
    sequence: int,
    num_streams: int = 4,
    itemsize: int = 2,
    bandwidth_share: float = BANDWIDTH_SHARE,
    flops_share: float = FLOPS_SHARE,
) -> Prediction:
    """Return the model's answer for one device and mode; `itemsize` in bytes, of the stream and of activations."""
    bandwidth, flops = device.bandwidth * bandwidth_share, device.flops * flops_share

    def moving(elements: float) -> float:
        return elements * itemsize / bandwidth

    def connections(form: Form) -> float:
        return moving(SUBLAYERS * form.elements(num_streams, mode) * sizes.hidden_size)

    work = layer_work(sizes, sequence, mode)
    residual = connections(RESIDUAL)
    seconds = work.flops / flops + moving(work.elements) + residual
    overhead = {name: (connections(form) - residual) / seconds for name, form in FORMS.items()}
    return Prediction(device.name, mode, seconds, overhead, residual)
