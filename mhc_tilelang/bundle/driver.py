"""Cubins through the CUDA driver: what tilelang's runtime does after a compilation, without it.

Modules are loaded into the context that torch made current for a tensor's device, and launched on torch's current
stream. A kernel that waits for the one before it (`T.pdl_sync`) is launched as any other, so it overlaps nothing.
The launch is computed from the manifest alone, which a test compares with tilelang's; the calls of the driver have
not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ..compiler.kernel import Kernel, Signature
from ..errors import BundleError
from .launch_size import value_of

if TYPE_CHECKING:
    import torch

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
SHARED_BYTES = 48 * 1024  # that a launch may have without asking
CTYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_int64, "f": ctypes.c_float}


@dataclass(frozen=True)
class Launch:
    """The arguments of cuLaunchKernel."""

    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[Any, ...]


def launch_at(facts: Mapping[str, Any], pointers: Mapping[str, int], numbers: Mapping[str, float]) -> Launch:
    """Return a kernel's launch for the addresses of its buffers and its run-time sizes and scalars."""
    x, y, z = (value_of(extent, numbers) for extent in facts["grid"])
    values = {**pointers, **numbers}
    arguments = tuple(CTYPES[kind](values[name]) for name, kind in facts["arguments"])
    threads_x, threads_y, threads_z = facts["threads"]
    return Launch((x, y, z), (threads_x, threads_y, threads_z), facts["shared_bytes"], arguments)


def kernel(name: str, signature: Signature, cubin: bytes, facts: Mapping[str, Any]) -> Kernel:
    """Return a cubin's `Kernel`, as `compile.kernel` does; each device loads it at its first call."""
    functions: dict[int, ctypes.c_void_p] = {}
    lock = threading.Lock()
    names = [buffer.name for buffer in signature.buffers]

    def launch(tensors: Sequence[torch.Tensor], sizes: dict[str, int], scalars: list[float]) -> None:
        import torch

        numbers = {**sizes, **dict(zip(signature.scalars, scalars, strict=True))}
        pointers = {name: tensor.data_ptr() for name, tensor in zip(names, tensors, strict=True)}
        at = launch_at(facts, pointers, numbers)
        device = tensors[0].device
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            with lock:
                function = functions.get(device.index)
                if function is None:
                    function = functions[device.index] = load(cubin, facts["function"], at.shared_bytes)
            start(function, at, stream)

    return Kernel(name, signature, launch)


def load(cubin: bytes, function: str, shared_bytes: int) -> ctypes.c_void_p:
    """Load a function of a cubin in the current context. Modules stay loaded until the process ends."""
    module, found = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuModuleLoadData", ctypes.byref(module), cubin)
    call("cuModuleGetFunction", ctypes.byref(found), module, function.encode())
    if shared_bytes > SHARED_BYTES:
        call("cuFuncSetAttribute", found, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
    return found


def start(function: ctypes.c_void_p, at: Launch, stream: int) -> None:
    """Launch on a stream of the current context."""
    addresses = [ctypes.cast(ctypes.pointer(argument), ctypes.c_void_p) for argument in at.arguments]
    array = (ctypes.c_void_p * len(addresses))(*addresses)
    sizes: Sequence[int] = (*at.grid, *at.threads, at.shared_bytes)
    call("cuLaunchKernel", function, *map(ctypes.c_uint, sizes), ctypes.c_void_p(stream), array, None)


def call(name: str, *arguments: Any) -> None:
    """A function of the driver. Raises BundleError with its error's name."""
    status = getattr(library(), name)(*arguments)
    if status != 0:
        text = ctypes.c_char_p()
        library().cuGetErrorName(status, ctypes.byref(text))
        got = (text.value or b"no name").decode()
        raise BundleError(f"{name}: expected CUDA_SUCCESS, got {got} ({status})")


@cache
def library() -> ctypes.CDLL:
    """Load the driver. Raises BundleError where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BundleError(f"expected the CUDA driver's libcuda.so.1, got {error}") from None
