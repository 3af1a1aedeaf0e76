"""The CUDA source that tilelang generates for a kernel, and how it is launched. Needs neither nvcc nor a GPU.

What `perf.inspect` compiles and reads, and what `perf.simt` executes. Imports tilelang: two seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilelang.engine.lower import lower
from tvm import tirx, transform
from tvm.arith import Analyzer
from tvm.target import Target

from .cuda import PASS_CONFIGS
from .tracing import trace

AXES = ("x", "y", "z")


@dataclass(frozen=True)
class CudaSource:
    """A generated kernel and its launch.

    Attributes:
        entry: the name of the `__global__` function.
        code: the whole translation unit.
        arguments: names of the entry's parameters, in order: buffers, then run-time sizes and scalars.
        grid: blocks along x, y and z, as TIR expressions of the run-time sizes and scalars.
        threads: threads of a block along x, y and z.
        shared_bytes: shared memory that the launch asks for; static shared memory is declared in the code.
    """

    entry: str
    code: str
    arguments: tuple[str, ...]
    grid: tuple[Any, Any, Any]
    threads: tuple[int, int, int]
    shared_bytes: int

    def grid_at(self, sizes: Mapping[str, int]) -> tuple[int, int, int]:
        """The grid for run-time sizes and scalars, by name. Raises KeyError for one that is missing."""
        x, y, z = (evaluate(extent, sizes) for extent in self.grid)
        return x, y, z


def generate(family: str, parameters: dict[str, Any], arch: str) -> CudaSource:
    """The source of a family's kernel for an architecture, exactly as `cuda.load` would compile it."""
    return generate_from(trace(family, parameters), arch)


def generate_from(func: Any, arch: str) -> CudaSource:
    """The same for any TIR function that launches one kernel."""
    target = Target({"kind": "cuda", "arch": arch})
    with target, transform.PassContext(opt_level=3, config={key.value: on for key, on in PASS_CONFIGS.items()}):
        artifact = lower(func, target=target)
    (device,) = artifact.device_mod.functions.values()
    extents = device.attrs["thread_extent"]
    arguments = tuple(param.name for param in device.params)
    return CudaSource(
        entry=str(device.attrs["global_symbol"]),
        code=artifact.kernel_source,
        arguments=arguments,
        grid=tuple(extents.get(f"blockIdx.{axis}", 1) for axis in AXES),
        threads=tuple(int(extents.get(f"threadIdx.{axis}", 1)) for axis in AXES),
        shared_bytes=int(device.attrs.get("dyn_shared_memory_buf", 0)),
    )


def evaluate(extent: Any, sizes: Mapping[str, int]) -> int:
    """The value of an integer expression of run-time sizes."""
    if isinstance(extent, int):
        return extent
    values = {var: tirx.IntImm(var.dtype, sizes[var.name]) for var in tirx.analysis.undefined_vars(extent)}
    return int(Analyzer().simplify(tirx.stmt_functor.substitute(extent, values)))
