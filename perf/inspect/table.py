"""The table that `mhc-tilelang inspect` prints: an architecture a table, a kernel and its sizes a line."""

from __future__ import annotations

from collections.abc import Sequence

from .faults import list_widths
from .row import Row

FOOTNOTES = """\
regs: registers of a thread, + bytes that it spills. shared: bytes of a block, static and dynamic. warps: resident, of
those that a multiprocessor holds, and what allows no more: Registers, Shared memory, Blocks, Warps, Named barriers.
instr, mma, bar: instructions in the machine code, those on tensor cores, barriers. loads, stores: global accesses in
the machine code, how many × how many bytes."""

HEADERS = ("kernel", "n", "C", "dtype", "regs", "shared", "warps", "instr", "mma", "bar", "loads", "stores")
LEFT = ("kernel", "dtype", "loads", "stores")
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", None: ""}
LIMITERS = {"registers": "R", "shared memory": "S", "blocks": "B", "warps": "W", "barriers": "N"}


def report(rows: Sequence[Row]) -> str:
    """Return all tables, and what the columns mean."""
    tables = []
    for arch in dict.fromkeys(row.arch for row in rows):
        tables.append(f"{arch}\n{align([HEADERS, *(cells(row) for row in rows if row.arch == arch)])}")
    return "\n\n".join([*tables, FOOTNOTES])


def align(lines: Sequence[Sequence[str]]) -> str:
    """Align columns as narrow as they can be: 120 characters are few for these."""
    columns = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [lines[0], ["-" * length for length in columns], *lines[1:]]

    def padded(name: str, cell: str, length: int) -> str:
        return cell.ljust(length) if name in LEFT else cell.rjust(length)

    return "\n".join("  ".join(map(padded, HEADERS, line, columns)).rstrip() for line in lines)


def cells(row: Row) -> tuple[str, ...]:
    """Return the cells of one line."""
    return (
        row.label,
        str(row.num_streams or ""),
        str(row.hidden_size or ""),
        SHORT[row.dtype],
        f"{row.registers}+{row.spill_bytes}" if row.spill_bytes else str(row.registers),
        str(row.shared_bytes or ""),
        f"{row.occupancy:.0%} {LIMITERS[row.limiter]}",
        str(row.instructions),
        str(row.tensor_instructions or ""),
        str(row.barriers or ""),
        list_widths(row.global_loads),
        list_widths(row.global_stores),
    )
