"""The CUDA target: kernels built by tilelang and nvcc, for the GPU at hand or for any architecture without one.

tilelang keeps what it compiled in its own disk cache. Imports tilelang, so only `compile` imports this, on
first use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tilelang
from tilelang import PassConfigKey
from tvm.target import Target

from ..errors import CompilerError
from . import trust
from .kernel import Kernel
from .toolchain import Tool, find_nvcc
from .tracing import progress, signature_of, trace

if TYPE_CHECKING:
    import torch


# Warp specialisation and TMA miscompile a pipelined loop inside a chunk loop in tilelang 0.1.15, and wgmma
# changes the order of sums with the tile. Off until a kernel has passed on a GPU with one of them on.
PASS_CONFIGS = {
    PassConfigKey.TL_DISABLE_WARP_SPECIALIZED: True,
    PassConfigKey.TL_DISABLE_TMA_LOWER: True,
    PassConfigKey.TL_DISABLE_WGMMA: True,
    PassConfigKey.TL_ENABLE_FAST_MATH: False,
    # With 32-byte accesses on, which sm_100 and later have, tilelang reads and writes some tiles element by element.
    PassConfigKey.TL_DISABLE_VECTORIZE_256: True,
    PassConfigKey.TL_ENABLE_FP32X2_REDUCTION: False,  # of sm_100: other instructions, and more registers
}
# Kernels that share a formula must share its bits: contraction could differ between them, so fma is written
# out where it is meant and nowhere else.
COMPILE_FLAGS = ["-fmad=false"]


def load(family: str, parameters: dict[str, Any], arch: str) -> Kernel:
    """Return the kernel for the GPUs of one architecture."""
    func = trace(family, parameters)
    run = entry_of(build(func, arch, family, parameters))

    def launch(tensors: Sequence[torch.Tensor], _sizes: dict[str, int], scalars: list[float]) -> None:
        import torch

        device = tensors[0].device
        if device.index == torch.cuda.current_device():
            run(*tensors, *scalars)
        else:
            with torch.cuda.device(device):
                run(*tensors, *scalars)

    return Kernel(family, signature_of(func), launch)


def entry_of(jit_kernel: tilelang.JITKernel) -> Callable[..., object]:
    """Return a kernel's host code, which checks its tensors and launches on torch's current stream.

    tilelang's adapter in front of it looks for outputs to allocate, of which there are none: 5.5 µs instead of 2.1 with
    18 tensors.
    """
    if not hasattr(jit_kernel.adapter, "get_exportable_executable"):  # another of tilelang's backends
        return jit_kernel
    executable = jit_kernel.adapter.get_exportable_executable()
    module = executable.jit() if hasattr(executable, "jit") else executable  # one from tilelang's cache is a module
    entry: Callable[..., object] = module.main
    return entry


def build(func: Any, arch: str, family: str, parameters: dict[str, Any]) -> tilelang.JITKernel:
    """Compile a TIR function for `arch`, or find it in tilelang's cache; needs nvcc, but no GPU.

    tilelang verifies what it kept; TrustError where others can write to it.
    """
    nvcc()
    if (kept := Path(tilelang.env.TILELANG_CACHE_DIR)).exists():
        trust.check(kept)
    with progress(family, arch, parameters):
        return tilelang.compile(
            func,
            target=Target({"kind": "cuda", "arch": arch}),
            pass_configs=configs_of(func),
            compile_flags=COMPILE_FLAGS,
        )


def configs_of(func: Any) -> dict[Any, Any]:
    """Return the passes of a function: PASS_CONFIGS, and those that are off for it alone (see `kernels.warps`)."""
    return {**PASS_CONFIGS, **{str(name): True for name in (func.attrs or {}).get("mhc.pass_configs", ())}}


def nvcc_command(arch: str, flags: tuple[str, ...] = tuple(COMPILE_FLAGS)) -> list[str]:
    """nvcc as tilelang calls it for a cubin: its flags (`tilelang.contrib.nvcc`, `tilelang.cuda.backend`) and ours."""
    from tilelang.contrib.cc import get_cplus_compiler
    from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

    includes = [f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}"]
    command = [nvcc().path, f"-ccbin={get_cplus_compiler()}", "--cubin", "-O3", "-lineinfo", f"-arch={arch}"]
    return [*command, "-std=c++20", *includes, *flags]


def nvcc() -> Tool:
    """nvcc, or a CompilerError that says what to install."""
    if tool := find_nvcc():
        return tool
    raise CompilerError(
        "no nvcc: CUDA kernels are built with it. Install the CUDA toolkit, or `pip install tilelang[nvcc]`"
    )
