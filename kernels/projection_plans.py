"""Plans of the kernels with a product: the projection and its backward, by tiles and by warps.

Imports nothing but `plans`, so that a kernel found on disk is launched without loading tilelang.
"""

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import gcd

from .plans import BYTES, WARP

SPAN = 32  # channels that a warp takes at a time, 8 consecutive ones a lane
WARP_STREAMS = (2, 4)  # whose forward is by warps; of eight in part
MOST_CHUNKS = 5  # of 64 channels in a group: longer ones leave the device fewer blocks to share out
LARGE_SHARED_BYTES = 227 * 1024  # that a block may use where nothing else is said: sm_90a and sm_100a
LANES = 16  # partial sums of Σx² per token
STAGE_BYTES = 32 * 1024  # shared memory of one pipeline stage: three of them fit the 99 KB of sm_120
GROUP_CHANNELS = 1024  # channels, at most, whose chunks are added up before they are written, except for small batches
SLAB_CHUNKS = 0.5  # what a slab of partial sums costs to write and to read, in chunks of the stream (n = 4, 16 bits)


@dataclass(frozen=True)
class ProjectionPlan:
    """Compile-time constants of a projection: phi's form, and the tile of tokens and channels of a block."""

    rows: int
    split: bool
    operand_dtype: str
    tokens: int
    channels: int
    threads: int
    stages: int
    chunks_per_group: int = 1

    @property
    def halves(self) -> int:
        """Parts that phi is split into: high and low, or phi itself."""
        return 2 if self.split else 1

    @property
    def lanes(self) -> int:
        """Partial sums of the squares in a slab."""
        return LANES

    @property
    def padded_rows(self) -> int:
        """Rows of phi in a tile: both halves, padded to the tensor core's 16."""
        return -(-2 * self.rows // 16) * 16 if self.split else self.rows

    @property
    def held_rows(self) -> int:
        """Rows of phi that a block's threads hold of a tile: as many as they share out evenly, the last ones empty."""
        step = 8 if self.split and self.rows > 4 else 4 if self.split and self.rows == 3 else 1
        return -(-self.rows // step) * step

    @property
    def slab_rows(self) -> int:
        """Rows of one slab of partial sums: the dots of each half, then the lanes of the squares."""
        return self.halves * self.rows + self.lanes

    def num_chunks(self, hidden_size: int) -> int:
        """Chunks that the channels are summed in."""
        return -(-hidden_size // self.channels)

    def is_grouped(self, hidden_size: int) -> bool:
        """Whether chunks are added up in groups: not where one is all there is."""
        return self.chunks_per_group > 1 and self.num_chunks(hidden_size) > 1


@dataclass(frozen=True)
class WarpProjectionPlan(ProjectionPlan):
    """A projection's plan for the kernels in which a warp owns 16 tokens.

    phi's halves lie in memory as the tensor core takes them, and end in one sum, so that a slab has one row for each
    row of phi and one for the squares.
    """

    @property
    def halves(self) -> int:
        """Parts of the dots in a slab: both halves of phi are in one sum."""
        return 1

    @property
    def lanes(self) -> int:
        """Partial sums of the squares in a slab."""
        return 1

    @property
    def full_tiles(self) -> int:
        """Tiles of 16 rows of phi, of high halves, and as many of low ones."""
        return self.rows // 16

    @property
    def sum_tiles(self) -> int:
        """Tiles of sums: the full ones, and one of 8 rows of high halves above their low ones, if rows are left."""
        return self.full_tiles + (self.rows % 16 > 0)

    @property
    def low_scale(self) -> float:
        """What low halves are multiplied with: in float16 most were subnormal otherwise."""
        return 2.0**11 if self.operand_dtype == "float16" else 1.0

    @property
    def dots_tiles(self) -> int:
        """Tiles of sums in a chunk: scaled low halves have their own."""
        return self.sum_tiles if self.low_scale == 1 else self.phi_tiles

    @property
    def group_sums(self) -> int:
        """Dots of a group that a lane has of 8 tokens, high and low halves added up."""
        return self.full_tiles * 4 + (self.sum_tiles - self.full_tiles) * 2

    @property
    def phi_tiles(self) -> int:
        """Tiles of 16 rows in which phi's halves lie."""
        return self.full_tiles + self.sum_tiles

    @property
    def padded_rows(self) -> int:
        """Rows of phi in a tile: both halves, padded to the tensor core's 16."""
        return 16 * self.phi_tiles

    def units(self, num_streams: int) -> int:
        """16-byte units of a chunk of phi: for each span of 32 channels, stream, step of 16 channels, tile and lane."""
        return self.channels // SPAN * num_streams * (SPAN // 16) * self.phi_tiles * WARP


@cache
def projection_plan(
    rows: int,
    num_streams: int,
    hidden_size: int,
    dtype: str,
    platform: str,
    shared_bytes: int = LARGE_SHARED_BYTES,
) -> ProjectionPlan:
    """The plan for phi with `rows` rows. It must not depend on the token count: the chunks fix the bits.

    A 16-bit stream of two or four is projected by warps where a lane's 8 channels are in a row; one of eight in
    bfloat16, on a Sinkhorn connection's rows, where a block may use the `shared_bytes` that it takes.
    """
    if num_streams in WARP_STREAMS and has_warps(hidden_size, dtype, platform):
        plan = WarpProjectionPlan(rows, True, dtype, tokens=64, channels=64, threads=128, stages=2)
        return replace(plan, chunks_per_group=equal_group(plan.num_chunks(hidden_size), MOST_CHUNKS))
    has_room = dtype == "bfloat16" and shared_bytes >= LARGE_SHARED_BYTES
    if (num_streams, rows) == (8, 80) and has_room and has_warps(hidden_size, dtype, platform):
        plan = WarpProjectionPlan(rows, True, dtype, tokens=128, channels=32, threads=256, stages=2)
        return replace(plan, chunks_per_group=equal_group(plan.num_chunks(hidden_size), 2 * MOST_CHUNKS))
    return tile_projection_plan(rows, hidden_size, dtype, platform)


@cache
def tile_projection_plan(rows: int, hidden_size: int, dtype: str, platform: str) -> ProjectionPlan:
    """Return the plan for the kernels in which a block's threads share out tiles."""
    if platform == "cpu":
        channels = min(256, -(-hidden_size // LANES) * LANES)
        return ProjectionPlan(rows, False, "float32", tokens=32, channels=channels, threads=1, stages=1)
    operand_dtype = "bfloat16" if dtype == "bfloat16" else "float32"
    plan = ProjectionPlan(rows, True, operand_dtype, tokens=64, channels=128, threads=128, stages=3)
    if plan.padded_rows > 96:  # n = 8: with 128 threads the 160 columns of sums take all 255 registers
        plan = replace(plan, threads=256)
    if dtype == "float32":  # x is split in registers too: wider tiles spill, and more tokens do at n = 8
        plan = replace(plan, channels=32, tokens=64 if plan.padded_rows <= 96 else 32)
    bytes_per_channel = plan.tokens * BYTES[dtype] + plan.padded_rows * BYTES[operand_dtype]
    while plan.channels * bytes_per_channel > STAGE_BYTES:
        plan = replace(plan, channels=plan.channels // 2)
    return replace(plan, chunks_per_group=equal_group(plan.num_chunks(hidden_size), GROUP_CHANNELS // plan.channels))


def equal_group(num_chunks: int, most: int) -> int:
    """Chunks of a group, at most `most` and more than half of it: groups of one size, an even number of them if any can
    be, so that splits of one group or of two are equal shares.

    C = 2560 has groups of 5, 5, 5, 5 chunks of 128; of 8, 8, 4 the longest splits take 16 where the mean is 10.
    """

    def unequal(size: int) -> tuple[int, int, int]:
        groups = -(-num_chunks // size)
        return groups * size - num_chunks, groups % 2, -size

    return most if num_chunks <= most else min(range(most // 2 + 1, most + 1), key=unequal)


def chunks_per_split(num_tokens: int, num_chunks: int, plan: ProjectionPlan, parallel_blocks: int) -> int:
    """Return the chunks of a projection's block: equal shares for a device that runs `parallel_blocks` at a time.

    A group by warps, whatever the batch: of slabs of chunks the coefficients would wait for five times the loads. Else
    whole groups where these are enough to keep half of it busy or more: to write slabs of chunks costs 1C, and as much
    to read them (n = 4, bfloat16), slabs of groups a fifth. Of those, what ends first: waves of blocks times the chunks
    and slabs of one. Split-K never changes results.
    """
    if isinstance(plan, WarpProjectionPlan):
        return plan.chunks_per_group
    token_blocks = max(1, -(-num_tokens // plan.tokens))
    wanted = max(1, parallel_blocks // token_blocks)
    num_groups = -(-num_chunks // plan.chunks_per_group)
    if wanted < 2 * num_groups:

        def ends(groups: int) -> tuple[float, int]:
            splits = -(-num_groups // groups)
            chunks = min(num_chunks, groups * plan.chunks_per_group)
            of_one = chunks + SLAB_CHUNKS * (groups if splits > 1 else 1)
            return -(-token_blocks * splits // parallel_blocks) * of_one, splits

        return min(num_chunks, min(range(1, num_groups + 1), key=ends) * plan.chunks_per_group)
    return -(-num_chunks // min(num_chunks, wanted))


def num_slabs(chunks_per_split: int, num_chunks: int, plan: ProjectionPlan) -> int:
    """Slabs of partial sums that the projection writes: one of totals, one per group of chunks, or one per chunk."""
    if chunks_per_split >= num_chunks and not isinstance(plan, WarpProjectionPlan):
        return 1
    return num_chunks if chunks_per_split % plan.chunks_per_group else -(-num_chunks // plan.chunks_per_group)


@dataclass(frozen=True)
class WarpsPlan:
    """Compile-time constants of a kernel of thread-level code (see `warp_tiles`): a block's tile and stages.

    `stages` tiles are in shared memory at a time: two where one is in flight while the other is worked on.

    `streams` is how many a block has; `blocks_per_sm` how many blocks shall find room on a
    multiprocessor, which holds the compiler to its share of the registers.
    """

    rows: int
    streams: int
    tokens: int = 32
    channels: int = 64
    stages: int = 2
    blocks_per_sm: int = 2

    @property
    def split(self) -> bool:
        """Operands are split into halves, of bfloat16 whatever the stream is."""
        return True

    @property
    def operand_dtype(self) -> str:
        """Dtype of the halves."""
        return "bfloat16"


@lru_cache(maxsize=4096)  # a backward asks at every call, and for thousands of tokens it takes a while
def tiles_in_waves(num_tiles: int, blocks: int, parallel_blocks: int, partial_tiles: float) -> int:
    """Tiles of tokens that a block of thread-level code walks over: what ends soonest.

    Each of the ranges that the tokens are cut in has `blocks` blocks, of which the device runs `parallel_blocks` at a
    time: blocks in whole waves, since the last one costs as much as any; several rather than one, since
    multiprocessors run dry one by one at the end; few, since each leaves a partial g_phi, which costs `partial_tiles`.
    """

    def cost(tiles: int) -> float:
        """Return the cost in times of a tile, as `mhc-tilelang predict` has them; a block's start costs one more."""
        ranges = -(-num_tiles // tiles)
        waves = -(-ranges * blocks // parallel_blocks)
        return (waves + LAST_WAVE) * (tiles + 1) + ranges * blocks / parallel_blocks * partial_tiles

    return min(range(1, max(2, num_tiles + 1)), key=lambda tiles: (cost(tiles), -tiles))


LAST_WAVE = 0.27  # of a wave's time is lost at the end


def has_warps(hidden_size: int, dtype: str, platform: str) -> bool:
    """Whether thread-level code does it: on a GPU, for 16-bit streams whose rows start on 16 bytes."""
    return platform != "cpu" and BYTES[dtype] == 2 and hidden_size % 8 == 0


def projection_shared_bytes(plan: WarpsPlan) -> int:
    """Shared memory of a block of `project_backward`, of all its forms the largest."""
    n, tokens, blocks = plan.streams, plan.tokens, -(-plan.rows // 8)
    a_stage = (n + 1) * tokens * plan.channels * 2 + tokens * (16 * (2 * blocks + 1) + 4 * (n + 1))
    return plan.stages * a_stage + n * plan.channels * (blocks | 1) * 8 * 4


@dataclass(frozen=True)
class ProjectionBackwardPlan:
    """Compile-time constants of a projection's backward: as `ProjectionPlan`, for a block of channels of one stream."""

    rows: int
    split: bool
    operand_dtype: str
    tokens: int
    channels: int
    threads: int

    @property
    def padded_rows(self) -> int:
        """Rows of phi in a tile, padded to the tensor core's 16."""
        return -(-self.rows // 16) * 16 if self.split else self.rows


@cache
def projection_backward_plan(
    rows: int, hidden_size: int, dtype: str, platform: str, num_streams: int = 0, shared_bytes: int = LARGE_SHARED_BYTES
) -> ProjectionBackwardPlan | WarpsPlan:
    """The plan for phi with `rows` rows: thread-level code where it does it (see `has_warps`) and the number of streams
    is given, with as many of them a block as leave room for another block and divide n; the tile-level kernel else.
    """
    if platform == "cpu":
        channels = min(512 if rows <= 32 else 256, -(-hidden_size // LANES) * LANES)
        return ProjectionBackwardPlan(rows, False, "float32", tokens=48, channels=channels, threads=1)
    if num_streams and has_warps(hidden_size, dtype, platform):
        plan = WarpsPlan(rows, gcd(num_streams, 4 if rows <= 32 else 2))
        return plan if projection_shared_bytes(plan) <= shared_bytes else replace(plan, stages=1)
    # 256 threads: with 128 the sums of a tile take 200 registers on sm_90a, and more than there are on sm_100a.
    if dtype == "bfloat16":
        channels = 128 if rows <= 32 else 64
        return ProjectionBackwardPlan(rows, True, "bfloat16", tokens=64, channels=channels, threads=256)
    return ProjectionBackwardPlan(rows, True, "float32", tokens=64 if rows <= 32 else 32, channels=64, threads=256)


TOKENS_PER_PARTIAL = 512  # a partial g_phi costs 4·M·K bytes to write: 0.75C a token at 512 (n = 4, bfloat16)
MAX_PARTIALS = 8


def tokens_per_split(
    num_tokens: int,
    plan: ProjectionBackwardPlan | WarpsPlan,
    num_streams: int = 1,
    hidden_size: int = 0,
    parallel_blocks: int = 1,
) -> int:
    """Tokens that share one partial g_phi: whole tiles, of the tile-level kernel 512 or more, eight partials at most;
    of thread-level code what fills a device that runs `parallel_blocks` at a time.
    """
    if isinstance(plan, WarpsPlan):
        blocks = -(-hidden_size // plan.channels) * (num_streams // plan.streams)
        num_tiles = -(-num_tokens // plan.tokens)
        return plan.tokens * tiles_in_waves(num_tiles, blocks, parallel_blocks, partial_tiles=1.5)
    wanted = max(TOKENS_PER_PARTIAL, -(-num_tokens // MAX_PARTIALS))
    return -(-wanted // plan.tokens) * plan.tokens
