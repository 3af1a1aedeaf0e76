"""Kernels and sizes that are measured.

Imports no torch: the options' defaults come from here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...kernels.plans import BYTES
from .table import AGGREGATED

KERNELS = ("expand", "project", "coefficients", "sinkhorn", "aggregate", "post")
BACKWARD_KERNELS = tuple(f"{kernel}_backward" for kernel in KERNELS)
# All that precedes a layer, as one measurement: implementations that do not split it up are compared with the sum.
SUBLAYER_INPUT = "project+coefficients+aggregate"
# Fused across a boundary: post of one sublayer and pre of the next, and as one measurement forward and backward.
POST_PRE, POST_PRE_DELAYED, POST_PRE_BACKWARD = "post_pre", "post_pre_delayed", "post_pre_backward"
BOUNDARY_STEP = "post_pre+post_pre_backward"
BOUNDARY_KERNELS = (POST_PRE, POST_PRE_DELAYED, POST_PRE_BACKWARD)
FORWARD_PARTS = ("post", "project", "coefficients", "aggregate")
# With the layer's input in float8: measured where they are asked for.
AGGREGATE_QUANTIZED, POST_PRE_QUANTIZED = "aggregate_quantized", "post_pre_quantized"
FLOAT8_KERNELS = (AGGREGATE_QUANTIZED, POST_PRE_QUANTIZED)
BACKWARD_PARTS = ("aggregate_backward", "coefficients_backward", AGGREGATED, "post_backward")
# What else is run where these are measured: the parts, the separate kernels, those that make the inputs of a backward.
MADE_OF = {
    "coefficients": ("project",),
    "coefficients_backward": ("project", "coefficients"),
    SUBLAYER_INPUT: ("project", "coefficients", "aggregate"),
    POST_PRE: FORWARD_PARTS,
    POST_PRE_DELAYED: FORWARD_PARTS,
    POST_PRE_QUANTIZED: (POST_PRE, "coefficients", AGGREGATE_QUANTIZED),  # whose kernels it launches
    POST_PRE_BACKWARD: (POST_PRE, *BACKWARD_PARTS),
    BOUNDARY_STEP: (POST_PRE, POST_PRE_BACKWARD, *FORWARD_PARTS, *BACKWARD_PARTS),
}
TOKEN_KERNELS = ("coefficients", "sinkhorn", "coefficients_backward", "sinkhorn_backward")  # never see the stream
WIDTHS = (1280, 1920, 2560, 4096, 7168)  # the paper's 3B, 9B and 27B models, then DeepSeek-V4's two
CPU_WIDTHS = (1280, 2560)  # of these as many as take two cores two minutes or so
GPU_TOKENS = (4096, 16384)  # the batch of one sequence, and of four
CPU_STREAM_BYTES = 32 << 20


@dataclass(frozen=True)
class Shape:
    """The sizes of one stream; `dtype` is torch's name of its dtype."""

    num_tokens: int
    num_streams: int
    hidden_size: int
    dtype: str

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the stream."""
        return BYTES[self.dtype]


@dataclass(frozen=True)
class Case:
    """One kernel at one shape."""

    kernel: str
    shape: Shape

    @property
    def calls(self) -> tuple[str, ...]:
        """Names of the calls that measuring this case runs: itself, if it is one call with a check, and its parts."""
        itself = () if self.kernel in (SUBLAYER_INPUT, BOUNDARY_STEP, POST_PRE_QUANTIZED) else (self.kernel,)
        return (*itself, *MADE_OF.get(self.kernel, ()))

    @property
    def reads_stream(self) -> bool:
        """Whether the stream is read or written; the other kernels are float32 throughout."""
        return self.kernel not in TOKEN_KERNELS

    @property
    def hidden_size(self) -> int | None:
        """C; None for Sinkhorn, which never sees a channel."""
        return None if self.kernel in ("sinkhorn", "sinkhorn_backward") else self.shape.hidden_size

    @property
    def dtype(self) -> str:
        """The dtype of what the kernel mostly reads."""
        return self.shape.dtype if self.reads_stream else "float32"


def make_cases(kernels: Iterable[str], shapes: Iterable[Shape]) -> list[Case]:
    """Shape by shape, every kernel; without those that a size they do not depend on would repeat."""
    cases: dict[tuple[object, ...], Case] = {}
    kernels = tuple(kernels)
    for shape in shapes:
        for case in (Case(kernel, shape) for kernel in kernels):
            identity = (case.kernel, shape.num_tokens, shape.num_streams, case.hidden_size, case.dtype)
            cases.setdefault(identity, case)
    return list(cases.values())


def cpu_tokens(num_streams: int, hidden_size: int, itemsize: int, cache_bytes: int) -> int:
    """Return a power of two of tokens whose stream is 32 MiB at most, more where the last-level cache is larger.

    The limit is never below twice the cache, so that even rounded down to a power of two a stream does not
    fit the cache.
    """
    limit = max(CPU_STREAM_BYTES, 2 * cache_bytes)
    tokens = max(1, limit // (num_streams * hidden_size * itemsize))
    return 1 << (tokens.bit_length() - 1)
