"""Base of the modules with streams: a spec, and parameters that are float32 and stay so.

`model.to(torch.bfloat16)`, `.half()` and `.double()` move these parameters and leave their dtype, since
coefficients are float32 from end to end. `connections` has the modules.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..arguments import check_spec
from ..spec import MHCSpec

INITIAL_ALPHA = 0.01  # the mHC paper's and the HC paper's

Device = torch.device | str | None


class StreamModule(nn.Module):
    """A module for streams of one spec, whose parameters are float32 after every conversion."""

    def __init__(self, spec: MHCSpec) -> None:
        super().__init__()
        check_spec(type(self).__name__, spec)
        self.spec = spec

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        def keep_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point():  # a buffer that is not ours
                return moved
            # Not moved.float(), whose values the other dtype has rounded.
            return moved if moved.dtype == torch.float32 else tensor.to(moved.device, torch.float32)

        return super()._apply(keep_float32, recurse)

    def check_parameters(self, *parameters: torch.Tensor) -> None:
        """Refuse phi, alpha and bias that something has rounded on the way, such as FSDP2 with a policy."""
        for name, parameter in zip(("phi", "alpha", "bias"), parameters, strict=True):
            if parameter.dtype != torch.float32:
                raise TypeError(
                    f"{type(self).__name__}: {name}: expected dtype torch.float32, got {parameter.dtype}; "
                    "shard connections on their own, without a mixed-precision policy"
                )

    def extra_repr(self) -> str:
        return f"hidden_size={self.spec.hidden_size}, num_streams={self.spec.num_streams}"


class SublayerModule(StreamModule):
    """A connection with streams, whose mappings start as constants."""

    alpha: nn.Parameter
    bias: nn.Parameter

    def __init__(self, spec: MHCSpec, sublayer: int) -> None:
        super().__init__(spec)
        if type(sublayer) is not int or sublayer < 0:
            raise ValueError(f"{type(self).__name__}: sublayer: expected an int of at least 0, got {sublayer!r}")
        self.sublayer = sublayer

    def reset_static(self, pre: torch.Tensor, post: float, res: torch.Tensor) -> None:
        """alpha, and the bias from its groups pre [n], post and res [n, n]."""
        nn.init.constant_(self.alpha, INITIAL_ALPHA)
        with torch.no_grad():
            self.bias.copy_(_sharded_like(self.bias, torch.cat([pre, torch.full_like(pre, post), res.flatten()])))

    def identity(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row `sublayer % n` of the identity, and the identity [n, n]; on the CPU, wherever parameters are."""
        identity = torch.eye(self.spec.num_streams, device="cpu", dtype=torch.float32)
        return identity[self.sublayer % self.spec.num_streams], identity

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sublayer={self.sublayer}"


def make_parameter(*shape: int, device: Device) -> nn.Parameter:
    """Return a float32 parameter without values."""
    return nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32))


def _sharded_like(parameter: nn.Parameter, values: torch.Tensor) -> torch.Tensor:
    """Return the values laid out as the parameter is: FSDP shards a model on meta before its parameters are reset."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return values
    return distribute_tensor(values, parameter.device_mesh, parameter.placements)
