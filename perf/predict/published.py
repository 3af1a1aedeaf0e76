"""Published times of DeepSeek's TileKernels, and what the model needs to know of the kernels they were measured with.

    published-times.csv     kernel, tokens, C, device, µs, source: none of them measured here
    published-blocks.csv    the kernels' features, so that a validation needs neither the package nor nvcc; made by
                            `python -m mhc_tilelang.perf.predict.published` where tile-kernels and nvcc are installed

mhc_bench timed them with a flushed L2 on a B200: 13 shapes, 11 kernels that `pip install tile-kernels` builds. The
bytes of each are its operator's: every stream tensor once, phi and mappings once.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from .block import Block
from .model import Work

if TYPE_CHECKING:
    from .built import Built
    from .walk import Entry

FOLDER = Path(__file__).parent
TIMES, BLOCKS = FOLDER / "published-times.csv", FOLDER / "published-blocks.csv"
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


@dataclass(frozen=True)
class Point:
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
    def is_fitted(self) -> bool:
        """Whether constants may be fitted on it: of mhc_bench, flushed, and of a kernel that we can build."""
        return self.name in BYTES and self.source.startswith(BENCH)


def points() -> list[Point]:
    """All of the file whose kernel can be built."""
    with TIMES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = []
    for row in rows:
        kernel = OTHERS.get(row["kernel"], row["kernel"])
        if kernel in BYTES:
            sizes = int(row["tokens"]), int(row["C"])
            found.append(Point(row["kernel"], kernel, *sizes, row["device"], float(row["us"]), row["source"]))
    return found


Key = tuple[str, int, int, str]


def key_of(point: Point) -> Key:
    """What a work depends on."""
    return point.kernel, point.tokens, point.hidden_size, point.arch


def works() -> dict[Key, Work]:
    """The stored works of all points."""
    with BLOCKS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        block = Block(**{field.name: float(row[field.name]) for field in fields(Block)})
        key = row["kernel"], int(row["tokens"]), int(row["hidden_size"]), row["arch"]
        found[key] = Work(block, int(row["grid"]), int(row["resident"]), int(row["bytes"]))
    return found


def measure() -> Iterator[tuple[Key, Work]]:
    """Build and walk every kernel that a point needs; each build once."""
    from math import prod

    from ..inspect import tile_kernels
    from .block import walk_block
    from .built import build

    walked: dict[tuple[str, int, str], Callable[[int], tuple[Block, int, int]]] = {}
    for kernel, tokens, width, arch in dict.fromkeys(map(key_of, points())):
        place = kernel, width if kernel in WIDE else NARROW, arch
        if place not in walked:
            source, flags = tile_kernels.source_of(*place)
            built = build(source, arch, flags)
            print(f"{' '.join(map(str, place))}", file=sys.stderr)

            def at(tokens: int, built: Built = built) -> Entry:
                return built.entry(dict.fromkeys(built.source.arguments, tokens))

            few, more = (walk_block(built.code, at(number)).block for number in LONG_TOKENS)

            def features(
                tokens: int, few: Block = few, more: Block = more, built: Built = built, kernel: str = kernel
            ) -> tuple[Block, int, int]:
                block = between(few, more, tokens) if kernel in LONG else more
                return block, prod(built.entry(dict.fromkeys(built.source.arguments, tokens)).grid), built.resident

            walked[place] = features
        block, grid, resident = walked[place](tokens)
        yield (kernel, tokens, width, arch), Work(block, grid, resident, BYTES[kernel](tokens, width))


def between(few: Block, more: Block, tokens: int) -> Block:
    """A block that walks over so many tokens, from two that walk over LONG_TOKENS: every iteration is alike."""
    share = (tokens - LONG_TOKENS[0]) / (LONG_TOKENS[1] - LONG_TOKENS[0])
    pairs = zip(astuple(few), astuple(more), strict=True)
    return Block(*(low + share * (high - low) for low, high in pairs))


def write() -> None:
    """Make published-blocks.csv anew."""
    names = ["kernel", "tokens", "hidden_size", "arch", "grid", "resident", "bytes", *(f.name for f in fields(Block))]
    with BLOCKS.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(names)
        for key, work in measure():
            numbers = (work.grid, work.resident, work.bytes)
            table.writerow([*key, *numbers, *(f"{value:.6g}" for value in astuple(work.block))])


if __name__ == "__main__":
    write()
