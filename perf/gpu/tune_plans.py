"""The plans around the heuristic's choice that a kernel could be compiled with instead.

A plan that a compiler refuses, or that does not fit the chip, costs nothing but the try: what is legal is not decided
here. TMA, warp specialisation and wgmma are no axes: `cuda.PASS_CONFIGS` has them off until a kernel has passed on a
GPU with one of them on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from ...kernels.boundary_plans import (
    AggregateMappingsPlan,
    CoefficientsAggregateBackwardPlan,
    CoefficientsAggregatePlan,
    ExpandProjectPlan,
    PostPrePlan,
    PostProjectPlan,
)
from ...kernels.plans import BYTES, MAX_ACCESS_BYTES, WARP, ChannelTile, NormTile, ReductionTile
from ...kernels.projection_plans import ProjectionBackwardPlan, ProjectionPlan, WarpProjectionPlan, WarpsPlan

if TYPE_CHECKING:
    from ...compiler.recording import Recorded

Parameters = dict[str, Any]
CHUNKS = "chunks_per_split"
CUDA_THREADS = (32, 64, 96, 128, 160, 192, 256, 320, 512)


def alternatives(parameters: Parameters, target: str) -> list[Parameters]:
    """Other parameters of the same kernel on "cpu" or "cuda", those it has left out; none where it has no plan."""
    found = []
    for name, value in parameters.items():
        if name == "tile":
            found += [{**parameters, name: tile} for tile in tiles(value, parameters["hidden_size"], target)]
        elif name == "plan":
            found += [{**parameters, name: plan} for plan in plans_like(value, parameters, target)]
        elif name == "block":
            sizes = (16, 32, 64, 128, 256) if target == "cpu" else (32, 64, 96, 128, 256, 512)
            found += [{**parameters, name: size} for size in sizes]
    return [one for one in found if one != parameters]


def shares(one: Recorded) -> list[Parameters]:
    """Return a launch's parameters with other shares of a block, in whole groups of chunks, which move no bit.

    A share, CHUNKS, is an argument, not compiled in: `compiled` leaves it out, `adapt_arguments` passes it. By warps
    alone.
    """
    plan = one.parameters.get("plan")
    projection = getattr(plan, "projection", plan)
    if CHUNKS not in one.arguments or not isinstance(projection, WarpProjectionPlan):
        return []
    chunks, group = projection.num_chunks(one.parameters["hidden_size"]), projection.chunks_per_group
    sizes = {min(chunks, groups * group) for groups in (1, 2, 4, -(-chunks // group))} - {one.arguments[CHUNKS]}
    return [{**one.parameters, CHUNKS: size} for size in sorted(sizes)]


def compiled(parameters: Parameters) -> Parameters:
    """Return what a kernel is compiled with."""
    return {name: value for name, value in parameters.items() if name != CHUNKS}


def tiles(tile: ChannelTile | ReductionTile, hidden_size: int, target: str) -> Iterator[ChannelTile | ReductionTile]:
    """Tiles of the kernels that walk over channels. The width of an access stays at most the heuristic's."""
    if isinstance(tile, NormTile):
        lanes = (8, 16, 32, 64) if target == "cpu" else (64, 128, 256, 512)
        yield from (replace(tile, lanes=lane, kept=kept) for lane, kept in product(lanes, (True, False)))
    elif isinstance(tile, ReductionTile):
        yield from (replace(tile, lanes=lane) for lane in ((8, 16, 32, 64) if target == "cpu" else (32, 64, 128, 256)))
    else:
        yield from channel_tiles(tile, hidden_size, target)


def channel_tiles(tile: ChannelTile, hidden_size: int, target: str) -> Iterator[ChannelTile]:
    """Yield candidate tiles for the kernels that sum nothing over channels."""
    if target == "cpu":
        yield from (ChannelTile(min(channels, hidden_size), 1) for channels in (256, 512, 1024, 2048, hidden_size))
    else:
        width = tile.channels // tile.threads
        widths = [each for each in (width, width // 2, width // 4) if each]
        for each, threads in product(widths, CUDA_THREADS):
            if threads * each < hidden_size + 32 * each:  # else a warp of every block idles
                yield ChannelTile(threads * each, threads)


def plans_like(plan: Any, parameters: Parameters, target: str) -> Iterator[Any]:
    """Plans of tokens, threads, stages and blocks; of the kernels with a product, channels where they fix no bits."""
    if isinstance(plan, ProjectionPlan):
        yield from projections(plan, target)
    elif isinstance(plan, ExpandProjectPlan):
        for projection, blocks in product(projections(plan.projection, target), room(target)):
            yield replace(plan, projection=projection, blocks_per_sm=blocks)
    elif isinstance(plan, PostProjectPlan):
        if isinstance(plan.projection, WarpProjectionPlan):
            for projection in projections(plan.projection, target):
                yield replace(plan, projection=projection)
            return
        vectors = plan.projection.channels * BYTES[parameters["dtype"]] // MAX_ACCESS_BYTES
        for projection, blocks in product(projections(plan.projection, target), room(target)):
            most = plan.rows if target == "cpu" else max(1, min(projection.tokens, projection.threads // vectors))
            for rows in {most, max(1, most // 2)}:
                yield replace(plan, projection=projection, rows=rows, blocks_per_sm=blocks)
    elif isinstance(plan, AggregateMappingsPlan):
        for tile, blocks in product(channel_tiles(plan.tile, parameters["hidden_size"], target), (1, 4, 8, 12)):
            yield replace(plan, tile=tile, tokens=tile.threads, blocks_per_sm=blocks)
    elif isinstance(plan, CoefficientsAggregatePlan | PostPrePlan):
        yield from (replace(plan, blocks_per_sm=blocks) for blocks in (2, 3, 4, 6))
    elif isinstance(plan, CoefficientsAggregateBackwardPlan):
        yield from (replace(plan, blocks_per_sm=blocks) for blocks in (1, 2, 3))
    elif isinstance(plan, WarpsPlan):
        for stages, blocks in product((1, 2), room(target)):
            yield replace(plan, stages=stages, blocks_per_sm=blocks)
    elif isinstance(plan, ProjectionBackwardPlan):
        sizes = ((16, 24, 48), (128, 256), (1,)) if target == "cpu" else ((16, 32, 64), (64, 128, 256), (128, 256))
        for tokens, channels, threads in product(*sizes):
            yield replace(plan, tokens=tokens, channels=channels, threads=threads)


def projections(plan: ProjectionPlan, target: str) -> Iterator[ProjectionPlan]:
    """Tiles of tokens, threads and stages. Chunks of channels fix the bits, so they stay."""
    if isinstance(plan, WarpProjectionPlan):  # a warp has 16 tokens, and phi two stages
        for tokens in (32, 64, 128):
            yield replace(plan, tokens=tokens, threads=WARP * tokens // 16)
        return
    sizes = ((16, 32, 64), (1,), (1,)) if target == "cpu" else ((32, 64, 128), (128, 256), (2, 3, 4))
    for tokens, threads, stages in product(*sizes):
        yield replace(plan, tokens=tokens, threads=threads, stages=stages)


def room(target: str) -> tuple[int, ...]:
    """Blocks that shall find room on a multiprocessor."""
    return (1,) if target == "cpu" else (1, 2, 3)
