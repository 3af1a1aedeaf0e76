"""Checks of the public functions' arguments: every error names the argument, what was expected, what came.

They run before any kernel is compiled or started. `Arguments` collects the shapes' letters as it goes, so the
first tensor that mentions a size fixes it for the others.
"""

from __future__ import annotations

import torch

from .errors import GradientError
from .spec import STREAM_COUNTS, MHCSpec

STREAM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Arguments:
    """The checks of one call. `tensor` is called once per tensor, in the order of the signature."""

    def __init__(self, function: str) -> None:
        self.function = function
        self.device: torch.device | None = None
        self.leading: torch.Size | None = None

    def tensor(
        self,
        name: str,
        value: torch.Tensor,
        trailing: tuple[int, ...],
        dtypes: tuple[torch.dtype, ...] = (torch.float32,),
        batched: bool = False,
    ) -> torch.Tensor:
        """Check one tensor; `batched` tensors have leading (token) dimensions, the same for all of them.

        Returns it with all leading dimensions flattened to one.
        """
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{self.function}: {name}: expected a torch.Tensor, got {type(value).__name__}")
        self._check_shape(name, value, trailing, batched)
        self._check_memory(name, value)
        if value.dtype not in dtypes:
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            raise TypeError(f"{self.function}: {name}: expected dtype {wanted}, got {value.dtype}")
        if self.device is None:
            if value.device.type not in ("cpu", "cuda"):
                raise ValueError(f"{self.function}: {name}: expected device cpu or cuda, got {value.device}")
            self.device = value.device
        elif value.device != self.device:
            raise ValueError(f"{self.function}: {name}: expected device {self.device}, got {value.device}")
        if not value.is_contiguous():
            raise ValueError(
                f"{self.function}: {name}: expected a contiguous tensor, got strides {tuple(value.stride())} for "
                f"shape {list(value.shape)}; call .contiguous() first"
            )
        tangent = torch.autograd.forward_ad.unpack_dual(value).tangent
        if tangent is not None or (value.requires_grad and torch.is_grad_enabled()):
            raise GradientError(
                f"{self.function}: {name} requires a gradient, and the kernels have no backward yet; "
                "call under torch.no_grad(), or pass a detached tensor"
            )
        return value.reshape(-1, *trailing) if batched else value

    def _check_memory(self, name: str, value: torch.Tensor) -> None:
        """The kernels read a tensor's memory: refuse tensors that have none, or whose values are something else."""
        wrapped = torch._is_functional_tensor(value) or torch._C._functorch.is_functorch_wrapped_tensor(value)
        if wrapped or type(value) not in (torch.Tensor, torch.nn.Parameter):
            kind = "one wrapped by a function transform" if wrapped else type(value).__name__
            raise TypeError(f"{self.function}: {name}: expected a torch.Tensor with memory of its own, got {kind}")
        if value.is_neg():
            raise ValueError(f"{self.function}: {name}: expected no lazy negation, got one; call .resolve_neg() first")

    def _check_shape(self, name: str, value: torch.Tensor, trailing: tuple[int, ...], batched: bool) -> None:
        split = value.ndim - len(trailing)
        leading = value.shape[: max(split, 0)]
        if tuple(value.shape[max(split, 0) :]) != trailing or (not batched and split != 0):
            wanted = ", ".join(map(str, [*(["..."] if batched else []), *trailing]))
            hint = " (transposed?)" if value.ndim == 2 and tuple(value.shape[::-1]) == trailing else ""
            raise ValueError(f"{self.function}: {name}: expected shape [{wanted}], got {list(value.shape)}{hint}")
        if batched and self.leading is None:
            self.leading = leading
        elif batched and leading != self.leading:
            raise ValueError(
                f"{self.function}: {name}: expected leading dimensions {list(self.leading or ())}, got {list(leading)}"
            )

    def output(self, flat: torch.Tensor) -> torch.Tensor:
        """A flat result with the call's leading dimensions put back."""
        assert self.leading is not None
        return flat.view(*self.leading, *flat.shape[1:])


def check_spec(function: str, spec: MHCSpec) -> None:
    """Refuse anything but an MHCSpec, whose own checks have then passed."""
    if not isinstance(spec, MHCSpec):
        raise TypeError(f"{function}: spec: expected an MHCSpec, got {type(spec).__name__}")


def check_streams(function: str, name: str, num_streams: int) -> None:
    """Refuse stream counts that there are no kernels for."""
    if type(num_streams) is not int:
        raise TypeError(f"{function}: {name}: expected int, got {num_streams!r} of type {type(num_streams).__name__}")
    if num_streams not in STREAM_COUNTS:
        raise ValueError(f"{function}: {name}: expected one of {STREAM_COUNTS} streams, got {num_streams}")


def sizes_of(function: str, name: str, value: torch.Tensor, dimensions: tuple[str, ...]) -> tuple[int, ...]:
    """The last dimensions of a tensor, for functions whose sizes come from it instead of a spec."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{function}: {name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.ndim < len(dimensions):
        raise ValueError(f"{function}: {name}: expected shape [..., {', '.join(dimensions)}], got {list(value.shape)}")
    sizes = tuple(value.shape[value.ndim - len(dimensions) :])
    if 0 in sizes:
        raise ValueError(f"{function}: {name}: expected {', '.join(dimensions)} of at least 1, got {list(value.shape)}")
    return sizes
