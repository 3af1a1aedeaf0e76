"""Bytes that a kernel has to move: every tensor it takes or writes, once. From sizes alone, without torch.

Stream tensors are counted in elements per token, in units of C (4n + 2 for the sum of the paper's
kernels, project, aggregate and post):

    expand     reads 1      writes n
    project    reads n      writes 0
    aggregate  reads n      writes 1
    post       reads n + 1  writes n

    expand_backward     reads n       writes 1
    project_backward    reads n       writes n
    aggregate_backward  reads n + 1   writes 0
    post_backward       reads 2n + 1  writes n + 1

    aggregate_gradients      reads n + 1  writes n
    aggregate_norm           reads n      writes 1
    aggregate_quantized      reads n      writes 1 in float8, which is 1/2 of a 16-bit stream's
    aggregate_norm_backward  reads n + 1  writes 1

Fused across a boundary (delayed is the form whose h_pre is there already; at n = 8 a GPU's backward is not fused):

    post_pre, post_head         reads 2n + 1  writes n + 1     post_pre in one launch, for few tokens, reads n + 1
    post_pre_delayed            reads n + 1   writes n + 1
    post_pre_quantized          reads 2n + 1  writes n, and 1 in float8
    post_pre_backward           reads 3n + 3  writes n + 1
    post_pre_delayed_backward   reads 2n + 2  writes n + 1
    post_head_backward          reads 3n + 3  writes n + 1
    identity_post_pre           as post_pre, without h_res
    identity_post_pre_backward  as post_pre_backward
    expand_pre                  reads 2       writes n + 1
    expand_pre_backward         reads n + 4   writes 2, and torch adds the two, 3 more

    replay  reads n + L − 1  writes n·(L − 1) + L     of a block of L sublayers, 4 where it is counted

Everything else is small and counted apart: phi (and its halves, where it is split for tensor cores) and its
gradient, partial sums, coefficients, logits. A workspace is written, then read.

The formulas are here because they cost nothing; `audited` counts the same bytes from the kernels' code, and a test
holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels import boundary_plans, plans, projection_plans
from ...kernels.plans import BYTES
from ...kernels.projection_plans import WARP_STREAMS, ProjectionPlan, WarpProjectionPlan
from ...spec import MHCSpec
from ..calls.cases import POST_PRE, POST_PRE_BACKWARD, POST_PRE_DELAYED, POST_PRE_QUANTIZED, Case
from ..calls.table import CALLS

PARALLEL_BLOCKS = 2 * 132  # on the multiprocessors of an H100 or H200: they set how tokens are cut in ranges

FLOAT32 = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes of one call."""

    stream_read: int = 0
    stream_written: int = 0
    small: int = 0

    @property
    def stream(self) -> int:
        """Bytes of stream tensors, read and written."""
        return self.stream_read + self.stream_written

    @property
    def total(self) -> int:
        """All bytes, read and written."""
        return self.stream + self.small

    def __add__(self, other: Traffic) -> Traffic:
        """Add the traffic of two calls."""
        return Traffic(
            self.stream_read + other.stream_read,
            self.stream_written + other.stream_written,
            self.small + other.small,
        )


def stream_elements(call: str, num_streams: int) -> tuple[int, int]:
    """Elements of stream dtype read and written per token, in units of C."""
    return CALLS[call].elements(num_streams)


def float8_elements(call: str, itemsize: int) -> float:
    """Return what is also written in float8, in elements of `itemsize` bytes, per token and in units of C."""
    return CALLS[call].float8 / itemsize


