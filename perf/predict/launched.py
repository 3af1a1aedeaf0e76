"""One launch of ours as the model's `Work`: built by nvcc, walked, and held to its TIR before there is a number.

Source and listing are kept beside the CPU's kernels, named by a hash of the TIR and of what makes them: a kernel that
has not changed is read in a second, without nvcc. Blocks along y and z may differ (a projection's last split is
shorter), so up to four of them are walked, beyond that the first, the middle and the last; along x, where the tokens
are, the middle one stands for all. Each refusal is a sentence:

    loops           a branch depended on data: how often it goes which way is not in the code
    bytes           of the stream tensors the walk's bytes are the audit's, which reads the TIR; every access is of a
                    known buffer
    barriers        that the blocks come to in the walk are those of the generated source
    products        tensor instructions executed do the multiply-adds of the TIR's T.gemm
    not modelled    wgmma and tcgen05, the TMA, atomics, spills inside loops
    cache           a working set that fits the last-level cache, unless it is said to be flushed
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...compiler.cuda_source import CudaSource
from ..inspect.compiler import COMPILE_FLAGS, Compiled, compile_source, versions
from ..inspect.occupancy import occupancy
from .barriers import count_barriers
from .block import Block, Walked, walk_block
from .listing import Instruction, parse
from .model import Work
from .walk import Argument, Entry

if TYPE_CHECKING:
    from ...compiler.recording import Recorded

FEW_BLOCKS = 4
TOLERANCE = 0.01  # of bytes and products: blocks at an edge do less than the middle one
OTHER_TENSOR = ("HGMMA", "IGMMA", "QGMMA", "BGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA", "UTCOMMA")
SHAPES = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}  # multiply-adds of a warp's instruction


@dataclass(frozen=True)
class Built:
    """A kernel for one architecture: its source, what ptxas says, its instructions, how many blocks fit an SM."""

    source: CudaSource
    arch: str
    compiled: Compiled
    code: list[Instruction]
    resident: int

    def entry(self, sizes: Mapping[str, float]) -> Entry:
        """Return the launch at these run-time sizes and scalars: arguments, grid, threads."""
        head = self.source.code[self.source.code.rindex("__global__") :]
        head = head[: head.index("{")]
        arguments = []
        for name, dtype in zip(self.source.arguments, self.source.dtypes, strict=True):
            pointer = "tensor map" if f"CUtensorMap {name}" in head else "buffer"
            arguments.append(Argument(name, pointer if dtype == "handle" else dtype, sizes.get(name, 0)))
        return Entry(self.arch, tuple(arguments), self.source.grid_at(sizes), self.source.threads)


def build_function(func: Any, arch: str) -> Built:
    """Lower and build a TIR function, or find what was kept. Raises CompilerError where a tool is missing."""
    from ...compiler import cuda_source
    from ...compiler.cpu.build import digest
    from ...compiler.disk_cache import Made, get_or_make

    makers = Path(cuda_source.__file__).read_text(encoding="utf-8"), str(cuda_source.configs_of(func)), str(versions())
    name = digest("\0".join((func.script(show_meta=True), arch, *COMPILE_FLAGS, *makers)))

    def make(_scratch: Path) -> Made:
        source = cuda_source.generate_from(func, arch)
        return {"source": asdict(source), "compiled": asdict(build(source, arch).compiled)}, None

    def use(facts: dict[str, Any], _file: Path) -> Built:
        tuples = {key: tuple(facts["source"][key]) for key in ("arguments", "grid", "threads", "dtypes")}
        return read(CudaSource(**{**facts["source"], **tuples}), Compiled(**facts["compiled"]), arch)

    return get_or_make("predict", name, make, use)


def build(source: CudaSource, arch: str, flags: Sequence[str] = tuple(COMPILE_FLAGS)) -> Built:
    """Compile and disassemble a source."""
    return read(source, compile_source(source.code, arch, tuple(flags), encoded=True), arch)


def read(source: CudaSource, compiled: Compiled, arch: str) -> Built:
    """Parse the listing; how many blocks fit."""
    shared = source.shared_bytes + compiled.static_shared_bytes
    fits = occupancy(arch, prod(source.threads), compiled.registers, shared, compiled.named_barriers)
    return Built(source, arch, compiled, parse(compiled.listing), fits.blocks)


class Launched(NamedTuple):
    """A launch's work, what its checks said, and the bytes that it touches at all, for the cache."""

    family: str
    work: Work
    refusals: tuple[str, ...]
    working_set: int


