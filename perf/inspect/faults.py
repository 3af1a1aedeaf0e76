"""What must not be: the faults of a build that its row shows."""

from __future__ import annotations

from .occupancy import ARCHITECTURES
from .row import Row

WIDE = 16  # bytes of the widest access that every architecture has
MIXED = "16-bit layer"  # beside a float32 stream: a thread has four channels, 16 bytes of the one and 8 of the other
WIDE_BITS = ("bulk", "256", "128")


def faults(row: Row) -> list[str]:
    """A line for each; none for a sound build."""
    return [*resources(row), *narrow(row)]


def place(row: Row) -> str:
    """Which build it is: the kernel, the sizes that it depends on, the architecture."""
    named = {"n = ": row.num_streams, "C = ": row.hidden_size, "": row.dtype}
    return ", ".join([row.label, *(f"{name}{size}" for name, size in named.items() if size), row.arch])


def with_faults(row: Row) -> str:
    """Both in a line."""
    return f"{place(row)}: {'; '.join(faults(row))}"


def resources(row: Row) -> list[str]:
    """Registers, shared memory, atomics, fragments."""
    available = ARCHITECTURES[row.arch].shared_bytes_per_block
    found = list(row.truncated)
    if row.spill_bytes or row.local_accesses:
        found.append(f"{row.spill_bytes} bytes of spills, {row.local_accesses} accesses to local memory")
    if row.shared_bytes > available:
        found.append(f"{row.shared_bytes} bytes of shared memory, {available} are available")
    elif not row.blocks:
        found.append(f"no block fits a multiprocessor, for its {row.limiter}")
    if row.atomics:
        found.append(f"{row.atomics} atomics")
    return found


def narrow(row: Row) -> list[str]:
    """Accesses to stream tensors of less than 16 bytes, in the source or in what nvcc makes of it.

    Where C is no multiple of 8, rows start anywhere and nothing is said.
    """
    if row.hidden_size is None or row.hidden_size % 8:
        return []
    found = []
    sides = ((row.stream_reads, row.global_loads, "read"), (row.stream_writes, row.global_stores, "written"))
    for streams, in_machine_code, how in sides:
        wide = WIDE // 2 if row.variant == MIXED else WIDE
        for bytes_wide in sorted({widths[0] for widths in streams.values() if widths[0] < wide}):
            names = ", ".join(name for name, widths in streams.items() if widths[0] == bytes_wide)
            found.append(f"{names} {how} {bytes_wide} bytes wide")
        if any(widths[-1] >= WIDE for widths in streams.values()) and not any(map(in_machine_code.get, WIDE_BITS)):
            seen = ", ".join(str(int(bits) // 8) for bits in in_machine_code)
            found.append(f"{', '.join(streams)} {how} 16 bytes wide in the source, {seen} in the machine code")
    return found
