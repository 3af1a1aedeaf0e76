"""Registration of operators, and helpers that all families apply to their tensors.

Operators are defined by schema and not by `torch.library.custom_op`, which costs a quarter more per call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function

from ..errors import GradientError
from ..kernels.plans import MAX_ACCESS_BYTES
from ..spec import MHCSpec
from . import sharding

NAMESPACE = "mhc_tilelang"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
Operator = torch._ops.OpOverload


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Operator:
    """Register an operator: `run` computes it on a CPU and on a GPU, `fake` only allocates what it would return."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def define_out(schema: str, run: Callable[..., None]) -> Operator:
    """Register an operator that writes into buffers and returns nothing."""
    return define(schema, run, _nothing)


def define_backward(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Operator:
    """Register the backward of an operator; to differentiate it once more is an error."""
    name = schema.partition("(")[0]
    operator = define(schema, run, fake)

    def refuse(*_: Any) -> None:
        raise GradientError(f"{name.removesuffix('_backward')}: no second derivative: the backward has no gradient")

    differentiate(operator, refuse, _nothing)
    return operator


def differentiate(
    operator: Operator, backward: Callable[..., Any], setup_context: Callable[[Any, tuple, Any], None]
) -> Any:
    """Register an operator's autograd; return its `autograd.Function`. `apply` takes what computes it, which
    has its `constants`, then its tensors.

    Not by `torch.library.register_autograd`, whose operators torch.func.grad refuses, which drops the tangents of
    forward mode without a word, and which takes twice as long per call. `autograd.Function` itself would dispatch
    anew under torch.func; its base class is differentiated where it stands, by the one transform that the dispatcher
    is at. Where nothing needs a gradient there is none of this.

    That base class is private to PyTorch, and the same in 2.10 and 2.13, where the tests pass.
    """

    name = operator._schema.name.partition("::")[2]
    num_tensors = sum("Tensor" in str(argument.type) for argument in operator._schema.arguments)

    def jvp(*_: Any) -> None:
        raise GradientError(f"{name}: no forward-mode gradients; use reverse mode")

    def setup(ctx: Any, arguments: tuple, output: Any) -> None:
        ctx.constants = arguments[0].constants
        ctx.set_materialize_grads(False)
        setup_context(ctx, arguments[1:], output)

    methods: dict[str, Any] = {
        "forward": lambda compute, *inputs: compute(*inputs),
        "setup_context": setup,
        "backward": lambda ctx, *gradients: (None, *backward(ctx, *gradients)),
        "jvp": jvp,
    }
    base: Any = torch.autograd.function._SingleLevelFunction
    function: Any = type(name, (base,), {key: staticmethod(method) for key, method in methods.items()})

    def apply(*arguments: Any) -> Any:
        sharding.register_if_loaded()
        inputs, compute = arguments[:num_tensors], _Below(operator, arguments[num_tensors:])
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(compute, *inputs)
        if torch.autograd.forward_ad._current_level < 0 and not needs_gradient(inputs):
            return compute(*inputs)
        return function.apply(compute, *inputs)

    LIBRARY.impl(name, apply, "Autograd")
    return function


class _Below:
    """An operator with its constants, below autograd."""

    def __init__(self, operator: Operator, constants: tuple[Any, ...]) -> None:
        self._operator, self.constants = operator, constants

    def __call__(self, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if torch._C._are_functorch_transforms_active():  # an outer transform differentiates what is below
                with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
                    return self._operator(*inputs, *self.constants)
            return self._operator(*inputs, *self.constants)


def needs_gradient(inputs: Sequence[torch.Tensor | None]) -> bool:
    """Whether autograd has to know of a call with these inputs."""
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs)


def flat(tensor: torch.Tensor, trailing: int) -> torch.Tensor:
    """Contiguous, and all but the last `trailing` dimensions flattened to tokens."""
    return tensor.contiguous().view(-1, *tensor.shape[tensor.ndim - trailing :])


def check_buffers(
    function: str, buffers: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], whole: tuple[str, ...] = ()
) -> None:
    """Refuse buffers that a kernel cannot write into, and count the write for autograd.

    These are buffers that are not contiguous, that share memory with an input or with each other, and on a GPU those
    of `whole` that do not start where the kernels' vectors do.

    Raises:
        ValueError: names the function, the buffer, and what is wrong with it.
    """
    others = {name: _extent(tensor) for name, tensor in inputs.items()}
    for name, buffer in buffers.items():
        if not buffer.is_contiguous():  # compiled code gets here without the checks of `arguments`
            raise ValueError(f"{function}: {name}: expected a contiguous tensor, got strides {buffer.stride()}")
        start, end = _extent(buffer)
        for other, (other_start, other_end) in others.items():
            if max(start, other_start) < min(end, other_end):
                raise ValueError(f"{function}: {name}: expected memory of its own, got a buffer that overlaps {other}")
        others[name] = (start, end)
        if name in whole and buffer.is_cuda and start % MAX_ACCESS_BYTES:
            raise ValueError(
                f"{function}: {name}: expected a buffer that starts on {MAX_ACCESS_BYTES} bytes, got one at {start:#x}"
            )
    torch.autograd.graph.increment_version(buffers.values())


def spec_of(x: torch.Tensor, *constants: float, **named: Any) -> MHCSpec:
    """Return the spec again, from a stream x and the constants, in MHCSpec's order or by name."""
    return spec_of_sizes(x.shape[-1], x.shape[-2], *constants, **named)


@cache
def spec_of_sizes(hidden_size: int, num_streams: int, *constants: float, **named: Any) -> MHCSpec:
    """Return a spec of the stream's sizes and constants, cached."""
    return MHCSpec(hidden_size, num_streams, *constants, **named)  # type: ignore[arg-type]


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and the one after the last of a contiguous tensor."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _nothing(*_: Any, **__: Any) -> None:
    return None
