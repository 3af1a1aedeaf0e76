"""Compiled kernels by (kernel family, sizes, target): the one place that hands them out.

    kernel = compile.kernel("post", target, num_streams=4, hidden_size=2560, dtype="bfloat16", tile=tile)
    kernel(x=x, layer_output=layer_output, h_post=h_post, h_res=h_res, x_next=x_next)

A target is "cpu" (see `cpu`) or a CUDA architecture such as "sm_90a" (see `cuda`). What was compiled is kept
in this process, and by the target on disk. Importing this module loads neither torch nor tilelang: both take
seconds, and a CPU kernel found on disk needs no tilelang at all.

With $MHC_TILELANG_BUNDLE set, kernels come from exported bundles (see `bundle`), and nothing is ever compiled.

Within `emulating`, tensors on the CPU are taken by a GPU's kernels instead, which an emulator executes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .architectures import SHARED_BYTES
from .kernel import Kernel

if TYPE_CHECKING:
    import torch

BUNDLE_VARIABLE = "MHC_TILELANG_BUNDLE"
_kernels: dict[tuple, Kernel] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Emulator:
    """Takes the kernels of a target on tensors that lie elsewhere.

    Attributes:
        target: its name as a target, which no other target has.
        load: the kernel of a family for these parameters.
        parallel_blocks: how many blocks of a projection the GPU runs at a time.
        platform: whose plans the kernels follow, "cuda" or "cpu".
        kernels: where those it has loaded are kept, if not with all others: a target may bear the name of a real one.
        device: the type of the tensors' device.
        has_counters: whether kernels find the zeros by which their blocks synchronise (`launch.workspace`).
    """

    target: str
    load: Callable[[str, dict[str, Any]], Kernel]
    parallel_blocks: int
    platform: str = "cuda"
    kernels: dict[tuple, Kernel] | None = None
    device: str = "cpu"
    has_counters: bool = True


_emulators: list[Emulator] = []  # those that are entered, the one in force last


@contextmanager
def emulating(emulator: Emulator) -> Iterator[None]:
    """Replace every kernel for tensors on the emulator's device by the emulator's, in all threads, in this block."""
    _emulators.append(emulator)
    try:
        yield
    finally:
        del _emulators[next(k for k, entered in enumerate(_emulators) if entered is emulator)]


def emulator_of(device: torch.device) -> Emulator | None:
    """The emulator that takes a device's tensors, if one does."""
    return next((entered for entered in reversed(_emulators) if entered.device == device.type), None)


def kernel(family: str, target: str, **parameters: Any) -> Kernel:
    """The compiled kernel of `family` (see `mhc_tilelang.kernels.FAMILIES`) for `target`; compiles if it must.

    Raises CompilerError (an MHCError) when a compiler is missing or refuses the code, BundleError where
    $MHC_TILELANG_BUNDLE names bundles and none has the kernel: then nothing is compiled.
    """
    emulator = next((entered for entered in reversed(_emulators) if target == entered.target), None)
    kernels = _kernels if emulator is None or emulator.kernels is None else emulator.kernels
    key = (family, target, *parameters.items())
    found = kernels.get(key)
    if found is None:
        with _lock:  # two threads that ask first at the same time compile once
            found = kernels.get(key)
            if found is None:
                found = emulator.load(family, parameters) if emulator else _load(family, target, parameters)
                kernels[key] = found
    return found


def _load(family: str, target: str, parameters: dict[str, Any]) -> Kernel:
    if named := os.environ.get(BUNDLE_VARIABLE):
        from ..bundle import load

        return load.kernel(named, family, target, parameters)
    if target == "cpu":
        from .cpu import build

        return build.load(family, parameters)
    from . import cuda

    return cuda.load(family, parameters, target)


def platform_of(device: torch.device) -> str:
    """Whose plans the kernels of a tensor's device follow: "cpu" or "cuda"."""
    emulator = emulator_of(device)
    return emulator.platform if emulator else device.type


def target_of(device: torch.device) -> str:
    """The target that a tensor's device runs: "cpu", or the CUDA architecture, "sm_90a" of an H200.

    Raises ValueError for a device that there are no kernels for.
    """
    if emulator := emulator_of(device):
        return emulator.target
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"device: expected compute capability 8.0 or newer, got {major}.{minor} ({device})")
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def has_counters(device: torch.device) -> bool:
    """Whether kernels for a device's tensors find counters: not those of a bundle, whose hosts are told of none."""
    emulator = emulator_of(device)
    return emulator.has_counters if emulator else not os.environ.get(BUNDLE_VARIABLE)


def shared_bytes(device: torch.device) -> int:
    """Bytes of shared memory that one block may use on a device; the most that any has where it is none."""
    arch = target_of(device).removeprefix("simt-")
    if arch in SHARED_BYTES or not arch.startswith("sm_"):
        return SHARED_BYTES.get(arch, max(SHARED_BYTES.values()))
    return min(SHARED_BYTES.values())  # sm_86, sm_89, sm_121: 99 KB
