"""TileLang kernels of someone else, ready to be called: on a GPU compiled by tilelang, on a CPU by our CPU target.

A factory is what `@tilelang.jit` makes of a function that returns a TIR function. Kernels for the CPU are kept on
disk beside our own, named by a hash of their C++.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...compiler.cpu import build
from ...compiler.disk_cache import Made, get_or_make
from ...compiler.kernel import Kernel
from ...compiler.tracing import signature_of

Factory = Any  # tilelang.jit's; importing the type takes seconds


def compiled(factory: Factory, device: torch.device, *parameters: Any) -> Callable[..., Any]:
    """Return the factory's kernel for these parameters, called with its tensors in order.

    Raises LoweringError where the CPU target does not know something that the kernel uses.
    """
    if device.type == "cuda":
        kernel: Callable[..., Any] = factory(*parameters)
        return kernel
    return in_order(cpu_kernel(factory.get_tir(*parameters)))


def cpu_kernel(func: Any) -> Kernel:
    """Return a TIR function on the CPU."""
    from ...compiler.cpu.emit import emit

    source, symbol = emit(func), str(func.attrs["global_symbol"])
    runtime = (build.HERE / "runtime.h").read_text(encoding="utf-8")
    name = f"peer-{symbol}-{build.digest(chr(0).join((source, runtime, *build.flags())))}"

    def make(scratch: Path) -> Made:
        cpp, made = scratch / "peer.cpp", scratch / "peer.so"
        cpp.write_text(source, encoding="utf-8")
        build.run_compiler(cpp, made)
        return {}, made

    signature = signature_of(func)
    return get_or_make(build.folder(), name, make, lambda _, library: build.bind(library, symbol, symbol, signature))


def in_order(kernel: Kernel) -> Callable[..., None]:
    """Return a kernel that is called with its tensors in order."""
    names = kernel.signature.names
    return lambda *tensors: kernel(**dict(zip(names, tensors, strict=True)))
