"""Libraries that run generated CUDA on the CPU: the kernel's code and the executor, compiled and linked.

The kernel's code is compiled with the compiler's thread sanitizer, whose calls before every load and store the
executor answers in place of the sanitizer's own runtime. Libraries are kept beside the CPU target's kernels.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

from ...errors import CompilerError
from ..cpu.build import cxx, processor_hash
from ..cuda_source import CudaSource
from ..disk_cache import Made, get_or_make, location, put

HERE = Path(__file__).parent
EXECUTOR_SOURCES = ("executor.cpp", "accesses.cpp", "together.cpp", "atomics.cpp")
# A fortified longjmp takes a jump to another fiber's stack for an error.
EXECUTOR_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-c", "-U_FORTIFY_SOURCE")
# No flag lets a float32 result change; -O1 keeps accesses as the source has them, but for those it repeats.
KERNEL_FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-c",
    "-w",
    "-fsanitize=thread",
    "-march=native",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-math-errno",
)
POISON = "-ftrivial-auto-var-init=pattern"  # registers that nothing wrote; from g++ 12 on
_libraries: dict[Path, Path] = {}  # those that this process has verified


def library(source: CudaSource) -> Path:
    """Return a generated kernel's library, built unless there. Raises CompilerError, with the compiler's words."""
    if sys.platform != "linux":
        raise CompilerError(f"the SIMT executor runs on Linux alone, got {sys.platform}")
    name = f"{source.entry}-{digest(source.entry, source.code, executor_hash())}"
    key = location() / folder() / name
    if key not in _libraries or not _libraries[key].exists():
        _libraries[key] = get_or_make(folder(), name, partial(build, source, name), where)
    return _libraries[key]


def where(_facts: dict[str, Any], file: Path) -> Path:
    """Return the file of an entry."""
    return file


def folder() -> str:
    """Return the cache folder of this processor's libraries."""
    return f"simt-{processor_hash()}"


def build(source: CudaSource, name: str, scratch: Path) -> Made:
    """Compile and link; the source is left beside, which findings quote. Equal files each time: no path is in them."""
    code, made = scratch / "kernel.cpp", scratch / f"{name}.so"
    code.write_text(translation_unit(source), encoding="utf-8")
    flags = [*KERNEL_FLAGS, *poison(), f"-fdebug-prefix-map={scratch}=.", f"-I{HERE}"]
    run([*flags, str(code), "-o", str(scratch / "kernel.o")], scratch)
    run(["-shared", "-Wl,-z,defs", "-o", str(made), str(scratch / "kernel.o"), *map(str, executor())])
    put(code, scratch.parent / f"{name}.cpp")
    return {}, made


def translation_unit(source: CudaSource) -> str:
    """Wrap the generated code between our header and a call of its kernel; its lines keep their numbers but for one."""
    code = re.sub(r"^#include <(cuda\.h|math_constants\.h|tl_templates/.*)>$", "", source.code, flags=re.MULTILINE)
    shared = r"extern __shared__ (__align__\(\d+\)) (\w+) (\w+)\[\];"  # of which the executor has one for all
    code = re.sub(shared, r"\2* const \3 = reinterpret_cast<\2*>(simt_shared_memory);", code)
    call = f"void simt_call_kernel(void** arguments) {{ simt_apply({source.entry}, arguments); }}"
    return f'#include "device.h"\n{code}\nextern "C" SIMT_UNWATCHED {call}\n'


def executor() -> list[Path]:
    """Return the executor's object files, built unless they are there."""

    def make(name: str, scratch: Path) -> Made:
        made = scratch / "executor.o"
        run([*EXECUTOR_FLAGS, str(HERE / name), "-o", str(made)])
        return {}, made

    names = {name: f"{Path(name).stem}-{executor_hash()}" for name in EXECUTOR_SOURCES}
    return [get_or_make(folder(), entry, partial(make, name), where, ".o") for name, entry in names.items()]


def run(arguments: list[str], folder: Path | None = None) -> None:
    """Call the C++ compiler, in a folder if one is given; its words in a CompilerError if it fails."""
    tool = cxx()
    command = [os.path.abspath(tool.path), *tool.arguments, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode != 0:
        raise CompilerError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")


@cache
def poison() -> tuple[str, ...]:
    """Return the flags that fill uninitialised registers with garbage, none where the compiler cannot."""
    tool = cxx()
    command = [tool.path, *tool.arguments, POISON, "-fsyntax-only", "-x", "c++", os.devnull]
    return (POISON,) if subprocess.run(command, capture_output=True, check=False).returncode == 0 else ()


@cache
def executor_hash() -> str:
    """Return a hash of everything but the kernel that a library is made from."""
    files = sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp"), HERE / "build.py"])
    tool = cxx()
    return digest(tool.path, *tool.arguments, *(f"{path.name}\0{path.read_text(encoding='utf-8')}" for path in files))


def digest(*parts: str) -> str:
    """Return a short hash for a file's name."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
