"""The kernels that are fused across a sublayer boundary, as `launches` has the others.

`launch_boundary` and `launch_boundary_backward` decide the same from tensors.
"""

from __future__ import annotations

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


def mixing_backward(call: Call, mappings: Launch, delayed: bool) -> tuple[Launch, Launch]:
    """The gradients of what was mixed and of phi, then every kind of partial sum, those of `mappings` too."""
    from ..launch_backward import ELEMENTS

    shape, spec, rows = call.case.shape, call.spec, call.spec.num_coefficients
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
        "num_parameters": 3 + rows,
    }
    sums = {"num_streams": spec.num_streams, "delayed": delayed, "ranges": num_ranges > 1, **lanes}
    return backward, Launch("boundary_sums", sums, sizes)
