"""Published times of DeepSeek's TileKernels, and what the model needs to know of the kernels they were measured with.

    published-times.csv     kernel, tokens, C, device, µs, source: none of them measured here
    published-blocks.csv    the kernels' features, so that a validation needs neither the package nor nvcc; made by
                            `python -m mhc_tilelang.perf.predict.published` where tile-kernels and nvcc are installed

mhc_bench timed them with a flushed L2 on a B200: 13 shapes, 11 kernels that `pip install tile-kernels` builds. The
bytes of each are its operator's: every stream tensor once, phi and mappings once.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .block import Block, walk_block
from .model import Work

if TYPE_CHECKING:
    from .launched import Built
    from .walk import Entry

TIMES, BLOCKS = (Path(__file__).with_name(f"published-{name}.csv") for name in ("times", "blocks"))
ARCHS = {"B200": "sm_100a", "SM100": "sm_100a", "B200?": "sm_100a", "Hopper?": "sm_90a"}
OTHERS = {"post_fwd@quack": "post_fwd", "vllm_post_fwd": "post_fwd", "tl_example_post_fwd": "post_fwd"}
BENCH = "mhc_bench@bdb9d712"  # what constants are fitted on
NARROW = 8192  # width that kernels are built at which do not depend on it

# Bytes that one launch moves through memory: T tokens, C channels of four bfloat16 streams; M = 24 rows of phi.
BYTES: dict[str, Callable[[int, int], int]] = {
    "post_fwd": lambda T, C: T * (18 * C + 80),
    "post_bwd": lambda T, C: T * (28 * C + 160),
    "pre_apply_mix_fwd": lambda T, C: T * (10 * C + 16),
    "pre_apply_mix_bwd": lambda T, C: T * (26 * C + 16),
    "pre_norm_fn_fwd_mul": lambda T, C: T * (8 * C + 100) + 384 * C,
    "pre_norm_fn_bwd_mul": lambda T, C: T * (24 * C + 100) + 384 * C,
    "pre_norm_fn_fwd_norm": lambda T, _: T * 296,
    "pre_norm_fn_bwd_norm": lambda T, _: T * 296,
    "pre_split_mixes_fwd": lambda T, _: T * 192,
    "sinkhorn_fwd": lambda T, _: T * 128,
    "sinkhorn_bwd": lambda T, _: T * 192,
}
WIDE = tuple(name for name in BYTES if name.startswith(("post", "pre_apply")) or name.endswith("_mul"))
LONG = ("pre_norm_fn_bwd_mul",)  # whose blocks walk over all tokens
LONG_TOKENS = (1024, 2048)
KEY = ("kernel", "tokens", "hidden_size", "arch")
Key = tuple[str, int, int, str]


class Point(NamedTuple):
    """A published time; `kernel` is the one of BYTES that is meant."""

    name: str
    kernel: str
    tokens: int
    hidden_size: int
    device: str
    us: float
    source: str

    @property
    def arch(self) -> str:
        """The architecture that it was measured on, as far as known."""
        return ARCHS[self.device]

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens, self.hidden_size

    @property
    def key(self) -> Key:
        """Key of the point's work: kernel, tokens, hidden size, architecture."""
        return self.kernel, self.tokens, self.hidden_size, self.arch

    @property
    def is_fitted(self) -> bool:
        """Whether constants may be fitted on it: of mhc_bench, flushed, and of a kernel that we can build."""
        return self.name in BYTES and self.source.startswith(BENCH)


def points() -> list[Point]:
    """Read all points of the file whose kernel can be built."""
    with TIMES.open(encoding="utf-8", newline="") as file:
        rows = [(OTHERS.get(row["kernel"], row["kernel"]), row) for row in csv.DictReader(file)]
    return [
        Point(row["kernel"], kernel, int(row["tokens"]), int(row["C"]), row["device"], float(row["us"]), row["source"])
        for kernel, row in rows
        if kernel in BYTES
    ]


def works() -> dict[Key, Work]:
    """Return the stored works of all points."""
    with BLOCKS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (row["kernel"], int(row["tokens"]), int(row["hidden_size"]), row["arch"]): Work(
            Block(*(float(row[name]) for name in Block._fields)), *(int(row[name]) for name in Work._fields[1:])
        )
        for row in rows
    }


def measure(point: Point) -> Work:
    """Return the work of a point's kernel: one block's, and the number of blocks."""
    built, few, block = walk_kernel(point.kernel, point.hidden_size if point.kernel in WIDE else NARROW, point.arch)
    if point.kernel in LONG:  # every iteration is alike: two lengths give any
        share = (point.tokens - LONG_TOKENS[0]) / (LONG_TOKENS[1] - LONG_TOKENS[0])
        block = Block(*(low + share * (high - low) for low, high in zip(few, block, strict=True)))
    return Work(block, prod(entry(built, point.tokens).grid), built.resident, BYTES[point.kernel](*point.shape))


@cache
def walk_kernel(kernel: str, width: int, arch: str) -> tuple[Built, Block, Block]:
    """Build one of TileKernels' kernels and walk its block at both of LONG_TOKENS."""
    from ..inspect import tile_kernels
    from .launched import build

    source, flags = tile_kernels.source_of(kernel, width, arch)
    built = build(source, arch, flags)
    few, more = (walk_block(built.code, entry(built, tokens)).block for tokens in LONG_TOKENS)
    return built, few, more


def entry(built: Built, tokens: int) -> Entry:
    """Return the launch of a build; every numeric argument is the number of tokens."""
    return built.entry(dict.fromkeys(built.source.arguments, tokens))


def write() -> None:
    """Rewrite published-blocks.csv."""
    with BLOCKS.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*KEY, *Work._fields[1:], *Block._fields])
        for key, point in {point.key: point for point in points()}.items():
            work = measure(point)
            table.writerow([*key, *work[1:], *(f"{value:.6g}" for value in work.block)])


if __name__ == "__main__":
    write()