def small_bytes(case: Case, plan: ProjectionPlan, num_slabs: int) -> int:
    """Bytes of everything that is not a stream tensor; `plan` and `num_slabs` are the projection's.

    Of a boundary `num_slabs` are those of its schedule.
    """
    n, tokens = case.shape.num_streams, case.shape.num_tokens
    rows = n * n + 2 * n
    partial = num_slabs * plan.slab_rows * tokens * FLOAT32
    if case.kernel == "project":
        return rows * n * case.shape.hidden_size * FLOAT32 + split_phi_bytes(case, plan) + partial
    if case.kernel == "coefficients":
        return partial + (3 + rows + (2 * rows + 1) * tokens) * FLOAT32  # the mappings, and what a backward needs
    if case.kernel == "coefficients_backward":  # g_h_*, and what is projected in and out; alpha, bias in and out
        token_sums = 2 * num_token_sums(case, plan) * (3 + rows)
        return ((3 * rows + 2) * tokens + 2 * (3 + rows) + token_sums) * FLOAT32
    if case.kernel == "aggregate_quantized":  # h_pre in, scales out, and the norm's weight
        per_row = n + plans.num_scales(case.shape.hidden_size)
        return (per_row * tokens + case.shape.hidden_size) * FLOAT32
    if case.kernel == POST_PRE_QUANTIZED:  # h_post, h_res and phi, then what its other two launches move
        read = (n + n * n) * tokens + rows * n * case.shape.hidden_size
        partial += split_phi_bytes(case, plan) if isinstance(plan, WarpProjectionPlan) else 0
        launched = (Case(kernel, case.shape) for kernel in ("coefficients", "aggregate_quantized"))
        return read * FLOAT32 + partial + sum(small_bytes(one, plan, num_slabs) for one in launched)
    if at_once := one_launch(case, plan):
        return one_launch_bytes(case, at_once)
    if case.kernel in (POST_PRE, POST_PRE_DELAYED):  # h_pre, h_post, h_res and phi, then what `coefficients` moves
        read = (2 * n + n * n) * tokens + rows * n * case.shape.hidden_size
        if isinstance(plan, WarpProjectionPlan):  # a launch splits phi
            partial += split_phi_bytes(case, plan)
        if isinstance(plan, WarpProjectionPlan) and n in WARP_STREAMS:  # another one has mappings and aggregation
            read -= n * tokens if case.kernel == POST_PRE else 0
        elif case.kernel == POST_PRE and plan.split:  # on a GPU two mappings are made by the aggregation's launch
            read += (n + n * n) * tokens
        return read * FLOAT32 + partial + small_bytes(Case("coefficients", case.shape), plan, num_slabs)
    if case.kernel == POST_PRE_BACKWARD:
        return boundary_backward_bytes(case, plan)
    if case.kernel == "project_backward":  # phi in and out
        phi = rows * n * case.shape.hidden_size
        return (2 * phi + (rows + 1) * tokens) * FLOAT32 + g_phi_slab_bytes(case, plan)
    per_token = {
        "sinkhorn": 2 * n * n,
        "aggregate": n,
        "post": n + n * n,
        "sinkhorn_backward": 3 * n * n,
        "aggregate_backward": n,
        "post_backward": 2 * (n + n * n),
    }.get(case.kernel, 0)
    return per_token * tokens * FLOAT32


