"""A page of Markdown for a terminal: wrapped to its width, tables as columns where they fit, else as paragraphs.

`mhc-tilelang inspect KERNEL --explain` prints it, with a legend; docs/kernels has the page as it is.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby

NARROWEST, WIDEST = 80, 100
LEGEND = """\
## Legend

Traffic: read and written in units of C elements of the stream a token, C being the hidden size; of small tensors the
last column has what blocks read of them again, from caches.

Launch: the grid is blocks along x, y and z, T the functions of TileLang, and threads those of a block.

Resources: registers, spills (bytes stored and loaded for want of registers) of a thread; shared memory in bytes of a
block; blocks that a multiprocessor holds at a time, and their warps as a share of all that it can hold; what leaves
room for no more. Instructions, those on tensor cores, barriers: how often they stand in the machine code. Loads and
stores: global accesses there, how many × how many bytes; what is in a loop counts once.
"""


def width() -> int:
    """Columns to fill: the terminal's, within what reads well."""
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))


def fit(markdown: str, columns: int) -> str:
    """Wrap the page to this many columns, but for a word that is longer by itself."""
    code, lines = False, list[str]()
    for is_table, group in groupby(markdown.splitlines(), key=lambda line: line.startswith("|")):
        if is_table and not code:
            lines += table(list(group), columns)
            continue
        prose: list[str] = []
        for line in group:
            fence = line.startswith("```")
            if line and not fence and not code and re.match(r"[^\s#-]", line):
                prose.append(line)
                continue
            lines += textwrap.wrap(" ".join(prose), columns, break_long_words=False, break_on_hyphens=False)
            prose = []
            if fence:
                code = not code
            elif line.startswith("- "):
                lines += textwrap.wrap(line, columns, subsequent_indent="    ", break_long_words=False)
            else:
                lines += wrap_code(line, columns)
        lines += textwrap.wrap(" ".join(prose), columns, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def wrap_code(line: str, columns: int) -> list[str]:
    """Wrap a line of code or of a formula; what is too long goes on below, further in."""
    if len(line) <= columns:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(line.strip(), columns, initial_indent=indent, subsequent_indent=f"{indent}        ",
                            break_long_words=False, break_on_hyphens=False, replace_whitespace=False)  # fmt: skip


def table(rows: Sequence[str], columns: int) -> Iterator[str]:
    """Yield a table of Markdown in aligned columns; else a paragraph a row, each cell under its column's name."""
    cells = [[cell.strip().replace("`", "").replace("**", "") for cell in row.strip("|").split("|")] for row in rows]
    header, body = cells[0], cells[2:]
    sizes = [max(len(line[k]) if k < len(line) else 0 for line in (header, *body)) for k in range(len(header))]
    if sum(sizes) + 2 * (len(sizes) - 1) <= columns:
        for line in (header, ["-" * size for size in sizes], *body):
            yield "  ".join(cell.ljust(size) for cell, size in zip(line, sizes, strict=False)).rstrip()
        return
    for line in body:
        named = [f"{name} {cell}" for name, cell in zip(header[1:], line[1:], strict=False) if cell]
        yield from textwrap.wrap(f"{line[0]}: {', '.join(named)}", columns, subsequent_indent="    ",
                                 break_long_words=False, break_on_hyphens=False)  # fmt: skip
