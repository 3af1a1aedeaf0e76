"""The page of one kernel: its equation, its TileLang, what it moves, how it is launched, what it takes on a GPU.

`mhc-tilelang inspect KERNEL --explain` prints it, `pages` writes the same to docs/kernels. The equation is the
kernel's module docstring, traffic and launch are read from the TIR: none of it needs nvcc. Registers, shared memory
and counts are those of the stored builds, whose versions the page names.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType
from typing import Any

from ...kernels import FAMILIES
from . import matrix, stored
from .faults import known_splits, list_widths
from .machine_accesses import UNKNOWN
from .matrix import MAIN, STUDIED, Subject
from .occupancy import ARCHITECTURES
from .row import Row


def page(kernel: str) -> str:
    """Return the page of a family, in Markdown."""
    module_name, factory = FAMILIES[kernel]
    module = import_module(f"mhc_tilelang.kernels.{module_name}")
    subjects = matrix.subjects(matrix.studied_shape(kernel), [kernel])
    matrix.refuse_unbuilt([kernel], subjects)
    sections = [
        f"# {kernel}\n\n{equation(module)}",
        f"## TileLang\n\n{source_of(module, module_name, factory)}",
        f"## Traffic\n\n{traffic(subjects)}",
        f"## Launch\n\n{launch_shape(subjects)}",
        f"## Resources\n\n{resources(kernel)}",
    ]
    return "\n\n".join(sections) + "\n"


def equation(module: ModuleType) -> str:
    """Return the module's docstring: its formulas are indented, which Markdown shows as they stand."""
    return inspect.getdoc(module) or ""


def source_of(module: ModuleType, module_name: str, factory: str) -> str:
    """Return the factory, and before it the macros and helpers of the same module that it uses."""
    text = inspect.getsource(module)
    definitions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    lines = text.splitlines()

    def used(name: str, seen: tuple[str, ...] = ()) -> list[str]:
        names = {node.id for node in ast.walk(definitions[name]) if isinstance(node, ast.Name)}
        inner = [other for other in definitions if other in names and other not in (name, *seen)]
        return [*(deep for other in inner for deep in used(other, (*seen, name))), name]

    def text_of(name: str) -> str:
        node = definitions[name]
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        return textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))

    parts = [text_of(name) for name in definitions if name in used(factory)]
    link = f"[`kernels/{module_name}.py`](../../kernels/{module_name}.py)"
    return f"From {link}.\n\n```python\n" + "\n\n\n".join(parts) + "\n```"


def traffic(subjects: Iterable[Subject]) -> str:
    """Return a table of the buffers: bytes in units of C elements a token."""
    rows = ["| kernel | buffer | read | written | of small tensors, again from caches |", "|---|---|---|---|---|"]
    for subject in subjects:
        streams = [0, 0]
        for name, moved in count_traffic(subject).items():
            is_stream = name in subject.launch.streams
            sides = (moved.read, moved.written)
            numbers = [side.accessed if is_stream else side.distinct for side in sides]
            again = 0 if is_stream else sum(side.per_block - side.distinct for side in sides)
            if is_stream:
                streams = [total + number for total, number in zip(streams, numbers, strict=True)]
            if any(numbers):
                rows.append(f"| {subject.label} | `{name}` | {' | '.join(map(units, (*numbers, again)))} |")
        if any(streams):
            rows.append(f"| {subject.label} | **stream and layer** | {' | '.join(map(units, streams))} | |")
    shape = STUDIED
    text = (
        f"Counted from the code at n = {shape.num_streams}, C = {shape.hidden_size}, {shape.dtype}, "
        f"{shape.num_tokens} tokens, in units of C elements of the stream a token: of tensors as wide as the stream "
        "or a layer every access, of the others each element once, and apart what blocks read of them again."
    )
    return text + "\n\n" + "\n".join(rows)


def count_traffic(subject: Subject) -> dict[str, Any]:
    """Count the traffic of each buffer."""
    from ..traffic.audit import audit_function

    return audit_function(subject.launch.function, subject.launch.sizes)


def units(num_bytes: float) -> str:
    """Bytes in units of C a token."""
    value = num_bytes / (STUDIED.num_tokens * STUDIED.hidden_size * STUDIED.itemsize)
    return f"{value:.3f}".rstrip("0").rstrip(".") + "C" if value >= 0.0005 else "–" if not value else "< 0.001C"