def one_launch(case: Case, plan: ProjectionPlan) -> boundary_plans.PostPrePlan | None:
    """Return the plan of the boundary in one launch; None of another call, or of a boundary in several."""
    found = boundary_plans.post_pre_plan(plan) if case.kernel in (POST_PRE, POST_PRE_DELAYED) else None
    sizes = case.shape.num_tokens, case.shape.hidden_size
    return found if found and boundary_plans.ends_at_once(*sizes, found, PARALLEL_BLOCKS // 2) else None


def one_launch_bytes(case: Case, plan: boundary_plans.PostPrePlan) -> int:
    """Return the small bytes of `post_pre` in one launch: phi, coefficients, sums that blocks leave each other."""
    n, tokens, hidden_size = case.shape.num_streams, case.shape.num_tokens, case.shape.hidden_size
    rows, num_chunks = n * n + 2 * n, plan.projection.num_chunks(hidden_size)
    left = tokens % plan.tokens
    summed = tokens - left + next(size for size in (0, 4, 8, plan.tokens) if left <= size)
    partial = num_chunks * (rows + 1) * (-(-tokens // 8) * 8 + summed)
    mappings = (2 * n * (n + 1) + (2 * n if case.kernel == POST_PRE_DELAYED else n) + rows + 1) * tokens
    return (rows * n * hidden_size + 3 + rows + mappings + partial + 2 * plan.num_tiles(tokens)) * FLOAT32


def split_phi_bytes(case: Case, plan: ProjectionPlan) -> int:
    """Return the bytes of phi's halves, written and then read; by warps in whole chunks of channels."""
    if not plan.split:
        return 0
    hidden_size = case.shape.hidden_size
    if isinstance(plan, WarpProjectionPlan):
        hidden_size = plan.num_chunks(hidden_size) * plan.channels
    return 2 * plan.padded_rows * case.shape.num_streams * hidden_size * BYTES[plan.operand_dtype]


def boundary_backward_bytes(case: Case, plan: ProjectionPlan) -> int:
    """Return the small bytes of `post_pre_backward`: of h_pre, mappings, mixing with phi, sums; the first two can be
    one launch, which keeps h_pre's gradient on the chip.
    """
    shape, rows = case.shape, plan.rows
    n, tokens, mixing = shape.num_streams, shape.num_tokens, shape.num_streams * (shape.num_streams + 1)
    backward = boundary_plans.boundary_backward_plan(rows, n, shape.hidden_size, shape.dtype, target_of(plan))
    per_range = boundary_plans.tiles_per_range(tokens, backward, shape.hidden_size, PARALLEL_BLOCKS)
    num_ranges = max(1, -(-tokens // (per_range * backward.tokens)))
    blocks = -(-shape.hidden_size // backward.channels)
    phi = rows * n * shape.hidden_size
    ranges = 2 * num_ranges * phi if num_ranges > 1 else 0  # partial sums in and out; a single range's is g_phi itself
    is_joined = boundary_plans.joins_coefficients(n, shape.hidden_size, shape.dtype, target_of(plan))
    token_sums = 2 * (num_joined_sums(tokens) if is_joined else num_token_sums(case, plan)) * (3 + rows)
    parameters = 2 * (3 + rows)  # alpha and bias in, their gradients out
    pre = -n if is_joined else n  # joined, it is not read either
    per_token = pre + (3 * rows + 2) + (rows + 1 + n + mixing) + mixing  # pre, mappings, what is mixed, sums out
    elements = (per_token + 2 * blocks * mixing) * tokens + 2 * phi + ranges + token_sums + parameters
    return elements * FLOAT32


def separate_backward(case: Case, plan: ProjectionPlan) -> Traffic:
    """Return the traffic of `post_pre_backward` as separate kernels: theirs, and g_layer_input and h_pre in between."""
    shape = case.shape
    n, unit = shape.num_streams, shape.num_tokens * shape.hidden_size * shape.itemsize
    kernels = ("aggregate_backward", "coefficients_backward", "project_backward", "post_backward")
    parts = (traffic(Case(kernel, shape), plan, num_slabs=1) for kernel in kernels)
    return sum(parts, start=Traffic(unit, 0, n * shape.num_tokens * FLOAT32))


def num_joined_sums(num_tokens: int) -> int:
    """Return the same of `coefficients_aggregate_backward`, a block of which has a multiprocessor to itself."""
    plan = boundary_plans.CoefficientsAggregateBackwardPlan(capacity=1)
    return -(-num_tokens // boundary_plans.joined_tokens(num_tokens, plan, PARALLEL_BLOCKS // 2))


def num_token_sums(case: Case, plan: ProjectionPlan) -> int:
    """Rows of partial sums of g_alpha and g_bias that `coefficients_backward` leaves: one a block of tokens."""
    n, iters = case.shape.num_streams, MHCSpec(case.shape.hidden_size, case.shape.num_streams).sinkhorn_iters
    return -(-case.shape.num_tokens // plans.sinkhorn_backward_sizes(n, iters, target_of(plan))[1])


def g_phi_slab_bytes(case: Case, plan: ProjectionPlan) -> int:
    """Bytes of partial sums of g_phi that `project_backward` writes and reads again; none where one sum is all."""
    shape = case.shape
    sizes = (plan.rows, shape.hidden_size, shape.dtype, target_of(plan), shape.num_streams)
    backward, cut = (
        projection_plans.projection_backward_plan(*sizes),
        (shape.num_streams, shape.hidden_size, PARALLEL_BLOCKS),
    )
    num_splits = -(-shape.num_tokens // projection_plans.tokens_per_split(shape.num_tokens, backward, *cut))
    phi = plan.rows * shape.num_streams * shape.hidden_size * FLOAT32
    return 2 * num_splits * phi if num_splits > 1 else 0


def target_of(plan: ProjectionPlan) -> str:
    """The target that a plan is for: only on a CPU is phi multiplied whole."""
    return "cuda" if plan.split else "cpu"


def traffic(case: Case, plan: ProjectionPlan, num_slabs: int) -> Traffic:
    """The bytes of one call of the case's kernel, or of the kernels that its name joins."""
    n, kernels = case.shape.num_streams, case.kernel.split("+")
    if case.kernel == POST_PRE_BACKWARD and not boundary_plans.backward_is_fused(n, target_of(plan)):
        return separate_backward(case, plan)
    if len(kernels) > 1:
        return sum((traffic(Case(kernel, case.shape), plan, num_slabs) for kernel in kernels), start=Traffic())
    unit = case.shape.num_tokens * case.shape.hidden_size * case.shape.itemsize
    read, written = stream_elements(case.kernel, n)
    if case.kernel == POST_PRE and one_launch(case, plan):
        read -= n
    float8 = CALLS[case.kernel].float8 * case.shape.num_tokens * case.shape.hidden_size
    return Traffic(read * unit, written * unit + float8, small_bytes(case, plan, num_slabs))
