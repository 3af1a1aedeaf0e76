"""One function per kernel: pick the plan for the tensor's device, allocate the outputs unless `out` has them, launch.

Tensors come flat, [T, …], checked and contiguous; `ops` sees to that. Nothing here changes a result: plans
are functions of sizes and target, and the split of a projection moves no bits.
"""

from __future__ import annotations

from typing import Any

import torch

from . import compiler
from .compiler.kernel import Kernel, dtype_name
from .kernels import boundary_plans, plans
from .spec import MHCSpec


def expand(h: torch.Tensor, num_streams: int, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """h [T, C] -> [T, n, C]."""
    x = h.new_empty(h.shape[0], num_streams, h.shape[1]) if out is None else out
    apply_kernel("expand", x, h, x)(h=h, x=x)
    return x


def aggregate(x: torch.Tensor, h_pre: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, n, C], h_pre [T, n] -> layer_input [T, C]."""
    layer_input = x.new_empty(x.shape[0], x.shape[2]) if out is None else out
    apply_kernel("aggregate", x, x, layer_input)(x=x, h_pre=aligned(h_pre), layer_input=layer_input)
    return layer_input


def post(
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, n, C], layer_output [T, C], h_post [T, n], h_res [T, n, n] -> x_next [T, n, C]."""
    x_next = torch.empty_like(x) if out is None else out
    layer_dtype = dtype_name(layer_output.dtype)
    kernel = apply_kernel("post", x, x, layer_output, x_next, layer_dtype=layer_dtype)
    kernel(x=x, layer_output=layer_output, h_post=aligned(h_post), h_res=aligned(h_res), x_next=x_next)
    return x_next


def sinkhorn(logits: torch.Tensor, iters: int, eps: float, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """logits [T, n, n] -> h_res [T, n, n]."""
    target = compiler.target_of(logits.device)
    h_res = torch.empty_like(logits) if out is None else out
    kernel = compiler.kernel(
        "sinkhorn",
        target,
        num_streams=logits.shape[-1],
        block=plans.tokens_per_block(target),
    )
    kernel(logits=aligned(logits), h_res=h_res, iters=iters, sinkhorn_eps=eps)
    return h_res


def split_phi(phi: torch.Tensor, plan: plans.ProjectionPlan) -> torch.Tensor:
    """phi [M, n, C] float32 -> its halves [columns, n, C] in the plan's operand dtype."""
    _, num_streams, hidden_size = phi.shape
    halves = phi.new_empty(plan.padded_rows, num_streams, hidden_size, dtype=getattr(torch, plan.operand_dtype))
    target = compiler.target_of(phi.device)
    kernel = compiler.kernel("split_phi", target, num_streams=num_streams, hidden_size=hidden_size, plan=plan)
    kernel(phi=aligned(phi), phi_split=halves)
    return halves


def project(
    x: torch.Tensor,
    phi: torch.Tensor,
    plan: plans.ProjectionPlan | None = None,
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
        chunks_per_split = plans.chunks_per_split(num_tokens, num_chunks, plan, parallel_blocks(x.device))
    if chunks_per_split < 1:
        raise ValueError(f"project: chunks_per_split: expected at least 1, got {chunks_per_split}")
    shape = (plans.num_slabs(chunks_per_split, num_chunks, plan), plan.slab_rows, num_tokens)
    partial = x.new_empty(shape, dtype=torch.float32) if out is None else out
    if partial.shape != shape:  # the kernel takes the slab count from the tensor and writes what the split says
        raise ValueError(f"project: out: expected shape {list(shape)}, got {list(partial.shape)}")
    kernel = compiler.kernel(
        "project",
        compiler.target_of(x.device),
        num_streams=num_streams,
        hidden_size=hidden_size,
        dtype=dtype_name(x.dtype),
        plan=plan,
    )
    kernel(x=aligned(x), phi=operand, partial=partial, chunks_per_split=chunks_per_split)
    return partial


def coefficients(
    partial: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    plan: plans.ProjectionPlan,
    *,
    deferred: bool = False,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partial sums, alpha [3], bias [M] -> h_pre [T, n], h_post [T, n], h_res [T, n, n], projected [M + 1, T].

    Where they are `deferred`, h_post and h_res are not written: `launch_mappings.aggregate_mappings` is to do it. `out`
    has the first three.
    """
    n, num_tokens = spec.num_streams, partial.shape[-1]
    h_pre, h_post, h_res = out or (partial.new_empty(num_tokens, *rest) for rest in ((n,), (n,), (n, n)))
    projected = partial.new_empty(spec.num_coefficients + 1, num_tokens)
    target = compiler.target_of(partial.device)
    kernel = compiler.kernel(
        "coefficients",
        target,
        num_streams=n,
        hidden_size=spec.hidden_size,
        plan=plan,
        block=plans.tokens_per_block(target),
        deferred=deferred,
        pdl=deferred and target in boundary_plans.PDL,
    )
    kernel(
        partial=partial,
        alpha=aligned(alpha),
        bias=aligned(bias),
        h_pre=h_pre,
        h_post=h_post.new_empty(1) if deferred else h_post,
        h_res=h_res.new_empty(1) if deferred else h_res,
        projected=projected,
        iters=spec.sinkhorn_iters,
        sinkhorn_eps=spec.sinkhorn_eps,
        pre_eps=spec.pre_eps,
        rms_eps=spec.rms_eps,
        post_scale=spec.post_scale,
    )
    return h_pre, h_post, h_res, projected


def head_coefficients(
    partial: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    plan: plans.ProjectionPlan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial sums, alpha [1], bias [n] -> h_pre [T, n], projected [n + 1, T]."""
    n, num_tokens = spec.num_streams, partial.shape[-1]
    h_pre, projected = partial.new_empty(num_tokens, n), partial.new_empty(n + 1, num_tokens)
    target = compiler.target_of(partial.device)
    kernel = compiler.kernel(
        "head_coefficients",
        target,
        num_streams=n,
        hidden_size=spec.hidden_size,
        plan=plan,
        block=plans.tokens_per_block(target),
    )
    kernel(
        partial=partial,
        alpha=aligned(alpha),
        bias=aligned(bias),
        h_pre=h_pre,
        projected=projected,
        pre_eps=spec.pre_eps,
        rms_eps=spec.rms_eps,
    )
    return h_pre, projected


def projection_plan(x: torch.Tensor, rows: int) -> plans.ProjectionPlan:
    """The plan by which a stream on this device is projected on a phi of `rows` rows."""
    return plans.projection_plan(rows, x.shape[-1], dtype_name(x.dtype), compiler.platform_of(x.device))


def parallel_blocks(device: torch.device) -> int:
    """How many blocks of a projection the device runs at a time: two on every multiprocessor, or its threads."""
    if emulator := compiler.emulator_of(device):
        return emulator.parallel_blocks
    if device.type == "cpu":
        return torch.get_num_threads()
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def apply_kernel(family: str, stream: torch.Tensor, *accessed: torch.Tensor, **parameters: Any) -> Kernel:
    """The kernel of a family that walks over channels, for vectors that all `accessed` pointers allow."""
    _, num_streams, hidden_size = stream.shape
    copies = family == "expand"
    platform = compiler.platform_of(stream.device)
    tile = plans.channel_tile(hidden_size, stream.element_size(), platform, alignment(*accessed), copies)
    return compiler.kernel(
        family,
        compiler.target_of(stream.device),
        num_streams=num_streams,
        hidden_size=hidden_size,
        dtype=dtype_name(stream.dtype),
        **parameters,
        tile=tile,
    )


def alignment(*tensors: torch.Tensor) -> int:
    """The largest power of two, up to 16 bytes, that divides every data pointer. Views can start anywhere.

    Of the first tensor's bytes: one with wider elements must start on as many of its own for the same vector.
    """
    bits = plans.MAX_ACCESS_BYTES
    for tensor in tensors:
        bits |= tensor.data_ptr() // max(1, tensor.element_size() // tensors[0].element_size())
    return bits & -bits


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or on a GPU a copy of it if it does not start on 16 bytes, which is how kernels read.

    Not for the streams of `pre`, `post` and `expand`: those kernels are built for narrower accesses instead.
    """
    starts_anywhere = compiler.platform_of(tensor.device) == "cpu" or alignment(tensor) == plans.MAX_ACCESS_BYTES
    return tensor if starts_anywhere else tensor.clone()
