"""The `--device` option, and what a device is called in reports. No torch until a function is called."""

from __future__ import annotations

import argparse
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ..compiler.toolchain import output_of
from ..errors import MHCError

if TYPE_CHECKING:
    import torch


EXECUTOR = "simt"
"""The `--device` for which `cli` runs a command within `compiler.simt.executing`."""


def add_device_argument(parser: argparse.ArgumentParser, *more: str) -> None:
    """Add `--device auto|cpu|cuda`, and what else a command knows; auto takes a GPU if there is one."""
    help_text = "where to run (auto: a GPU)"
    if EXECUTOR in more:
        help_text += f"; {EXECUTOR}: a GPU's code, executed on the CPU thread by thread"
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", *more), default="auto", help=help_text)


def pick_device(name: str) -> torch.device:
    """Return the torch device of a `--device` value. Raises MHCError for cuda where torch sees no GPU."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise MHCError("--device cuda: torch sees no GPU; `mhc-tilelang doctor` tells more")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, 0) if name == "cuda" else torch.device("cpu")


def describe(device: torch.device) -> str:
    """Return the GPU's name, or the processor's with the threads that torch and the kernels use."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """Return the processor's model name, as the system tells it."""
    if platform.system() == "Darwin":
        return output_of(["sysctl", "-n", "machdep.cpu.brand_string"]).strip() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import torch

    return {
        "mhc-tilelang": metadata.version("mhc-tilelang"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tilelang": metadata.version("tilelang"),
        "cuda": torch.version.cuda or "none",
    }
