"""What a call launches: kernel families, what they are compiled with, and their run-time sizes.

The `launch` modules decide it from tensors on a device; this is the same decision from sizes and a target alone, for
tensors that start on 16 bytes. A test holds the two together. Imports no torch until `launches` is called. `calls` has
what a builder takes and gives, `launches_boundary` the kernels that are fused across a boundary, `launches_norm` those
that normalise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..kernels import boundary_plans, plans
from . import launches_boundary as boundary
from . import launches_norm as norm
from .calls import Call, Launch
from .cases import BOUNDARY_KERNELS, REPLAYED, Case

AGGREGATED = "project_backward_aggregated"
BOUNDARY = (
    *("post_pre", "post_pre_delayed", "post_head", "expand_pre"),
    *("post_pre_backward", "post_pre_delayed_backward", "post_head_backward", "expand_pre_backward"),
)
# `bench` has no case for them.
UNTIMED = (
    *("head_coefficients", "head_coefficients_backward", AGGREGATED, "replay"),
    *(kernel for kernel in BOUNDARY if kernel not in BOUNDARY_KERNELS),
    *norm.NORM,
)

STREAMS = {
    "expand": ("h", "x"),
    "project": ("x",),
    "pre": ("x", "layer_input"),
    "post": ("x", "layer_output", "x_next"),
    "pre_mappings": ("x", "layer_input"),
    "pre_norm": ("x", "layer_input"),
    "expand_backward": ("g_x", "g_h"),
    "project_backward": ("x", "g_layer_input", "g_x"),
    "pre_backward": ("g_layer_input", "x"),
    "pre_norm_backward": ("g_layer_input", "x", "g_u"),
    "post_backward": ("g_x_next", "x", "layer_output", "g_x", "g_layer_output"),
    "expand_project": ("h", "x"),
    "post_project": ("x", "layer_output", "x_next", "layer_input"),
    "replay": tuple(
        f"{name}_{k}" for k in range(plans.MAX_SUBLAYERS + 1) for name in ("x", "layer_output", "layer_input")
    ),
    "boundary_backward": ("g_x_next", "g_layer_input", "x", "layer_output", "g_x", "g_layer_output"),
}
"""The buffers of each family that are as wide as the stream or a layer; all others are small."""


def launches(case: Case, target: str, parallel_blocks: int) -> tuple[Launch, ...]:
    """The kernels of one call, in order.

    Args:
        case: a kernel of `cases`, or of UNTIMED: AGGREGATED is the projection's backward as pre's backward calls it,
            where g_x also gets h_pre · g_layer_input.
        target: "cuda" or "cpu".
        parallel_blocks: how many blocks of a projection the device runs at a time.
    """
    return BUILDERS[case.kernel](Call(case, target, parallel_blocks))


def expand(call: Call) -> tuple[Launch, ...]:
    """h -> x."""
    return (Launch("expand", {**call.stream, **call.channels(copies=True)}, call.tokens),)


def project(call: Call) -> tuple[Launch, ...]:
    """Split phi where the plan says so, then project."""
    rows = call.spec.num_coefficients
    plan, (chunks_per_split, num_slabs) = call.plan(rows), call.split(rows)
    sizes = {**call.tokens, "num_slabs": num_slabs, "chunks_per_split": chunks_per_split}
    split = Launch("split_phi", {**call.sizes, "plan": plan}, {})
    return (*([split] if plan.split else []), Launch("project", {**call.stream, "plan": plan}, sizes))


def coefficients(call: Call, num_slabs: int | None = None, deferred: bool = False) -> tuple[Launch, ...]:
    """Partial sums -> the mappings; `num_slabs` of them where not `project`'s, all or `deferred`."""
    spec, rows = call.spec, call.spec.num_coefficients
    constants = {"iters": spec.sinkhorn_iters, "sinkhorn_eps": spec.sinkhorn_eps, "post_scale": spec.post_scale}
    return (
        _coefficients(call, "coefficients", rows, {**constants, "deferred": deferred, "chained": False}, num_slabs),
    )


def head_coefficients(call: Call) -> tuple[Launch, ...]:
    """Partial sums of a phi of n rows -> h_pre."""
    return (_coefficients(call, "head_coefficients", call.spec.num_streams, {}),)


def _coefficients(
    call: Call, family: str, rows: int, constants: dict[str, Any], num_slabs: int | None = None
) -> Launch:
    block = plans.tokens_per_block(call.target)
    constants |= {"pre_eps": call.spec.pre_eps, "rms_eps": call.spec.rms_eps, "block": block}
    sizes = {**call.tokens, "num_slabs": num_slabs or call.split(rows)[1]}
    return Launch(family, {**call.sizes, "plan": call.plan(rows), **constants}, sizes)


def sinkhorn(call: Call) -> tuple[Launch, ...]:
    """Logits -> h_res."""
    return (_sinkhorn(call, "sinkhorn", plans.tokens_per_block(call.target)),)


