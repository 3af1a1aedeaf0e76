"""Compile generated CUDA source to a listing of its machine code: nvcc as tilelang calls it, then nvdisasm.

No GPU is needed. The flags are tilelang's (`tilelang.contrib.nvcc`, `tilelang.cuda.backend`) and the package's own,
plus ptxas's report, which alone tells what was spilled, and line numbers, which change no instruction.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from ...compiler.cuda import COMPILE_FLAGS, nvcc, nvcc_command
from ...compiler.toolchain import Tool, find_nvdisasm, version_of
from ...errors import CompilerError
from .sass import SOURCE


@dataclass(frozen=True)
class Compiled:
    """Resources and machine code of a kernel, as ptxas and nvdisasm report them.

    Attributes:
        registers: registers of a thread.
        spill_bytes: stored to and loaded from local memory for want of registers, of a thread.
        static_shared_bytes: shared memory that the code declares.
        named_barriers: named barriers that a block occupies.
        listing: the machine code, as text; comments name the line of SOURCE that what follows comes from.
    """

    registers: int
    spill_bytes: int
    static_shared_bytes: int
    named_barriers: int
    listing: str


def compile_source(
    code: str, arch: str, flags: tuple[str, ...] = tuple(COMPILE_FLAGS), encoded: bool = False
) -> Compiled:
    """Compile a translation unit with one kernel; `encoded`: with each instruction's encoding in the listing.

    Raises CompilerError where a tool is missing or refuses.
    """
    with TemporaryDirectory(prefix="mhc-inspect-") as folder:
        source, cubin = Path(folder) / SOURCE, Path(folder) / "kernel.cubin"
        source.write_text(code, encoding="utf-8")
        options = ("-lineinfo", "-Xptxas", "-v", "-w")
        report = output([*nvcc_command(arch, flags), *options, "-o", str(cubin), str(source)])
        listing = output([nvdisasm().path, "-c", "-hex" if encoded else "-gi", str(cubin)]).replace(f"{folder}/", "")

    def total(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, report)))

    return Compiled(
        registers=max(map(int, re.findall(r"Used (\d+) registers", report))),
        spill_bytes=total(r"(\d+) bytes spill"),
        static_shared_bytes=total(r"(\d+) bytes smem"),
        named_barriers=total(r"used (\d+) barriers"),
        listing=listing,
    )


def nvdisasm() -> Tool:
    """nvdisasm, or a CompilerError that says what to install."""
    if tool := find_nvdisasm():
        return tool
    raise CompilerError("no nvdisasm: install the CUDA toolkit, or `pip install nvidia-cuda-nvdisasm`")


@cache
def versions() -> dict[str, str]:
    """Return the versions of nvcc, nvdisasm and tilelang: the machine code depends on them besides the source."""
    from importlib.metadata import version

    tools = {"nvcc": version_of(nvcc()), "nvdisasm": version_of(nvdisasm())}
    return {"tilelang": version("tilelang"), **{name: release(line) for name, line in tools.items()}}


def release(line: str) -> str:
    """Return the number in a tool's version line: 13.0.88 of "… release 13.0, V13.0.88"."""
    found = re.search(r"V([\d.]+)", line)
    return found.group(1) if found else line


def output(command: list[str]) -> str:
    """Run a command and return what it prints on stdout and stderr. Raises CompilerError with that when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompilerError(f"{' '.join(command)} failed:\n{(done.stderr or done.stdout).strip()}")
    return done.stdout + done.stderr
