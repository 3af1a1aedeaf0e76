"""From generated CUDA to a library that runs it on the CPU: the kernel's code and the executor, compiled and linked.

The kernel's code is compiled with the compiler's thread sanitizer, whose calls before every load and store the
executor answers in place of the sanitizer's own runtime. Libraries are kept beside the CPU target's kernels.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from ...cpu.build import cache_directory, cxx, processor_hash
from ...cuda_source import CudaSource
from ...errors import CompilerError

HERE = Path(__file__).parent
EXECUTOR_SOURCES = ("executor.cpp", "accesses.cpp", "together.cpp")
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


def library(source: CudaSource) -> Path:
    """The library of a generated kernel, built unless it is there. Raises CompilerError, with the compiler's words."""
    if sys.platform != "linux":
        raise CompilerError(f"the SIMT executor runs on Linux alone, got {sys.platform}")
    directory = cache_directory() / f"simt-{processor_hash()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        made = directory / f"{source.entry}-{digest(source.entry, source.code, executor_hash())}.so"
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                build(source, Path(scratch), made)
    except OSError as error:
        raise CompilerError(f"cannot keep executors in {directory}: {error}") from error
    return made


def build(source: CudaSource, scratch: Path, made: Path) -> None:
    """Compile and link; the files appear whole or not at all."""
    code = scratch / "kernel.cpp"
    code.write_text(translation_unit(source), encoding="utf-8")
    run([*KERNEL_FLAGS, *poison(), f"-I{HERE}", str(code), "-o", str(scratch / "kernel.o")])
    run(["-shared", "-Wl,-z,defs", "-o", str(scratch / made.name), str(scratch / "kernel.o"), *map(str, executor())])
    os.replace(code, made.with_suffix(".cpp"))
    os.replace(scratch / made.name, made)


def translation_unit(source: CudaSource) -> str:
    """The generated code between our header and a call of its kernel; its lines keep their numbers but for one."""
    code = re.sub(r"^#include <(cuda\.h|math_constants\.h|tl_templates/.*)>$", "", source.code, flags=re.MULTILINE)
    shared = r"extern __shared__ (__align__\(\d+\)) (\w+) (\w+)\[\];"  # of which the executor has one for all
    code = re.sub(shared, r"\2* const \3 = reinterpret_cast<\2*>(simt_shared_memory);", code)
    call = f"void simt_call_kernel(void** arguments) {{ simt_apply({source.entry}, arguments); }}"
    return f'#include "device.h"\n{code}\nextern "C" SIMT_UNWATCHED {call}\n'


def executor() -> list[Path]:
    """The executor's object files, built unless they are there."""
    directory = cache_directory() / f"simt-{processor_hash()}"
    objects = []
    for name in EXECUTOR_SOURCES:
        made = directory / f"{Path(name).stem}-{executor_hash()}.o"
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                run([*EXECUTOR_FLAGS, str(HERE / name), "-o", str(Path(scratch) / made.name)])
                os.replace(Path(scratch) / made.name, made)
        objects.append(made)
    return objects


def run(arguments: list[str]) -> None:
    """Call the C++ compiler; its words in a CompilerError if it fails."""
    tool = cxx()
    command = [tool.path, *tool.arguments, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompilerError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")


@cache
def poison() -> tuple[str, ...]:
    """What makes registers that nothing wrote start as garbage, where the compiler can."""
    tool = cxx()
    command = [tool.path, *tool.arguments, POISON, "-fsyntax-only", "-x", "c++", os.devnull]
    return (POISON,) if subprocess.run(command, capture_output=True, check=False).returncode == 0 else ()


@cache
def executor_hash() -> str:
    """A hash of everything but the kernel that a library is made from."""
    files = sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp"), HERE / "build.py"])
    tool = cxx()
    return digest(tool.path, *tool.arguments, *(f"{path.name}\0{path.read_text(encoding='utf-8')}" for path in files))


def digest(*parts: str) -> str:
    """A short hash for a file's name."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
