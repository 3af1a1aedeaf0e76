"""Excerpts in the pages; `python -m mhc_tilelang.perf.figures.excerpts .` renews them in README and docs.

A page names its source in a comment, which a browser of the repository hides. What is taken follows; a number precedes:

    <!-- from kernels/aggregate.py: def aggregate_kernel -->                          a function, with its decorators
    <!-- from kernels/aggregate.py: `for c in` to `T.copy(acc` -->              lines, the first and the last one named
    <!-- rows of docs/kernels/README.md: aggregate; post -->              rows of a table that begin so, and its head
    <!-- = timings("default", 2560) -->                                   a table or a fenced block that `facts` makes
    it adds 5.9 %<!-- = layer_overhead() --> to the step                  a number with its unit that `facts` gives

A test compares: what a page shows is what its source says now. Sources are read as text, from the root of the checkout,
which is where the command runs; `facts` is called.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from pathlib import Path

from ..inspect import pages

KERNEL_TABLE = "docs/kernels/README.md"  # which only `make docs` writes
EXCERPT = re.compile(r"^<!-- (from|rows of) (\S+): (.+) -->\n(?:```python\n(?:.*\n)*?```\n|(?:\|.*\n)*)", re.M)
BLOCK = re.compile(r"^<!-- = (.+) -->\n(?:```\n(?:.*\n)*?```\n|(?:\|.*\n)*)", re.M)
NUMBER = re.compile(r"[+-]?\d[\d.,]*(?: %|×|C\b)?(?=<!-- = (.+?) -->)")
MARKED = re.compile(f"{NUMBER.pattern}<!--.*?-->")
MARKER = re.compile(r"<!--.*?-->", re.S)


def refresh(page: str, root: Path) -> str:
    """Renew a page from its sources. Raises LookupError naming what is no longer there."""

    def excerpt(match: re.Match[str]) -> str:
        kind, path, what = match.groups()
        source = pages.index() if path == KERNEL_TABLE else (root / path).read_text(encoding="utf-8")
        if kind == "rows of":
            body = rows(source, what.split("; "), path)
        else:
            body = f"```python\n{code(source, what, path)}\n```\n"
        return f"<!-- {kind} {path}: {what} -->\n{body}"

    page = EXCERPT.sub(excerpt, page)
    page = BLOCK.sub(lambda match: f"<!-- = {match[1]} -->\n{fact(match[1])}\n", page)
    return NUMBER.sub(lambda match: fact(match[1]), page)


def fact(expression: str) -> str:
    """Return the result of a call of `facts`, as text. Raises LookupError for an expression that is not one."""
    from . import facts

    try:
        return str(eval(expression, {name: getattr(facts, name) for name in facts.__all__}))
    except Exception as error:
        raise LookupError(f"<!-- = {expression} -->: {type(error).__name__}: {error}") from error


def find_misplaced(page: str) -> list[str]:
    """Find comments that `refresh` passes over: misspelt, or after what is no number."""
    for pattern in (EXCERPT, BLOCK, MARKED):
        page = pattern.sub("", page)
    return MARKER.findall(page)


def code(source: str, what: str, path: str) -> str:
    """Return a function by name, or the lines between two that are quoted, without their common indentation."""
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
    """Return the first line from `start` on that holds the text."""
    for index in range(start, len(lines)):
        if text in lines[index]:
            return index
    raise LookupError(f"{path}: no line with {text}")


def rows(source: str, names: list[str], path: str) -> str:
    """Return the head of a table and those of its rows whose first cells are named, in the order of the names."""
    lines = source.splitlines()
    found = []
    for name in names:
        index = next((i for i, line in enumerate(lines) if line.startswith(f"| {name} |")), None)
        if index is None:
            raise LookupError(f"{path}: no row {name}")
        found.append(index)
    head = next(i for i in range(found[0], 0, -1) if re.match(r"\| ?:?--", lines[i]))
    return "\n".join([lines[head - 1], lines[head], *(lines[i] for i in found)]) + "\n"


def write(root: Path) -> None:
    """Refresh the README and every page of docs."""
    for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        page = path.read_text(encoding="utf-8")
        path.write_text(refresh(page, root), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
