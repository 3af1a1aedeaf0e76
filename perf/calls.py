"""What builders of `launches` take and give: a call at sizes on a target, and the kernels that it launches.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kernels import plans
from ..spec import MHCSpec
from .cases import Case


@dataclass(frozen=True)
class Launch:
    """One kernel: its family, what it is compiled with, the sizes it is called with.

    `of_streams` is off where a kernel of streams is used for small tensors.
    """

    family: str
    parameters: dict[str, Any]
    sizes: dict[str, int]
    of_streams: bool = True


@dataclass(frozen=True)
class Call:
    """A case on a target, and what its kernels have in common."""

    case: Case
    target: str
    parallel_blocks: int

    @property
    def spec(self) -> MHCSpec:
        """The constants of the released code, which no byte depends on."""
        return MHCSpec(self.case.shape.hidden_size, self.case.shape.num_streams)

    @property
    def tokens(self) -> dict[str, int]:
        """The run-time size that every kernel has."""
        return {"num_tokens": self.case.shape.num_tokens}

    @property
    def sizes(self) -> dict[str, Any]:
        """The compiled sizes of a kernel that sees channels."""
        return {"num_streams": self.spec.num_streams, "hidden_size": self.spec.hidden_size}

    @property
    def stream(self) -> dict[str, Any]:
        """The same, and the stream's dtype."""
        return {**self.sizes, "dtype": self.case.shape.dtype}

    def channels(self, copies: bool = False) -> dict[str, Any]:
        """The tile of a kernel that walks over channels."""
        shape = self.case.shape
        return {"tile": plans.channel_tile(shape.hidden_size, shape.itemsize, self.target, copies=copies)}

    def reduction(self) -> dict[str, Any]:
        """The tile of a kernel that sums over channels."""
        return {"tile": plans.reduction_tile(self.spec.hidden_size, self.case.shape.itemsize, self.target)}

    def plan(self, rows: int) -> plans.ProjectionPlan:
        """How the stream is projected on a phi of so many rows."""
        return plans.projection_plan(rows, self.spec.hidden_size, self.case.shape.dtype, self.target)

    def split(self, rows: int) -> tuple[int, int]:
        """Chunks of a projection that a block takes, and slabs of partial sums that it leaves."""
        plan = self.plan(rows)
        num_chunks = plan.num_chunks(self.spec.hidden_size)
        per_split = plans.chunks_per_split(self.case.shape.num_tokens, num_chunks, plan, self.parallel_blocks)
        return per_split, plans.num_slabs(per_split, num_chunks, plan)
