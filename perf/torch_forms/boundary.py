"""Plain torch for the boundary between two sublayers, as a whole; `boundary_parts` puts together its fastest parts.

    as written    post, then pre: for torch.compile, which may fuse across the boundary as the kernels do
    autograd      its backward, recorded or compiled, as in `backward_autograd`; for a step both passes

Arguments as `calls.table` names them; the last ones are outputs. `tolerances` says how far from the fused kernels
a result may be that is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...checking import plain_torch
from ...checking.tolerance import UNIT_ROUNDOFF
from ...compiler.kernel import dtype_name
from ...spec import MHCSpec
from ..calls.cases import BOUNDARY_STEP, POST_PRE, POST_PRE_BACKWARD, POST_PRE_DELAYED
from ..calls.table import FORWARD_RESULTS, GRADIENTS, MIXING, PARAMETERS
from ..calls.workloads import Trained
from .backward_autograd import coefficients_of, record, write
from .baselines import COMPILED, EAGER, TOLERANCE, Form

TAKEN = (*MIXING, *PARAMETERS)
UPSTREAM = tuple(f"g_{name}" for name in FORWARD_RESULTS)


def pre_of(spec: MHCSpec, given: Tensor | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """pre as a function of x and PARAMETERS, in plain torch; aggregated with `given`, which adds h_pre."""

    def forward(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        dots, squares = plain_torch.project(x, phi)
        s = torch.rsqrt(squares / spec.stream_size + spec.rms_eps)
        h_pre, h_post, h_res = coefficients_of(spec)(dots, s, alpha, bias)
        if given is None:
            return plain_torch.aggregate(x, h_pre), h_post, h_res
        return plain_torch.aggregate(x, given), h_post, h_res, h_pre

    return forward


def boundary_of(spec: MHCSpec, given: Tensor | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """post and pre as a function of TAKEN."""

    def forward(
        x: Tensor, layer_output: Tensor, h_post: Tensor, h_res: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor
    ) -> tuple[Tensor, ...]:
        x_next = plain_torch.post(x, layer_output, h_post, h_res)
        return x_next, *pre_of(spec, given)(x_next, phi, alpha, bias)

    return forward


def select(tensors: dict[str, Any], names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Select tensors by name, in the order of the names."""
    return tuple(tensors[name] for name in names)


def post_pre(spec: MHCSpec, h_pre: Tensor | None = None, **tensors: Tensor) -> None:
    """The formulas as written; with h_pre the delayed form."""
    names = FORWARD_RESULTS if h_pre is None else (*FORWARD_RESULTS, "h_pre_next")
    write(select(tensors, names), boundary_of(spec, h_pre)(*select(tensors, TAKEN)))


def backward_recorded(spec: MHCSpec, **tensors: Tensor) -> Callable[[], None]:
    """Record the formulas as written; return what runs their backward."""
    upstream, outputs = select(tensors, UPSTREAM), select(tensors, GRADIENTS)
    return record(boundary_of(spec), select(tensors, TAKEN), upstream, outputs)


def backward_vjp(spec: MHCSpec, x_next: Tensor, **tensors: Tensor) -> None:
    """Traced with the forward, of which the compiler keeps what the gradients need.

    It reads x_next as the forward left it: recomputed within the graph, it would not be rounded, and g_phi 2e-3 off.
    """
    _, through_pre, *_ = torch.func.vjp(pre_of(spec), x_next, *select(tensors, PARAMETERS))
    g_next, *g_parameters = through_pre(select(tensors, UPSTREAM[1:]))
    _, through_post, *_ = torch.func.vjp(plain_torch.post, *select(tensors, MIXING))
    g_mixing = through_post(tensors["g_x_next"] + g_next)
    write(select(tensors, GRADIENTS), (*g_mixing, *g_parameters))


def step_recorded(spec: MHCSpec, **tensors: Tensor) -> Callable[[], None]:
    """Forward and backward, recorded at every call."""
    trained = Trained(boundary_of(spec), {name: tensors[name] for name in TAKEN}, select(tensors, UPSTREAM))
    outputs = select(tensors, (*FORWARD_RESULTS, *GRADIENTS))

    def run() -> None:
        trained.run()
        write(outputs, trained.latest)

    return run


def step_compiled(spec: MHCSpec, **tensors: Tensor) -> Callable[[], None]:
    """Forward and backward in a graph each, as torch.compile has them of a module."""
    taken, upstream = ({name: tensors[name] for name in names} for names in (TAKEN, UPSTREAM))
    results, gradients = ({name: tensors[name] for name in names} for names in (FORWARD_RESULTS, GRADIENTS))
    forward, backward = (torch.compile(each, fullgraph=True, dynamic=False) for each in (post_pre, backward_vjp))

    def run() -> None:
        forward(spec=spec, **taken, **results)
        backward(spec=spec, x_next=results["x_next"], **taken, **upstream, **gradients)

    return run


def tolerances(kernel: str, dtype: torch.dtype) -> dict[str, float]:
    """Return the relative difference allowed from the fused kernels' outputs beyond `TOLERANCE`, by output.

    Forward, a few elements of x_next are rounded the other way, 5 of 100,000 by an ulp or 2e-5 of it in bfloat16 (of
    far fewer elements than a benchmark's a single one may be more), and the mappings follow by as much: δ is half of
    TOLERANCE, which still tells phi in TF32. A layer_input that was off by δ before it is rounded is off by √(δ·u)
    afterwards. Backward, torch and the separate kernels round the gradient of x_next up to three times on its way
    (through phi, the aggregation's share, the sum), each by u/√3 at most: u in all, where the kernels keep float32.
    """
    unit, delta = UNIT_ROUNDOFF[dtype_name(dtype)], TOLERANCE[dtype] / 2
    mappings = dict.fromkeys(("h_pre_next", "h_post_next", "h_res_next"), delta)
    forward = {**mappings, "layer_input": (delta * unit) ** 0.5}
    of_stream = dict.fromkeys((f"g_{name}" for name in MIXING), unit)
    through_mappings = dict.fromkeys((f"g_{name}" for name in PARAMETERS), delta)
    return {
        POST_PRE: forward,
        POST_PRE_DELAYED: forward,
        POST_PRE_BACKWARD: {**of_stream, **through_mappings},
        BOUNDARY_STEP: {**forward, **of_stream, **through_mappings},
    }.get(kernel, {})


# On a CPU eager torch runs the whole several times slower than its fastest parts, and would be most of the measurement.
AS_WRITTEN = (
    Form("as written", post_pre, modes=(EAGER,), devices=("cuda",)),
    Form("as written", post_pre, modes=(COMPILED,)),
)
FORMS: dict[str, tuple[Form, ...]] = {
    POST_PRE: AS_WRITTEN,
    POST_PRE_DELAYED: AS_WRITTEN,
    POST_PRE_BACKWARD: (
        Form("autograd", backward_recorded, modes=(EAGER,), devices=("cuda",), binds=True),
        Form("autograd", backward_vjp, modes=(COMPILED,)),
    ),
    BOUNDARY_STEP: (
        Form("autograd", step_recorded, modes=(EAGER,), devices=("cuda",), binds=True),
        Form("autograd", step_compiled, modes=(COMPILED,), binds=True),
    ),
}
