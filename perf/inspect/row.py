"""One kernel, built for one architecture: everything that can be said of it without running it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .matrix import Subject


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture; a row of the JSON.

    Attributes:
        kernel: family; `variant` tells several of a family at the same sizes apart.
        num_streams, hidden_size, dtype: None where the kernel does not depend on them.
        threads: threads of a block.
        registers: registers of a thread.
        spill_bytes: stored and loaded for want of registers, of a thread.
        shared_bytes: static and dynamic, of a block; `static_shared_bytes` is the part that the code declares.
        named_barriers: named barriers that a block occupies.
        occupancy: warps that fit a multiprocessor, as a share of those that it can hold; `blocks` of the kernel, and
            `limiter` is what leaves room for no more.
        instructions, tensor_instructions, barriers, global_loads, global_stores, atomics, local_accesses: counts of the
            machine code, see `sass`; accesses by their width in bits.
        stream_reads, stream_writes: widths in bytes of the accesses to each stream tensor in the generated source.
        truncated: fragments that tilelang gave too little room, see `fragments`.
        machine_reads, machine_writes: accesses to each stream tensor in the machine code by their width in bits, see
            `machine_accesses`; not counted of other implementations.
        made_from: hash of what was built, see `hash_source`; empty of other implementations.
    """

    kernel: str
    variant: str
    arch: str
    num_streams: int | None
    hidden_size: int | None
    dtype: str | None
    threads: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    static_shared_bytes: int
    named_barriers: int
    occupancy: float
    blocks: int
    limiter: str
    instructions: int
    tensor_instructions: int
    barriers: int
    global_loads: dict[str, int]
    global_stores: dict[str, int]
    atomics: int
    local_accesses: int
    stream_reads: dict[str, list[int]]
    stream_writes: dict[str, list[int]]
    truncated: list[str]
    machine_reads: dict[str, dict[str, int]] = field(default_factory=dict)
    machine_writes: dict[str, dict[str, int]] = field(default_factory=dict)
    made_from: str = ""

    @property
    def key(self) -> tuple[str, str, str, int | None, int | None, str | None]:
        """Key that tells rows apart."""
        return self.kernel, self.variant, self.arch, self.num_streams, self.hidden_size, self.dtype

    @property
    def label(self) -> str:
        """The family, and the variant in brackets."""
        return f"{self.kernel} ({self.variant})" if self.variant else self.kernel


def hash_source(func: Any, subject: Subject, arch: str) -> str:
    """Hash all that a row follows from, except for tools: TIR, streams, architecture, what tilelang is told."""
    from ...compiler.cpu.build import digest
    from ...compiler.cuda import configs_of

    made_from = [func.script(show_meta=True), str(subject.launch.streams), arch, str(configs_of(func))]
    return digest(chr(0).join(made_from))


def build_function(func: Any, subject: Subject, arch: str) -> Row:
    """Lower, compile, disassemble, count."""
    from ...compiler.cuda_source import generate_from
    from .compiler import compile_source
    from .fragments import find_truncated
    from .machine_accesses import machine_accesses
    from .source_accesses import accesses

    made_from = hash_source(func, subject, arch)  # before it is lowered: that leaves its marks in a tile-level function
    source = generate_from(func, arch)
    buffers = accesses(source.code)
    streams = {name: buffers[name] for name in subject.launch.streams if name in buffers}
    compiled = compile_source(source.code, arch)
    machine_reads, machine_writes = machine_accesses(source.code, compiled.listing, streams)
    return Row(
        kernel=subject.kernel,
        variant=subject.variant,
        arch=arch,
        num_streams=subject.num_streams,
        hidden_size=subject.hidden_size,
        dtype=subject.dtype,
        stream_reads={name: widths.read for name, widths in streams.items() if widths.read},
        stream_writes={name: widths.written for name, widths in streams.items() if widths.written},
        truncated=find_truncated(func, source.code),
        machine_reads=machine_reads,
        machine_writes=machine_writes,
        made_from=made_from,
        **measure_build(source, compiled, arch),
    )


def measure_build(source: Any, compiled: Any, arch: str) -> dict[str, Any]:
    """Return the numbers of a row that machine code and launch give."""
    from .occupancy import occupancy
    from .sass import count

    x, y, z = source.threads
    shared_bytes = source.shared_bytes + compiled.static_shared_bytes
    fits = occupancy(arch, x * y * z, compiled.registers, shared_bytes, compiled.named_barriers)
    return {
        "threads": x * y * z,
        "registers": compiled.registers,
        "spill_bytes": compiled.spill_bytes,
        "shared_bytes": shared_bytes,
        "static_shared_bytes": compiled.static_shared_bytes,
        "named_barriers": compiled.named_barriers,
        "occupancy": fits.share,
        "blocks": fits.blocks,
        "limiter": fits.limiter,
        **asdict(count(compiled.listing)),
    }
