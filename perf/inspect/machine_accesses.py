"""How wide each tensor is accessed in the machine code: what nvcc makes of the accesses of the source.

Machine code does not tell which tensor an instruction accesses. The line of the source that it comes from does, as
nvdisasm lists it and `source_accesses` reads it. Where a line reads several tensors, an instruction goes to those that
the source accesses as wide, to all of them if none. Now and then the scheduler leaves an instruction without its line:
it is counted as of UNKNOWN.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from .sass import by_width, global_accesses
from .source_accesses import Use, uses

UNKNOWN = "?"

Machine = dict[str, dict[str, int]]  # tensor -> width in bits, or "bulk" -> instructions, the widest first


def machine_accesses(code: str, listing: str, tensors: Collection[str]) -> tuple[Machine, Machine]:
    """Loads and stores of each of the tensors, and of UNKNOWN, in the listing of a compiled source; none of no tensors.

    Raises MHCError as `source_accesses.uses`.
    """
    of_source = uses(code)
    found: tuple[dict[str, list[str]], dict[str, list[str]]] = (defaultdict(list), defaultdict(list))
    for access in global_accesses(listing):
        for name in tensors_at(of_source, access.line, access.writes, access.width):
            found[access.writes][name].append(access.width)
    chosen = [*tensors, UNKNOWN] if tensors else []
    reads, writes = ({name: by_width(side[name]) for name in chosen if name in side} for side in found)
    return reads, writes


def tensors_at(of_source: dict[str, list[Use]], line: int | None, writes: bool, width: str) -> list[str]:
    """The tensors that an instruction of a line may access."""
    there = {
        name: {use.width for use in found if (use.line, use.writes) == (line, writes)}
        for name, found in of_source.items()
    }
    candidates = [name for name, widths in there.items() if widths]
    as_wide = [name for name in candidates if width != "bulk" and int(width) // 8 in there[name]]
    return as_wide or candidates or [UNKNOWN]
