"""`mhc-tilelang doctor`: what this machine has, what is missing, and what to install.

One function per topic (packages, torch, compilers, GPUs, CPU, kernel cache, bundles); each returns rows. Never imports
tilelang, whose import takes seconds: versions come from the installed metadata. Works without torch and
without tilelang, and says so.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from mhc_tilelang.cli.device import processor_name
from mhc_tilelang.cli.json_output import add_json_argument, write_json
from mhc_tilelang.compiler.toolchain import CXX_NAMES, find_cxx, find_nvcc, find_nvdisasm, output_of, version_of
from mhc_tilelang.errors import CompilerError

# Oldest versions that work; tests/package/test_doctor.py compares them with the package's own requirements.
OLDEST_PYTHON = (3, 10)
OLDEST = {"torch": (2, 10), "tilelang": (0, 1, 15), "numpy": ()}
OLDEST_COMPUTE_CAPABILITY = (8, 0)

SIMD_OF_INTEREST = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "neon", "bf16", "sve")

Status = Literal["ok", "missing", "optional"]


@dataclass(frozen=True)
class Row:
    """One finding. Status: ok; missing (required, not usable); optional (absent, one can do without)."""

    name: str
    value: str
    status: Status = "ok"
    hint: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang doctor`."""
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 when something required is missing."""
    rows = examine()
    missing = [row.name for row in rows if row.status == "missing"]
    print(as_table(rows))
    print(f"\nmissing: {', '.join(missing)}" if missing else "\nnothing required is missing")
    write_json(args.json, {"ok": not missing, "missing": missing, "rows": [asdict(row) for row in rows]})
    return 1 if missing else 0


def examine() -> list[Row]:
    """Look at everything, in the order of the table."""
    torch = import_torch()
    return [
        python_row(),
        *package_rows(),
        *torch_rows(torch),
        cxx_row(),
        nvcc_row(required=torch is not None and torch.cuda.is_available()),
        nvdisasm_row(),
        *gpu_rows(torch),
        *cpu_rows(),
        cache_row(),
        *bundle_rows(),
    ]


def as_table(rows: Iterable[Row]) -> str:
    """Lay the rows out as text, the hints indented under the rows that they belong to."""
    from tabulate import tabulate

    lines: list[tuple[str, str, str]] = []
    for row in rows:
        lines.append((row.status, row.name, row.value))
        if row.hint:
            lines.append(("", "", f"  → {row.hint}"))
    return tabulate(lines, headers=("", "what", "found"), tablefmt="simple", disable_numparse=True)


# Python and its packages


def python_row() -> Row:
    """Report the interpreter."""
    value = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info >= OLDEST_PYTHON:
        return Row("python", value)
    return Row("python", value, "missing", f"Python {format_version(OLDEST_PYTHON)} or newer")


def package_rows() -> list[Row]:
    """Report the installed packages, from their metadata."""
    rows = [package_row(name, name, oldest) for name, oldest in OLDEST.items()]
    return [package_row("mhc-tilelang", "mhc-tilelang"), *rows, package_row("tvm-ffi", "apache-tvm-ffi")]


def package_row(label: str, distribution: str, oldest: tuple[int, ...] = ()) -> Row:
    """Report one package: its version, or what to install when it is absent or too old."""
    wanted = f"{distribution}>={format_version(oldest)}" if oldest else distribution
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return Row(label, "not installed", "missing", f'pip install "{wanted}"')
    if leading_numbers(version) < oldest:
        return Row(label, f"{version}, too old", "missing", f'pip install "{wanted}"')
    return Row(label, version)


def import_torch() -> ModuleType | None:
    """Import torch; None when it is missing or broken (torch_rows tells which)."""
    try:
        return import_module("torch")
    except Exception:  # a broken build fails with OSError, ImportError or whatever its C++ raises
        return None


def torch_rows(torch: ModuleType | None) -> list[Row]:
    """Report how torch was built and how it runs; nothing when it is not installed at all."""
    if torch is None:
        try:
            metadata.version("torch")
        except metadata.PackageNotFoundError:
            return []
        return [Row("torch build", "installed, but its import fails", "missing", 'python -c "import torch"')]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return [
        Row("torch build", build),
        Row("torch threads", f"{torch.get_num_threads()}, OpenMP runtime: {openmp_runtime(torch)}"),
    ]


def openmp_runtime(torch: ModuleType) -> str:
    """Name the OpenMP library that torch has loaded, as far as the system tells."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text(errors="replace") if maps.exists() else ""
    libraries = sorted(set(re.findall(r"/(lib(?:gomp|iomp5|omp)[^/\s]*)$", loaded, re.MULTILINE)))
    if libraries:
        return ", ".join(libraries)
    return "linked into torch" if torch.backends.openmp.is_available() else "none"


# Compilers


def cxx_row() -> Row:
    """Report the C++ compiler, which the CPU target needs."""
    if tool := find_cxx():
        return Row("C++ compiler", f"{version_of(tool)} ({tool.path}, from {tool.origin})")
    named = os.environ.get("CXX", "").strip()
    value = f"$CXX is {named}, which is no program" if named else f"none of {', '.join(CXX_NAMES)} on the PATH"
    return Row(
        "C++ compiler",
        value,
        "missing",
        "g++ or clang++ (Debian: apt install g++; macOS: xcode-select --install)",
    )


def nvcc_row(required: bool) -> Row:
    """Report nvcc, which the CUDA target needs: required where torch sees a GPU."""
    if tool := find_nvcc():
        return Row("nvcc", f"{version_of(tool)} ({tool.path}, from {tool.origin})")
    hint = 'a CUDA toolkit, or pip install "tilelang[nvcc]"'
    return Row("nvcc", "not found", "missing" if required else "optional", hint)


