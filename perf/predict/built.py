"""From a kernel's source to machine code that can be walked: nvcc, nvdisasm, kept on disk.

Source and listing are kept beside the CPU's kernels, named by a hash of the TIR and of what makes them: a kernel that
has not changed is read in a second, without nvcc.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...compiler.cuda_source import CudaSource
from ..inspect.compiler import COMPILE_FLAGS, Compiled, compile_source, versions
from ..inspect.occupancy import occupancy
from .listing import Instruction, parse
from .walk import Argument, Entry

BUFFER, TENSOR_MAP = "handle", "CUtensorMap"


@dataclass(frozen=True)
class Built:
    """A kernel for one architecture.

    Attributes:
        source: as generated.
        compiled: what ptxas says, and the listing.
        code: its instructions.
        resident: blocks that fit an SM.
    """

    source: CudaSource
    arch: str
    compiled: Compiled
    code: list[Instruction]
    resident: int

    def entry(self, sizes: Mapping[str, float]) -> Entry:
        """How it is launched at these run-time sizes and scalars."""
        arguments = tuple(
            Argument(name, kind_of(self.source, name, dtype), sizes.get(name, 0))
            for name, dtype in zip(self.source.arguments, self.source.dtypes, strict=True)
        )
        return Entry(self.arch, arguments, self.source.grid_at(sizes), self.source.threads)


def kind_of(source: CudaSource, name: str, dtype: str) -> str:
    """What a parameter of the entry is."""
    if dtype != BUFFER:
        return dtype
    head = source.code[source.code.rindex("__global__") :]
    return "tensor map" if f"{TENSOR_MAP} {name}" in head[: head.index("{")] else "buffer"


def build_function(func: Any, arch: str) -> Built:
    """Lower and build a TIR function, or find what was kept. Raises CompilerError where a tool is missing."""
    from ...compiler import cuda_source
    from ...compiler.cpu.build import digest
    from ...compiler.disk_cache import Made, kept

    makers = Path(cuda_source.__file__).read_text(encoding="utf-8"), str(cuda_source.PASS_CONFIGS), str(versions())
    name = digest("\0".join((func.script(show_meta=True), arch, *COMPILE_FLAGS, *makers)))

    def make(_scratch: Path) -> Made:
        source = cuda_source.generate_from(func, arch)
        return {"source": asdict(source), "compiled": asdict(build(source, arch).compiled)}, None

    def use(facts: dict[str, Any], _file: Path) -> Built:
        tuples = {key: tuple(facts["source"][key]) for key in ("arguments", "grid", "threads", "dtypes")}
        return read(CudaSource(**{**facts["source"], **tuples}), Compiled(**facts["compiled"]), arch)

    return kept("predict", name, make, use)


def build(source: CudaSource, arch: str, flags: tuple[str, ...] = tuple(COMPILE_FLAGS)) -> Built:
    """Compile and disassemble a source."""
    return read(source, compile_source(source.code, arch, flags, encoded=True), arch)


def read(source: CudaSource, compiled: Compiled, arch: str) -> Built:
    """Parse the listing; how many blocks fit."""
    x, y, z = source.threads
    shared = source.shared_bytes + compiled.static_shared_bytes
    fits = occupancy(arch, x * y * z, compiled.registers, shared, compiled.named_barriers)
    return Built(source, arch, compiled, parse(compiled.listing), fits.blocks)
