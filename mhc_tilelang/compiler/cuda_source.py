"""The CUDA source that tilelang generates for a kernel, and how it is launched. Needs neither nvcc nor a GPU.

What `perf.inspect` compiles and reads, and what `compiler.simt` executes. Imports tilelang: two seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tilelang.engine.lower import lower
from tvm import transform
from tvm.target import Target

from .cuda import configs_of
from .tracing import trace


@dataclass(frozen=True)
class CudaSource:
    """A generated kernel and its launch.

    Attributes:
        entry: the name of the `__global__` function.
        code: the whole translation unit.
        arguments: names of the entry's parameters, in order: buffers, then run-time sizes and scalars.
        grid: blocks along x, y and z, as Python expressions of the run-time sizes and scalars.
        threads: threads of a block along x, y and z.
        shared_bytes: shared memory that the launch asks for; static shared memory is declared in the code.
        dtypes: of the arguments: "handle" for a buffer, "int32" or "int64" for a number.
    """

    entry: str
    code: str
    arguments: tuple[str, ...]
    grid: tuple[str, str, str]
    threads: tuple[int, int, int]
    shared_bytes: int
    dtypes: tuple[str, ...] = ()

    def grid_at(self, sizes: Mapping[str, float]) -> tuple[int, int, int]:
        """Return the grid for run-time sizes and scalars, by name. Raises NameError for one that is missing."""
        functions = {"__builtins__": {}, "T": SimpleNamespace(min=min, max=max)}
        x, y, z = (int(eval(extent, functions, dict(sizes))) for extent in self.grid)
        return x, y, z


def generate(family: str, parameters: dict[str, Any], arch: str) -> CudaSource:
    """Return the source of a family's kernel for an architecture, exactly as `cuda.load` would compile it."""
    return generate_from(trace(family, parameters), arch)


def generate_from(func: Any, arch: str, configs: Mapping[Any, Any] | None = None) -> CudaSource:
    """Generate CUDA for any TIR function that launches one kernel, under these passes, its own by default."""
    target = Target({"kind": "cuda", "arch": arch})
    config = {getattr(key, "value", key): value for key, value in (configs or configs_of(func)).items()}
    with target, transform.PassContext(opt_level=3, config=config):
        artifact = lower(func, target=target)
    (device,) = artifact.device_mod.functions.values()
    extents = device.attrs["thread_extent"]
    grid_x, grid_y, grid_z = (text_of(extents.get(f"blockIdx.{axis}", 1)) for axis in "xyz")
    threads_x, threads_y, threads_z = (int(extents.get(f"threadIdx.{axis}", 1)) for axis in "xyz")
    return CudaSource(
        entry=str(device.attrs["global_symbol"]),
        code=str(artifact.kernel_source),
        arguments=tuple(str(param.name) for param in device.params),
        grid=(grid_x, grid_y, grid_z),
        threads=(threads_x, threads_y, threads_z),
        shared_bytes=int(device.attrs.get("dyn_shared_memory_buf", 0)),
        dtypes=tuple(text_of(param.dtype) for param in device.params),
    )


def text_of(expression: Any) -> str:
    """Return an expression as Python text. Its `str` is TVM's own string, which `copy.deepcopy` frees twice."""
    return "".join(str(expression))
