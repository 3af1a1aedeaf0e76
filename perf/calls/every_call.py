"""Every call of the table ready to run on a device: what audits, builds, profilers, sanitizers and the tuner launch.

The inputs are those of the correctness check. Forward results that a backward needs are computed once, when first asked
for. On the "meta" device, within `recording`, nothing is computed: `launches` notes what would be launched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch

from ... import launch
from ...checking import inputs as checking
from ...checking.families.aggregate_norm import rms_norm_weight
from ...checking.inputs import Gradients, Inputs
from ...kernels.projection_plans import ProjectionPlan
from ...spec import MHCSpec
from .cases import Shape
from .table import CALLS, REPLAYED

Run = Callable[[], Any]


@dataclass(frozen=True)
class Given:
    """All that calls take at one shape, by name; see also the fields of `Inputs` and `Gradients`."""

    case: checking.Case
    inputs: Inputs
    gradients: Gradients
    eps: float = 1e-6  # of the layer's norm
    is_delayed: bool = True  # of a backward that asks

    @classmethod
    def of(cls, shape: Shape, device: torch.device) -> Given:
        """Draw them."""
        case = checking.Case(shape.num_streams, shape.hidden_size, getattr(torch, shape.dtype), shape.num_tokens)
        return cls.of_case(case, device)

    @classmethod
    def of_case(cls, case: checking.Case, device: torch.device) -> Given:
        """Draw them for a case of the checks, whose logits and layer may be others."""
        return cls(case, Inputs.of(case, device), Gradients.of(case, device))

    def __getattr__(self, name: str) -> Any:
        """Return a tensor of the inputs or of the gradients."""
        return getattr(self.gradients if name.startswith("g_") else self.inputs, name)

    def arguments(self, name: str, **replaced: Any) -> dict[str, Any]:
        """Return a call's arguments by name, those in `replaced` taken from there and not computed."""
        sources = CALLS[name].sources
        return {p: replaced[p] if p in replaced else attrgetter(source)(self) for p, source in sources.items()}

    def run(self, name: str) -> Run:
        """Return a call, bound to its arguments."""
        arguments = self.arguments(name)
        return lambda: function(name)(**arguments)

    @property
    def spec(self) -> MHCSpec:
        return self.case.spec

    @cached_property
    def weight(self) -> torch.Tensor:
        """Weight of the layer's RMSNorm, [C]."""
        return rms_norm_weight(self.case, self.inputs.x.device)

    @cached_property
    def plan(self) -> ProjectionPlan:
        return launch.projection_plan(self.inputs.x, self.spec.num_coefficients)

    @cached_property
    def partial(self) -> torch.Tensor:
        """The partial sums that `project` leaves."""
        return self.run("project")()

    @cached_property
    def projected(self) -> torch.Tensor:
        """Projection kept for the backward, [M + 1, T]: s·(x·phi), and s."""
        return self.run("coefficients")()[3]

    @cached_property
    def head_phi(self) -> torch.Tensor:
        return self.inputs.phi[: self.case.num_streams].contiguous()

    @cached_property
    def head_alpha(self) -> torch.Tensor:
        return self.inputs.alpha[:1].clone()

    @cached_property
    def head_bias(self) -> torch.Tensor:
        return self.inputs.bias[: self.case.num_streams].clone()

    @cached_property
    def head_plan(self) -> ProjectionPlan:
        return launch.projection_plan(self.inputs.x, self.case.num_streams)

    @cached_property
    def head_partial(self) -> torch.Tensor:
        return launch.project(self.inputs.x, self.head_phi, self.head_plan)

    @cached_property
    def head_projected(self) -> torch.Tensor:
        return self.run("head_coefficients")()[1]

    @cached_property
    def gate_phi(self) -> torch.Tensor:
        return self.inputs.phi[: 2 * self.case.num_streams].contiguous()

    @cached_property
    def gate_alpha(self) -> torch.Tensor:
        return self.inputs.alpha[:2].clone()

    @cached_property
    def gate_bias(self) -> torch.Tensor:
        return self.inputs.bias[: 2 * self.case.num_streams].clone()

    @cached_property
    def gate_plan(self) -> ProjectionPlan:
        return launch.projection_plan(self.inputs.x, 2 * self.case.num_streams)

    @cached_property
    def gate_partial(self) -> torch.Tensor:
        return launch.project(self.inputs.x, self.gate_phi, self.gate_plan)

    @cached_property
    def gate_projected(self) -> torch.Tensor:
        return self.run("gates")()[2]

    @cached_property
    def without_res(self) -> launch.IdentityBoundary:
        return self.run("identity_post_pre")()

    @cached_property
    def written(self) -> list[launch.Written]:
        """Layer outputs and mappings of a replayed block's sublayers, one `Written` each."""
        return [launch.Written(self.inputs.layer_output, self.inputs.h_post, self.inputs.h_res)] * (REPLAYED - 1)

    @cached_property
    def asked(self) -> dict[int, torch.Tensor]:
        """The h_pre of a replayed block's layer inputs."""
        return dict.fromkeys(range(REPLAYED), self.inputs.h_pre)

    @cached_property
    def after(self) -> launch.Boundary:
        return self.run("post_pre")()

    @cached_property
    def delayed(self) -> launch.Boundary:
        return self.run("post_pre_delayed")()

    @cached_property
    def last(self) -> launch.LastBoundary:
        return self.run("post_head")()

    @cached_property
    def first(self) -> launch.FirstBoundary:
        return self.run("expand_pre")()


def function(name: str) -> Callable[..., Any]:
    """Return the function of `launch` behind a call."""
    return getattr(launch, CALLS[name].launch or name)


def every_call(shape: Shape, device: torch.device) -> dict[str, Run]:
    """Return every name of CALLS at these sizes. Compiles and runs what the inputs of a backward need."""
    given = Given.of(shape, device)
    return {name: given.run(name) for name in CALLS}