def walk_launch(launch: Recorded, arch: str) -> Launched:
    """Build, walk and check one launch. Raises MHCError where it cannot be built or walked."""
    from ..traffic.audit import audit_function

    func = launch.function
    built = build_function(func, arch)
    entry = built.entry(launch.sizes)
    walked = walk_grid(built, entry)
    expected = sum(share * count_barriers(built.source, launch.sizes, block) for block, share in blocks_of(entry.grid))
    audited = audit_function(func, launch.sizes)
    streams = [name for name in launch.streams if name in audited]
    blocks, edge = prod(entry.grid), 1 / entry.grid[0]
    moved: Counter[tuple[str, str]] = Counter()
    for (number, side), amount in walked.moved.items():
        moved[built.source.arguments[number] if number >= 0 else "", side] += amount * blocks  # type: ignore[assignment]
    refusals = not_modelled(built.code, walked)
    if not walked.others["atomics"]:  # else what one block does depends on when the others come
        refusals += barriers_differ(walked.block.barriers, expected)
        refusals += bytes_differ(moved, audited, streams, edge)
        products = blocks * multiply_adds(built.code, walked)
        refusals += products_differ(products, products_asked(func, launch.sizes), edge)
    through_memory = working_set = 0
    for name, traffic in audited.items():
        for movement in (traffic.read, traffic.written):
            through_memory += movement.accessed if name in streams else movement.distinct
            working_set += movement.distinct
    work = Work(walked.block, blocks, built.resident, through_memory)
    return Launched(launch.family, work, tuple(refusals), working_set)


def walk_grid(built: Built, entry: Entry) -> Walked:
    """Walk the blocks that stand for the grid, averaged."""
    walked = [
        (walk_block(built.code, entry, (x, y, z)), of_x * share)
        for (x, of_x), ((_, y, z), share) in product(kinds_along_x(built, entry), blocks_of(entry.grid))
    ]
    features = zip(*(each.block for each, _ in walked), strict=True)
    shares = [share for _, share in walked]
    block = Block(*(sum(value * share for value, share in zip(each, shares, strict=True)) for each in features))
    places = dict.fromkeys(place for each, _ in walked for place in each.moved)
    moved = {place: sum(each.moved.get(place, 0) * share for each, share in walked) for place in places}
    undecided = dict.fromkeys(text for each, _ in walked for text in each.undecided)
    others = {name: max(each.others[name] for each, _ in walked) for name in walked[0][0].others}
    return Walked(block, moved, tuple(undecided), others)


