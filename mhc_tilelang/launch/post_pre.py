"""The boundary between two sublayers, launched: `post` of the one, `pre` of the next, fused and in its parts.

    post_pre          three launches: post_project, coefficients, and the aggregation; two in the delayed form, but
                      three again with a norm of the layer's input, since no block of post_project has a whole row;
                      one for few tokens (`post_pre_at_once`), where the schedule says so, without a norm and unless
                      the coefficients are wanted beside the layer
    post_project      post, the projection of the next sublayer, and with h_pre its layer input
    schedule          how a batch's work is shared out over blocks: print it, or give another

Tensors come flat, [T, …], checked and contiguous; `ops` sees to that. Results have the bits of the separate kernels,
`post`, then `project`, `coefficients` and `aggregate`. The backward is in `post_pre_backward`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import compiler
from ..compiler.kernel import dtype_name
from ..kernels import boundary_plans, plans, projection_plans
from ..spec import MHCSpec
from . import beside
from .aggregate import aggregate_norm
from .coefficients import coefficients
from .mappings import coefficients_and_aggregate
from .operands import aligned, alignment, placeholder_if_none, stream_kernel
from .projection import parallel_blocks, projection_plan, split_phi
from .workspace import counters

MOST_CHUNKS = 1023  # that a word of the one launch counts


class Boundary(NamedTuple):
    """Results of a boundary, and what its backward needs besides the inputs: h_pre and `projected`."""

    x_next: torch.Tensor
    layer_input: torch.Tensor
    h_post: torch.Tensor
    h_res: torch.Tensor
    h_pre: torch.Tensor
    projected: torch.Tensor


def post_pre(
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    h_pre: torch.Tensor | None = None,
    rms_norm_weight: torch.Tensor | None = None,
    rms_norm_eps: float = 1e-6,
    schedule: boundary_plans.BoundarySchedule | None = None,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> Boundary:
    """x [T, n, C], layer_output [T, C], h_post [T, n], h_res [T, n, n] of the sublayer that ends, phi [M, K],
    alpha [3], bias [M] of the one that begins -> x_next [T, n, C], and of the one that begins layer_input [T, C],
    h_post [T, n], h_res [T, n, n], h_pre [T, n], projected [M + 1, T].

    In the delayed form, with an h_pre [T, n] from the sublayer before, layer_input is aggregated with that, and the
    h_pre that is returned is for the sublayer after. With a rms_norm_weight [C], layer_input is normalised. `out` has
    all results but projected.
    """
    num_tokens, n, hidden_size = x.shape
    x_next, layer_input, h_post_next, h_res_next, h_pre_next = out or (
        torch.empty_like(x),
        x.new_empty(num_tokens, hidden_size),
        *(h_post.new_empty(num_tokens, *rest) for rest in ((n,), (n, n), (n,))),
    )
    if rms_norm_weight is None and (h_pre is None or beside.asked() is None):
        schedule = schedule or boundary_schedule(x, phi.shape[0])
        mixed, parameters = (x, layer_output, h_post, h_res), (phi, alpha, bias)
        every = (x_next, layer_input, h_pre_next, h_post_next, h_res_next)
        if schedule.one_launch:
            projected = post_pre_at_once(*mixed, *parameters, spec, h_pre=h_pre, out=every)
            if projected is not None:
                return Boundary(x_next, layer_input, h_post_next, h_res_next, h_pre_next, projected)
    if schedule is not None and schedule.one_launch:
        schedule = boundary_schedule(x, phi.shape[0], one_launch=False)
    given = h_pre if rms_norm_weight is None else None  # what post_project aggregates with, if it does
    _, partial, _ = post_project(
        x,
        layer_output,
        h_post,
        h_res,
        phi,
        h_pre=given,
        schedule=schedule,
        out=(x_next, None if given is None else layer_input),
    )
    plan = projection_plan(x, phi.shape[0])
    if h_pre is None and rms_norm_weight is None:
        results = (layer_input, h_pre_next, h_post_next, h_res_next)
        projected = coefficients_and_aggregate(x_next, partial, alpha, bias, spec, plan, out=results)
        return Boundary(x_next, layer_input, h_post_next, h_res_next, h_pre_next, projected)
    mappings = (h_pre_next, h_post_next, h_res_next)
    if h_pre is None:
        *_, projected = coefficients(partial, alpha, bias, spec, plan, out=mappings)
    else:
        projected = beside.coefficients_beside(partial, alpha, bias, spec, plan, out=mappings)
    if given is None:
        weights = h_pre_next if h_pre is None else h_pre
        aggregate_norm(x_next, weights, rms_norm_weight, rms_norm_eps, out=layer_input)
    return Boundary(x_next, layer_input, h_post_next, h_res_next, h_pre_next, projected)


def post_pre_at_once(
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor | None,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    h_pre: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    polls: int = boundary_plans.POLLS,
) -> torch.Tensor | None:
    """The boundary in one launch -> projected [M + 1, T]; `out` has x_next, layer_input, h_pre, h_post and h_res.

    With an h_pre [T, n] it is the delayed form; without h_res, which `out` then has none of either, an identity
    connection's. None, and nothing is done, where the kernel does not take these tensors: rows that do not start on 16
    bytes, a layer of another dtype, 65,536 channels, or no counters for it while a CUDA graph is captured. `polls`: how
    often a block of the ordinary form asks whether the others have come. Neither that nor the order of blocks moves a
    bit.
    """
    num_tokens, n, hidden_size = x.shape
    x_next, layer_input, h_pre_next, h_post_next, h_res_next = out
    plan = boundary_plans.post_pre_plan(projection_plan(x, phi.shape[0]))
    starts = alignment(x, layer_output, x_next, layer_input)
    if plan is None or starts < plans.MAX_ACCESS_BYTES or layer_output.dtype != x.dtype:
        return None
    num_tiles, num_chunks = plan.num_tiles(num_tokens), plan.projection.num_chunks(hidden_size)
    if num_chunks > MOST_CHUNKS:
        return None
    most = plan.num_tiles(max(num_tokens, boundary_plans.MOST_TOKENS_AT_ONCE))
    if (sync := counters(x.device, most * (1 + num_chunks))) is None:
        return None
    partial = phi.new_empty(num_tiles, num_chunks, plan.projection.slab_rows, plan.tokens)
    projected = phi.new_empty(plan.projection.slab_rows, num_tokens)
    forms = {**({} if h_pre is None else {"has_h_pre": True}), **({} if h_res is not None else {"has_h_res": False})}
    kernel = stream_kernel("post_pre", x, plan=plan, **forms)
    kernel(
        x=x,
        layer_output=layer_output,
        h_post=aligned(h_post),
        h_res=placeholder_if_none(h_res, phi),
        phi=aligned(phi).view(-1, n, hidden_size),
        alpha=aligned(alpha),
        bias=aligned(bias),
        h_pre=phi.new_empty(1) if h_pre is None else aligned(h_pre),
        x_next=x_next,
        layer_input=layer_input,
        h_pre_next=h_pre_next,
        h_post_next=h_post_next,
        h_res_next=placeholder_if_none(h_res_next, phi),
        projected=projected,
        partial=partial,
        sync=sync[: num_tiles * (1 + num_chunks)].view(num_tiles, 1 + num_chunks),
        iters=spec.sinkhorn_iters,
        sinkhorn_eps=spec.sinkhorn_eps,
        pre_eps=spec.pre_eps,
        rms_eps=spec.rms_eps,
        post_scale=spec.post_scale,
        post_eps=spec.post_eps,
        polls=polls,
    )
    return projected


def post_project(
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor | None,
    phi: torch.Tensor,
    plan: boundary_plans.PostProjectPlan | None = None,
    *,
    h_pre: torch.Tensor | None = None,
    schedule: boundary_plans.BoundarySchedule | None = None,
    out: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x [T, n, C], layer_output [T, C], h_post [T, n], h_res [T, n, n], phi [M, K] of the next sublayer or of a head
    -> x_next [T, n, C], partial sums [slabs, slab_rows, T] as of `project`, layer_input [T, C].

    The layer's input is None unless h_pre [T, n], from the sublayer before, is given. `plan` and `schedule` are picked
    unless given; neither moves a bit as long as the plan's chunks are those of `project`. `out` has x_next and
    layer_input. Without h_res H_res is the identity.
    """
    num_tokens, num_streams, hidden_size = x.shape
    has_h_pre = h_pre is not None
    plan = plan or post_project_plan(x, phi.shape[0], has_h_pre)
    schedule = schedule or boundary_plans.boundary_schedule(num_tokens, hidden_size, plan, parallel_blocks(x.device))
    partial = x.new_empty((schedule.slabs, plan.projection.slab_rows, num_tokens), dtype=torch.float32)
    x_next, layer_input = out or (torch.empty_like(x), x.new_empty(num_tokens, hidden_size) if has_h_pre else None)
    operand = aligned(phi).view(-1, num_streams, hidden_size)
    if isinstance(plan.projection, projection_plans.WarpProjectionPlan):
        operand = split_phi(operand, plan.projection)
    kernel = stream_kernel(
        "post_project",
        x,
        layer_dtype=dtype_name(layer_output.dtype),
        plan=plan,
        has_h_pre=has_h_pre,
        **({"has_h_res": False} if h_res is None else {}),
    )
    kernel(
        x=aligned(x),
        layer_output=aligned(layer_output),
        h_post=aligned(h_post),
        h_res=h_post.new_empty(1) if h_res is None else aligned(h_res),
        phi=operand,
        h_pre=phi.new_empty(1) if h_pre is None else aligned(h_pre),
        x_next=x_next,
        partial=partial,
        layer_input=x.new_empty(1) if layer_input is None else layer_input,
        chunks_per_split=schedule.chunks_per_split,
    )
    return x_next, partial, layer_input


