"""A CUDA architecture of a bundle: each kernel's source, its cubin, and how it is launched.

    sm_90a/NAME.cu      as tilelang generates it; to compile it again takes tilelang's and CUTLASS's headers
    sm_90a/NAME.cubin   what nvcc made of it, for this architecture alone
    sm_90a/mhc_kernels.h

Cubins are built with the flags of a JIT compilation but -lineinfo, which adds nothing to the machine code. Needs nvcc
and no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compiler.architectures import SHARED_BYTES
from ..compiler.toolchain import version_of
from ..errors import MHCError
from . import headers
from .cpu_target import call, workers
from .described import Described, entry_of

if TYPE_CHECKING:
    from ..compiler.cuda_source import CudaSource

KINDS = {"handle": "p", "int32": "i", "int64": "l", "float32": "f"}


def check_arch(arch: str) -> None:
    """Raise MHCError for an architecture that the kernels are not made for."""
    if arch not in SHARED_BYTES:
        raise MHCError(f"--arch: expected cpu or any of {', '.join(SHARED_BYTES)}, got {arch}")


def write(kernels: Sequence[Described], arch: str, folder: Path, tick: Callable[[], object]) -> dict[str, Any]:
    """Write the architecture's files; returns its part of the manifest. A tick per kernel.

    Raises CompilerError where there is no nvcc, or it refuses.
    """
    from ..compiler.cuda import nvcc, nvcc_command
    from ..compiler.cuda_source import generate_from

    place = folder / arch
    place.mkdir()
    command = [flag for flag in nvcc_command(arch) if flag != "-lineinfo"]

    def compile_one(path: Path) -> None:
        call([*command, "-w", "-o", str(path.with_suffix(".cubin")), str(path)])
        tick()

    described = []
    with ThreadPoolExecutor(workers()) as pool:
        waiting = []
        for kernel in kernels:  # lowered one at a time, since that is Python, while nvcc works on those before
            source = generate_from(kernel.func, arch)
            path = place / f"{kernel.name}.cu"
            path.write_text(source.code, encoding="utf-8")
            waiting.append(pool.submit(compile_one, path))
            described.append((kernel, source, launch_of(source, f"{arch}/{kernel.name}.cubin")))
        for one in waiting:
            one.result()
    (place / "mhc_kernels.h").write_text(headers.launches(arch, described), encoding="utf-8")
    entries = [
        {**entry_of(kernel), "source": f"{arch}/{kernel.name}.cu", "launch": launch} for kernel, _, launch in described
    ]
    return {
        "kind": "cuda",
        "arch": arch,
        "compiler": version_of(nvcc()),
        "flags": [flag for flag in command[1:] if not flag.startswith(("-I", "-ccbin"))],
        "kernels": entries,
    }


def launch_of(source: CudaSource, cubin: str) -> dict[str, Any]:
    """Return a kernel's launch in the manifest's form."""
    return {
        "cubin": cubin,
        "function": source.entry,
        "arguments": [[name, KINDS[dtype]] for name, dtype in zip(source.arguments, source.dtypes, strict=True)],
        "grid": list(source.grid),
        "threads": list(source.threads),
        "shared_bytes": source.shared_bytes,
    }