def sinkhorn_backward(call: Call) -> tuple[Launch, ...]:
    """g_h_res, logits -> g_logits."""
    return (_sinkhorn(call, "sinkhorn_backward", _sinkhorn_tokens(call)),)


def _sinkhorn(call: Call, family: str, block: int) -> Launch:
    spec = call.spec
    parameters = {"num_streams": spec.num_streams, "iters": spec.sinkhorn_iters, "eps": spec.sinkhorn_eps}
    return Launch(family, {**parameters, "block": block}, call.tokens)


def _sinkhorn_tokens(call: Call) -> int:
    return plans.sinkhorn_backward_tokens(call.spec.num_streams, call.spec.sinkhorn_iters, call.target)


def pre(call: Call) -> tuple[Launch, ...]:
    """x, h_pre -> layer_input."""
    return (Launch("pre", {**call.stream, **call.channels()}, call.tokens),)


def post(call: Call) -> tuple[Launch, ...]:
    """x, layer_output, h_post, h_res -> x_next."""
    parameters = {**call.stream, "layer_dtype": call.case.shape.dtype, **call.channels()}
    return (Launch("post", parameters, call.tokens),)


def replay(call: Call) -> tuple[Launch, ...]:
    """A block's start, the outputs of all layers but the last -> the block's other streams, every layer's input."""
    block = {"sublayers": REPLAYED - 1, "inputs": tuple(range(REPLAYED))}
    parameters = {**call.stream, "layer_dtype": call.case.shape.dtype, **block, **call.channels()}
    return (Launch("replay", parameters, call.tokens),)


def expand_backward(call: Call) -> tuple[Launch, ...]:
    """g_x -> g_h."""
    return (Launch("expand_backward", {**call.stream, **call.channels()}, call.tokens),)


def pre_backward(call: Call) -> tuple[Launch, ...]:
    """g_layer_input, x -> g_h_pre."""
    return (Launch("pre_backward", {**call.stream, **call.reduction()}, call.tokens),)


def pre_norm_backward(call: Call) -> tuple[Launch, ...]:
    """Every gradient of pre_norm."""
    launch = norm.pre_norm_backward(call)
    return launch, _sum_partials(launch.sizes["num_partials"], call.spec.hidden_size)


def post_backward(call: Call) -> tuple[Launch, ...]:
    """Every gradient of post."""
    wanted = {"stream": True, "layer": True, "mixing": True}
    parameters = {**call.stream, "layer_dtype": call.case.shape.dtype, **call.reduction(), **wanted}
    return (Launch("post_backward", parameters, call.tokens),)


def coefficients_backward(call: Call) -> tuple[Launch, ...]:
    """The gradients of the projection, then of alpha and bias from a row of partial sums a block."""
    spec, block = call.spec, _sinkhorn_tokens(call)
    constants = {"iters": spec.sinkhorn_iters, "sinkhorn_eps": spec.sinkhorn_eps, "post_scale": spec.post_scale}
    given = {"pre_given": True, "post_given": True, "res_given": True}
    parameters = {**call.sizes, **constants, "block": block, **given}
    return _token_backward(call, "coefficients_backward", parameters, 3 + spec.num_coefficients)


def head_coefficients_backward(call: Call) -> tuple[Launch, ...]:
    """The same for the head's n rows."""
    parameters = {**call.sizes, "block": plans.tokens_per_block(call.target)}
    return _token_backward(call, "head_coefficients_backward", parameters, 1 + call.spec.num_streams)


