"""Plans of the kernels that are fused across a sublayer boundary: what `plans` has for the others.

Imports nothing but `plans`, so that a kernel found on disk is launched without loading tilelang.
"""

from dataclasses import dataclass, replace
from functools import cache

from .plans import BYTES, MAX_ACCESS_BYTES, WARP, ChannelTile, channel_tile, tokens_per_block
from .projection_plans import (
    LARGE_SHARED_BYTES,
    MAX_PARTIALS,
    MOST_CHUNKS,
    WARP_STREAMS,
    ProjectionBackwardPlan,
    ProjectionPlan,
    WarpProjectionPlan,
    WarpsPlan,
    chunks_per_split,
    equal_group,
    has_warps,
    num_slabs,
    projection_plan,
    tile_projection_plan,
    tiles_in_waves,
)

# A partial g_phi costs 4·M·K bytes to write and to read: 0.6C a token at 4096 tokens (n = 4, bfloat16), in six ranges,
# which beside the 0.6C of the sums over channels keeps a backward's small tensors below 1.5C.
TOKENS_PER_RANGE = 768


@dataclass(frozen=True)
class PostProjectPlan:
    """Compile-time constants of `post_project`: the projection's plan, and how many of its tokens are mixed at a time.

    `blocks_per_sm` blocks shall find room on a multiprocessor, which holds the compiler to its share of the registers.
    """

    projection: ProjectionPlan
    rows: int
    blocks_per_sm: int = 1


