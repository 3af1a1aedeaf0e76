"""Whether tilelang has given every fragment of a kernel room for all its elements.

tilelang 0.1.15 lays a fragment out by its first loop and truncates it, without a word, where that loop covers only a
part: the other elements then share registers. The generated source shows it.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any

DECLARATION = re.compile(r"^\s+\w+ (\w+?)(?:_\d+)?\[(\d+)\];", re.MULTILINE)


def find_truncated(func: Any, code: str) -> list[str]:
    """Describe each fragment of the TIR function that has less room in its source than it needs.

    In the source, fragments of one name are told apart by a number.
    """
    declared = DECLARATION.findall(code)
    threads, buffers = tiles_of(func)
    fragments = [buffer for buffer in buffers if buffer.scope() == "local.fragment"]
    wrong = []
    for name in dict.fromkeys(buffer.name for buffer in fragments if buffer.name):  # one without is not to be found
        needed = [-(-prod(map(int, b.shape)) // threads) for b in fragments if b.name == name]
        given = [int(size) for declared_name, size in declared if declared_name == name]
        given += [0] * (len(needed) - len(given))
        for room, elements in zip(sorted(given, reverse=True), sorted(needed, reverse=True), strict=False):
            if room < elements:
                wrong.append(f"{name}: {room} registers a thread for {elements} elements")
    return wrong


def shared_bytes(func: Any) -> int:
    """Shared memory of a block as written: every shared tile once per pipeline stage."""
    from tvm import tirx

    stages = [1]

    def visit(node: Any) -> None:
        if isinstance(node, tirx.For):
            stages.append(int(node.annotations.get("num_stages", 1)))

    tirx.stmt_functor.post_order_visit(func.body, visit)
    shared = [buffer for buffer in tiles_of(func)[1] if buffer.scope().startswith("shared")]
    return max(stages) * sum(prod(int(extent) for extent in b.shape) * b.dtype.itemsize for b in shared)


def tiles_of(func: Any) -> tuple[int, list[Any]]:
    """Return the threads of a block, and the shared and fragment buffers that something touches."""
    from tvm import tirx

    from ...compiler.cpu.views import accesses_of

    touched = {access.buffer for access in accesses_of(func.body)}
    threads: list[Any] = []
    buffers: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, tirx.SBlock):
            buffers.extend(buffer for buffer in node.alloc_buffers if buffer in touched)
            threads.extend(node.annotations.get("tl.launch_threads", [])[:1])

    tirx.stmt_functor.post_order_visit(func.body, visit)
    return int(threads[0]), buffers
