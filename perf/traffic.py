"""Bytes that a kernel has to move: every tensor it takes or writes, once. From sizes alone, without torch.

Stream tensors are counted in elements per token, in units of C (4n + 2 for the sum of the paper's
kernels, project, pre and post):

    expand   reads 1      writes n
    project  reads n      writes 0
    pre      reads n      writes 1
    post     reads n + 1  writes n

Everything else is small and counted apart: phi (and its halves, where it is split for tensor cores),
partial sums, coefficients, logits.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.plans import BYTES, ProjectionPlan
from .cases import Case

FLOAT32 = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes of one call."""

    stream_read: int = 0
    stream_written: int = 0
    small: int = 0

    @property
    def stream(self) -> int:
        """Bytes of stream tensors, read and written."""
        return self.stream_read + self.stream_written

    @property
    def total(self) -> int:
        """All bytes, read and written."""
        return self.stream + self.small


def stream_elements(kernel: str, num_streams: int) -> tuple[int, int]:
    """Elements of stream dtype read and written per token, in units of C."""
    n = num_streams
    return {"expand": (1, n), "project": (n, 0), "pre": (n, 1), "post": (n + 1, n)}.get(kernel, (0, 0))


def small_bytes(case: Case, plan: ProjectionPlan, num_slabs: int) -> int:
    """Bytes of everything that is not a stream tensor; `plan` and `num_slabs` are the projection's."""
    n, tokens = case.shape.num_streams, case.shape.num_tokens
    rows = n * n + 2 * n
    partial = num_slabs * plan.slab_rows * tokens * FLOAT32
    if case.kernel == "project":
        stream_size = n * case.shape.hidden_size
        halves = plan.columns * stream_size * BYTES[plan.operand_dtype] if plan.split else 0
        return rows * stream_size * FLOAT32 + 2 * halves + partial  # the halves are written, then read
    if case.kernel == "coefficients":
        return partial + (3 + rows + rows * tokens) * FLOAT32
    per_token = {"sinkhorn": 2 * n * n, "pre": n, "post": n + n * n}.get(case.kernel, 0)
    return per_token * tokens * FLOAT32


def traffic(case: Case, plan: ProjectionPlan, num_slabs: int) -> Traffic:
    """The bytes of one call of the case's kernel."""
    unit = case.shape.num_tokens * case.shape.hidden_size * case.shape.itemsize
    read, written = stream_elements(case.kernel, case.shape.num_streams)
    return Traffic(read * unit, written * unit, small_bytes(case, plan, num_slabs))
