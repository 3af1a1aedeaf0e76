"""C++ names of TIR's buffers, dtypes and operators. Used by the rest of the lowering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from ...errors import LoweringError

C_TYPES = {
    "float32": "float",
    "bfloat16": "mhc::bfloat16",
    "float16": "mhc::float16",
    "float8_e4m3fn": "mhc::float8_e4m3fn",
    "int32": "int32_t",
    "int64": "int64_t",
    "uint32": "uint32_t",
    "bool": "bool",
}


@dataclass(frozen=True)
class Array:
    """A TIR buffer as C++ sees it."""

    name: str
    dtype: str
    shape: tuple
    is_global: bool

    @property
    def c_type(self) -> str:
        return c_type(self.dtype)


def op_name(node: Any) -> str:
    """The name of the operator that a Call calls; empty for any other node."""
    return getattr(node.op, "name", "") if isinstance(node, tirx.Call) else ""


def c_type(dtype: Any) -> str:
    if str(dtype) not in C_TYPES:
        raise LoweringError(f"dtype {dtype}")
    return C_TYPES[str(dtype)]