def launch_shape(subjects: Iterable[Subject]) -> str:
    """Return a table of grids and threads, and what was compiled in."""
    from ...compiler.cuda_source import CudaSource, text_of
    from .fragments import tiles_of

    rows = [f"| kernel | grid | at {STUDIED.num_tokens} tokens | threads |", "|---|---|---|---|"]
    compiled = []
    for subject in subjects:
        func = subject.launch.function
        grid = [text_of(extent) for extent in grid_of(func)]
        x, y, z = [*grid, "1", "1"][:3]
        at_sizes = CudaSource("", "", (), (x, y, z), (1, 1, 1), 0).grid_at(subject.launch.sizes)
        blocks = " × ".join(map(str, at_sizes[: len(grid)]))
        extents = ", ".join(f"`{extent}`" for extent in grid)
        rows.append(f"| {subject.label} | {extents} | {blocks} | {tiles_of(func)[0]} |")
        parameters = ", ".join(f"{name}={value!r}" for name, value in subject.launch.parameters.items())
        compiled.append(f"- {subject.label}: `{parameters}`")
    return "\n".join([*rows, "", "Compiled with:", "", *compiled])


def grid_of(func: Any) -> list[Any]:
    """Blocks along x, y, z, as far as the kernel has them: expressions of its run-time sizes."""
    from tvm import tirx

    found: dict[str, Any] = {}

    def visit(node: Any) -> None:
        if isinstance(node, tirx.For) and node.kind == tirx.ForKind.THREAD_BINDING:
            found[str(node.thread_binding.thread_tag)] = node.extent

    tirx.stmt_functor.post_order_visit(func.body, visit)
    return [found[tag] for tag in sorted(found) if tag.startswith("blockIdx")]


def resources(kernel: str) -> str:
    """Return a table of what ptxas and the machine code say at the studied shape, an architecture a line."""
    versions, rows = stored.read(stored.KERNELS)
    shape = matrix.studied_shape(kernel)
    wanted = {subject.key(arch) for subject in matrix.subjects(shape, [kernel]) for arch in matrix.ARCHITECTURES}
    chosen = [row for row in rows if row.key in wanted]
    tools = ", ".join(f"{name} {number}" for name, number in versions.items())
    text = f"At n = {shape.num_streams}, C = {shape.hidden_size}, {shape.dtype}; {tools}."
    parts = [text, resource_table(chosen), stream_table(chosen), limits(chosen)]
    return "\n\n".join(part for part in parts if part)


def resource_table(rows: Iterable[Row]) -> str:
    """Rows as Markdown."""
    lines = [
        "| kernel | arch | registers | spills | shared | blocks, warps | limited by | instructions | tensor | barriers "
        "| loads | stores |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = (row.instructions, row.tensor_instructions, row.barriers)
        fits = f"{row.blocks}, {row.occupancy:.0%}"
        cells = [row.label, row.arch, row.registers, row.spill_bytes, row.shared_bytes, fits, row.limiter, *numbers]
        cells += [list_widths(row.global_loads) or "–", list_widths(row.global_stores) or "–"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def stream_table(rows: Iterable[Row]) -> str:
    """Tabulate access widths of the stream's tensors in the machine code, and the accesses that nvcc splits.

    Empty where no tensor is.
    """
    of_streams = [row for row in rows if row.stream_reads or row.stream_writes]
    lines = ["| kernel | arch | tensor | loads | stores |", "|---|---|---|---|---|"]
    for row in of_streams:
        reads, writes = row.machine_reads, row.machine_writes
        for name in dict.fromkeys([*reads, *writes]):
            tensor = "not told" if name == UNKNOWN else f"`{name}`"
            sides = [list_widths(side.get(name, {})) or "–" for side in (reads, writes)]
            lines.append(f"| {row.label} | {row.arch} | {tensor} | {' | '.join(sides)} |")
    if not of_streams:
        return ""
    parts = ["Accesses to what is as wide as the stream, in the machine code, how many × how many bytes:"]
    parts += ["\n".join(lines)] if len(lines) > 2 else []
    if split := "\n".join(f"- {row.label} on {row.arch}: {each}." for row in of_streams for each in known_splits(row)):
        parts.append(f"Split by nvcc:\n\n{split}")
    return "\n\n".join(parts)


def limits(rows: Iterable[Row]) -> str:
    """Say in words which resource of the main architecture limits occupancy, a line for each row."""
    return "\n".join(limit(row) for row in rows if row.arch == MAIN)


def limit(row: Row) -> str:
    """Say in a line what limits a row's occupancy."""
    warps = -(-row.threads // 32)
    needs = {
        "registers": f"{row.registers} registers a thread, {warps} warps a block",
        "shared memory": f"{row.shared_bytes} bytes of shared memory a block, and 1 KB that the system reserves",
        "blocks": f"{warps} warp{'s' * (warps > 1)} a block, and a multiprocessor takes no more blocks",
        "warps": f"{warps} warps a block, and a multiprocessor holds {ARCHITECTURES[row.arch].warps}",
        "barriers": f"{row.named_barriers} named barriers a block",
    }[row.limiter]
    resident = row.blocks * warps
    return f"- {row.label} on {row.arch}: {row.blocks} blocks, {resident} warps. Limited by {row.limiter}: {needs}."
