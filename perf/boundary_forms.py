"""Plain torch for the boundary between two sublayers, as a whole; `boundary_parts` puts together its fastest parts.

    as written    post, then pre: for torch.compile, which may fuse across the boundary as the kernels do
    autograd      its backward, recorded or compiled, as in `backward_autograd`; for a step both passes

Arguments as `boundary_workloads` names them; the last ones are outputs. `allowed` says how far from the fused kernels
a result may be that is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checking import plain_torch
from ..checking.tolerance import UNIT_ROUNDOFF
from ..kernel import dtype_name
from ..spec import MHCSpec
from .backward_autograd import coefficients_of, recorded, write
from .baselines import COMPILED, EAGER, TOLERANCE, Form
from .boundary_workloads import FORWARD_RESULTS, GRADIENTS, MIXING, PARAMETERS, Trained
from .cases import BOUNDARY_STEP, POST_PRE, POST_PRE_BACKWARD, POST_PRE_DELAYED

TAKEN = (*MIXING, *PARAMETERS)
UPSTREAM = tuple(f"g_{name}" for name in FORWARD_RESULTS)


def boundary_of(spec: MHCSpec, given: Tensor | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """post and pre as a function of TAKEN, in plain torch; aggregated with `given`, which adds next_pre."""

    def forward(
        x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor
    ) -> tuple[Tensor, ...]:
        x_next = plain_torch.post(x, layer_output, h_post, h_res)
        dots, squares = plain_torch.project(x_next, phi)
        s = torch.rsqrt(squares / spec.stream_size + spec.rms_eps)
        next_pre, next_post, next_res = coefficients_of(spec)(dots, s, alpha, bias)
        if given is None:
            return x_next, plain_torch.aggregate(x_next, next_pre), next_post, next_res
        return x_next, plain_torch.aggregate(x_next, given), next_post, next_res, next_pre

    return forward


def chosen(tensors: dict[str, Any], names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Those of these names, in their order."""
    return tuple(tensors[name] for name in names)


def post_pre(spec: MHCSpec, h_pre: Tensor | None = None, **tensors: Tensor) -> None:
    """The formulas as written; with h_pre the delayed form."""
    names = FORWARD_RESULTS if h_pre is None else (*FORWARD_RESULTS, "next_pre")
    write(chosen(tensors, names), boundary_of(spec, h_pre)(*chosen(tensors, TAKEN)))


def backward_recorded(spec: MHCSpec, **tensors: Tensor) -> Callable[[], None]:
    """What autograd recorded of the formulas as written."""
    upstream, outputs = chosen(tensors, UPSTREAM), chosen(tensors, GRADIENTS)
    return recorded(boundary_of(spec), chosen(tensors, TAKEN), upstream, outputs)


def backward_vjp(spec: MHCSpec, **tensors: Tensor) -> None:
    """Traced with the forward, of which the compiler keeps what the gradients need."""
    _, backward, *_ = torch.func.vjp(boundary_of(spec), *chosen(tensors, TAKEN))
    write(chosen(tensors, GRADIENTS), backward(chosen(tensors, UPSTREAM)))


def step_recorded(spec: MHCSpec, **tensors: Tensor) -> Callable[[], None]:
    """Forward and backward, recorded at every call."""
    trained = Trained(boundary_of(spec), {name: tensors[name] for name in TAKEN}, chosen(tensors, UPSTREAM))
    outputs = chosen(tensors, (*FORWARD_RESULTS, *GRADIENTS))

    def run() -> None:
        trained.run()
        write(outputs, trained.latest)

    return run


def step_vjp(spec: MHCSpec, **tensors: Tensor) -> None:
    """Forward and backward in one graph."""
    results, backward, *_ = torch.func.vjp(boundary_of(spec), *chosen(tensors, TAKEN))
    gradients = backward(chosen(tensors, UPSTREAM))
    write(chosen(tensors, (*FORWARD_RESULTS, *GRADIENTS)), (*results, *gradients))


def allowed(kernel: str, dtype: torch.dtype) -> dict[str, float]:
    """By output, the relative difference that a right result may have from the fused kernels', beyond `TOLERANCE`.

    Forward, a few elements of x_next are rounded the other way, 2e-5 of it in bfloat16, and the mappings follow by as
    much: δ is half of TOLERANCE, which still tells phi in TF32. A layer_input that was off by δ before it is rounded is
    off by √(δ·u) afterwards. Backward, torch and the separate kernels round the gradient of x_next up to three times on
    its way (through phi, the aggregation's share, the sum), each by u/√3 at most: u in all, where the kernels keep
    float32.
    """
    unit, delta = UNIT_ROUNDOFF[dtype_name(dtype)], TOLERANCE[dtype] / 2
    mappings = dict.fromkeys(("next_pre", "next_post", "next_res"), delta)
    forward = {**mappings, "layer_input": (delta * unit) ** 0.5}
    of_stream = dict.fromkeys((f"g_{name}" for name in MIXING), unit)
    through_mappings = dict.fromkeys((f"g_{name}" for name in PARAMETERS), delta)
    return {
        POST_PRE: forward,
        POST_PRE_DELAYED: forward,
        POST_PRE_BACKWARD: {**of_stream, **through_mappings},
        BOUNDARY_STEP: {**forward, **of_stream, **through_mappings},
    }.get(kernel, {})


FORMS: dict[str, tuple[Form, ...]] = {
    POST_PRE: (Form("as written", post_pre),),
    POST_PRE_DELAYED: (Form("as written", post_pre),),
    POST_PRE_BACKWARD: (
        Form("autograd", backward_recorded, modes=(EAGER,), binds=True),
        Form("autograd", backward_vjp, modes=(COMPILED,)),
    ),
    BOUNDARY_STEP: (
        Form("autograd", step_recorded, modes=(EAGER,), binds=True),
        Form("autograd", step_vjp, modes=(COMPILED,)),
    ),
}
