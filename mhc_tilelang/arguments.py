"""Checks of the public functions' arguments: every error names the argument, what was expected, what came.

They run before any kernel is compiled or started. `Arguments` remembers the device and the leading dimensions of
the first tensor that has them, which fixes them for the others.

torch.compile traces through here. Sizes that it leaves open must not be compared by `if`, which would fix them: see
`_check_leading`. What an operator takes care of itself is not asked then, since asking means one more guard.
torch.jit.trace records the operators and none of these checks: see `shape_of`.
"""

from __future__ import annotations

from typing import Any

import torch

from .errors import GradientError
from .operators import sharding
from .spec import STREAM_COUNTS, MHCSpec

STREAM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICES = ("cpu", "cuda", "meta")  # meta: shapes and dtypes, no kernel


class Arguments:
    """The checks of one call. `tensor` is called once per tensor, in the order of the signature."""

    def __init__(self, function: str) -> None:
        self.function = function
        self.device: torch.device | None = None
        self.leading: torch.Size | None = None
        self.differentiated: str | None = None
        self.distributed: bool | None = None

    def tensor(
        self,
        name: str,
        value: torch.Tensor,
        trailing: tuple[int, ...],
        dtypes: tuple[torch.dtype, ...] = STREAM_DTYPES,
        batched: bool = False,
    ) -> None:
        """Check one tensor; `batched` tensors have leading (token) dimensions, the same for all of them."""
        check_dense(self.function, name, value)
        self._check_shape(name, value, trailing, batched)
        if value.dtype not in dtypes:
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            raise TypeError(f"{self.function}: {name}: expected dtype {wanted}, got {value.dtype}")
        if self.device is None:
            if value.device.type not in DEVICES:
                wanted = " or ".join(DEVICES)
                raise ValueError(f"{self.function}: {name}: expected device {wanted}, got {value.device}")
            self.device = value.device
        elif value.device != self.device:
            raise ValueError(f"{self.function}: {name}: expected device {self.device}, got {value.device}")
        if not torch.compiler.is_compiling():
            self._check_layout(name, value)
            self._check_distributed(name, value, len(trailing))
        if value.requires_grad and torch.is_grad_enabled():
            self.differentiated = self.differentiated or name

    def widened(self, name: str, value: torch.Tensor, trailing: tuple[int, ...], batched: bool = False) -> torch.Tensor:
        """Check a parameter, mapping or logits, and return it in float32, which is how kernels read it.

        16 bits are widened where autograd sees it: their gradient is summed in float32 and rounded once. A mapping
        [..., n] may come as [..., n, 1], which is a view of it.
        """
        try:
            self.tensor(name, value, trailing, batched=batched)
        except ValueError:
            is_column = batched and len(trailing) == 1 and not value.is_nested and value.layout is torch.strided
            if not is_column or tuple(value.shape[-2:]) != (*trailing, 1):
                raise
            value = value.squeeze(-1)
            self.tensor(name, value, trailing, batched=batched)
        return value if value.dtype == torch.float32 else value.float()

    def buffer(self, name: str, value: torch.Tensor, trailing: tuple[int, ...], dtype: torch.dtype) -> None:
        """Check a tensor that the caller wants a result in. After the inputs: it has their leading dimensions."""
        self.tensor(name, value, trailing, (dtype,), batched=True)
        if self.distributed:
            raise TypeError(f"{self.function}: {name}: expected no buffers for DTensors, got one; leave out= away")
        if self.differentiated is not None:
            raise GradientError(
                f"{self.function}: {self.differentiated} requires a gradient, and a call with out= gives none; "
                "leave out= away, or call under torch.no_grad()"
            )

    def _check_shape(self, name: str, value: torch.Tensor, trailing: tuple[int, ...], batched: bool) -> None:
        shape = shape_of(value)
        split = len(shape) - len(trailing)
        leading = shape[: max(split, 0)]
        if tuple(shape[max(split, 0) :]) != trailing or (not batched and split != 0):
            wanted = ", ".join(map(str, [*(["..."] if batched else []), *trailing]))
            hint = " (transposed?)" if value.ndim == 2 and tuple(shape[::-1]) == trailing else ""
            if batched and len(trailing) == 2 and tuple(shape[-1:]) == (trailing[0] * trailing[1],):
                hint = " (packed? .unflatten(-1, [n, C]) is a view)"
            raise ValueError(f"{self.function}: {name}: expected shape [{wanted}], got {list(shape)}{hint}")
        if batched and self.leading is None:
            self.leading = leading
        elif batched:
            self._check_leading(name, leading)

    def _check_leading(self, name: str, leading: torch.Size) -> None:
        assert self.leading is not None
        same_rank = len(leading) == len(self.leading)
        if same_rank and torch.compiler.is_compiling():  # torch 2.10 traces no message with a name in it
            for size, expected in zip(leading, self.leading, strict=True):
                torch._check(size == expected, lambda: "expected the same leading dimensions of all tensors of a call")
        elif not same_rank or leading != self.leading:
            raise ValueError(
                f"{self.function}: {name}: expected leading dimensions {list(self.leading)}, got {list(leading)}"
            )

    def _check_layout(self, name: str, value: torch.Tensor) -> None:
        if not value.is_contiguous():
            raise ValueError(
                f"{self.function}: {name}: expected a contiguous tensor, got strides {tuple(value.stride())} for "
                f"shape {list(value.shape)}; call .contiguous() first"
            )
        forward_ad = torch.autograd.forward_ad  # an operator without a formula for tangents drops them in silence
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
            raise GradientError(
                f"{self.function}: {name} has a tangent, and there are no forward-mode gradients; "
                "use reverse mode, or pass a detached tensor"
            )

    def _check_distributed(self, name: str, value: Any, trailing: int) -> None:
        distributed = sharding.is_dtensor(value)
        if self.distributed is None:  # the first tensor, whose tokens decide how the others lie
            self.distributed = distributed
            if distributed:
                sharding.register_if_loaded()  # in inference mode no autograd does
                sharding.check_tokens(self.function, name, value.placements, value.ndim - trailing)
        elif distributed != self.distributed:
            kinds = ("a DTensor", "a plain tensor") if self.distributed else ("a plain tensor", "a DTensor")
            raise TypeError(f"{self.function}: {name}: expected {kinds[0]}, like those before it, got {kinds[1]}")


