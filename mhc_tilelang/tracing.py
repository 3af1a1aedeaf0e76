"""From a kernel family and its sizes to TIR, before any target sees it. What both targets start from.

Loads tilelang when a function is called, not before.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .kernel import Buffer, Signature
from .kernels import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Iterator


def trace(family: str, parameters: dict[str, Any]) -> Any:
    """The family's TIR function for these sizes, before any target sees it. Loads tilelang."""
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


@contextmanager
def progress(family: str, target: str, parameters: dict[str, Any]) -> Iterator[None]:
    """Say on stderr what is being compiled, and how long it took; a progress bar that is up stays whole."""
    from tqdm import tqdm

    sizes = ", ".join(f"{name}={value}" for name, value in parameters.items() if isinstance(value, int | str))
    tqdm.write(f"mhc-tilelang: compiling {family} for {target} ({sizes})", file=sys.stderr)
    start = time.monotonic()
    yield
    tqdm.write(f"mhc-tilelang: compiled {family} in {time.monotonic() - start:.1f} s", file=sys.stderr)
