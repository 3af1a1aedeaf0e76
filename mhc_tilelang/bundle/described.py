"""A kernel in words: what a host must know to call it, and what a running program asks for it by.

Parameters become JSON, plans and tiles with the name of their type; `key_of` turns what `compile.kernel` is asked for
into the same text without loading tilelang.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from ..compiler.kernel import Signature
from ..kernels import projection_plans

INPUT, OUTPUT, UNUSED = "in", "out", "unused"
ABBREVIATED = {"num_streams": "n", "hidden_size": "c", "dtype": ""}


@dataclass(frozen=True)
class Described:
    """A kernel of a bundle.

    Attributes:
        name: within the bundle; the family, and what tells it from others of the family.
        symbol: name of its C function: `name`, with the sizes that a bundle has in common.
        family, parameters: as `compile.kernel` takes them.
        signature: buffers, then run-time sizes, then scalars: the order of every call.
        roles: of each buffer; "unused" are those that this kernel does not touch.
        func: TIR of the kernel, which every target starts from.
    """

    name: str
    symbol: str
    family: str
    parameters: dict[str, Any]
    signature: Signature
    roles: tuple[str, ...]
    func: Any

    @property
    def numbers(self) -> dict[str, str]:
        """Run-time sizes and scalars, in the order of a call, and what they are in C: float, or int64_t."""
        floats = {name for name, dtype in self.signature.scalars.items() if dtype == "float32"}
        names = (*self.signature.sizes, *self.signature.scalars)
        return {name: "float" if name in floats else "int64_t" for name in names}


def describe(family: str, parameters: dict[str, Any], common: dict[str, Any]) -> Described:
    """Trace a kernel, and say what it reads and writes; `common` are the sizes of its bundle. Loads tilelang."""
    from ..compiler.tracing import signature_of, trace

    func = trace(family, parameters)
    from ..compiler.cpu.views import accesses_of  # after tilelang, which puts tvm on the path

    signature = signature_of(func)
    accesses = accesses_of(func.body)
    written = {access.buffer.name for access in accesses if access.is_write}
    touched = {access.buffer.name for access in accesses}
    roles = tuple(
        OUTPUT if buffer.name in written else INPUT if buffer.name in touched else UNUSED
        for buffer in signature.buffers
    )
    name = name_of(family, parameters, common)
    return Described(name, f"{prefix_of(**common)}{name}", family, parameters, signature, roles, func)


def prefix_of(num_streams: int, hidden_size: int, dtype: str) -> str:
    """Return the common prefix of a bundle's C functions, so that two models can be linked into one program."""
    return f"mhc_n{num_streams}_c{hidden_size}_{dtype}_"


def name_of(family: str, parameters: dict[str, Any], common: dict[str, Any]) -> str:
    """Return the family, then what its kernels in one bundle differ in: rows of phi, lanes, what is asked for.

    A first sublayer's kernels have other sizes than `common`: one stream, or float32.
    """
    parts = [family]
    for name, value in parameters.items():
        if name == "plan":
            projection = getattr(value, "projection", value)
            parts += [f"rows{projection.rows}"] if hasattr(projection, "rows") else []
            parts += (
                [f"warps{projection.channels}"] if isinstance(projection, projection_plans.WarpProjectionPlan) else []
            )
        elif name == "lanes":
            parts.append(f"lanes{value}")
        elif name == "layer_dtype" and value != parameters["dtype"]:
            parts.append(f"layer_{value}")
        elif value is True:
            parts.append(name)
        elif name in common and value != common[name]:
            parts.append(f"{ABBREVIATED[name]}{value}")
    return "_".join(parts)


def unique_names(kernels: list[Described]) -> list[Described]:
    """Return the kernels with unique names; those that would share one get a digest of their parameters."""
    names = [kernel.name for kernel in kernels]
    found = []
    for kernel in kernels:
        if names.count(kernel.name) > 1:
            suffix = "_" + hashlib.sha256(key_of(kernel.family, kernel.parameters).encode()).hexdigest()[:6]
            values = {field.name: getattr(kernel, field.name) for field in fields(kernel)}
            kernel = Described(**{**values, "name": kernel.name + suffix, "symbol": kernel.symbol + suffix})
        found.append(kernel)
    return found


def encode(value: Any) -> Any:
    """Encode a parameter as JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__, **{name: encode(part) for name, part in vars(value).items()}}
    return value


def encode_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """Encode all parameters."""
    return {name: encode(value) for name, value in parameters.items()}


def key_of(family: str, parameters: dict[str, Any]) -> str:
    """Return the key of a kernel and its parameters, encoded or not."""
    return json.dumps([family, encode_parameters(parameters)], sort_keys=True)


def entry_of(kernel: Described) -> dict[str, Any]:
    """Return the kernel's entry in the manifest."""
    buffers = [
        {**asdict(buffer), "role": role} for buffer, role in zip(kernel.signature.buffers, kernel.roles, strict=True)
    ]
    return {
        "name": kernel.name,
        "symbol": kernel.symbol,
        "family": kernel.family,
        "parameters": encode_parameters(kernel.parameters),
        "buffers": buffers,
        "sizes": list(kernel.signature.sizes),
        "scalars": kernel.signature.scalars,
    }
