"""Launch decisions: which kernel, by which plan, into which buffers. A family a file, both directions.

    operands       alignment, views by vector width, placeholders for absent operands
    expand         expand_backward is collapse
    projection     split_phi, project, project_backward; partial_sums: sum_partials
    coefficients   of a sublayer and of the head, from a projection's partial sums
    beside         coefficients on another CUDA stream, in the delayed form
    identity       gates and post of a connection without h_res
    sinkhorn
    aggregate      alone, and with the layer's RMSNorm; mappings: with h_post and h_res beside it
    quantized      the layer's input in float8, behind its RMSNorm
    post
    post_pre       the boundary between two sublayers; post_pre_backward
    expand_pre, post_head   those of a stream's ends
    replay         a block of sublayers once more, for the backward
    workspace      counters of blocks that hand over to each other

Tensors come flat, [T, …], checked and contiguous; `operators` sees to that. Nothing here changes a result: plans are
functions of sizes and target.
"""

from .aggregate import aggregate, aggregate_backward, aggregate_gradients, aggregate_norm, aggregate_norm_backward
from .beside import coefficients_beside, coefficients_on
from .coefficients import (
    coefficients,
    coefficients_aggregate_backward,
    coefficients_backward,
    head_coefficients,
    head_coefficients_backward,
    head_mapping_backward,
    mappings_backward,
)
from .expand import expand, expand_backward
from .expand_pre import FirstBoundary, FirstGradients, expand_pre, expand_pre_backward, expand_project, total_h_pre
from .identity import (
    IdentityBoundary,
    gates,
    gates_and_aggregate,
    gates_backward,
    identity_post,
    identity_post_backward,
    identity_post_pre,
    identity_post_pre_backward,
)
from .mappings import aggregate_mappings, coefficients_and_aggregate
from .operands import aligned, alignment
from .partial_sums import sum_partials
from .post import post, post_backward
from .post_head import LastBoundary, post_head, post_head_backward
from .post_pre import Boundary, boundary_schedule, post_pre, post_pre_at_once, post_project, post_project_plan
from .post_pre_backward import BoundaryGradients, boundary_sums, mixing_backward, post_pre_backward, separate_backward
from .projection import parallel_blocks, project, project_backward, projection_plan, split_phi
from .quantized import RMSNorm, aggregate_quantized, coefficients_and_quantize, post_pre_quantized
from .replay import Written, replay, replay_parts
from .sinkhorn import sinkhorn, sinkhorn_backward, sinkhorn_sizes

__all__ = [
    "Boundary",
    "BoundaryGradients",
    "FirstBoundary",
    "FirstGradients",
    "IdentityBoundary",
    "LastBoundary",
    "RMSNorm",
    "Written",
    "aggregate",
    "aggregate_backward",
    "aggregate_gradients",
    "aggregate_mappings",
    "aggregate_norm",
    "aggregate_norm_backward",
    "aggregate_quantized",
    "aligned",
    "alignment",
    "boundary_schedule",
    "boundary_sums",
    "coefficients",
    "coefficients_aggregate_backward",
    "coefficients_and_aggregate",
    "coefficients_and_quantize",
    "coefficients_backward",
    "coefficients_beside",
    "coefficients_on",
    "expand",
    "expand_backward",
    "expand_pre",
    "expand_pre_backward",
    "expand_project",
    "gates",
    "gates_and_aggregate",
    "gates_backward",
    "head_coefficients",
    "head_coefficients_backward",
    "head_mapping_backward",
    "identity_post",
    "identity_post_backward",
    "identity_post_pre",
    "identity_post_pre_backward",
    "mappings_backward",
    "mixing_backward",
    "parallel_blocks",
    "post",
    "post_backward",
    "post_head",
    "post_head_backward",
    "post_pre",
    "post_pre_at_once",
    "post_pre_backward",
    "post_pre_quantized",
    "post_project",
    "post_project_plan",
    "project",
    "project_backward",
    "projection_plan",
    "replay",
    "replay_parts",
    "separate_backward",
    "sinkhorn",
    "sinkhorn_backward",
    "sinkhorn_sizes",
    "split_phi",
    "sum_partials",
    "total_h_pre",
]
