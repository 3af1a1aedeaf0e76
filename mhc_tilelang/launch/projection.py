"""The projection x·phi with Σx², split-K over chunks of channels, and its backward.

Tensors come flat and contiguous, [T, …]; `operators` sees to that. Plans are functions of sizes and target; split-K
never changes results. In the backward, sums over tokens are taken in an order that the sizes fix, and for 16-bit
streams on a GPU how many blocks it runs at a time: g_phi repeats to the bit on one kind of GPU, not from one to
another.
"""

from __future__ import annotations

import torch

from .. import compiler
from ..compiler.kernel import dtype_name
from ..kernels import plans, projection_plans
from .operands import Gradient, aligned, placeholder_if_none, stream_kernel
from .partial_sums import sum_partials


def split_phi(phi: torch.Tensor, plan: projection_plans.ProjectionPlan, *, sums_streams: bool = False) -> torch.Tensor:
    """phi [M, n, C] float32 -> its halves [padded_rows, n, C] in the plan's operand dtype, or by warps [units, 8].

    With `sums_streams`, by warps, those of Σ_j phi[:, j].
    """
    _, num_streams, hidden_size = phi.shape
    shape: tuple[int, ...] = (plan.padded_rows, num_streams, hidden_size)
    if isinstance(plan, projection_plans.WarpProjectionPlan):
        units = plan.units(1 if sums_streams else num_streams)
        shape = (plan.num_chunks(hidden_size) * units, plans.MAX_ACCESS_BYTES // 2)
    halves = phi.new_empty(shape, dtype=getattr(torch, plan.operand_dtype))
    target = compiler.target_of(phi.device)
    summed = {"sums_streams": True} if sums_streams else {}
    sizes = {"num_streams": num_streams, "hidden_size": hidden_size}
    kernel = compiler.kernel("split_phi", target, **sizes, plan=plan, **summed)
    kernel(phi=aligned(phi), phi_split=halves)
    return halves


def project(
    x: torch.Tensor,
    phi: torch.Tensor,
    plan: projection_plans.ProjectionPlan | None = None,
    chunks_per_split: int | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, n, C], phi [M, K] -> partial sums [slabs, slab_rows, T], which the coefficients kernels read.

    `plan` and `chunks_per_split` are picked unless given; the split is redone at every call, since phi may
    have been updated in between.
    """
    num_tokens, num_streams, hidden_size = x.shape
    plan = plan or projection_plan(x, phi.shape[0])
    operand = phi.view(phi.shape[0], num_streams, hidden_size)
    if plan.split:
        operand = split_phi(operand, plan)
    num_chunks = plan.num_chunks(hidden_size)
    if chunks_per_split is None:
        chunks_per_split = projection_plans.chunks_per_split(num_tokens, num_chunks, plan, parallel_blocks(x.device))
    if chunks_per_split < 1:
        raise ValueError(f"project: chunks_per_split: expected at least 1, got {chunks_per_split}")
    shape = (projection_plans.num_slabs(chunks_per_split, num_chunks, plan), plan.slab_rows, num_tokens)
    partial = x.new_empty(shape, dtype=torch.float32) if out is None else out
    if partial.shape != shape:  # the kernel takes the slab count from the tensor and writes what the split says
        raise ValueError(f"project: out: expected shape {list(shape)}, got {list(partial.shape)}")
    kernel = stream_kernel("project", x, plan=plan)
    kernel(x=aligned(x), phi=operand, partial=partial, chunks_per_split=chunks_per_split)
    return partial


def projection_plan(x: torch.Tensor, rows: int) -> projection_plans.ProjectionPlan:
    """Return the plan by which a stream on this device is projected on a phi of `rows` rows."""
    _, n, hidden_size = x.shape
    sizes = (rows, n, hidden_size, dtype_name(x.dtype), compiler.platform_of(x.device))
    return projection_plans.projection_plan(*sizes, compiler.shared_bytes(x.device))


def parallel_blocks(device: torch.device) -> int:
    """Return how many of a projection's blocks the device runs at a time: two a multiprocessor, or its threads."""
    if emulator := compiler.emulator_of(device):
        return emulator.parallel_blocks
    if device.type == "cpu":
        return torch.get_num_threads()
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def project_backward(
    g_projected: torch.Tensor,
    x: torch.Tensor,
    phi: torch.Tensor,
    *,
    h_pre: Gradient = None,
    g_layer_input: Gradient = None,
    needs_g_x: bool = True,
    needs_g_phi: bool = True,
    out: tuple[Gradient, Gradient] | None = None,
) -> tuple[Gradient, Gradient]:
    """g_projected [M + 1, T], x [T, n, C], phi [M, K] -> g_x [T, n, C] and g_phi [M, K], None unless needed.

    With h_pre [T, n] and g_layer_input [T, C], g_x also has what the aggregation adds, h_pre[i] · g_layer_input.
    """
    if not (needs_g_x or needs_g_phi):
        return None, None
    num_tokens, num_streams, hidden_size = x.shape
    rows = phi.shape[0]
    sizes = (rows, hidden_size, dtype_name(x.dtype), compiler.platform_of(x.device), num_streams)
    plan = projection_plans.projection_backward_plan(*sizes, compiler.shared_bytes(x.device))
    blocks = parallel_blocks(x.device)
    tokens_per_split = projection_plans.tokens_per_split(num_tokens, plan, num_streams, hidden_size, blocks)
    num_splits = -(-num_tokens // tokens_per_split)
    g_x, g_phi = out or (torch.empty_like(x) if needs_g_x else None, torch.empty_like(phi) if needs_g_phi else None)
    if num_tokens == 0:
        return g_x, None if g_phi is None else g_phi.zero_()
    partial = None
    if g_phi is not None:
        own = num_splits == 1  # one range of tokens: its partial sum is the sum
        partial = g_phi.view(1, -1) if own else phi.new_empty(num_splits, phi.numel())
    kernel = stream_kernel(
        "project_backward",
        x,
        plan=plan,
        needs_g_x=needs_g_x,
        needs_g_phi=needs_g_phi,
        has_g_layer_input=needs_g_x and g_layer_input is not None,
    )
    shape = (rows, num_streams, hidden_size)
    kernel(
        g_projected=g_projected,
        x=aligned(x),
        phi=aligned(phi).view(shape) if needs_g_x else phi.new_empty(1),
        h_pre=placeholder_if_none(h_pre if needs_g_x else None, phi),
        g_layer_input=placeholder_if_none(g_layer_input if needs_g_x else None, x),
        g_x=placeholder_if_none(g_x, x),
        partial=placeholder_if_none(None if partial is None else partial.view(-1, *shape), phi),
        tokens_per_split=tokens_per_split,
    )
    if g_phi is not None and partial is not None and num_splits > 1:
        sum_partials(partial, out=g_phi.view(-1))
    return g_x, g_phi
