"""Excerpts in docs/guide: `python -m mhc_tilelang.perf.guide docs/guide` takes them from their sources again.

A page names what it shows in a comment, which a browser of the repository hides, and the excerpt follows:

    <!-- from kernels/pre.py: def pre_kernel -->                          a function, with its decorators
    <!-- from kernels/pre.py: `for c in` to `T.copy(acc` -->              lines, the first and the last one named
    <!-- rows of docs/kernels/README.md: pre; post -->                    rows of a table that begin so, and its head

A test compares: an excerpt is what its source says now. Imports nothing; sources are read as text, from the root of the
checkout, which is where the command runs.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from pathlib import Path

EXCERPT = re.compile(r"^<!-- (from|rows of) (\S+): (.+) -->\n(?:```python\n(?:.*\n)*?```\n|(?:\|.*\n)*)", re.M)


def refreshed(page: str, root: Path) -> str:
    """The page with every excerpt as its source has it. Raises LookupError naming what is no longer there."""

    def excerpt(match: re.Match[str]) -> str:
        kind, path, what = match.groups()
        source = (root / path).read_text(encoding="utf-8")
        if kind == "rows of":
            body = rows(source, what.split("; "), path)
        else:
            body = f"```python\n{code(source, what, path)}\n```\n"
        return f"<!-- {kind} {path}: {what} -->\n{body}"

    return EXCERPT.sub(excerpt, page)


def code(source: str, what: str, path: str) -> str:
    """A function by name, or the lines between two that are quoted, without their common indentation."""
    lines = source.splitlines()
    if what.startswith("def "):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name == what[4:]:
                first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
                return textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
        raise LookupError(f"{path}: no function {what[4:]}")
    quoted = re.fullmatch(r"`(.+)` to `(.+)`", what)
    if quoted is None:
        raise LookupError(f"{path}: expected `…` to `…` or def NAME, got {what}")
    first = line_with(lines, quoted[1], 0, path)
    last = line_with(lines, quoted[2], first, path)
    return textwrap.dedent("\n".join(lines[first : last + 1]))


def line_with(lines: list[str], text: str, start: int, path: str) -> int:
    """The first line from `start` on that holds the text."""
    for index in range(start, len(lines)):
        if text in lines[index]:
            return index
    raise LookupError(f"{path}: no line with {text}")


def rows(source: str, names: list[str], path: str) -> str:
    """The head of a table and those of its rows whose first cells are named, in the order of the names."""
    lines = source.splitlines()
    found = []
    for name in names:
        index = next((i for i, line in enumerate(lines) if line.startswith(f"| {name} |")), None)
        if index is None:
            raise LookupError(f"{path}: no row {name}")
        found.append(index)
    head = next(i for i in range(found[0], 0, -1) if re.match(r"\| ?:?--", lines[i]))
    return "\n".join([lines[head - 1], lines[head], *(lines[i] for i in found)]) + "\n"


def write(folder: Path, root: Path) -> None:
    """Refresh every page of the folder."""
    for path in sorted(folder.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        path.write_text(refreshed(page, root), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path.cwd())
