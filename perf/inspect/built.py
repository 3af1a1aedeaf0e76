"""Rows, built where they must be: many at a time on all cores, and kept on disk.

A row is kept in the folder of the CPU's kernels, in a file named by a hash of the kernel's TIR and of all that turns it
into machine code and facts; so a kernel that has not changed is neither lowered nor compiled again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import starmap
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ...compiler.disk_cache import Made, get_or_make
from .matrix import Subject
from .row import Row, build_function, hash_source

HERE = Path(__file__).parent
MAKERS = (
    "compiler",
    "fragments",
    "machine_accesses",
    "occupancy",
    "row",
    "sass",
    "source_accesses",
)  # whose code makes a row
Wanted = tuple[Subject, str] | tuple[Subject, str, Row | None]  # what `build` takes
BUILDS_PER_PROCESS = 40  # 1.3 GB after 60


def build(subject: Subject, arch: str, kept: Row | None = None, cached: bool = True) -> Row:
    """Build a subject, or find what was built; return `kept` if it is of the same kernel.

    Raises CompilerError where a tool is missing or refuses.
    """
    from ...compiler.tracing import trace

    func = trace(subject.kernel, subject.parameters(arch))
    if kept and kept.made_from == hash_source(func, subject, arch):
        return kept
    if not cached:
        return build_function(func, subject, arch)

    def make(_scratch: Path) -> Made:
        return asdict(build_function(func, subject, arch)), None

    return get_or_make("inspect", entry_name(func, subject, arch), make, lambda facts, _: rename(Row(**facts), subject))


def rename(row: Row, subject: Subject) -> Row:
    """Put a row under the subject's name: split_phi, for one, is the same kernel for float16 and float32."""
    return replace(
        row,
        kernel=subject.kernel,
        variant=subject.variant,
        num_streams=subject.num_streams,
        hidden_size=subject.hidden_size,
        dtype=subject.dtype,
    )


def entry_name(func: Any, subject: Subject, arch: str) -> str:
    """Return the name a kernel's row is cached under: a hash of everything it is made from."""
    from ...compiler import cuda_source
    from ...compiler.cpu.build import digest
    from .compiler import COMPILE_FLAGS, versions

    makers = [Path(cuda_source.__file__), *(HERE / f"{name}.py" for name in MAKERS)]
    made_from = [hash_source(func, subject, arch), str(versions()), *COMPILE_FLAGS]
    made_from += [path.read_text(encoding="utf-8") for path in makers]
    return digest(chr(0).join(made_from))


def build_all(wanted: Sequence[Wanted]) -> Iterator[Row]:
    """Build many on all cores, in order: in processes, since lowering is Python; each for a while, since it leaks."""
    workers = min(len(wanted), os.cpu_count() or 1)
    if workers <= 1:
        yield from starmap(build, wanted)
        return
    with get_context("spawn").Pool(workers, maxtasksperchild=BUILDS_PER_PROCESS) as pool:
        yield from pool.imap(build_one, wanted)


def build_one(wanted: Wanted) -> Row:
    """`build`, of one argument."""
    return build(*wanted)
