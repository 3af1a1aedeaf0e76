"""Argument checks of ResidualStream: dtypes, shapes, kinds. Errors name the method and the argument."""

from __future__ import annotations

import torch

from ..arguments import STREAM_DTYPES, Arguments, check_dense, shape_of
from ..ops_arguments import layer_dtypes
from .connections import Connection, HyperHead


def check_stream_dtype(function: str, name: str, value: torch.Tensor) -> None:
    """Refuse a tensor whose dtype no stream has."""
    if value.dtype not in STREAM_DTYPES:
        wanted = " or ".join(str(dtype) for dtype in STREAM_DTYPES)
        raise TypeError(f"{function}: {name}: expected dtype {wanted}, got {value.dtype}")


def check_h_pre(function: str, h_pre: torch.Tensor, x: torch.Tensor, connection: str) -> torch.Tensor:
    """Refuse an h_pre that does not go with the streams x that were handed over; return it in float32."""
    if connection != "mhc":
        raise ValueError(f"{function}: h_pre: expected none for connections of kind {connection!r}, got one")
    arguments = Arguments(function)
    sizes = tuple(shape_of(x)[-2:])
    arguments.tensor("x", x, sizes, batched=True)
    return arguments.widened("h_pre", h_pre, sizes[:1], batched=True)


def check_layer_output(layer_output: torch.Tensor, x: torch.Tensor, kind: str) -> None:
    """Refuse what cannot be merged into a stream x of connections of this kind."""
    check_dense("ResidualStream.write", "layer_output", layer_output)
    got, sizes = shape_of(layer_output), shape_of(x)
    shape = sizes if kind == "residual" else (*sizes[:-2], sizes[-1])
    if got != torch.Size(shape):
        raise ValueError(f"ResidualStream.write: layer_output: expected shape {list(shape)}, got {list(got)}")
    dtypes = layer_dtypes(x.dtype)
    if layer_output.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"ResidualStream.write: layer_output: expected dtype {wanted}, got {layer_output.dtype}")
    if not torch.compiler.is_compiling() and not layer_output.is_contiguous():
        raise ValueError(
            "ResidualStream.write: layer_output: expected a contiguous tensor, got strides "
            f"{tuple(layer_output.stride())} for shape {list(layer_output.shape)}; call .contiguous() first"
        )
    if layer_output.device != x.device:
        raise ValueError(f"ResidualStream.write: layer_output: expected device {x.device}, got {layer_output.device}")


def check_reduction(reduction: str | HyperHead, kind: str, sizes: tuple[int, int]) -> None:
    """Refuse what cannot reduce a stream of this kind and these sizes, streams and channels."""
    if isinstance(reduction, HyperHead):
        if kind == "residual":
            raise ValueError(
                "ResidualStream.reduce: reduction: expected 'sum' or 'mean' for a plain residual, got a HyperHead"
            )
        check_spec("reduce", "reduction", reduction, sizes)
    elif reduction not in ("sum", "mean"):
        raise ValueError(f"ResidualStream.reduce: reduction: expected 'sum', 'mean' or a HyperHead, got {reduction!r}")


def check_spec(call: str, name: str, module: Connection | HyperHead, sizes: tuple[int, int]) -> None:
    """Refuse a module that is made for other streams than `sizes`, streams and channels."""
    spec = module.spec
    if spec is not None and (spec.num_streams, spec.hidden_size) != sizes:
        raise ValueError(
            f"ResidualStream.{call}: {name}: expected {sizes[0]} streams of {sizes[1]} channels, "
            f"got a spec of {spec.num_streams} streams of {spec.hidden_size}"
        )
