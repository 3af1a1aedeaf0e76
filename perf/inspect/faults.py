"""Build faults: spills, oversized shared memory, atomics, narrow accesses to wide tensors."""

from __future__ import annotations

from collections.abc import Mapping

from ...kernels.plans import BYTES
from .machine_accesses import UNKNOWN
from .occupancy import ARCHITECTURES
from .row import Row

WIDE = 16  # bytes of the widest access that every architecture has
FLOAT8 = "values"  # a thread has as many channels of it as 16 bytes of the stream
MIXED = "16-bit layer"  # beside a float32 stream: a thread has four channels, 16 bytes of the one and 8 of the other


# Kernels whose accesses to the stream nvcc may split, and why they are left so. A test drops what is no longer needed.
SPLIT = {
    "coefficients_aggregate": "no access of the stream: loads of partial sums that the listing has without a line",
    "coefficients_aggregate_backward": "g_layer_input's vectors count as x's, for a listing that has both in one line",
    "expand_project": "stores x from registers, as tiles do",
    "post_project": "where it is by tiles: x_next of one stream is stored from registers",
    "boundary_backward": "stores g_x and g_layer_output from registers; to be rebuilt with a wider layout",
}
SYNCHRONISED = ("post_pre",)  # whose blocks count each other by atomics; their sums have a fixed order all the same


def faults(row: Row) -> list[str]:
    """A line for each; none for a sound build."""
    return [*resources(row), *narrow(row), *([] if row.kernel in SPLIT else splits(row))]


def known_splits(row: Row) -> list[str]:
    """Accesses that nvcc splits in a kernel of SPLIT, and why that is no fault of the build."""
    return [f"{split} ({SPLIT[row.kernel]})" for split in splits(row) if row.kernel in SPLIT]


def place(row: Row) -> str:
    """Name a build: the kernel, the sizes that it depends on, the architecture."""
    named = {"n = ": row.num_streams, "C = ": row.hidden_size, "": row.dtype}
    return ", ".join([row.label, *(f"{name}{size}" for name, size in named.items() if size), row.arch])


def with_faults(row: Row) -> str:
    """Name a build and its faults in a line."""
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
    if row.atomics and row.kernel not in SYNCHRONISED:
        found.append(f"{row.atomics} atomics")
    return found


def narrow(row: Row) -> list[str]:
    """Accesses to stream tensors of less than 16 bytes in the source.

    Where C is no multiple of 8, rows start anywhere and nothing is said.
    """
    if starts_anywhere(row):
        return []
    found = []
    for streams, how in ((row.stream_reads, "read"), (row.stream_writes, "written")):
        for bytes_wide in sorted({widths[0] for name, widths in streams.items() if widths[0] < wide(row, name)}):
            narrow_ones = {name: widths for name, widths in streams.items() if widths[0] < wide(row, name)}
            names = ", ".join(name for name, widths in narrow_ones.items() if widths[0] == bytes_wide)
            found.append(f"{names} {how} {bytes_wide} bytes wide")
    return found


def splits(row: Row) -> list[str]:
    """Accesses to stream tensors that are wide in the source and that nvcc makes narrower ones of."""
    if starts_anywhere(row):
        return []
    found = []
    sides = (("read", row.stream_reads, row.machine_reads), ("written", row.stream_writes, row.machine_writes))
    for how, in_source, by_tensor in sides:
        of_wide = [name for name, widths in in_source.items() if widths[0] >= wide(row, name)]
        each = (split_of(name, how, by_tensor.get(name, {}), wide(row, name)) for name in of_wide)
        found += [split for split in each if split]
        hidden = {bits: number for bits, number in by_tensor.get(UNKNOWN, {}).items() if is_narrow(bits, WIDE)}
        if in_source and sum(int(bits) // 8 * number for bits, number in hidden.items()) >= WIDE:
            found.append(f"a tensor that the listing does not tell {how} {list_widths(hidden)}")
    return found


def split_of(name: str, how: str, machine: dict[str, int], bytes_wide: int) -> str | None:
    """Describe split accesses to a tensor; None if there are none. No access at all is a fault too: it went unseen.

    Parts are together as wide as what they are parts of: fewer bytes are a small tensor's, of a line that has both.
    """
    narrow_ones = {bits: number for bits, number in machine.items() if is_narrow(bits, bytes_wide)}
    narrow_bytes = sum(int(bits) // 8 * number for bits, number in narrow_ones.items())
    if len(machine) > len(narrow_ones) and narrow_bytes < bytes_wide:
        return None
    in_parts = -(-narrow_bytes // bytes_wide)
    accesses = in_parts + sum(number for bits, number in machine.items() if bits not in narrow_ones)
    if not accesses:
        return f"{name} {how} in the source, not in the machine code"
    return f"{in_parts} of {accesses} accesses by which {name} is {how} split: {list_widths(machine)} bytes"


def is_narrow(bits: str, bytes_wide: int) -> bool:
    """Whether an access in the machine code is narrower than `bytes_wide` bytes."""
    return bits != "bulk" and int(bits) < 8 * bytes_wide


def list_widths(machine: Mapping[str, int]) -> str:
    """List accesses by their width in bytes: 4×16 20×4."""
    return " ".join(f"{number}×{bits if bits == 'bulk' else int(bits) // 8}" for bits, number in machine.items())


def starts_anywhere(row: Row) -> bool:
    """Whether no width is expected: of a kernel without channels, or of rows that start on any element."""
    return row.hidden_size is None or row.hidden_size % 8 != 0


def wide(row: Row, name: str) -> int:
    """Bytes that accesses to one of its stream tensors should have."""
    if name == FLOAT8:
        return WIDE // BYTES[row.dtype or ""]
    return WIDE // 2 if row.variant == MIXED else WIDE
