"""Run a kernel under another plan than the heuristic's: its arguments, and what the plan changes, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...kernels.boundary_plans import BoundaryBackwardPlan
from .tune_plans import CHUNKS

if TYPE_CHECKING:
    from ...compiler.recording import Recorded

ONE_A_BLOCK = ("coefficients_backward", "head_coefficients_backward", "gates_backward")  # a row of partial sums


def outputs_of(one: Recorded) -> list[str]:
    """Return the buffers that a kernel writes."""
    from ..traffic.audit import audit_function

    return [name for name, moved in audit_function(one.function, one.sizes).items() if moved.written.accessed]


def adapt_arguments(one: Recorded, parameters: Mapping[str, Any], written: Sequence[str]) -> dict[str, Any]:
    """Return the arguments for other parameters: outputs of their own, full of NaN, and what depends on the plan."""
    import torch

    found = dict(one.arguments)
    for name in written:
        found[name] = torch.full_like(found[name], float("nan"))
    if CHUNKS in parameters:
        found[CHUNKS] = parameters[CHUNKS]
    plan = parameters.get("plan")
    if isinstance(plan, BoundaryBackwardPlan):
        tokens = one.arguments["tiles_per_range"] * one.parameters["plan"].tokens
        if tokens % plan.tokens:
            raise ValueError(f"{tokens} tokens share a partial sum, which {plan.tokens} do not divide")
        found["tiles_per_range"] = tokens // plan.tokens
        shape = (-(-parameters["hidden_size"] // plan.channels), *found["partial_mixing"].shape[1:])
        found["partial_mixing"] = found["partial_mixing"].new_full(shape, float("nan"))
    elif one.family in ONE_A_BLOCK:
        num_tokens, partial_sums = found["projected"].shape[1], found["partial"]
        shape = (-(-num_tokens // parameters["block"]), partial_sums.shape[1])
        found["partial"] = partial_sums.new_full(shape, float("nan"))
    return found


def changes(parameters: Mapping[str, Any], heuristic: Mapping[str, Any]) -> str:
    """The fields in which a plan differs from the heuristic's, all of the heuristic's own."""
    whole, other = flat(parameters), flat(heuristic)
    differing = {name: value for name, value in whole.items() if value != other.get(name)}
    shown = differing or {name: value for name, value in whole.items() if name in tuned_fields(other)}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def flat(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with the fields of a plan, and of a plan within it, beside the others."""
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        found |= flat(vars(value)) if hasattr(value, "__dataclass_fields__") else {name: value}
    return found


def tuned_fields(fields: Mapping[str, Any]) -> list[str]:
    """Return the names of a plan's fields that describe the heuristic's choice."""
    names = ("channels", "tokens", "threads", "stages", "rows", "blocks_per_sm", "lanes", "width", "kept", "block")
    return [name for name in names if name in fields]