@cache
def post_project_plan(
    rows: int,
    num_streams: int,
    hidden_size: int,
    dtype: str,
    platform: str,
    has_h_pre: bool = False,
    shared_bytes: int = LARGE_SHARED_BYTES,
) -> PostProjectPlan:
    """The plan for phi with `rows` rows. Chunks are those of the projection alone, since they fix the bits.

    A GPU's thread mixes one 16-byte vector of each stream at a time; a CPU what stays in its first-level cache. Two
    blocks share a multiprocessor where that spills nothing: 128 registers are just enough for bfloat16.
    """
    projection = projection_plan(rows, num_streams, hidden_size, dtype, platform, shared_bytes)
    if isinstance(projection, WarpProjectionPlan):
        return PostProjectPlan(projection, rows=WARP // 2, blocks_per_sm=2 if num_streams in WARP_STREAMS else 1)
    return tile_post_project_plan(rows, num_streams, hidden_size, dtype, platform, has_h_pre)


@cache
def tile_post_project_plan(
    rows: int, num_streams: int, hidden_size: int, dtype: str, platform: str, has_h_pre: bool = False
) -> PostProjectPlan:
    """Return the plan for the kernels in which a block's threads share out tiles."""
    projection = tile_projection_plan(rows, hidden_size, dtype, platform)
    if platform == "cpu":
        return PostProjectPlan(projection, rows=max(r for r in (32, 16, 8, 4) if r * num_streams <= 32))
    tokens = 64 if num_streams <= 4 else 32
    # The most warps that share out the tensor core's tiles of 16 x 8 evenly.
    warps = next(w for w in (8, 4, 2, 1) if projection.padded_rows // 8 % max(1, w // (tokens // 16)) == 0)
    projection = replace(projection, threads=WARP * warps, tokens=tokens)
    vectors = projection.channels * BYTES[dtype] // MAX_ACCESS_BYTES
    rows_at_once = min(projection.tokens, projection.threads // vectors)
    fits_twice = dtype == "bfloat16" and num_streams <= 4 and not has_h_pre
    return PostProjectPlan(projection, rows_at_once, blocks_per_sm=2 if fits_twice else 1)


@dataclass(frozen=True)
class ExpandProjectPlan:
    """Compile-time constants of `expand_project`: the projection's plan, and the least blocks a multiprocessor."""

    projection: ProjectionPlan
    blocks_per_sm: int = 1


EXPANDING_BLOCKS = 4  # on a multiprocessor, by warps


@cache
def expand_project_plan(rows: int, num_streams: int, hidden_size: int, dtype: str, platform: str) -> ExpandProjectPlan:
    """The plan for phi with `rows` rows: by warps where the projection is, in chunks twice as long, since they have one
    stream to multiply; else tiles and threads of `post_project`, whose chunks are the projection's.

    By tiles 256 threads instead of 128 halve the registers of a thread, and so hold twice the warps.
    """
    projection = projection_plan(rows, num_streams, hidden_size, dtype, platform)
    if isinstance(projection, WarpProjectionPlan) and num_streams in WARP_STREAMS:
        projection = replace(projection, channels=2 * projection.channels)
        group = equal_group(projection.num_chunks(hidden_size), MOST_CHUNKS)
        return ExpandProjectPlan(replace(projection, chunks_per_group=group), blocks_per_sm=EXPANDING_BLOCKS)
    return tile_expand_project_plan(rows, num_streams, hidden_size, dtype, platform)


@cache
def tile_expand_project_plan(
    rows: int, num_streams: int, hidden_size: int, dtype: str, platform: str
) -> ExpandProjectPlan:
    """Return the plan for the kernels in which a block's threads share out tiles."""
    plan = tile_post_project_plan(rows, num_streams, hidden_size, dtype, platform)
    return ExpandProjectPlan(plan.projection, plan.blocks_per_sm)


@dataclass(frozen=True)
class AggregateMappingsPlan:
    """Compile-time constants of `aggregate_mappings`: the tile of `aggregate`, the tokens of a block of mappings.

    On a GPU these are one a thread; `blocks_per_sm` blocks shall find room on a multiprocessor.
    """

    tile: ChannelTile
    tokens: int
    blocks_per_sm: int = 1


# That hold Sinkhorn's matrix without a spill; left alone, the compiler takes 64 and 166, where `aggregate` takes 32 and
# 55.
MAPPING_REGISTERS = {1: 48, 2: 48, 3: 48, 4: 48, 5: 64, 6: 80, 7: 96, 8: 128}


@cache
def aggregate_mappings_plan(
    num_streams: int, hidden_size: int, itemsize: int, platform: str, alignment: int = MAX_ACCESS_BYTES
) -> AggregateMappingsPlan:
    """The plan for streams whose data starts on `alignment` bytes.

    The aggregation wants warps that wait for memory, so the compiler is held to fewer registers than it would take.
    """
    tile = channel_tile(hidden_size, itemsize, platform, alignment)
    if platform == "cpu":
        return AggregateMappingsPlan(tile, tokens_per_block(platform))
    warps = 4 * (16 * 1024 // (MAPPING_REGISTERS[num_streams] * WARP))  # in a multiprocessor's four parts
    return AggregateMappingsPlan(tile, tile.threads, min(16, warps * WARP // tile.threads))


@dataclass(frozen=True)
class CoefficientsAggregatePlan:
    """Compile-time constants of `coefficients_aggregate`: the projection's plan, the threads of a block.

    `blocks_per_sm` blocks shall find room on a multiprocessor.
    """

    projection: WarpProjectionPlan
    threads: int = 128
    blocks_per_sm: int = 4


def aggregating_parts(num_tokens: int, hidden_size: int, plan: CoefficientsAggregatePlan, num_sms: int) -> int:
    """Warps that share a token's channels in `coefficients_aggregate`: as few as fill the device twice, and at most one
    for each vector of a lane.
    """
    vectors = -(-hidden_size // (MAX_ACCESS_BYTES // 2 * WARP))
    warps = 2 * num_sms * plan.blocks_per_sm * plan.threads // WARP
    return max(1, min(vectors, warps // max(1, num_tokens)))


# Architectures on which a boundary's second and third launch wait on the device for the one before (programmatic
# dependent launch), instead of being started after it. For sm_90a and later; none until it was timed and tested on one.
PDL: frozenset[str] = frozenset()


def defers_mappings(platform: str) -> bool:
    """Whether h_post and h_res are made beside the aggregation: on a GPU, where other blocks stream meanwhile.

    A CPU's threads all work anyway.
    """
    return platform != "cpu"


@dataclass(frozen=True)
class PostPrePlan:
    """What is compiled into `post_pre`, the boundary in one launch: the projection's plan, tokens and threads of a
    block, and how many blocks shall find room on a multiprocessor.
    """

    projection: WarpProjectionPlan
    tokens: int = 16
    threads: int = 128
    blocks_per_sm: int = 4

    def num_tiles(self, num_tokens: int) -> int:
        """Tiles of tokens."""
        return -(-num_tokens // self.tokens)


# On an H200 a wave of blocks is predicted to take 8 µs and each further one 3, where three launches take 18 (10 to 31),
# for 128 tokens as for one (docs/critical-path.md): the rest is for what no list of steps knows, and other devices.
MOST_TOKENS_AT_ONCE, MOST_WAVES_AT_ONCE = 128, 2
# How often a block of `post_pre` asks whether the others have come, some 0.5 µs each time, before it leaves a note.
POLLS = 64


def post_pre_plan(plan: ProjectionPlan) -> PostPrePlan | None:
    """The plan of the boundary in one launch, beside one of three with this projection; None where there is none.

    By warps alone, of two or four streams.
    """
    return PostPrePlan(plan) if isinstance(plan, WarpProjectionPlan) and plan.full_tiles <= 1 else None


@dataclass(frozen=True)
class BoundarySchedule:
    """Schedule of a batch's tiles of tokens and chunks of channels over blocks; it never changes results.

    "tokens" where every block takes all chunks of its tile, as with thousands of tokens; "channels" where the chunks
    of a tile go to several blocks, so that a few tokens still fill the device; "one launch" where these blocks also
    hand over to each other what is otherwise left to the launches after, as in decoding.
    """

    token_blocks: int
    chunks_per_split: int
    splits: int
    slabs: int
    one_launch: bool = False

    @property
    def regime(self) -> str:
        """What is shared out: "tokens", or "channels" too, or all in "one launch"."""
        return "one launch" if self.one_launch else "tokens" if self.splits == 1 else "channels"

    def __str__(self) -> str:
        return (
            f"regime {self.regime}: {self.token_blocks} x {self.splits} blocks (token tiles x splits), "
            f"{self.chunks_per_split} chunks a split, {self.slabs} slabs of partial sums"
        )


def boundary_schedule(
    num_tokens: int,
    hidden_size: int,
    plan: PostProjectPlan | ExpandProjectPlan,
    parallel_blocks: int,
    per_split: int | None = None,
    one_launch: bool | None = False,
) -> BoundarySchedule:
    """The schedule for a batch on a device that runs `parallel_blocks` at a time; `per_split` chunks where given.

    `one_launch` says whether `post_pre` is one; None: where that is predicted to end first.
    """
    projection = plan.projection
    num_chunks = projection.num_chunks(hidden_size)
    at_once = post_pre_plan(projection)
    if at_once and one_launch is None and per_split is None:
        one_launch = ends_at_once(num_tokens, hidden_size, at_once, parallel_blocks // 2)
    if at_once and one_launch:
        return BoundarySchedule(at_once.num_tiles(num_tokens), 1, num_chunks, num_chunks, one_launch=True)
    per_split = per_split or chunks_per_split(num_tokens, num_chunks, projection, parallel_blocks)
    return BoundarySchedule(
        token_blocks=-(-num_tokens // projection.tokens),
        chunks_per_split=per_split,
        splits=-(-num_chunks // per_split),
        slabs=num_slabs(per_split, num_chunks, projection),
    )


def ends_at_once(num_tokens: int, hidden_size: int, plan: PostPrePlan, num_sms: int) -> bool:
    """Whether the boundary is taken to end earlier in one launch, on a device of `num_sms` multiprocessors."""
    blocks = plan.num_tiles(num_tokens) * plan.projection.num_chunks(hidden_size)
    waves = -(-blocks // (max(1, num_sms) * plan.blocks_per_sm))
    return num_tokens <= MOST_TOKENS_AT_ONCE and waves <= MOST_WAVES_AT_ONCE


@dataclass(frozen=True)
class BoundaryBackwardPlan(ProjectionBackwardPlan):
    """Compile-time constants of `boundary_backward`: as a projection's backward, for some channels of all streams."""


def backward_is_fused(num_streams: int, platform: str) -> bool:
    """Whether a boundary's backward is: on a GPU up to four streams; on a CPU the fused kernel takes longer than the
    separate ones (docs/tuning.md).

    At n = 8 tilelang's layouts take minutes and 6 GB to find. There the separate kernels run, which round the gradient
    of x_next to the stream's dtype.
    """
    return platform != "cpu" and num_streams <= 4


@dataclass(frozen=True)
class CoefficientsAggregateBackwardPlan:
    """What is compiled into `coefficients_aggregate_backward`: iterations that Sinkhorn's backward has room for, the
    warps of a block that sum over channels, and how many blocks shall find room on a multiprocessor.

    With one warp more nvcc holds two blocks' threads to 96 registers, and spills 176 bytes on sm_100a and sm_120a.
    """

    capacity: int
    summing_warps: int = 7
    blocks_per_sm: int = 2


def mappings_by_threads(num_streams: int, platform: str) -> bool:
    """Whether thread-level code is Sinkhorn's backward in `coefficients_backward`: on a GPU, of two streams or four,
    whose rows of a matrix are one access; at n = 8 matrix, gradient and logits are 192 registers.
    """
    return platform != "cpu" and num_streams in (2, 4)


def joins_coefficients(num_streams: int, hidden_size: int, dtype: str, platform: str) -> bool:
    """Whether `coefficients_aggregate_backward` takes the place of two launches: for 16-bit streams whose rows start on
    16 bytes, where there is thread-level code for both.
    """
    return mappings_by_threads(num_streams, platform) and has_warps(hidden_size, dtype, platform)


def joined_tokens(num_tokens: int, plan: CoefficientsAggregateBackwardPlan, parallel_blocks: int) -> int:
    """Tokens of its block: as few as fill a device that runs `parallel_blocks` at a time once, or some times where a
    warp of them is too few; a multiple of the warps that share them. It changes no token's bits.
    """
    waves = max(1, -(-num_tokens // (WARP * parallel_blocks)))
    tokens = -(-num_tokens // (waves * parallel_blocks))
    return min(WARP, max(1, -(-tokens // plan.summing_warps)) * plan.summing_warps)


@cache
def boundary_backward_plan(
    rows: int,
    num_streams: int,
    hidden_size: int,
    dtype: str,
    platform: str,
    layer_dtype: str = "",
    shared_bytes: int = LARGE_SHARED_BYTES,
) -> BoundaryBackwardPlan | WarpsPlan:
    """The plan for phi with `rows` rows. It must not depend on the token count: the channels of a block fix the bits.

    On a GPU, n is 4 at most (see `backward_is_fused`). Thread-level code, with a stage less where `shared_bytes`, what
    a block may use, are too few for two; the tile-level kernel for float32, for a layer of another dtype than the
    stream's (where one is said), where rows start on less than 16 bytes, and for one or three streams.
    """
    if platform == "cpu":
        channels = min(128 if num_streams <= 4 else 32, -(-hidden_size // 16) * 16)
        tokens = 16 if dtype == "float32" else 24  # what a stack holds
        return BoundaryBackwardPlan(rows, False, "float32", tokens, channels, threads=1)
    if num_streams in (2, 4) and has_warps(hidden_size, dtype, platform) and layer_dtype in ("", dtype):
        plan = WarpsPlan(rows, num_streams)
        return plan if boundary_shared_bytes(plan) <= shared_bytes else replace(plan, stages=1)
    operand = "bfloat16" if dtype == "bfloat16" else "float32"
    if dtype == "float16":
        return BoundaryBackwardPlan(rows, True, operand, tokens=16, channels=64, threads=128)
    if dtype == "float32":
        return BoundaryBackwardPlan(rows, True, operand, tokens=16, channels=32, threads=128)
    tokens, channels = (16, 128) if rows > 16 else (32, 64)  # a head's few rows: 128 channels spill
    return BoundaryBackwardPlan(rows, True, operand, tokens, channels, threads=256)


def boundary_shared_bytes(plan: WarpsPlan) -> int:
    """Shared memory of a block of `boundary_backward`, of all its forms the largest."""
    n, tokens, blocks = plan.streams, plan.tokens, -(-plan.rows // 8)
    streams, layers = (plan.stages + 1) * n, 2 * plan.stages  # g_x_next has one stage
    wide = (streams + layers) * tokens * plan.channels * 2
    phi = n * plan.channels * (blocks | 1) * 8 * 4
    coefficients = plan.stages * tokens * (16 * (2 * blocks + 1) + 4 * (n * n + 2 * n + 1))
    return wide + phi + coefficients + plan.channels // 32 * n * (n + 2) * tokens * 4


def tiles_per_range(
    num_tokens: int, plan: BoundaryBackwardPlan | WarpsPlan, hidden_size: int = 0, parallel_blocks: int = 1
) -> int:
    """Tiles of tokens that share one partial g_phi: of the tile-level kernel 768 tokens or more, eight ranges at most;
    of thread-level code what fills a device that runs `parallel_blocks` at a time.
    """
    if isinstance(plan, BoundaryBackwardPlan):
        return -(-max(TOKENS_PER_RANGE, -(-num_tokens // MAX_PARTIALS)) // plan.tokens)
    blocks = -(-hidden_size // plan.channels)
    return tiles_in_waves(-(-num_tokens // plan.tokens), blocks, parallel_blocks, partial_tiles=0.8)
