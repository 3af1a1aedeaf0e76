"""Cases of a check, and the rows of their results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..arguments import STREAM_DTYPES
from ..compiler.kernel import dtype_name
from ..spec import STREAM_COUNTS
from . import families  # noqa: F401  enters the checks
from .comparison import CHECKS, compare
from .inputs import Case, Inputs


@dataclass(frozen=True)
class Row:
    """One kernel at one case: its worst output, relative to the output's scale (see `comparison.compare`)."""

    kernel: str
    dtype: str
    num_streams: int
    hidden_size: int
    num_tokens: int
    error: float
    tolerance: float
    torch_error: float
    passed: bool


POWERS_OF_TWO = (2, 4, 8)  # numbers of streams that are checked in every dtype; the others in bfloat16


def everywhere(hidden_size: int, num_tokens: int, streams: Iterable[int] | None = None) -> list[Case]:
    """Return every n and dtype at one width; every dtype of each n where some `streams` are named."""
    return [
        Case(n, hidden_size, dtype, num_tokens)
        for n in streams or STREAM_COUNTS
        for dtype in (STREAM_DTYPES if streams or n in POWERS_OF_TWO else (torch.bfloat16,))
    ]


def cases(streams: Iterable[int] | None = None) -> list[Case]:
    """Return every n and dtype at one small width; wide, odd and single-channel streams at n = 4; few tokens and many;
    a float32 layer in a 16-bit stream. Of some `streams` alone every dtype, and wide logits.
    """
    wide_logits = [Case(n, 192, torch.float32, 511, logit_std=6.0) for n in streams or POWERS_OF_TWO]
    if streams:
        return [*everywhere(192, 127, streams), *wide_logits]
    shapes = [(2560, 63), (1000, 128), (333, 65), (1, 4097), (64, 1), (64, 0)]
    spread = [Case(4, size, torch.bfloat16, tokens) for size, tokens in shapes]
    wide_layer = Case(4, 192, torch.bfloat16, 127, layer_dtype=torch.float32)
    return [*everywhere(192, 127), *spread, *wide_logits, wide_layer]


def small_cases(streams: Iterable[int] | None = None) -> list[Case]:
    """Return cases for an executor that runs a thread at a time: every n and dtype, odd and single-channel streams."""
    sizes = [] if streams else [(33, 3), (1, 130), (64, 1), (64, 0)]
    return everywhere(144, 37, streams) + [Case(4, size, torch.bfloat16, tokens) for size, tokens in sizes]


def check_case(kernel: str, case: Case, inputs: Inputs) -> Row:
    """Run one kernel at one case; the row shows its output that is closest to its bound."""
    with torch.no_grad():
        verdicts = [compare(comparison) for comparison in CHECKS[kernel](case, inputs)]
    worst = max(verdicts, key=lambda v: (not v.passed, v.error / v.tolerance if v.tolerance else 0.0))
    dtype = "float32" if kernel.startswith("sinkhorn") else dtype_name(case.dtype)  # it never sees the stream
    sizes = (dtype, case.num_streams, case.hidden_size, case.num_tokens)
    passed = all(verdict.passed for verdict in verdicts)
    return Row(kernel, *sizes, worst.error, worst.tolerance, worst.torch_error, passed)


def iterate(device: torch.device, chosen: Iterable[Case], kernels: Iterable[str] | None = None) -> Iterator[Row]:
    """Yield the rows as computed: case by case, kernel by kernel; those of all checks unless some are named."""
    for case in chosen:
        inputs = Inputs.of(case, device)
        for kernel in CHECKS if kernels is None else kernels:
            yield check_case(kernel, case, inputs)
