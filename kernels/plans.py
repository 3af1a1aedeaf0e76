"""Plans: compile-time choices of a kernel besides the sizes (tiles, threads, stages), from sizes and target.

A plan is a frozen dataclass and the heuristic that returns it; to tune, pass another one to the kernel. This
module imports nothing, so that a kernel found on disk is launched without loading tilelang. Targets are "cpu"
and "cuda" here: no plan depends on the architecture yet.
"""

from dataclasses import dataclass
from functools import cache

WARP = 32
MAX_THREADS = 256
MAX_REGISTERS, QUARTER_REGISTERS = 255, 16 * 1024  # of a thread, of one of a multiprocessor's four parts
MAX_ACCESS_BYTES = 16
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
CPU_CHANNELS = 1024  # four streams of it in float32 stay in a 32 KB first-level cache, with room to spare


@dataclass(frozen=True)
class ChannelTile:
    """One block's share of a token: `channels` consecutive channels, spread over `threads` GPU threads."""

    channels: int
    threads: int


@cache
def channel_tile(
    hidden_size: int, itemsize: int, platform: str, alignment: int = MAX_ACCESS_BYTES, copies: bool = False
) -> ChannelTile:
    """The tile for `platform` ("cuda" or "cpu"); `alignment` is that of the stream's data pointers, in bytes.

    A kernel that only `copies` keeps nothing on the CPU's stack and takes whole rows there: in cut ones, `expand`
    was 15 to 25 % slower at C = 1280 to 7168.
    """
    if platform == "cpu":
        return ChannelTile(hidden_size if copies else cpu_channels(hidden_size), threads=1)
    return cuda_tile(hidden_size, vector_width(hidden_size, itemsize, alignment))


def vector_width(hidden_size: int, itemsize: int, alignment: int) -> int:
    """Channels a thread owns: a power of two, 8 at most, whose accesses stay aligned in every row.

    float32 streams also own up to 8 channels, as two 16-byte accesses.
    """
    width = 8
    while width > 1 and (hidden_size % width or alignment % min(width * itemsize, MAX_ACCESS_BYTES)):
        width //= 2
    return width


