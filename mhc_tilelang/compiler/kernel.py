"""Compiled kernels: a signature, and a call that checks its tensors against it.

A target's `load` makes one (`cpu.build`, `cuda`), `compile` hands it out, `launch` calls it. Imports torch only
for its types.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from .json_input import fields, strings

if TYPE_CHECKING:
    import torch

    from .tape import Recorder


@dataclass(frozen=True)
class Buffer:
    """A tensor that a kernel takes: its name, dtype, and shape, where a name stands for a run-time size."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Signature:
    """Arguments of a kernel: buffers in TileLang's order, then the scalars, names with their dtypes."""

    buffers: tuple[Buffer, ...]
    scalars: dict[str, str]

    @classmethod
    def from_json(cls, facts: Any, where: str) -> Signature:
        """Read a signature that was written as JSON. Raises ValueError where a field is missing or of another type."""
        fields(facts, {"buffers": list, "scalars": dict}, where)
        buffers = []
        for each in facts["buffers"]:
            fields(each, {"name": str, "dtype": str, "shape": list}, f"{where}: buffers")
            if not all(type(size) in (int, str) for size in each["shape"]):
                raise ValueError(f"{where}: {each['name']}: shape: expected sizes or names, got {each['shape']}")
            buffers.append(Buffer(each["name"], each["dtype"], tuple(each["shape"])))
        strings([*facts["scalars"].values()], f"{where}: scalars")
        return cls(tuple(buffers), facts["scalars"])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all arguments."""
        return (*(buffer.name for buffer in self.buffers), *self.scalars)

    @property
    def sizes(self) -> tuple[str, ...]:
        """The run-time sizes, in order of first mention."""
        return tuple(dict.fromkeys(d for buffer in self.buffers for d in buffer.shape if isinstance(d, str)))


class _Taping(threading.local):
    """The recorder of this thread's launches, if a tape is recorded."""

    recorder: Recorder | None = None


taping = _Taping()


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. Call it with its tensors and scalars by name; outputs are tensors it writes.

    Attributes:
        name: family of the kernel.
        signature: names, dtypes and shapes of its arguments.
        launch: runs it on tensors, run-time sizes and scalars, in the signature's order; nothing is checked.
        native: the same as a ctypes function of addresses, sizes, scalars and a number of threads, where there is one.
    """

    name: str
    signature: Signature
    launch: Callable[[Sequence[torch.Tensor], dict[str, int], list[float]], None]
    native: Any = None

    def __call__(self, **arguments: torch.Tensor | float) -> None:
        """Check every dimension against what was compiled and against each other, then run.

        The CPU's code would read out of bounds on a wrong size without a word, so nothing is left out.
        Zero tokens return before the launch: a grid of zero blocks is not a valid one.
        """
        signature = self.signature
        if missing := [name for name in signature.names if name not in arguments]:
            raise TypeError(f"{self.name}: missing arguments {missing}")
        tensors: list[Any] = [arguments.pop(buffer.name) for buffer in signature.buffers]
        scalars: list[Any] = [arguments.pop(name) for name in signature.scalars]
        if arguments:
            raise TypeError(f"{self.name}: unknown arguments {sorted(arguments)}")
        sizes: dict[str, int] = {}
        device = tensors[0].device
        for buffer, tensor in zip(signature.buffers, tensors, strict=True):
            self._check(buffer, tensor, sizes, device)
        if 0 not in sizes.values():
            if taping.recorder is not None:
                taping.recorder.launched(self, tensors, sizes, scalars)
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
