"""Large kernels as several functions: each loop nest over a tile becomes one, and nests that are alike share it.

A compiler's passes take longer than in proportion to the length of a function, and most of a long kernel is the same
few nests, stream by stream: as one function `boundary_backward` of eight streams took g++ 9 to 20 s. A nest runs over
hundreds of elements, so that its call costs nothing. What a nest computes, and in which order, stays as it is.

`emit` marks the nests while it writes; `outline` works on its lines, in which every array and variable has one name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from tilelang import tvm  # noqa: F401  (puts tilelang's tvm on the path)
from tvm import tirx

from .types import Array, op_name

LONG = 300  # lines of a kernel that is outlined
ELEMENTS = 256  # of a nest that is worth a call, at least

NAME = re.compile(r"(?<![\w.:])[A-Za-z_]\w*(?!\w*::)")
DECLARED = re.compile(r"^\s*(?:for \()?(?:const )?([\w:]+) (\w+)(?: = |;)")


def elements(stmt: Any) -> int:
    """Count the elements of a T.Parallel, or of a tile operation's first region; 0 for anything else."""
    if isinstance(stmt, tirx.For):
        if stmt.kind != tirx.ForKind.PARALLEL:
            return 0
        return number(stmt.extent) * (elements(stmt.body) or 1)
    if isinstance(stmt, tirx.Evaluate) and op_name(stmt.value).startswith("tl.tileop."):
        return prod(number(extent) for extent in stmt.value.args[0].args[2:])
    return 0


def number(extent: Any) -> int:
    """Return an extent that is known when the kernel is compiled; 0 of others."""
    return int(extent) if isinstance(extent, tirx.IntImm) else 0


def outline(
    name: str,
    lines: list[str],
    nests: Sequence[tuple[int, int]],
    arrays: Mapping[str, Array],
    parameters: Sequence[str],
) -> list[str]:
    """Put a call in the place of every nest; returns the functions that are called.

    `name` is the kernel's, `nests` the first line of each and the one behind it, in order; `parameters` are the
    kernel's numbers, as declared.
    """
    types = {word: kind for kind, word in (text.split(" ") for text in parameters)}
    types |= {found[2]: found[1] for found in map(DECLARED.match, lines) if found}
    functions: dict[str, str] = {}
    for first, behind in reversed(nests):
        depth = len(lines[first]) - len(lines[first].lstrip())
        function, given = function_of([line[depth - 2 :] for line in lines[first:behind]], arrays, types)
        called = functions.setdefault(function, f"{name}_tile_{len(functions)}")
        lines[first:behind] = [f"{' ' * depth}{called}({', '.join(given)});"]
    return [f"static __attribute__((noinline)) void {called}{function}" for function, called in functions.items()]


def function_of(body: list[str], arrays: Mapping[str, Array], types: Mapping[str, str]) -> tuple[str, list[str]]:
    """Parameters and body of a nest, every name numbered in order of its first use; and what it is called with."""
    inside = {found[2] for found in map(DECLARED.match, body) if found}
    local: dict[str, str] = {}
    given: dict[str, str] = {}

    def renamed(match: re.Match[str]) -> str:
        word = match[0]
        if word in inside:
            return local.setdefault(word, f"v{len(local)}")
        if word in arrays or word in types:
            return given.setdefault(word, f"{'a' if word in arrays else 's'}{len(given)}")
        return word

    text = "\n".join(NAME.sub(renamed, line) for line in body)
    kinds = {word: f"{arrays[word].c_type}* __restrict" if word in arrays else types[word] for word in given}
    taken = ", ".join(f"{kinds[word]} {short}" for word, short in given.items())
    return f"({taken}) {{\n{text}\n}}\n", list(given)
