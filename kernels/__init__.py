"""TileLang device code, written for the GPU; the CPU target runs the same functions (see `mhc_tilelang.compiler.cpu`).

One family a file, its equation at the head, then macros, then the kernel: a function of the sizes that are
compiled in (streams, channels, dtype, a tile) which returns a `T.prim_func`. Token counts and split counts
are run-time values, so one compilation serves every batch.

    projection    Eq. 14–15   x·phi and Σx² from one read of x, in fixed chunks; phi split for tensor cores
    coefficients  Eq. 16–19   scale, bias, sigmoids and Sinkhorn of those chunk sums
    coefficients_aggregate  Eq. 3, 15   the coefficients and the aggregation in one launch
    gates         Eq. 16–18   the coefficients of an identity hyper-connection, which has no h_res
    sinkhorn      Eq. 9, 19   logits -> h_res, alone
    aggregate     Eq. 3       n streams -> the layer's input
    aggregate_mappings  Eq. 3, 18   the same, and beside it h_post and h_res, which are needed after the layer
    aggregate_norm      Eq. 3       the same, and the layer's own RMSNorm
    aggregate_quantized Eq. 3       the same in float8, with a scale for every 128 channels
    post          Eq. 3       mix the streams, add the layer's output
    replay        Eq. 3       post and aggregate of a block of sublayers again, without a projection, for the backward
    post_project  Eq. 3, 14   post, and the projection of what it made, from the same tile
    post_pre      Eq. 3, 14–19   the whole boundary in one launch, for few tokens
    expand                    an embedding -> n equal streams
    expand_project            expand, and the projection of what is the same in every stream
    head                      the coefficients of the last aggregation
    X_backward                the gradients of each, derived where it begins
    boundary_backward         that of post, and of the next projection and aggregation, from one read
    coefficients_aggregate_backward   that of an aggregation and of its coefficients, in one launch
    boundary_sums             every kind of partial sum that it leaves, in one launch
    projection_warps, post_project_warps, sinkhorn_thread…   the same as thread-level code, of `warps`
    partial_sums              sums over blocks of tokens, added up: the gradients of parameters
    plans                     tiles, threads, stages: what is compiled in, chosen from sizes and target
    projection_plans          the same for what has a product
    boundary_plans            the same for what is fused across a boundary

Imports tilelang and nothing of the package above it. `FAMILIES` names every kernel without importing it.
"""

FAMILIES = {
    "split_phi": ("projection", "split_phi_kernel"),
    "project": ("projection", "project_kernel"),
    "coefficients": ("coefficients", "coefficients_kernel"),
    "coefficients_aggregate": ("coefficients_aggregate", "coefficients_aggregate_kernel"),
    "head_coefficients": ("head", "head_coefficients_kernel"),
    "gates": ("gates", "gates_kernel"),
    "sinkhorn": ("sinkhorn", "sinkhorn_kernel"),
    "aggregate": ("aggregate", "aggregate_kernel"),
    "aggregate_mappings": ("aggregate_mappings", "aggregate_mappings_kernel"),
    "aggregate_norm": ("aggregate_norm", "aggregate_norm_kernel"),
    "aggregate_quantized": ("aggregate_quantized", "aggregate_quantized_kernel"),
    "post": ("post", "post_kernel"),
    "replay": ("replay", "replay_kernel"),
    "post_project": ("post_project", "post_project_kernel"),
    "post_pre": ("post_pre", "post_pre_kernel"),
    "expand": ("expand", "expand_kernel"),
    "expand_project": ("expand_project", "expand_project_kernel"),
    "project_backward": ("projection_backward", "project_backward_kernel"),
    "coefficients_backward": ("coefficients_backward", "coefficients_backward_kernel"),
    "head_coefficients_backward": ("head_backward", "head_coefficients_backward_kernel"),
    "gates_backward": ("gates_backward", "gates_backward_kernel"),
    "sinkhorn_backward": ("sinkhorn_backward", "sinkhorn_backward_kernel"),
    "aggregate_backward": ("aggregate_backward", "aggregate_backward_kernel"),
    "aggregate_gradients": ("aggregate_backward", "aggregate_gradients_kernel"),
    "coefficients_aggregate_backward": (
        "coefficients_aggregate_backward",
        "coefficients_aggregate_backward_kernel",
    ),
    "aggregate_norm_backward": ("aggregate_norm_backward", "aggregate_norm_backward_kernel"),
    "post_backward": ("post_backward", "post_backward_kernel"),
    "expand_backward": ("expand_backward", "expand_backward_kernel"),
    "boundary_backward": ("boundary_backward", "boundary_backward_kernel"),
    "boundary_sums": ("boundary_sums", "boundary_sums_kernel"),
    "sum_partials": ("partial_sums", "sum_partials_kernel"),
}
