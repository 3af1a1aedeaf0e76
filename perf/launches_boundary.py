"""The kernels that are fused across a sublayer boundary, as `launches` has the others.

`launch_boundary` and `launch_boundary_backward` decide the same from tensors.
"""

from __future__ import annotations

from dataclasses import replace

from ..kernels import boundary_plans, plans
from .calls import Call, Launch


def post_project(call: Call, rows: int, aggregated: bool = False) -> Launch:
    """post, and the projection on a phi of so many rows; `aggregated` with the next layer's input."""
    shape = call.case.shape
    plan = boundary_plans.post_project_plan(
        rows, shape.num_streams, shape.hidden_size, shape.dtype, call.target, aggregated
    )
    schedule = boundary_plans.boundary_schedule(shape.num_tokens, shape.hidden_size, plan, call.parallel_blocks)
    parameters = {**call.stream, "layer_dtype": shape.dtype, "plan": plan, "aggregated": aggregated}
    shares = {"num_slabs": schedule.slabs, "chunks_per_split": schedule.chunks_per_split}
    return Launch("post_project", parameters, {**call.tokens, **shares})


def pre_mappings(call: Call) -> Launch:
    """pre, and beside it h_post and h_res."""
    shape, spec = call.case.shape, call.spec
    plan = boundary_plans.pre_mappings_plan(shape.num_streams, shape.hidden_size, shape.itemsize, call.target)
    constants = {"iters": spec.sinkhorn_iters, "sinkhorn_eps": spec.sinkhorn_eps, "post_scale": spec.post_scale}
    return Launch("pre_mappings", {**call.stream, "plan": plan, **constants, "chained": False}, call.tokens)


def mixing_backward(call: Call, mappings: Launch, delayed: bool, head: bool = False) -> tuple[Launch, Launch]:
    """The gradients of what was mixed and of phi, then every kind of partial sum, those of `mappings` too.

    phi is a sublayer's, or a `head`'s.
    """
    from ..launch_backward import ELEMENTS

    shape, spec = call.case.shape, call.spec
    rows, groups = (spec.num_streams, 1) if head else (spec.num_coefficients, 3)
    plan = boundary_plans.boundary_backward_plan(rows, shape.num_streams, shape.hidden_size, shape.dtype, call.target)
    tiles_per_range = boundary_plans.tiles_per_range(shape.num_tokens, plan)
    num_ranges = -(-shape.num_tokens // (tiles_per_range * plan.tokens))
    given = {"outside": True, "aggregated": True, "delayed": delayed}
    parameters = {**call.stream, "layer_dtype": shape.dtype, "plan": plan, **given}
    ranges = {**call.tokens, "num_ranges": num_ranges}
    backward = Launch("boundary_backward", parameters, {**ranges, "tiles_per_range": tiles_per_range})
    num_blocks = mappings.sizes["num_partials"]
    lanes = {"lanes": plans.partial_lanes(num_blocks), "block": ELEMENTS}
    sizes = {
        **ranges,
        "num_weights": rows * spec.stream_size,
        "num_channel_blocks": -(-shape.hidden_size // plan.channels),
        "num_blocks": num_blocks,
        "num_parameters": groups + rows,
    }
    sums = {"num_streams": spec.num_streams, "delayed": delayed, "ranges": num_ranges > 1, **lanes}
    return backward, Launch("boundary_sums", sums, sizes)


def expand_project(call: Call) -> Launch:
    """expand, and the projection of the one stream that all are."""
    shape, rows = call.case.shape, call.spec.num_coefficients
    plan = boundary_plans.expand_project_plan(rows, shape.num_streams, shape.hidden_size, shape.dtype, call.target)
    schedule = boundary_plans.boundary_schedule(shape.num_tokens, shape.hidden_size, plan, call.parallel_blocks)
    shares = {"num_slabs": schedule.slabs, "chunks_per_split": schedule.chunks_per_split}
    return Launch("expand_project", {**call.stream, "plan": plan}, {**call.tokens, **shares})


def of_one_stream(launches: tuple[Launch, ...]) -> tuple[Launch, ...]:
    """The same on the one stream that all are before the first sublayer."""
    return tuple(replace(one, parameters={**one.parameters, "num_streams": 1}) for one in launches)


def total_pre(call: Call) -> Launch:
    """h_pre [T, n] -> its sum over streams [T, 1], by the kernel that adds up streams."""
    return _small("expand_backward", call, 1, call.case.shape.num_tokens)


def total_phi(call: Call) -> Launch:
    """phi [M, n, C] -> its sum over streams [M, C], by the same kernel."""
    return _small("expand_backward", call, call.spec.hidden_size, call.spec.num_coefficients)


def expand_phi(call: Call) -> Launch:
    """g_phi of one stream [M, C] -> that of all [M, n, C]."""
    return _small("expand", call, call.spec.hidden_size, call.spec.num_coefficients)


def _small(family: str, call: Call, hidden_size: int, num_rows: int) -> Launch:
    """A kernel of streams on rows of float32 that are none."""
    tile = plans.channel_tile(hidden_size, plans.BYTES["float32"], call.target, copies=family == "expand")
    sizes = {"num_streams": call.spec.num_streams, "hidden_size": hidden_size}
    return Launch(family, {**sizes, "dtype": "float32", "tile": tile}, {"num_tokens": num_rows}, of_streams=False)
