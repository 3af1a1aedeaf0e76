"""Barriers that a block comes to, counted in the generated source: the second way, beside the walk's.

What stands around a barrier (loops, guards, names that their bounds use) is turned into Python and run at the launch's
sizes; all the rest is left out. `tl::AllReduce` meets twice for each halving that crosses warps. A bound that depends
on a thread, on data or on more than arithmetic cannot be counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...compiler.cuda_source import CudaSource

FOR = re.compile(r"for \(int (\w+) = (.+); \1 < (.+); \+\+\1\) \{$")
IF = re.compile(r"if (\(.+\)) \{$")
NAME = re.compile(r"(?:const )?int (\w+) = (.+);$")
REDUCE = re.compile(r"tl::AllReduce<[\w:]+, (\d+), (\d+),")
PYTHON = (
    (r"/\*.*?\*/|\(int(64_t)?\)", ""),
    (r"blockIdx\.(\w)", r"block_\1"),
    ("&&", " and "),
    (r"\|\|", " or "),
    ("/", "//"),
    (r"!(?!=)", " not "),
)
WARP = 32
COUNT = "_met"  # no name that a kernel has


def count_barriers(source: CudaSource, sizes: Mapping[str, float], block: tuple[int, int, int]) -> float:
    """Times that the threads of a block meet; NaN where the source does not tell."""
    names = {**sizes, **{f"block_{axis}": place for axis, place in zip("xyz", block, strict=True)}}
    lines = map(str.strip, source.code[source.code.rindex("__global__") :].splitlines()[1:])
    program, _ = translate(lines)
    variables: dict[str, Any] = {
        "__builtins__": {"range": range, "min": min, "max": max},
        "attempt": attempt,
        COUNT: 0,
        **names,
    }
    try:
        exec("\n".join(program), variables)
    except (NameError, SyntaxError, TypeError):
        return float("nan")
    return float(variables[COUNT])


def attempt(value: Callable[[], int]) -> int | None:
    """Return an expression's value, None if it cannot be evaluated."""
    try:
        return value()
    except (NameError, TypeError):
        return None


def translate(lines: Iterator[str]) -> tuple[list[str], str]:
    """Lines up to a closing brace as Python that adds up COUNT, none if no barrier is in them; and that brace."""
    found: list[str] = []
    for line in lines:
        if line.startswith("}"):
            return found if any(COUNT in each for each in found) else [], line
        if line.endswith("{"):
            then, end = translate(lines)
            otherwise, end = translate(lines) if end == "} else {" else ([], end)
            if then or otherwise:
                found += [
                    opening(line),
                    *indent(then or ["pass"]),
                    "else:" if otherwise else "",
                    *indent(otherwise),
                ]
        elif name := NAME.match(line):
            found.append(
                f"{name[1]} = attempt(lambda: {python(name[2])})" if "?" not in name[2] else f"{name[1]} = None"
            )
        elif number := meetings(line):
            found.append(f"{COUNT} += {number}")
    return found, "}"


def indent(lines: list[str]) -> list[str]:
    """Indent lines one level deeper."""
    return [f"    {line}" for line in lines]


def opening(line: str) -> str:
    """Translate a line that opens a block to Python; what is not understood becomes an undefined name."""
    if loop := FOR.match(line):
        return f"for {loop[1]} in range({python(loop[2])}, {python(loop[3])}):"
    guard = IF.match(line)
    return f"if {python(guard[1])}:" if guard else "if True:" if line == "{" else "if not_understood:"


def python(expression: str) -> str:
    """C's arithmetic of numbers that are not negative."""
    for pattern, instead in PYTHON:
        expression = re.sub(pattern, instead, expression)
    return expression


def meetings(line: str) -> int:
    """Barriers of one statement."""
    if line == "__syncthreads();":
        return 1
    reduce = REDUCE.search(line)
    if reduce is None:
        return 0
    offset, scale, number = int(reduce[1]) // 2, int(reduce[2]), 0
    while offset >= max(scale, WARP):
        offset, number = offset // 2, number + 2
    return number