def check_dense(function: str, name: str, value: torch.Tensor) -> None:
    """Refuse what is no dense tensor: a list, a nested tensor, a sparse one, one in a library's own layout."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{function}: {name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise ValueError(
            f"{function}: {name}: expected a dense tensor, got a nested one of layout {value.layout}; concatenate its "
            "parts: leading dimensions may be all tokens of a batch"
        )
    if value.layout is not torch.strided:
        raise ValueError(f"{function}: {name}: expected a dense tensor, got layout {value.layout}; call .to_dense()")


def shape_of(value: torch.Tensor) -> torch.Size:
    """Return the sizes of a tensor, as numbers even while torch.jit.trace records, which would make tensors of them."""
    state = None if torch.compiler.is_compiling() else torch._C._get_tracing_state()
    if state is None:
        return value.shape
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return value.shape
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def check_spec(function: str, spec: MHCSpec) -> None:
    """Refuse anything but an MHCSpec, whose own checks have then passed."""
    if not isinstance(spec, MHCSpec):
        raise TypeError(f"{function}: spec: expected an MHCSpec, got {type(spec).__name__}")


def check_eps(function: str, eps: float) -> float:
    """Return rms_norm_eps as a float; refuse what no spec would take for one."""
    try:
        return MHCSpec(hidden_size=1, rms_eps=eps).rms_eps
    except (TypeError, ValueError) as error:
        raise type(error)(f"{function}: rms_norm_eps: {str(error).removeprefix('rms_eps: ')}") from None


def check_streams(function: str, name: str, num_streams: int) -> None:
    """Refuse stream counts that there are no kernels for."""
    if type(num_streams) is not int:
        raise TypeError(f"{function}: {name}: expected int, got {num_streams!r} of type {type(num_streams).__name__}")
    if num_streams not in STREAM_COUNTS:
        raise ValueError(f"{function}: {name}: expected one of {STREAM_COUNTS} streams, got {num_streams}")


def sizes_of(function: str, name: str, value: torch.Tensor, dimensions: tuple[str, ...]) -> tuple[int, ...]:
    """Return the last dimensions of a tensor, for functions whose sizes come from it instead of a spec."""
    check_dense(function, name, value)
    shape = shape_of(value)
    if len(shape) < len(dimensions):
        raise ValueError(f"{function}: {name}: expected shape [..., {', '.join(dimensions)}], got {list(shape)}")
    sizes = tuple(shape[len(shape) - len(dimensions) :])
    if 0 in sizes:
        raise ValueError(f"{function}: {name}: expected {', '.join(dimensions)} of at least 1, got {list(shape)}")
    return sizes