def _token_backward(call: Call, family: str, parameters: dict[str, Any], elements: int) -> tuple[Launch, ...]:
    num_partials = -(-call.case.shape.num_tokens // parameters["block"])
    launch = Launch(family, parameters, {**call.tokens, "num_partials": num_partials})
    return launch, _sum_partials(num_partials, elements)


def project_backward(
    call: Call, aggregated: bool = False, rows: int | None = None, num_streams: int | None = None
) -> tuple[Launch, ...]:
    """g_x, `aggregated` with what the aggregation adds, and g_phi, whose partial sums are added up if several.

    `rows` and `num_streams` where they are not those of a sublayer.
    """
    rows, num_tokens = rows or call.spec.num_coefficients, call.case.shape.num_tokens
    num_streams = num_streams or call.spec.num_streams
    plan = plans.projection_backward_plan(rows, call.spec.hidden_size, call.case.shape.dtype, call.target)
    tokens_per_split = plans.tokens_per_split(num_tokens, plan)
    num_splits = -(-num_tokens // tokens_per_split)
    wanted = {"stream": True, "weights": True, "aggregated": aggregated}
    sizes = {**call.tokens, "num_splits": num_splits, "tokens_per_split": tokens_per_split}
    launch = Launch("project_backward", {**call.stream, "num_streams": num_streams, "plan": plan, **wanted}, sizes)
    weights = rows * num_streams * call.spec.hidden_size
    return (launch,) if num_splits == 1 else (launch, _sum_partials(num_splits, weights))


def post_pre(call: Call) -> tuple[Launch, ...]:
    """post, and pre of the next sublayer."""
    project = boundary.post_project(call, call.spec.num_coefficients)
    num_slabs, deferred = project.sizes["num_slabs"], boundary_plans.defers_mappings(call.target)
    aggregate = (boundary.pre_mappings(call),) if deferred else pre(call)
    return (project, *coefficients(call, num_slabs, deferred), *aggregate)


def post_pre_delayed(call: Call) -> tuple[Launch, ...]:
    """The same with an h_pre that is there already."""
    project = boundary.post_project(call, call.spec.num_coefficients, aggregated=True)
    return (project, *coefficients(call, project.sizes["num_slabs"]))


def post_head(call: Call) -> tuple[Launch, ...]:
    """post of the last sublayer, and the model's output."""
    project = boundary.post_project(call, call.spec.num_streams)
    head = _coefficients(call, "head_coefficients", call.spec.num_streams, {}, project.sizes["num_slabs"])
    return (project, head, *pre(call))


def post_pre_backward(call: Call) -> tuple[Launch, ...]:
    """Every gradient of post_pre."""
    if not boundary_plans.backward_is_fused(call.spec.num_streams, call.target):
        return (*pre_backward(call), *_separate_backward(call))
    mappings = coefficients_backward(call)[0]
    return (*pre_backward(call), mappings, *boundary.mixing_backward(call, mappings, delayed=False))


def post_pre_delayed_backward(call: Call) -> tuple[Launch, ...]:
    """Every gradient of post_pre_delayed."""
    if not boundary_plans.backward_is_fused(call.spec.num_streams, call.target):
        return (*_separate_backward(call), *pre_backward(call))
    mappings = coefficients_backward(call)[0]
    return (mappings, *boundary.mixing_backward(call, mappings, delayed=True))


def post_head_backward(call: Call) -> tuple[Launch, ...]:
    """Every gradient of post_head."""
    mappings, *sums = head_coefficients_backward(call)
    if not boundary_plans.backward_is_fused(call.spec.num_streams, call.target):
        through = project_backward(call, aggregated=True, rows=call.spec.num_streams)
        return (*pre_backward(call), mappings, *sums, *through, *post_backward(call))
    return (*pre_backward(call), mappings, *boundary.mixing_backward(call, mappings, delayed=False, head=True))


def expand_pre(call: Call) -> tuple[Launch, ...]:
    """expand, and pre of the first sublayer."""
    [aggregate] = boundary.of_one_stream(pre(call))
    return (boundary.expand_project(call), *coefficients(call), boundary.total_pre(call), aggregate)


def expand_pre_backward(call: Call) -> tuple[Launch, ...]:
    """Every gradient of expand_pre; the sum of both gradients of h is torch's."""
    sums, mappings = boundary.of_one_stream(pre_backward(call)), coefficients_backward(call)
    gradients = project_backward(call, aggregated=True, num_streams=1)
    start = (*sums, boundary.total_pre(call), *mappings, boundary.total_phi(call))
    return (*start, *gradients, *expand_backward(call), boundary.expand_phi(call))


def _separate_backward(call: Call) -> tuple[Launch, ...]:
    return (*coefficients_backward(call), *project_backward(call, aggregated=True), *post_backward(call))


def _sum_partials(num_partials: int, num_elements: int) -> Launch:
    from ..launch_backward import ELEMENTS

    parameters = {"lanes": plans.partial_lanes(num_partials), "block": ELEMENTS}
    return Launch("sum_partials", parameters, {"num_partials": num_partials, "num_elements": num_elements})


BUILDERS: dict[str, Callable[[Call], tuple[Launch, ...]]] = {
    "expand": expand,
    "project": project,
    "coefficients": coefficients,
    "head_coefficients": head_coefficients,
    "sinkhorn": sinkhorn,
    "pre": pre,
    "post": post,
    "replay": replay,
    "pre_norm": norm.pre_norm,
    "expand_backward": expand_backward,
    "project_backward": project_backward,
    AGGREGATED: partial(project_backward, aggregated=True),
    "coefficients_backward": coefficients_backward,
    "head_coefficients_backward": head_coefficients_backward,
    "sinkhorn_backward": sinkhorn_backward,
    "pre_backward": pre_backward,
    "pre_norm_backward": pre_norm_backward,
    "post_backward": post_backward,
    "post_pre": post_pre,
    "post_pre_delayed": post_pre_delayed,
    "post_head": post_head,
    "post_pre_backward": post_pre_backward,
    "post_pre_delayed_backward": post_pre_delayed_backward,
    "post_head_backward": post_head_backward,
    "expand_pre": expand_pre,
    "expand_pre_backward": expand_pre_backward,
}
