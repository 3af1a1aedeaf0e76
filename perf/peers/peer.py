"""The interface of a peer: which of our functions it has, under which name, and how a call is made.

A `Function` binds a kernel's arguments, named as in `calls.table`. What is converted on the way in is converted once,
untimed; what is timed is the peer's own call, in its own layout; what comes out is converted back for the comparison,
untimed as well. So a peer pays for no convention but its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import MHCError

Inputs = Mapping[str, Any]
Outputs = Mapping[str, torch.Tensor]


class UnsupportedError(MHCError):
    """A peer, or one of its functions, that cannot run here; the message says why."""


@dataclass(frozen=True)
class Call:
    """A peer's function, bound: what is timed, and what carries its result over to our outputs."""

    run: Callable[[], Any]
    convert: Callable[[Any], object] = lambda _: None


@dataclass(frozen=True)
class Function:
    """One of our functions in a peer.

    Attributes:
        name: the peer's own.
        bind: (inputs, outputs) -> Call. The outputs are ours: a peer with our layout writes them directly.
        allowed: relative difference from our result that the peer's rounding explains; 0 for none beyond float32's.
        because: reason for the rounding, in words.
    """

    name: str
    bind: Callable[[Inputs, Outputs], Call]
    allowed: float = 0.0
    because: str = ""


@dataclass(frozen=True)
class Peer:
    """A peer that is loaded.

    Attributes:
        functions: functions by the name of our kernel.
        left_out: why a kernel is not among them, by its name; `otherwise` is the reason for all others.
        note: remark for readers on how it runs here.
    """

    functions: Mapping[str, Function]
    left_out: Mapping[str, str] = field(default_factory=dict)
    otherwise: str = "it has none"
    note: str = ""

    def function(self, kernel: str) -> Function:
        """Return the peer's function for our kernel. Raises UnsupportedError with the reason if it has none."""
        if kernel not in self.functions:
            raise UnsupportedError(self.left_out.get(kernel, self.otherwise))
        return self.functions[kernel]


def copy_to(outputs: Outputs, *names: str) -> Callable[[Any], None]:
    """Carry a tuple of results over to these outputs; a single result is not a tuple."""

    def convert(results: Any) -> None:
        for name, result in zip(names, results if len(names) > 1 else (results,), strict=True):
            outputs[name].copy_(result.reshape(outputs[name].shape))

    return convert


def require(condition: bool, what: str) -> None:
    """Raise UnsupportedError("needs ‹what›") unless it is so."""
    if not condition:
        raise UnsupportedError(f"needs {what}")


def recorded_backward(
    forward: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], upstream: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Run `forward` once, untimed; what is timed is the backward that autograd recorded of it."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        result = forward(*leaves)
    return lambda: torch.autograd.grad(result, leaves, upstream, retain_graph=True)
