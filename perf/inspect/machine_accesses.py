"""Access widths of each tensor in the machine code: what nvcc makes of the accesses of the source.

Machine code does not tell which tensor an instruction accesses. The line of the source that it comes from does, as
nvdisasm lists it and `source_accesses` reads it. Where a line reads several tensors, an instruction goes to those that
the source accesses as wide, to all of them if none. Now and then the scheduler leaves an instruction without its line:
it goes to the tensors that the source accesses as wide and no line shows, if there are any; else it is of UNKNOWN.
Where one call of an inlined function follows another, nvdisasm may tell the first one's line alone: a tensor that no
line shows then has what is as wide in such a run, beside the tensor of that line.
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
    in_run: tuple[list[str], list[str]] = ([], [])
    for access in global_accesses(listing):
        if access.in_run:
            in_run[access.writes].append(access.width)
        for name in tensors_at(of_source, access.line, access.writes, access.width):
            found[access.writes][name].append(access.width)
    for is_write, side in enumerate(found):
        unseen = {name: widths_of(each, bool(is_write)) for name, each in of_source.items() if name not in side}
        for width in side.pop(UNKNOWN, []):
            for name in [name for name, widths in unseen.items() if is_one_of(width, widths)] or [UNKNOWN]:
                side[name].append(width)
        for name, widths in unseen.items():
            if name not in side and (shared := [width for width in in_run[is_write] if is_one_of(width, widths)]):
                side[name] = shared
    chosen = [*tensors, UNKNOWN] if tensors else []
    reads, writes = ({name: by_width(side[name]) for name in chosen if name in side} for side in found)
    return reads, writes


def tensors_at(of_source: dict[str, list[Use]], line: int | None, writes: bool, width: str) -> list[str]:
    """Return the tensors that an instruction of a line may access."""
    if line is None:
        return [UNKNOWN]
    there = {name: widths_of(found, writes, line) for name, found in of_source.items()}
    candidates = [name for name, widths in there.items() if widths]
    as_wide = [name for name in candidates if is_one_of(width, there[name])]
    return as_wide or candidates or [UNKNOWN]


def widths_of(found: list[Use], writes: bool, line: int | None = None) -> set[int]:
    """Bytes of the source's accesses to a tensor, in a line or in all."""
    return {use.width for use in found if use.writes == writes and line in (None, use.line)}


def is_one_of(width: str, in_source: Collection[int]) -> bool:
    """Whether an instruction is as wide as some access in the source."""
    return width != "bulk" and int(width) // 8 in in_source
