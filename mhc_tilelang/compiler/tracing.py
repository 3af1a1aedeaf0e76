"""TIR of a kernel family at given sizes, before any target sees it: the start of both targets.

Loads tilelang when a function is called, not before.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib import import_module
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any

from ..kernels import FAMILIES
from .kernel import Buffer, Signature

if TYPE_CHECKING:
    from collections.abc import Iterator


def trace(family: str, parameters: dict[str, Any]) -> Any:
    """Return the family's TIR function for these sizes, before any target sees it. Loads tilelang."""
    parse_once()
    module, factory = FAMILIES[family]
    return getattr(import_module(f"mhc_tilelang.kernels.{module}"), factory)(**parameters)


@cache
def parse_once() -> None:
    """Have tilelang parse and compile a kernel or macro once, not each time that its factory is called.

    That takes 20 to 60 ms, half of a trace; `boundary_backward` of eight streams has 72 reductions, a macro each.
    What a factory's arguments change is in the closure, which is bound anew.
    """
    from tilelang.language.eager import builder, utils

    parse, known = builder.mutate, dict[tuple[Any, ...], Any]()

    def mutate(function: Any) -> Any:
        enclosed = utils.get_func_nonlocals(function)
        key = (function.__code__, *enclosed)
        first = known.get(key) or known.setdefault(key, parse(function))
        if first.extra_type_hints:  # types declared in the body follow from the closure
            return parse(function)
        cells = tuple(CellType(enclosed[name]) for name in first.gen.__code__.co_freevars)
        return replace(first, gen=FunctionType(first.gen.__code__, function.__globals__, closure=cells))

    builder.mutate = mutate


def signature_of(func: Any) -> Signature:
    """Return the signature of a TIR function."""
    from tvm import tirx

    buffers = []
    for param in func.params:
        if param in func.buffer_map:
            buffer = func.buffer_map[param]
            shape = tuple(d.name if isinstance(d, tirx.Var) else int(d) for d in buffer.shape)
            buffers.append(Buffer(buffer.name, str(buffer.dtype), shape))
    scalars = {param.name: str(param.dtype) for param in func.params if param not in func.buffer_map}
    return Signature(tuple(buffers), scalars)


@contextmanager
def progress(family: str, target: str, parameters: dict[str, Any]) -> Iterator[None]:
    """Say on stderr what is being compiled, and how long it took; a progress bar that is up stays whole."""
    from tqdm import tqdm

    tqdm.write(f"mhc-tilelang: compiling {family} for {target} ({sizes_of(parameters)})", file=sys.stderr)
    start = time.monotonic()
    yield
    tqdm.write(f"mhc-tilelang: compiled {family} in {time.monotonic() - start:.1f} s", file=sys.stderr)


def sizes_of(parameters: dict[str, Any]) -> str:
    """Describe a kernel's compile-time parameters in a line, the plan's fields among them; what is off is left out.

    Two kernels of a family never have the same.
    """
    found = []
    for name, value in parameters.items():
        if is_dataclass(value):
            found.append(sizes_of({field.name: getattr(value, field.name) for field in fields(value)}))
        elif value is not False:
            found.append(name if value is True else f"{name}={value}")
    return ", ".join(found)
