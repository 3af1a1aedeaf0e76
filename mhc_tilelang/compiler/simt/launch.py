"""Launch a generated kernel on the SIMT executor: the limits of a GPU, the call, and what came of it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import MHCError
from ..architectures import SHARED_BYTES
from ..cuda_source import CudaSource
from . import build, interface
from .source_lines import line_at

if TYPE_CHECKING:
    import torch

# CUDA programming guide, technical specifications per compute capability; the same on all four architectures.
MAX_GRID = (2**31 - 1, 65_535, 65_535)
MAX_BLOCK = (1024, 1024, 64)
MAX_THREADS = 1024
STATIC_SHARED_BYTES = 48 * 1024
ATOMICS = re.compile(r"\bAtomic(Add|AddRet|Load|Store)\(")
NUMBERS: dict[str, Any] = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float}


class LaunchError(MHCError):
    """A launch that a GPU would refuse."""


class SimtError(MHCError):
    """Faults that the executor found in a launch; `findings` has them one by one."""

    def __init__(self, entry: str, findings: tuple[Finding, ...], left_out: int = 0) -> None:
        lines = [f"{entry}:", *(f"  {finding}" for finding in findings)]
        super().__init__("\n".join([*lines, f"  and {left_out} more"] if left_out else lines))
        self.findings = findings

    @property
    def kinds(self) -> set[str]:
        """The kinds of what was found."""
        return {finding.kind for finding in self.findings}


@dataclass(frozen=True)
class Finding:
    """One defect at one instruction: its kind, a sentence, how often, the line of the generated source."""

    kind: str
    text: str
    times: int
    line: str

    def __str__(self) -> str:
        """Kind, sentence, times, line."""
        often = f" ({self.times} times)" if self.times > 1 else ""
        return f"{self.kind}: {self.text}{often}\n    {self.line}"


@dataclass(frozen=True)
class TensorCounts:
    """Traffic of one tensor in one launch, in bytes and 32-byte sectors.

    Attributes:
        read_bytes, written_bytes: bytes that threads requested.
        read_sectors, written_sectors: sectors that each warp's instructions touched, added up.
        read_distinct, written_distinct: bytes that were touched at all.
    """

    read_bytes: int
    written_bytes: int
    read_sectors: int
    written_sectors: int
    read_distinct: int
    written_distinct: int


@dataclass(frozen=True)
class Conflict:
    """An instruction whose lanes met in a bank of shared memory: its line, its passes, those that this added."""

    line: str
    wavefronts: int
    conflicts: int


@dataclass(frozen=True)
class Counts:
    """Counters of one launch.

    Attributes:
        tensors: traffic by the tensor's name.
        shared_wavefronts: passes that accesses to shared memory took, ldmatrix included.
        shared_conflicts: wavefronts among them that bank conflicts added.
        barriers: times that a block's threads met at a barrier.
        mma: tensor-core instructions, one a warp.
        worst: the instructions with the most conflicts.
    """

    tensors: Mapping[str, TensorCounts]
    shared_wavefronts: int
    shared_conflicts: int
    barriers: int
    mma: int
    worst: tuple[Conflict, ...]


def launch(
    source: CudaSource,
    arch: str,
    tensors: Mapping[str, torch.Tensor],
    numbers: Mapping[str, float],
    resident: int = 8,
    seed: int = 0,
) -> Counts:
    """Run a kernel on CPU tensors, which it changes in place.

    Args:
        source: the generated kernel.
        arch: architecture whose limit of shared memory holds.
        tensors: the buffers by name, contiguous.
        numbers: run-time sizes and scalars by name.
        resident: blocks that are on the device at a time, of a kernel with atomics.
        seed: seed of the order in which these begin and take turns; 0: ascending.

    Raises:
        LaunchError: the launch's sizes are not a GPU's.
        SimtError: a defect was found; if one stopped the launch, the tensors are as they were.
    """
    grid = source.grid_at(numbers)
    check_limits(source, grid, arch)
    if missing := [name for name in source.arguments if name not in tensors and name not in numbers]:
        raise ValueError(f"{source.entry}: expected a tensor or a number for {missing}")
    for name, tensor in tensors.items():
        if name not in source.arguments:
            raise ValueError(f"{source.entry}: expected tensors of {source.arguments}, got {name!r}")
        if not tensor.is_contiguous():
            raise ValueError(f"{source.entry}: {name}: expected a contiguous tensor, got strides {tensor.stride()}")
    path = build.library(source)
    described = (interface.Tensor * len(tensors))()
    for slot, name in zip(described, (name for name in source.arguments if name in tensors), strict=True):
        tensor = tensors[name]
        slot.name, slot.data = name.encode(), tensor.data_ptr()
        slot.bytes, slot.element_bytes = tensor.numel() * tensor.element_size(), tensor.element_size()
        slot.read_only = re.search(rf"const \w+\*(?: __restrict__)? {name}\b", source.code) is not None
    dtypes = dict(zip(source.arguments, source.dtypes, strict=False))
    scalars = [NUMBERS[dtypes.get(name, "int64")](numbers[name]) for name in source.arguments if name not in tensors]
    addresses = (ctypes.c_void_p * len(scalars))(*(ctypes.addressof(scalar) for scalar in scalars))
    call = interface.Launch(
        grid=interface.Index(*grid),
        block=interface.Index(*source.threads),
        shared_bytes=source.shared_bytes,
        most_static=STATIC_SHARED_BYTES,
        most=SHARED_BYTES[arch],
        resident=resident if ATOMICS.search(source.code) else 0,
        seed=seed,
        num_tensors=len(tensors),
        num_scalars=len(scalars),
        tensors=ctypes.cast(described, ctypes.POINTER(interface.Tensor)),
        scalars=ctypes.cast(addresses, ctypes.POINTER(ctypes.c_void_p)),
    )
    loaded = ctypes.PyDLL(str(path))  # keeps the interpreter's lock: a library executes one launch at a time
    if loaded.simt_launch(ctypes.byref(call)):
        found = tuple(finding(call.findings[k], loaded, path) for k in range(call.num_findings))
        raise SimtError(source.entry, found, call.left_out)
    names = [field.name for field in fields(TensorCounts)]
    counts = {slot.name.decode(): TensorCounts(**{name: getattr(slot, name) for name in names}) for slot in described}
    met = [call.conflicts[k] for k in range(call.num_conflicts)]
    worst = tuple(Conflict(line_at(c.site, loaded, path), c.wavefronts, c.conflicts) for c in met)
    return Counts(counts, call.shared_wavefronts, call.shared_conflicts, call.barriers, call.mma, worst)


def check_limits(source: CudaSource, grid: tuple[int, int, int], arch: str) -> None:
    """Raise LaunchError for a launch that the CUDA driver refuses."""
    for axis, blocks, most in zip("xyz", grid, MAX_GRID, strict=True):
        if not 1 <= blocks <= most:
            raise LaunchError(f"{source.entry}: grid.{axis}: expected 1 to {most} blocks, got {blocks}")
    for axis, threads, most in zip("xyz", source.threads, MAX_BLOCK, strict=True):
        if not 1 <= threads <= most:
            raise LaunchError(f"{source.entry}: block.{axis}: expected 1 to {most} threads, got {threads}")
    x, y, z = source.threads
    if x * y * z > MAX_THREADS:
        raise LaunchError(f"{source.entry}: expected at most {MAX_THREADS} threads a block, got {x * y * z}")
    if source.shared_bytes > (most := SHARED_BYTES[arch]):
        raise LaunchError(
            f"{source.entry}: shared memory: expected at most {most} bytes on {arch}, got {source.shared_bytes}"
        )


def finding(raw: interface.FoundAt, loaded: ctypes.CDLL, path: Path) -> Finding:
    """Return a finding with its line of the generated source."""
    return Finding(raw.kind.decode(), raw.text.decode(), raw.times, line_at(raw.site, loaded, path))
