"""Every call ready to run on a device: what audits, builds, profilers, sanitizers and the tuner launch.

The inputs are those of the correctness check. Forward results that a backward needs are computed once, here. On the
"meta" device, within `recording`, nothing is computed: `launches` notes what would be launched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ... import launch
from ...checking import inputs as checking
from ...checking.inputs import Gradients, Inputs
from ...checking.norm import rms_norm_weight
from .cases import AGGREGATED, REPLAYED, Shape

Run = Callable[[], object]
EPS = 1e-6  # of the layer's norm


def every_call(shape: Shape, device: torch.device) -> dict[str, Run]:
    """Every name of `cases.CALLS` at these sizes. Compiles and runs what the inputs of a backward need."""
    dtype = getattr(torch, shape.dtype)
    case = checking.Case(shape.num_streams, shape.hidden_size, dtype, shape.num_tokens)
    inputs, gradients, spec, n = Inputs.of(case, device), Gradients.of(case, device), case.spec, shape.num_streams
    x, phi, alpha, bias = inputs.x, inputs.phi, inputs.alpha, inputs.bias
    parameters, mixed = (phi, alpha, bias), (x, inputs.layer_output, inputs.h_post, inputs.h_res)
    head = (phi[:n].contiguous(), alpha[:1].clone(), bias[:n].clone())
    weight = rms_norm_weight(case, device)
    written = [launch.Written(*mixed[1:])] * (REPLAYED - 1)
    iters, eps = spec.sinkhorn_iters, spec.sinkhorn_eps
    of_mappings = (gradients.g_h_post, gradients.g_h_res)
    g_all = (gradients.g_h_pre, *of_mappings)
    upstream = (gradients.g_x, gradients.g_h, *of_mappings)

    plan, head_plan = launch.projection_plan(x, phi.shape[0]), launch.projection_plan(x, n)
    partial, head_partial = launch.project(x, phi, plan), launch.project(x, head[0], head_plan)
    *_, projected = launch.coefficients(partial, alpha, bias, spec, plan)
    _, head_projected = launch.head_coefficients(head_partial, *head[1:], spec, head_plan)
    after = launch.post_pre(*mixed, *parameters, spec)
    delayed = launch.post_pre(*mixed, *parameters, spec, h_pre=inputs.h_pre)
    last = launch.post_head(*mixed, *head, spec)
    first = launch.expand_pre(inputs.h, *parameters, spec)

    def post_pre_backward(forward: launch.Boundary, h_pre: torch.Tensor, **delayed: Any) -> object:
        saved = (forward.x_next, h_pre, forward.projected)
        return launch.post_pre_backward(*upstream, *mixed, *parameters, *saved, spec, **delayed)

    def post_head_backward() -> object:
        saved = (last.x_next, last.h_pre, last.projected)
        return launch.post_head_backward(gradients.g_x, gradients.g_h, *mixed, *head, *saved, spec)

    aggregated: dict[str, Any] = {"h_pre": inputs.h_pre, "g_layer_input": gradients.g_h}
    return {
        "expand": lambda: launch.expand(inputs.h, n),
        "project": lambda: launch.project(x, phi, plan),
        "coefficients": lambda: launch.coefficients(partial, alpha, bias, spec, plan),
        "head_coefficients": lambda: launch.head_coefficients(head_partial, *head[1:], spec, head_plan),
        "sinkhorn": lambda: launch.sinkhorn(inputs.logits, iters, eps),
        "aggregate": lambda: launch.aggregate(x, inputs.h_pre),
        "post": lambda: launch.post(*mixed),
        "replay": lambda: launch.replay(x, written, dict.fromkeys(range(REPLAYED), inputs.h_pre)),
        "aggregate_norm": lambda: launch.aggregate_norm(x, inputs.h_pre, weight, EPS),
        "expand_backward": lambda: launch.expand_backward(gradients.g_x),
        "project_backward": lambda: launch.project_backward(gradients.g_projected, x, phi),
        AGGREGATED: lambda: launch.project_backward(gradients.g_projected, x, phi, **aggregated),
        "coefficients_backward": lambda: launch.coefficients_backward(*g_all, projected, alpha, bias, spec),
        "head_coefficients_backward": lambda: launch.head_coefficients_backward(
            gradients.g_h_pre, head_projected, *head[1:], spec
        ),
        "sinkhorn_backward": lambda: launch.sinkhorn_backward(gradients.g_h_res, inputs.logits, iters, eps),
        "aggregate_backward": lambda: launch.aggregate_backward(gradients.g_h, x),
        "aggregate_gradients": lambda: launch.aggregate_gradients(gradients.g_h, x, inputs.h_pre),
        "aggregate_norm_backward": lambda: launch.aggregate_norm_backward(gradients.g_h, x, inputs.h_pre, weight, EPS),
        "post_backward": lambda: launch.post_backward(gradients.g_x, *mixed),
        "post_pre": lambda: launch.post_pre(*mixed, *parameters, spec),
        "post_pre_delayed": lambda: launch.post_pre(*mixed, *parameters, spec, h_pre=inputs.h_pre),
        "post_head": lambda: launch.post_head(*mixed, *head, spec),
        "post_pre_backward": lambda: post_pre_backward(after, after.h_pre),
        "post_pre_delayed_backward": lambda: post_pre_backward(
            delayed, inputs.h_pre, is_delayed=True, g_h_pre_next=gradients.g_h_pre
        ),
        "post_head_backward": post_head_backward,
        "expand_pre": lambda: launch.expand_pre(inputs.h, *parameters, spec),
        "expand_pre_backward": lambda: launch.expand_pre_backward(
            *upstream, inputs.h, *parameters, first.h_pre, first.projected, spec
        ),
    }