def cuda_tile(hidden_size: int, width: int) -> ChannelTile:
    """The tile of at most 256 threads that covers `hidden_size` with the fewest idle threads, then blocks.

    C = 1280 takes one block of 160 threads and C = 2560 two of them; a fixed 128 threads would leave three
    quarters of the last block of C = 1280 idle.
    """

    def cost(threads: int) -> tuple[int, int]:
        blocks = -(-hidden_size // (threads * width))
        return blocks * threads, blocks

    threads = min(range(WARP, MAX_THREADS + 1, WARP), key=cost)
    return ChannelTile(threads * width, threads)


def cpu_channels(hidden_size: int) -> int:
    """The largest divisor of `hidden_size` up to 1024, so that no tile hangs over; 1024 if all are small."""
    divisors = [d for d in range(CPU_CHANNELS // 4, CPU_CHANNELS + 1) if hidden_size % d == 0]
    return max(divisors, default=min(hidden_size, CPU_CHANNELS))


MAX_SUBLAYERS = 8  # that one launch replays: their tensors are its arguments, their code stands one after the other


@dataclass(frozen=True)
class ReductionTile:
    """A step of a block's walk over a token's channels: `lanes` sums, each of `width` consecutive channels."""

    lanes: int
    width: int


def reduction_tile(hidden_size: int, itemsize: int, platform: str) -> ReductionTile:
    """The tile of the kernels that sum over a token's channels; C is a multiple of its width.

    It fixes the order of the sums, so it must not depend on the data's alignment. On a GPU a lane is a thread, which
    reads 16 bytes at a time; lanes are a power of two, as tilelang's reductions want. On a CPU they are vector
    registers: one store of a row of 16-bit results takes 32 channels, and 2048 tokens of n = 4, C = 1024 took 1.4 ms
    with 32 where 64 took 2.9; float32 took 2.4 with 16 where 32 took 3.3.
    """
    if platform == "cpu":
        return ReductionTile(64 // itemsize, width=1)
    width = MAX_ACCESS_BYTES // itemsize
    while hidden_size % width:
        width //= 2
    return ReductionTile(lanes=128, width=width)


@dataclass(frozen=True)
class PostBackwardTile(ReductionTile):
    """A reduction tile, and the steps in flight or worked on at a time.

    `blocks_per_sm` blocks shall find room on a multiprocessor, which holds the compiler to its share of the registers.
    """

    stages: int
    blocks_per_sm: int


def post_backward_tile(num_streams: int, hidden_size: int, itemsize: int, platform: str) -> PostBackwardTile:
    """The tile of `post_backward`: as of `reduction_tile`, on a GPU of 64 or 32 lanes where that leaves fewer idle.

    At C = 2560 64 lanes take five whole steps, where 128 take two and a half. 16 warps a multiprocessor, two steps
    each: by `predict` 75.6 µs (H200, n = 4), 82 without stages and with the 12 warps that the compiler would leave.
    """
    tile = reduction_tile(hidden_size, itemsize, platform)
    if platform == "cpu":
        return PostBackwardTile(tile.lanes, tile.width, stages=1, blocks_per_sm=1)
    vectors = hidden_size // tile.width
    sums = num_streams**2  # of g_h_res, which threads have to share out evenly where they are fewer
    lanes = min(
        (lanes for lanes in (128, 64, 32) if sums <= lanes or sums % lanes == 0),
        key=lambda lanes: -(-vectors // lanes) * lanes,
    )
    if num_streams > 4:  # all registers are taken
        return PostBackwardTile(lanes, tile.width, stages=1, blocks_per_sm=1)
    return PostBackwardTile(lanes, tile.width, stages=2, blocks_per_sm=16 * WARP // lanes)


KEPT_CHANNELS = 32  # of a thread: what a norm's backward keeps of them takes 80 registers, 96 of a float32 stream


@dataclass(frozen=True)
class NormTile(ReductionTile):
    """A reduction tile for two walks over the channels; `kept` is whether the second has what the first one made."""

    kept: bool

    def steps(self, hidden_size: int) -> int:
        """Steps of a walk."""
        return -(-hidden_size // (self.lanes * self.width))

    def slots(self, hidden_size: int) -> int:
        """Steps whose channels a block holds at a time."""
        return self.steps(hidden_size) if self.kept else 1


@cache
def norm_tile(hidden_size: int, itemsize: int, platform: str) -> NormTile:
    """The tile of the kernels that normalise a row. 256 threads where 128 would have more channels than they keep."""
    tile = reduction_tile(hidden_size, itemsize, platform)
    lanes = tile.lanes
    if platform != "cpu" and hidden_size > lanes * KEPT_CHANNELS:
        lanes = MAX_THREADS
    return NormTile(lanes, tile.width, kept=hidden_size <= MAX_THREADS * KEPT_CHANNELS)


@dataclass(frozen=True)
class NormWarpsTile(NormTile):
    """A tile for thread-level code: lanes are any number of warps, and everything is kept.

    `blocks_per_sm` blocks shall find room on a multiprocessor, which holds the compiler to its share of the registers.
    """

    blocks_per_sm: int = 1


@cache
def norm_backward_tile(num_streams: int, hidden_size: int, itemsize: int, platform: str) -> NormTile:
    """The tile of a norm's backward: thread-level code on a GPU, for a 16-bit stream of two, four or eight whose
    rows start on 16 bytes; else that of `norm_tile`.

    A lane has two steps, three or four where these were more than 256 lanes, and of them as few that hang over as can
    be: at C = 2560 320 vectors are two steps of 160 lanes, by `predict` 43 µs (H200, n = 4), 47 in four steps of 96.
    """
    tile = norm_tile(hidden_size, itemsize, platform)
    if platform == "cpu" or num_streams not in (2, 4, 8) or tile.width * itemsize < MAX_ACCESS_BYTES or itemsize > 2:
        return tile
    vectors = hidden_size // tile.width
    for steps in (1, 2, 3, 4) if vectors <= 2 * WARP else (2, 3, 4):
        lanes = -(-vectors // (steps * WARP)) * WARP
        # Of a step x, g and the next g, u and the sums for g_w; of a stream h_pre and two dots; the rest.
        registers = steps * (4 * num_streams + 24) + 3 * num_streams + 32
        if lanes <= MAX_THREADS and registers < MAX_REGISTERS:
            warps = 4 * (QUARTER_REGISTERS // (-(-registers // 8) * 8 * WARP))
            return NormWarpsTile(lanes, tile.width, kept=True, blocks_per_sm=min(16, max(1, warps * WARP // lanes)))
    return tile


QUANTIZED_GROUP = 128  # channels that share a scale, as DeepGEMM's products take them


@dataclass(frozen=True)
class QuantizedTile(NormTile):
    """A tile for rows quantised by groups of channels: a step has several groups, or a group several steps.

    Steps are whole groups: those beyond the last channel have zeros. With `guesses` a reciprocal is the hardware's
    guess and a step of Newton's.
    """

    guesses: bool = False

    @property
    def groups(self) -> int:
        """Groups of a step."""
        return max(1, self.lanes * self.width // QUANTIZED_GROUP)

    @property
    def members(self) -> int:
        """Lanes of a group in a step."""
        return self.lanes // self.groups

    @property
    def parts(self) -> int:
        """Steps of a group."""
        return max(1, QUANTIZED_GROUP // (self.lanes * self.width))

    def steps(self, hidden_size: int) -> int:
        """Steps of a walk."""
        return -(-super().steps(hidden_size) // self.parts) * self.parts

    def scales(self, hidden_size: int) -> int:
        """Scales of a token."""
        return num_scales(hidden_size)


def num_scales(hidden_size: int) -> int:
    """Groups of channels that a row is quantised in; the last one may be shorter."""
    return -(-hidden_size // QUANTIZED_GROUP)


def quantized_tile(hidden_size: int, itemsize: int, platform: str) -> QuantizedTile:
    """The tile of `norm_tile`, whose sums the norm must have."""
    tile = norm_tile(hidden_size, itemsize, platform)
    return QuantizedTile(tile.lanes, tile.width, tile.kept, guesses=platform == "cuda")


MOST_NORM_TOKENS, MOST_NORM_PARTIALS = 16, 512


def norm_tokens(num_tokens: int, tile: NormTile, platform: str, parallel_blocks: int) -> int:
    """Tokens that share a row of partial sums of a norm's weight: 16, where a row costs 0.25C a token to write and read
    (16-bit stream), or more where there would be more than 512 rows; 11 of the kernel by tiles on a GPU.

    Of thread-level code as few as fill a device, which has `parallel_blocks` // 2 multiprocessors, in whole waves; two
    at least, for a row is 4·C bytes.
    """
    if not isinstance(tile, NormWarpsTile):
        return max(MOST_NORM_TOKENS if platform == "cpu" else 11, -(-num_tokens // MOST_NORM_PARTIALS))
    at_once = max(1, parallel_blocks // 2 * tile.blocks_per_sm)
    waves = max(1, min(-(-num_tokens // (MOST_NORM_TOKENS * at_once)), MOST_NORM_PARTIALS // at_once))
    return max(2, -(-num_tokens // (waves * at_once)))


def tokens_per_block(platform: str) -> int:
    """Tokens of a block of the one-thread-a-token kernels, `sinkhorn` and the coefficients.

    One warp on a GPU, since 4096 tokens are only 128 of them; four registers of 16 lanes on a CPU.
    """
    return 64 if platform == "cpu" else 32


DENOMINATOR_BYTES = {"cuda": 80 * 1024, "cpu": 256 * 1024}  # beside the other tiles: of sm_120's 99 KB, of a stack
FEWEST_ITERATIONS = 20  # that Sinkhorn's backward has room for on a GPU


@cache
def sinkhorn_backward_blocks(num_streams: int, platform: str) -> dict[int, int]:
    """Iterations whose 2·iters − 2 denominators a block of Sinkhorn's backward has room for -> tokens of the block.

    A kernel is compiled for each. On a GPU a block is a warp, and its shared memory decides how many run at a time: 20,
    40, 80 … up to 320/n iterations. A CPU touches no more of its stack than it needs: as many as fit beside 64 tokens,
    32, or 16, one vector, up to 2048/n.
    """

    def most(block: int) -> int:
        return DENOMINATOR_BYTES[platform] // (2 * num_streams * 4 * block)

    if platform == "cpu":
        return {most(block): block for block in (64, 32, 16)}
    doubled = (FEWEST_ITERATIONS << k for k in range(most(WARP).bit_length()))
    return dict.fromkeys((*(fewer for fewer in doubled if fewer < most(WARP)), most(WARP)), WARP)


def sinkhorn_backward_sizes(num_streams: int, iters: int, platform: str) -> tuple[int, int]:
    """The fewest iterations that a kernel has room for and that are enough, and its block; zeros where none is."""
    blocks = sinkhorn_backward_blocks(num_streams, platform)
    return next(((capacity, block) for capacity, block in blocks.items() if iters <= capacity), (0, 0))


def partial_lanes(num_partials: int) -> int:
    """Lanes in which partial sums are added: one for the few of g_phi, 16 for those of a block of tokens each."""
    return 1 if num_partials <= 16 else 16


PARTIAL_THREADS = 256  # of a block of `sum_partials`


def partial_block(lanes: int, platform: str) -> int:
    """Elements of a block of `sum_partials`: on a GPU a thread has one lane of one element, on a CPU all of some."""
    return PARTIAL_THREADS if platform == "cpu" else PARTIAL_THREADS // lanes
