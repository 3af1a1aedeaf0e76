"""State of a ResidualStream's call: grad mode, tensor versions, the backward pass; and whose methods run.

`residual_stream` asks these; `diagnostics` asks in which backward pass it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .connections import Connection, HyperConnection, HyperHead


def is_delayed(connection: Connection) -> bool:
    """Whether a connection aggregates with the h_pre of the one before."""
    return connection.kind == "mhc" and connection.spec is not None and connection.spec.delayed_pre


def has_own_merge(connection: Connection | None) -> bool:
    """Whether a connection's merge is HyperConnection's."""
    return getattr(type(connection), "merge", None) is HyperConnection.merge


def has_own_forward(reader: Connection | HyperHead) -> bool:
    """Whether a module's forward is HyperConnection's or HyperHead's, which take what waits."""
    own = HyperHead if isinstance(reader, HyperHead) else HyperConnection
    return getattr(type(reader), "forward", None) is own.forward


def modes() -> tuple[bool, bool]:
    """Grad mode and inference mode, the latter not asked in traced code."""
    return torch.is_grad_enabled(), not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def in_modes(wanted: tuple[bool, bool], call: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """Make the call in these modes, grad and inference."""
    if wanted == modes():
        return call(*arguments)
    with_grad, in_inference = wanted
    with torch.inference_mode(in_inference), torch.set_grad_enabled(with_grad):
        return call(*arguments)


def version(tensor: torch.Tensor) -> int:
    """Return the number of in-place changes of a tensor; 0 in traced code and for inference tensors."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def backward_pass() -> int | None:
    """Return the running backward pass of this thread, as autograd numbers them; -1 outside, None in traced code."""
    return None if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