def blocks_of(grid: tuple[int, int, int]) -> list[tuple[tuple[int, int, int], float]]:
    """Return the blocks to walk, and the share of the grid that each stands for."""
    x, y, z = grid
    places = product(positions(y), positions(z))
    return [((x // 2, at_y, at_z), of_y * of_z / (y * z)) for (at_y, of_y), (at_z, of_z) in places]


def kinds_along_x(built: Built, entry: Entry) -> list[tuple[int, float]]:
    """Blocks along x, where the tokens are, that stand for all, and their shares: the middle one, and the first where
    the first blocks do other work, such as mappings beside an aggregation. Where they end is found by bisection.
    """
    x, y, z = entry.grid

    def moved(at: int) -> object:
        return walk_block(built.code, entry, (at, y // 2, z // 2)).moved

    same, other = 0, x // 2
    first = moved(same)
    if first == moved(other):
        return [(other, 1.0)]
    while other - same > 1:
        between = (same + other) // 2
        same, other = (between, other) if moved(between) == first else (same, between)
    return [(0, other / x), (x // 2, 1 - other / x)]


def positions(extent: int) -> list[tuple[int, int]]:
    """Return the blocks to walk along an axis, and how many each stands for."""
    if extent <= FEW_BLOCKS:
        return [(place, 1) for place in range(extent)]
    return [(0, 1), (extent // 2, extent - 2), (extent - 1, 1)]


def not_modelled(code: Sequence[Instruction], walked: Walked) -> list[str]:
    """List what the walk could not decide, and machine code that no published kernel resembles."""
    found, others = [], walked.others
    if others["atomics"]:
        count = others["atomics"]
        return [f"{count} atomics a block, whose order and cost depend on timing: see docs/critical-path.md"]
    if walked.undecided:
        found.append(f"the path depends on data: {', '.join(walked.undecided[:3])}")
    if unknown := sorted({step.kind for step in code if step.kind.startswith(OTHER_TENSOR)}):
        found.append(f"tensor instructions that the model does not know: {', '.join(unknown)}")
    if others["bulk"]:
        found.append("copies by the TMA, whose bytes the instructions do not tell")
    standing = sum(step.kind in ("LDL", "STL") for step in code)
    if others["local"] > standing * walked.block.warps:
        text = f"{others['local']} accesses to local memory a block, {standing} in the code"
        found.append(f"spills inside a loop: {text}")
    return found


def differ(executed: float, expected: float, edge: float) -> bool:
    """Whether two counts are not of the same thing."""
    return not abs(executed - expected) <= (TOLERANCE + edge) * max(executed, expected)


def bytes_differ(
    moved: Mapping[tuple[str, str], float], audited: Mapping[str, Any], streams: Sequence[str], edge: float
) -> list[str]:
    """List differences between the walk's bytes and the audit's; `moved` is the whole launch, by buffer and side."""
    found = []
    if unknown := sum(amount for (name, _), amount in moved.items() if not name):
        found.append(f"{unknown / 1e6:.1f} MB of accesses whose buffer is not known")
    for name in streams:
        for side, traffic in (("read", audited[name].read), ("written", audited[name].written)):
            executed, expected = moved.get((name, side), 0.0), traffic.accessed
            if differ(executed, expected, edge):
                text = f"{executed / 1e6:.2f} MB executed, {expected / 1e6:.2f} MB in the TIR"
                found.append(f"{name}: bytes {side} differ: {text}")
    return found


def barriers_differ(executed: float, expected: float) -> list[str]:
    """Report barriers a block that differ between walk and source; NaN, a failed count, differs too."""
    if abs(executed - expected) < 0.5:
        return []
    return [f"barriers differ: {executed:.0f} a block executed, {expected:.0f} in the source"]


def products_differ(executed: float, expected: int, edge: float) -> list[str]:
    """Report tensor products that differ from T.gemm's; padding of a tile counts on both sides."""
    if not differ(executed, expected, edge):
        return []
    return [f"products differ: {executed / 1e9:.2f} G multiply-adds executed, {expected / 1e9:.2f} G in the TIR"]


def multiply_adds(code: Sequence[Instruction], walked: Walked) -> float:
    """Return the multiply-adds of one block's tensor instructions; NaN unless all have one known shape."""
    kinds = {tuple(SHAPES[m] for m in step.modifiers if m in SHAPES) for step in code if step.kind in ("HMMA", "IMMA")}
    if not walked.block.tensor:
        return 0
    return walked.block.tensor * prod(kinds.pop()) if len(kinds) == 1 and () not in kinds else float("nan")


def products_asked(func: Any, sizes: Mapping[str, float]) -> int:
    """Multiply-adds of all products of a launch, as its TIR asks for them: loops and guards as they run."""
    from ...compiler.cpu.emit import scalars_of, sizes_of
    from ...compiler.cpu.types import op_name
    from ..traffic.audit.accesses import Access, Walk
    from ..traffic.audit.counting import executions
    from ..traffic.audit.threads import is_thread_level, run_threads
    from ..traffic.audit.values import Values

    if is_thread_level(func):
        return run_threads(func, tuple(sizes.items())).multiply_adds
    found: list[tuple[int, Access]] = []

    class Products(Walk):
        """The walk of the audit, which also notes products."""

        def _Evaluate(self, stmt: Any) -> None:
            if op_name(stmt.value) == "tl.tileop.gemm":
                place = Access(stmt.value.args[0].args[0].buffer, False, (), self.loops, self.guards)
                found.append((prod(int(argument) for argument in stmt.value.args[5:8]), place))
            super()._Evaluate(stmt)

    variables = {var.name: var for var in (*sizes_of(func), *scalars_of(func))}
    walk = Products(Values({variables[name]: size for name, size in sizes.items()}))
    walk.statement(func.body)
    return sum(amount * executions(place, walk.values) for amount, place in found)


def fits_cache(working_set: int, cache_bytes: int) -> list[str]:
    """Whether memory may not be asked at all."""
    if working_set > cache_bytes:
        return []
    sizes = f"{working_set / 2**20:.0f} MiB of {cache_bytes / 2**20:.0f} MiB"
    return [f"the working set fits the last-level cache ({sizes}): say --flushed if the cache is cold"]
