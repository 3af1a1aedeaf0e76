"""From (kernel family, sizes, target) to something that can be called: the one place where kernels compile.

    kernel = compile.kernel("post", target, num_streams=4, hidden_size=2560, dtype="bfloat16", tile=tile)
    kernel(x=x, layer_output=layer_output, h_post=h_post, h_res=h_res, x_next=x_next)

A target is "cpu" (see `cpu`) or a CUDA architecture such as "sm_90a" (see `cuda`). What was compiled is kept
in this process and on disk. Importing this module loads neither torch nor tilelang: both take seconds, and a
CPU kernel found on disk needs no tilelang at all.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

CACHE_VARIABLE = "MHC_TILELANG_CACHE"


@dataclass(frozen=True)
class Buffer:
    """A tensor that a kernel takes: its name, dtype, and shape, where a name stands for a run-time size."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Signature:
    """What a kernel is called with: buffers in TileLang's order, then the scalars."""

    buffers: tuple[Buffer, ...]
    scalars: tuple[str, ...]

    @property
    def sizes(self) -> tuple[str, ...]:
        """The run-time sizes, in order of first mention."""
        return tuple(dict.fromkeys(d for buffer in self.buffers for d in buffer.shape if isinstance(d, str)))


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. Call it with its tensors and scalars by name; outputs are tensors it writes."""

    name: str
    signature: Signature
    launch: Callable[[list[torch.Tensor], dict[str, int], list[int]], None]

    def __call__(self, **arguments: torch.Tensor | int) -> None:
        """Check every dimension against what was compiled and against each other, then run.

        The CPU's code would read out of bounds on a wrong size without a word, so nothing is left out.
        Zero tokens return before the launch: a grid of zero blocks is not a valid one.
        """
        signature = self.signature
        tensors: list[Any] = [arguments.pop(buffer.name) for buffer in signature.buffers]
        scalars: list[Any] = [arguments.pop(name) for name in signature.scalars]
        if arguments:
            raise TypeError(f"{self.name}: unknown arguments {sorted(arguments)}")
        sizes: dict[str, int] = {}
        device = tensors[0].device
        for buffer, tensor in zip(signature.buffers, tensors, strict=True):
            self._check(buffer, tensor, sizes, device)
        if 0 not in sizes.values():
            self.launch(tensors, sizes, scalars)

    def _check(self, buffer: Buffer, tensor: torch.Tensor, sizes: dict[str, int], device: torch.device) -> None:
        got: tuple[int, ...] = tuple(tensor.shape)
        shape = buffer.shape
        if len(got) == len(shape):
            shape = tuple(sizes.setdefault(d, g) if isinstance(d, str) else d for d, g in zip(shape, got, strict=True))
        facts = (got, dtype_name(tensor.dtype), tensor.device, tensor.is_contiguous())
        wanted = (shape, buffer.dtype, device, True)
        if facts != wanted:
            names = ("shape", "dtype", "device", "contiguous")
            wrong = next(k for k in range(len(names)) if facts[k] != wanted[k])
            raise ValueError(f"{self.name}: {buffer.name}: expected {names[wrong]} {wanted[wrong]}, got {facts[wrong]}")


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """TileLang's name of a torch dtype: "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


_kernels: dict[tuple, Kernel] = {}
_lock = threading.Lock()


def kernel(family: str, target: str, **parameters: Any) -> Kernel:
    """The compiled kernel of `family` (see `mhc_tilelang.kernels.FAMILIES`) for `target`; compiles if it must.

    Raises CompilerError (an MHCError) when a compiler is missing or refuses the code.
    """
    key = (family, target, *parameters.items())
    found = _kernels.get(key)
    if found is None:
        with _lock:  # two threads that ask first at the same time compile once
            found = _kernels.get(key)
            if found is None:
                found = _kernels[key] = _load(family, target, parameters)
    return found


def _load(family: str, target: str, parameters: dict[str, Any]) -> Kernel:
    if target == "cpu":
        from .cpu import build

        return build.load(family, parameters)
    from . import cuda

    return cuda.load(family, parameters, target)


def trace(family: str, parameters: dict[str, Any]) -> Any:
    """The family's TIR function for these sizes, before any target sees it. Loads tilelang."""
    from importlib import import_module

    from .kernels import FAMILIES

    module, factory = FAMILIES[family]
    return getattr(import_module(f"mhc_tilelang.kernels.{module}"), factory)(**parameters)


def signature_of(func: Any) -> Signature:
    """The signature of a TIR function."""
    from tvm import tirx

    buffers = []
    for param in func.params:
        if param in func.buffer_map:
            buffer = func.buffer_map[param]
            shape = tuple(d.name if isinstance(d, tirx.Var) else int(d) for d in buffer.shape)
            buffers.append(Buffer(buffer.name, str(buffer.dtype), shape))
    scalars = tuple(param.name for param in func.params if param not in func.buffer_map)
    return Signature(tuple(buffers), scalars)


def target_of(device: torch.device) -> str:
    """The target that a tensor's device runs: "cpu", or the CUDA architecture, "sm_90a" of an H200.

    Raises ValueError for a device that there are no kernels for.
    """
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"device: expected compute capability 8.0 or newer, got {major}.{minor} ({device})")
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def cache_directory() -> Path:
    """Where compiled CPU kernels are kept: $MHC_TILELANG_CACHE, else mhc-tilelang in the user's cache.

    CUDA kernels are kept by tilelang, in $TILELANG_CACHE_DIR.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mhc-tilelang"


@contextmanager
def progress(family: str, target: str, parameters: dict[str, Any]) -> Iterator[None]:
    """Say on stderr what is being compiled, and how long it took; a progress bar that is up stays whole."""
    from tqdm import tqdm

    sizes = ", ".join(f"{name}={value}" for name, value in parameters.items() if isinstance(value, int | str))
    tqdm.write(f"mhc-tilelang: compiling {family} for {target} ({sizes})", file=sys.stderr)
    start = time.monotonic()
    yield
    tqdm.write(f"mhc-tilelang: compiled {family} in {time.monotonic() - start:.1f} s", file=sys.stderr)
