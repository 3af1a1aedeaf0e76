"""Large kernels as several functions: each loop nest over a tile becomes one, and nests that are alike share it.

A compiler's passes take longer than in proportion to the length of a function, and most of a long kernel is the same
few nests, stream by stream: as one function `boundary_backward` of eight streams took g++ 9 to 20 s. A nest runs over
hundreds of elements, so that its call costs nothing. What a nest computes, and in which order, stays as it is. Nests
of several streams differ in a constant of their indices; the function is given it.

`emit` marks the nests while it writes; `outline` works on its lines, in which every array and variable has one name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Any

from tilelang import tvm  # noqa: F401  (puts tilelang's tvm on the path)
from tvm import tirx

from .types import Array, op_name

LONG = 300  # lines of a kernel that is outlined
ELEMENTS = 256  # of a nest that is worth a call, at least

NAME = re.compile(r"(?<![\w.:])[A-Za-z_]\w*(?!\w*::)")
OFFSET = re.compile(r"(?<=\+ )\d+(?=[)\]])")
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
    alike: dict[tuple[tuple[str, ...], str], list[tuple[int, Nest]]] = {}
    for place, (first, behind) in enumerate(nests):
        depth = indent(lines[first])
        nest = Nest.of([line[depth - 2 :] for line in lines[first:behind]], arrays, types)
        alike.setdefault(nest.shape, []).append((place, nest))
    functions: list[str] = []
    calls: dict[int, str] = {}
    for members in alike.values():
        called = f"{name}_tile_{len(functions)}"
        columns = zip(*(nest.offsets for _, nest in members), strict=True)
        varying = [k for k, column in enumerate(columns) if len(set(column)) > 1]
        functions.append(f"static __attribute__((noinline, noclone)) void {called}{members[0][1].function(varying)}")
        calls |= {place: f"{called}({', '.join(nest.arguments(varying))});" for place, nest in members}
    for place, (first, behind) in reversed(list(enumerate(nests))):
        lines[first:behind] = [" " * indent(lines[first]) + calls[place]]
    return functions


def indent(line: str) -> int:
    """Count the spaces that a line begins with."""
    return len(line) - len(line.lstrip())


@dataclass(frozen=True)
class Nest:
    """A loop nest, every name numbered in order of its first use: what it takes, under which names, and its text.

    `offsets` are the constants that its text adds to an index. Nests that differ in them alone, stream by stream,
    share a function, which is given those that differ.
    """

    taken: tuple[str, ...]
    given: tuple[str, ...]
    text: str
    offsets: tuple[str, ...]

    @classmethod
    def of(cls, body: list[str], arrays: Mapping[str, Array], types: Mapping[str, str]) -> Nest:
        inside = {found[2] for found in map(DECLARED.match, body) if found}
        local: dict[str, str] = {}
        given: dict[str, str] = {}

        def rename(match: re.Match[str]) -> str:
            word = match[0]
            if word in inside:
                return local.setdefault(word, f"v{len(local)}")
            if word in arrays or word in types:
                return given.setdefault(word, f"{'a' if word in arrays else 's'}{len(given)}")
            return word

        text = "\n".join(NAME.sub(rename, line) for line in body)
        kinds = {word: f"{arrays[word].c_type}* __restrict" if word in arrays else types[word] for word in given}
        taken = tuple(f"{kinds[word]} {short}" for word, short in given.items())
        return cls(taken, tuple(given), text, tuple(OFFSET.findall(text)))

    @property
    def shape(self) -> tuple[tuple[str, ...], str]:
        """Key of nests that share a function: parameters, and the text without its offsets."""
        return self.taken, OFFSET.sub("?", self.text)

    def function(self, varying: Sequence[int]) -> str:
        """Parameters and body, with a parameter for each of the `varying` offsets."""
        names = {place: f"k{k}" for k, place in enumerate(varying)}
        places = count()
        text = OFFSET.sub(lambda match: names.get(next(places), match[0]), self.text)
        taken = ", ".join((*self.taken, *(f"int64_t {name}" for name in names.values())))
        return f"({taken}) {{\n{text}\n}}\n"

    def arguments(self, varying: Sequence[int]) -> list[str]:
        """Return the arguments of a call of `function`."""
        return [*self.given, *(self.offsets[place] for place in varying)]
