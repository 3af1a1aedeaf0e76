"""The compilers: C++ for the CPU target, nvcc for the CUDA target, nvdisasm to read its code.

Looks in the places where TileLang looks, in its order, without importing it. Imports nothing of the package.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CXX_NAMES = ("g++", "clang++", "c++")


class Tool(NamedTuple):
    """A program and how it was found: `$CXX`, `PATH`, `PyPI`, …."""

    path: str
    origin: str
    arguments: tuple[str, ...] = ()  # that $CXX gives, as in "ccache g++"


def find_cxx() -> Tool | None:
    """Find the C++ compiler: $CXX, and only that where it is set; else g++, clang++ or c++ on the PATH."""
    if named := os.environ.get("CXX", "").strip():
        try:
            program, *arguments = shlex.split(named)
        except ValueError:  # a quotation without an end
            return None
        path = shutil.which(program)
        return Tool(path, "$CXX", tuple(arguments)) if path else None
    for name in CXX_NAMES:
        if path := shutil.which(name):
            return Tool(path, "PATH")
    return None


def find_nvcc() -> Tool | None:
    """Find nvcc: $CUDA_HOME or $CUDA_PATH, the PATH, the PyPI package nvidia-cuda-nvcc, /usr/local/cuda."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            return _existing(Path(home) / "bin" / "nvcc", f"${variable}")
    if path := shutil.which("nvcc"):
        return Tool(path, "PATH")
    return _from_pypi("nvcc") or _existing(Path("/usr/local/cuda/bin/nvcc"), "/usr/local/cuda")


def find_nvdisasm() -> Tool | None:
    """Find nvdisasm: the PATH, the PyPI package nvidia-cuda-nvdisasm, beside nvcc."""
    if path := shutil.which("nvdisasm"):
        return Tool(path, "PATH")
    if tool := _from_pypi("nvdisasm"):
        return tool
    nvcc = find_nvcc()
    return _existing(Path(nvcc.path).resolve().with_name("nvdisasm"), "beside nvcc") if nvcc else None


def version_of(tool: Tool) -> str:
    """Return the version line of a tool: the release line of NVIDIA's, the first line of any other."""
    lines = output_of([tool.path, *tool.arguments, "--version"]).splitlines()
    release = [line for line in lines if "release" in line and "Cuda" in line]
    return (release or lines or ["version unknown"])[0].strip()


def output_of(command: Sequence[str]) -> str:
    """Return what a command prints; empty when it cannot be run, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _from_pypi(name: str) -> Tool | None:
    """Return a program of NVIDIA's that a PyPI package of its name brings."""
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    programs = [file for file in files if file.name == name]
    return _existing(Path(str(programs[0].locate())), "PyPI") if programs else None


def _existing(path: Path, origin: str) -> Tool | None:
    return Tool(str(path), origin) if os.access(path, os.X_OK) else None
