"""A connection's time on a GPU, from a file of `bench --json FILE`, in place of the bytes of its form.

The fused boundary's rows where the file has both, else the kernels one by one and, by bytes, the sum of two gradients
of the stream that autograd makes between them.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import MHCError
from ..overhead.model import BANDWIDTH_SHARE, Device, known_device
from ..sizes import LayerSizes
from ..stored.from_json import load
from ..stored.results import KernelResults
from .costs import ITEMSIZE, Measured

FUSED = ("post_pre",), ("post_pre_backward",)
ALONE = tuple(
    tuple(f"{kernel}{suffix}" for kernel in ("project", "coefficients", "aggregate", "post"))
    for suffix in ("", "_backward")
)


def read(path: Path, sizes: LayerSizes, num_streams: int) -> tuple[Measured, str]:
    """Return the connection's seconds per token, and the name of the device in `model.DEVICES`.

    Raises MHCError for a file of something else, of a machine without a datasheet here, or without these sizes.
    """
    results = load(path)
    if not isinstance(results, KernelResults):
        raise MHCError(f"--results {path}: expected what `bench --json` wrote, got an overhead")
    device = known_device(results.facts.device)
    if device is None:
        raise MHCError(f"--results {path}: expected a GPU of the model's table, got {results.facts.device!r}")
    C = sizes.hidden_size
    times = seconds_per_token(results, C, num_streams)
    for kernels in (FUSED, ALONE):
        if all(kernel in times for direction in kernels for kernel in direction):
            forward, backward = (sum(times[kernel] for kernel in direction) for direction in kernels)
            backward += gradient_sum_seconds(device, num_streams * C) if kernels == ALONE else 0.0
            return Measured(forward, backward, str(results.facts)), device.name
    missing = sorted({kernel for direction in ALONE for kernel in direction} - {*times})
    raise MHCError(f"--results {path}: expected C {C}, n {num_streams} in bfloat16, got no {', '.join(missing)}")


def seconds_per_token(results: KernelResults, hidden_size: int, num_streams: int) -> dict[str, float]:
    """Return each kernel's median at these sizes, from the row with most tokens; coefficients are float32 always."""
    found = [
        one
        for one in results.measurements
        if (one.hidden_size, one.num_streams) == (hidden_size, num_streams)
        and one.dtype == ("float32" if one.kernel.startswith("coefficients") else "bfloat16")
    ]
    return {one.kernel: one.time.median / one.num_tokens for one in sorted(found, key=lambda one: one.num_tokens)}


def gradient_sum_seconds(device: Device, stream: int) -> float:
    """Return the seconds per token of autograd's sum of two gradients of a stream of `stream` elements."""
    return 3 * stream * ITEMSIZE / (device.bandwidth * BANDWIDTH_SHARE)
