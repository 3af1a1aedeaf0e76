"""The CPU target of a bundle: C++ sources with C entry points, what builds them, and the library that was built.

    cpu/src/NAME.cpp     one kernel, as `cpu.emit` writes it; it needs runtime.h and a C++17 compiler with GCC's vector
                         extensions (GCC, clang), not the standard library
    cpu/CMakeLists.txt   builds `mhc_kernels`, which a C program can link
    cpu/libmhc_kernels.so   that library, for processors of the `march` that the manifest names

A 16-byte vector unit and a 64-byte one give the same bits: sums run over 16 lanes in a fixed order, and fma is
written out. So a library for x86-64-v3 returns what a native one does; a test holds that.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

from ..compiler.cpu import build
from ..compiler.toolchain import version_of
from ..errors import BundleError, CompilerError, MHCError
from . import headers
from .described import Described, entry_of

FOLDER = "cpu"
LIBRARY = "cpu/libmhc_kernels.so"
X86_64 = ()
X86_64_V2 = ("cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3")
X86_64_V3 = (*X86_64_V2, "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave")
X86_64_V4 = (*X86_64_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
LEVELS = {"x86-64": X86_64, "x86-64-v2": X86_64_V2, "x86-64-v3": X86_64_V3, "x86-64-v4": X86_64_V4}
"""The flags of /proc/cpuinfo that each level of the x86-64 psABI asks for."""

CMAKE = """# Builds the kernels of this bundle as the library `mhc_kernels`, which a C or C++ program links.
#
#   cmake -S bundle/cpu -B build/kernels && cmake --build build/kernels
#
# Build outside the bundle: files that are added to it are noticed by `mhc-tilelang export --verify`.
#
# MHC_MARCH: the processors to build for (-march, elsewhere -mcpu); `native` is this one. BUILD_SHARED_LIBS: OFF for an
# archive. OpenMP is used where there is one.
cmake_minimum_required(VERSION 3.16)
project(mhc_kernels LANGUAGES CXX)

set(MHC_MARCH "@march@" CACHE STRING "processors to build for")
option(BUILD_SHARED_LIBS "a shared library" ON)

add_library(mhc_kernels
  @sources@)
target_include_directories(mhc_kernels PUBLIC ${CMAKE_CURRENT_SOURCE_DIR})
target_compile_features(mhc_kernels PRIVATE cxx_std_17)
set_target_properties(mhc_kernels PROPERTIES POSITION_INDEPENDENT_CODE ON)
# No flag here lets the compiler change a float32 result.
target_compile_options(mhc_kernels PRIVATE @flags@ -Wno-psabi)
if(MHC_MARCH AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  target_compile_options(mhc_kernels PRIVATE -march=${MHC_MARCH})
elseif(MHC_MARCH)
  target_compile_options(mhc_kernels PRIVATE -mcpu=${MHC_MARCH})
endif()
find_package(OpenMP COMPONENTS CXX)
if(OpenMP_CXX_FOUND)
  target_link_libraries(mhc_kernels PRIVATE OpenMP::OpenMP_CXX)
endif()
"""


def default_march() -> str:
    """Return the default -march: x86-64-v3 (AVX2 and FMA, processors since 2013 to 2015), native off x86."""
    return "x86-64-v3" if is_x86() else "native"


def is_x86() -> bool:
    """Whether this machine is one."""
    return platform.machine().lower() in ("x86_64", "amd64")


def features_of(march: str) -> list[str]:
    """Return the features that code for `march` may use. Raises MHCError for an unknown architecture."""
    if march == "native":
        return sorted(processor_features())
    if march in LEVELS and is_x86():
        return list(LEVELS[march])
    known = ", ".join((*LEVELS, "native") if is_x86() else ("native",))
    raise MHCError(f"--march: expected one of {known}, got {march}")


def processor_features() -> set[str]:
    """Return the features of this processor, as Linux names them; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    found = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return set(next(found, ()))


def check_machine(facts: dict[str, Any], where: str) -> None:
    """Raise BundleError where this machine cannot run the library that a manifest describes."""
    here = (platform.system(), platform.machine())
    if (facts["system"], facts["machine"]) != here:
        wanted = f"{facts['system']} on {facts['machine']}"
        raise BundleError(f"{where}: expected a bundle for {here[0]} on {here[1]}, got one for {wanted}")
    if missing := sorted(set(facts["features"]) - processor_features()):
        raise BundleError(
            f"{where}: built for {facts['march']}: expected a processor with {', '.join(missing)}, got one without; "
            "export it with another --march"
        )


def write(
    kernels: Sequence[Described], dtype: str, march: str, folder: Path, tick: Callable[[], object]
) -> dict[str, Any]:
    """Write the target's files; returns its part of the manifest. A tick per kernel.

    Raises CompilerError where there is no C++ compiler, or it refuses.
    """
    from ..compiler.cpu.emit import emit

    features = features_of(march)
    place = folder / FOLDER
    (place / "src").mkdir(parents=True)
    for kernel in kernels:
        code = emit(kernel.func.with_attr("global_symbol", kernel.symbol))
        (place / "src" / f"{kernel.name}.cpp").write_text(code, encoding="utf-8")
    copyfile(build.HERE / "runtime.h", place / "runtime.h")
    (place / "mhc_kernels.h").write_text(headers.prototypes(kernels, dtype), encoding="utf-8")
    (place / "mhc_table.h").write_text(headers.table(kernels), encoding="utf-8")
    (place / "CMakeLists.txt").write_text(cmake(kernels, march), encoding="utf-8")
    flags = compile_library(kernels, march, folder, tick)
    entries = [{**entry_of(kernel), "source": f"{FOLDER}/src/{kernel.name}.cpp"} for kernel in kernels]
    return {
        "kind": "cpu",
        "system": platform.system(),
        "machine": platform.machine(),
        "march": march,
        "features": features,
        "flags": flags,
        "compiler": version_of(build.cxx()),
        "library": LIBRARY,
        "kernels": entries,
    }


def compile_library(kernels: Sequence[Described], march: str, folder: Path, tick: Callable[[], object]) -> list[str]:
    """Compile the sources on all cores, and link them; returns the compiler's flags."""
    tool, flags = build.cxx(), list(build.flags(march))
    place = folder / FOLDER
    with TemporaryDirectory(prefix="mhc-export-") as scratch:

        def compile_one(kernel: Described) -> str:
            made = f"{scratch}/{kernel.name}.o"
            options = [flag for flag in flags if flag != "-shared"]
            source = str(place / "src" / f"{kernel.name}.cpp")
            call([tool.path, *tool.arguments, *options, f"-I{place}", "-c", source, "-o", made])
            tick()
            return made

        with ThreadPoolExecutor(workers()) as pool:
            objects = list(pool.map(compile_one, kernels))
        call([tool.path, *tool.arguments, *flags, *objects, "-o", str(folder / LIBRARY)])
    return flags


def workers() -> int:
    """Compilers at a time: as many as there are cores for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def call(command: list[str]) -> None:
    """Run a compiler. Raises CompilerError with what it said when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompilerError(f"{' '.join(command)} failed:\n{(done.stderr or done.stdout).strip()}")


def cmake(kernels: Sequence[Described], march: str) -> str:
    """CMakeLists.txt."""
    flags = [flag for flag in build.FLAGS if flag.startswith(("-O", "-f")) and flag != "-fPIC"]
    values = {"march": march, "sources": "\n  ".join(f"src/{kernel.name}.cpp" for kernel in kernels)}
    text = CMAKE.replace("@flags@", " ".join(flags))
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text
