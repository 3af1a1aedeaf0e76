"""Lines of the generated source that instructions of a compiled kernel come from."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from ..toolchain import output_of


def line_at(site: int | None, loaded: ctypes.CDLL, path: Path) -> str:
    """Return the line that an address of a loaded library belongs to, through what was inlined into it."""
    base = ctypes.cast(loaded.simt_call_kernel, ctypes.c_void_p).value
    start = offset_of(path, "simt_call_kernel")
    if not site or not base or start is None:
        return "at an unknown line"
    return line_of(path, site - base + start - 1)  # the call, not what comes after it


@cache
def offset_of(path: Path, symbol: str) -> int | None:
    """Return a symbol's offset in a library; None where there is no nm to ask."""
    for line in output_of(["nm", "-D", str(path)]).splitlines():
        if line.endswith(f" {symbol}"):
            return int(line.split()[0], 16)
    return None


@cache
def line_of(path: Path, offset: int) -> str:
    """Return the line of the generated source that an instruction at this offset of a library belongs to."""
    for frame in output_of(["addr2line", "-i", "-e", str(path), hex(offset)]).splitlines():
        file, _, line = frame.partition(" ")[0].rpartition(":")
        if file.endswith("kernel.cpp") and line.isdigit():
            text = path.with_suffix(".cpp").read_text(encoding="utf-8").splitlines()[int(line) - 1]
            return f"line {int(line) - 1}: {text.strip()}"
    return "at an unknown line"