def post_project_plan(x: torch.Tensor, rows: int, has_h_pre: bool = False) -> boundary_plans.PostProjectPlan:
    """The plan by which a stream on this device is mixed and projected on a phi of `rows` rows."""
    _, num_streams, hidden_size = x.shape
    sizes = (rows, num_streams, hidden_size, dtype_name(x.dtype), compiler.platform_of(x.device))
    return boundary_plans.post_project_plan(*sizes, has_h_pre, compiler.shared_bytes(x.device))


def boundary_schedule(
    x: torch.Tensor, rows: int, chunks_per_split: int | None = None, one_launch: bool | None = None
) -> boundary_plans.BoundarySchedule:
    """Return, for `print`, how blocks share a stream x [T, n, C]'s boundary on its device; phi has `rows` rows.

    With `chunks_per_split`, from 1 to all, every block takes that number of chunks of channels instead. `one_launch`
    asks for the boundary in one launch, or in several; unless given, what is predicted to end first is taken. Bundles
    have several launches alone: their hosts know of no counters.

    Raises:
        ValueError: chunks_per_split is below 1; one_launch is asked for where there is no such form.
    """
    if chunks_per_split is not None and chunks_per_split < 1:
        raise ValueError(f"schedule: chunks_per_split: expected at least 1, got {chunks_per_split}")
    plan, (num_tokens, _, hidden_size) = post_project_plan(x, rows), x.shape
    if one_launch and boundary_plans.post_pre_plan(plan.projection) is None:
        raise ValueError(f"schedule: one_launch: expected a stream that is projected by warps, got {plan.projection}")
    if one_launch is None and not compiler.has_counters(x.device):
        one_launch = False
    return boundary_plans.boundary_schedule(
        num_tokens, hidden_size, plan, parallel_blocks(x.device), chunks_per_split, one_launch
    )