def nvdisasm_row() -> Row:
    """Report nvdisasm, with which `mhc-tilelang inspect` reads machine code."""
    if tool := find_nvdisasm():
        return Row("nvdisasm", f"{version_of(tool)} ({tool.path}, from {tool.origin})")
    return Row("nvdisasm", "not found", "optional", "a CUDA toolkit, or pip install nvidia-cuda-nvdisasm")


# Hardware


def gpu_rows(torch: ModuleType | None) -> list[Row]:
    """Report each GPU that torch sees, or why there is none to use."""
    if torch is None or not torch.cuda.is_available():
        return [no_gpu_row(nvidia_smi("name"))]
    driver = ", ".join(sorted(set(nvidia_smi("driver_version")))) or "unknown"
    return [
        gpu_row(index, torch.cuda.get_device_properties(index), driver) for index in range(torch.cuda.device_count())
    ]


def gpu_row(index: int, properties: Any, driver: str) -> Row:
    """Report one GPU: name, compute capability, memory, driver."""
    capability = (properties.major, properties.minor)
    memory = human_bytes(properties.total_memory)
    value = f"{properties.name}, compute capability {format_version(capability)}, {memory}, driver {driver}"
    if capability >= OLDEST_COMPUTE_CAPABILITY:
        return Row(f"GPU {index}", value)
    hint = f"the kernels need compute capability {format_version(OLDEST_COMPUTE_CAPABILITY)} or newer"
    return Row(f"GPU {index}", value, "optional", hint)


def no_gpu_row(names: list[str]) -> Row:
    """Report that there is no GPU, or one that torch cannot use."""
    if names:
        return Row(
            "GPU",
            f"{', '.join(names)}, not usable from torch",
            "optional",
            "a CUDA build of torch that matches the driver",
        )
    return Row("GPU", "none: kernels run on the CPU", "optional")


def nvidia_smi(field: str) -> list[str]:
    """Ask the NVIDIA driver for one field of every GPU; empty without one."""
    if not (program := shutil.which("nvidia-smi")):
        return []
    answer = output_of([program, f"--query-gpu={field}", "--format=csv,noheader"])
    return [line.strip() for line in answer.splitlines() if line.strip()]


def cpu_rows() -> list[Row]:
    """Report the CPU and those of its SIMD features that decide the speed of the CPU target."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = cpu_flags()
    simd = [name for name in SIMD_OF_INTEREST if name in flags]
    return [
        Row("CPU", f"{processor_name()}, {usable} of {os.cpu_count()} cores usable"),
        Row("SIMD", " ".join(simd) or f"none of {', '.join(SIMD_OF_INTEREST)} reported"),
    ]


def cpu_flags() -> set[str]:
    """Collect the CPU's feature names, in Linux's spelling; Arm's asimd is called neon."""
    if sys.platform == "darwin":
        text = output_of(["sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features"])
        flags = set(text.lower().split()) | ({"asimd"} if platform.machine() == "arm64" else set())
    else:
        found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo(), re.MULTILINE)
        flags = set(found.group(1).split()) if found else set()
    return flags | ({"neon"} if "asimd" in flags else set())


def cpuinfo() -> str:
    """Read Linux's description of the CPU; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace") if path.exists() else ""


# Kernel cache


def cache_row() -> Row:
    """Report the directory of compiled kernels: who can write it, its size, the space left."""
    from mhc_tilelang.compiler import disk_cache

    try:
        directory = disk_cache.location()
    except CompilerError as error:
        return Row("kernel cache", "none", "missing", str(error))
    if row := untrusted_row("kernel cache", directory):
        return row
    try:
        # A link that leads nowhere is there, too: no folder can be made in its place.
        existing = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
        with tempfile.TemporaryFile(dir=existing):
            pass
        free = human_bytes(shutil.disk_usage(existing).free)
    except OSError as error:
        return Row(
            "kernel cache",
            f"{directory}, not writable: {error.strerror}",
            "missing",
            "a directory that can be written",
        )
    return Row("kernel cache", f"{directory}, {human_bytes(size_of(directory))} used, {free} free")


def bundle_rows() -> list[Row]:
    """Report the bundles that kernels come from, where $MHC_TILELANG_BUNDLE names some."""
    from mhc_tilelang.compiler import BUNDLE_VARIABLE

    folders = [Path(name) for name in os.environ.get(BUNDLE_VARIABLE, "").split(os.pathsep) if name]
    absent = f"a bundle, or ${BUNDLE_VARIABLE} unset"
    return [
        untrusted_row("bundle", folder)
        or (Row("bundle", str(folder)) if folder.is_dir() else Row("bundle", f"{folder}, absent", "missing", absent))
        for folder in folders
    ]


def untrusted_row(name: str, folder: Path) -> Row | None:
    """Report a folder whose code is refused, since others can change it; None for one that is taken or absent."""
    from mhc_tilelang.compiler import trust
    from mhc_tilelang.errors import TrustError

    try:
        trust.check(folder)
    except TrustError as error:
        return Row(name, f"{folder}, refused", "missing", str(error))
    except OSError:
        pass
    return None


def size_of(directory: Path) -> int:
    """Add up the sizes of the files below a directory; other processes may be writing and removing them."""
    total = 0
    for folder, _, names in os.walk(directory):  # which passes over a folder that is gone by the time it is read
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(folder, name).stat().st_size
    return total


# Formatting


def human_bytes(count: float) -> str:
    """Format a number of bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def leading_numbers(version: str) -> tuple[int, ...]:
    """Return the release numbers of a version: "2.13.0+cpu" gives (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def format_version(numbers: tuple[int, ...]) -> str:
    """Write a tuple of numbers as a version."""
    return ".".join(map(str, numbers))
