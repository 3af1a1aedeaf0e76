"""The output of `mhc-tilelang traffic --schedule`: how blocks share the fused boundary, batch by batch.

The choice is `boundary_plans.boundary_schedule`'s, from sizes alone; `launch.boundary_schedule(x, rows)` is the same
for a tensor on its device, and takes another number of chunks a split. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...kernels.boundary_plans import (
    BoundarySchedule,
    PostPrePlan,
    PostProjectPlan,
    boundary_schedule,
    post_project_plan,
)
from ..calls.cases import Shape

TOKENS = tuple(1 << k for k in range(15))  # 1 to 16384

FOOTNOTES = """\
regime: "tokens" where a block takes every channel of its tile of tokens, as with thousands of tokens; "channels" where
the chunks of a tile are shared out over splits, so that a few tokens, as in decoding, still fill the device; "one
launch" where that is predicted to end first: the blocks of a tile hand over to each other, and no launch follows.
blocks: of the launch, token tiles × splits. slabs: of partial sums that the coefficients kernel adds up. No choice
moves a bit of any result, and the delayed form's is the same. Another one: launch.post_pre(…,
schedule=launch.boundary_schedule(x, rows, chunks_per_split, one_launch))."""


@dataclass(frozen=True)
class Row:
    """The choice for one batch."""

    shape: Shape
    plan: PostProjectPlan
    schedule: BoundarySchedule

    @classmethod
    def of(cls, shape: Shape, target: str, parallel_blocks: int) -> Row:
        """The schedule on a device that runs this many blocks at a time."""
        n = shape.num_streams
        plan = post_project_plan(n * n + 2 * n, n, shape.hidden_size, shape.dtype, target)
        schedule = boundary_schedule(shape.num_tokens, shape.hidden_size, plan, parallel_blocks, one_launch=None)
        return cls(shape, plan, schedule)

    def as_json(self) -> dict[str, Any]:
        """One object of the JSON list."""
        projection, schedule = self.plan.projection, self.schedule
        return {
            **vars(self.shape),
            "regime": schedule.regime,
            "tokens_per_tile": PostPrePlan.tokens if schedule.one_launch else projection.tokens,
            "channels_per_chunk": projection.channels,
            "num_chunks": projection.num_chunks(self.shape.hidden_size),
            "chunks_per_split": schedule.chunks_per_split,
            "splits": schedule.splits,
            "token_blocks": schedule.token_blocks,
            "slabs": schedule.slabs,
            "threads": projection.threads,
        }

    def cells(self) -> list[str]:
        """One line of the table."""
        schedule = self.schedule
        blocks = f"{schedule.token_blocks} × {schedule.splits} = {schedule.token_blocks * schedule.splits}"
        counts = (schedule.chunks_per_split, schedule.splits, schedule.slabs)
        return [str(self.shape.num_tokens), schedule.regime, *map(str, counts), blocks]


def report(target: str, parallel_blocks: int, rows: Sequence[Row]) -> str:
    """The table of one width and dtype, for several token counts."""
    from tabulate import tabulate

    shape, projection = rows[0].shape, rows[0].plan.projection
    num_chunks = projection.num_chunks(shape.hidden_size)
    sizes = f"n = {shape.num_streams}, C = {shape.hidden_size}, {shape.dtype}"
    tiles = f"tiles of {projection.tokens} tokens × {projection.channels} channels, {num_chunks} chunks"
    title = f"{target}, {sizes}: {tiles}; {parallel_blocks} blocks at a time"
    headers = ["tokens", "regime", "chunks a split", "splits", "slabs", "blocks"]
    align = ["right", "left", *["right"] * 4]
    return title + "\n" + tabulate([row.cells() for row in rows], headers, disable_numparse=True, colalign=align)
