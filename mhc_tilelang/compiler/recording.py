"""Records of the launches of a call while it runs: kernel families, compile-time parameters, arguments.

    recording         on meta tensors: the call takes every decision that it takes on a device, and nothing is computed
    record_launches   on the tensors of a device, where the kernels run as well

Audits, builds and benchmarks run a call here to know its launches: nothing is decided twice.
Imports torch for its types only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any, cast

from .. import compiler
from .kernel import Kernel, Signature

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Recorded:
    """One kernel as it was launched.

    Attributes:
        family: the kernel's family, of `kernels.FAMILIES`.
        parameters: compile-time parameters.
        arguments: tensors and scalars by name.
        streams: the names of those as wide as the stream or a layer; empty until told apart by `wide`.
    """

    family: str
    parameters: dict[str, Any]
    arguments: dict[str, Any]
    streams: tuple[str, ...] = ()

    @cached_property
    def function(self) -> Any:
        """The kernel's TIR function. Loads tilelang."""
        from .tracing import trace

        return trace(self.family, self.parameters)

    @cached_property
    def signature(self) -> Signature:
        """Signature of the kernel. Loads tilelang."""
        from .tracing import signature_of

        return signature_of(self.function)

    @cached_property
    def sizes(self) -> dict[str, float]:
        """The run-time sizes and scalars by name, as `audit` takes them. Loads tilelang."""
        found = {name: self.arguments[name] for name in self.signature.scalars}
        for buffer in self.signature.buffers:
            dimensions = zip(buffer.shape, self.arguments[buffer.name].shape, strict=True)
            found |= {name: size for name, size in dimensions if isinstance(name, str)}
        return found

    def wide(self, num_tokens: int, hidden_size: int) -> tuple[str, ...]:
        """Name the tensors as wide as the stream or a layer, [T, …, C], whose channels may be split in two.

        Shapes alone tell them from small tensors, whose extents must not be as large.
        """
        shapes = {name: tuple(getattr(value, "shape", ())) for name, value in self.arguments.items()}
        return tuple(
            name
            for name, shape in shapes.items()
            if shape[:1] == (num_tokens,) and hidden_size in accumulate(shape[:0:-1], mul)
        )


@contextmanager
def recording(target: str, parallel_blocks: int) -> Iterator[list[Recorded]]:
    """Within this block, calls on meta tensors launch nothing: what they would launch on the target is noted.

    Args:
        target: "cpu", or a CUDA architecture; "cuda" for what all have in common.
        parallel_blocks: number of a projection's blocks that the device runs at a time.
    """
    found: list[Recorded] = []

    def load(family: str, parameters: dict[str, Any]) -> Kernel:
        return cast(Kernel, lambda **arguments: found.append(Recorded(family, parameters, arguments)))

    platform = "cpu" if target == "cpu" else "cuda"
    with compiler.emulating(compiler.Emulator(target, load, parallel_blocks, platform, {}, device="meta")):
        yield found


def record_launches(run: Callable[[], object]) -> list[Recorded]:
    """Run a call and record every kernel that it launches."""
    found: list[Recorded] = []
    ordinary = compiler.kernel

    def noting(family: str, target: str, **parameters: Any) -> Callable[..., None]:
        kernel = ordinary(family, target, **parameters)

        def call(**arguments: torch.Tensor | int) -> None:
            found.append(Recorded(family, parameters, dict(arguments)))
            kernel(**arguments)

        return call

    compiler.kernel = noting  # type: ignore[assignment]
    try:
        run()
    finally:
        compiler.kernel = ordinary
    return found
