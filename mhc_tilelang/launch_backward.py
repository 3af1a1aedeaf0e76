"""One function per backward kernel, as `launch` has one per forward kernel: plan, outputs, launch.

Tensors come flat and contiguous, [T, …]; `operators` sees to that. A gradient that is not wanted, or not given, is
None: it is neither computed nor read. Sums over tokens are taken in an order that the sizes fix.
"""

from __future__ import annotations

import torch

from . import compiler
from .compiler.kernel import dtype_name
from .errors import GradientError
from .kernels import plans
from .launch import aligned, alignment
from .spec import MHCSpec

ELEMENTS = 256  # of a block of `sum_partials`

Gradient = torch.Tensor | None


def expand_backward(g_x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """g_x [T, n, C] -> g_h [T, C]."""
    num_tokens, num_streams, hidden_size = g_x.shape
    g_h = g_x.new_empty(num_tokens, hidden_size) if out is None else out
    tile = plans.channel_tile(hidden_size, g_x.element_size(), compiler.platform_of(g_x.device), alignment(g_x, g_h))
    kernel = compiler.kernel(
        "expand_backward",
        compiler.target_of(g_x.device),
        num_streams=num_streams,
        hidden_size=hidden_size,
        dtype=dtype_name(g_x.dtype),
        tile=tile,
    )
    kernel(g_x=g_x, g_h=g_h)
    return g_h


def sinkhorn_backward(
    g_h_res: torch.Tensor, logits: torch.Tensor, iters: int, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """g_h_res, logits [T, n, n] -> g_logits [T, n, n]."""
    num_streams = logits.shape[-1]
    g_logits = torch.empty_like(logits) if out is None else out
    target = compiler.target_of(logits.device)
    capacity, block = sinkhorn_sizes(num_streams, iters, target)
    kernel = compiler.kernel("sinkhorn_backward", target, num_streams=num_streams, capacity=capacity, block=block)
    kernel(g_h_res=aligned(g_h_res), logits=aligned(logits), g_logits=g_logits, iters=iters, sinkhorn_eps=eps)
    return g_logits


def sinkhorn_sizes(num_streams: int, iters: int, target: str) -> tuple[int, int]:
    """Iterations that Sinkhorn's backward has room for, and tokens of its block. Raises GradientError where none has
    room for so many.
    """
    kind = "cpu" if target == "cpu" else "cuda"
    capacity, block = plans.sinkhorn_backward_sizes(num_streams, iters, kind)
    if not capacity:
        most = max(plans.sinkhorn_backward_blocks(num_streams, kind))
        raise GradientError(
            f"sinkhorn: the backward keeps a vector per step on the chip: expected at most {most} iterations for "
            f"{num_streams} streams on {kind}, got {iters}"
        )
    return capacity, block


def aggregate_backward(
    g_layer_input: torch.Tensor, x: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """g_layer_input [T, C], x [T, n, C] -> g_h_pre [T, n]."""
    num_tokens, num_streams, hidden_size = x.shape
    g_h_pre = x.new_empty(num_tokens, num_streams, dtype=torch.float32) if out is None else out
    tile = plans.reduction_tile(hidden_size, x.element_size(), compiler.platform_of(x.device))
    kernel = compiler.kernel(
        "aggregate_backward",
        compiler.target_of(x.device),
        num_streams=num_streams,
        hidden_size=hidden_size,
        dtype=dtype_name(x.dtype),
        tile=tile,
    )
    kernel(g_layer_input=by_width(g_layer_input, tile), x=by_width(x, tile), g_h_pre=g_h_pre)
    return g_h_pre


def post_backward(
    g_x_next: torch.Tensor,
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    *,
    needs_x: bool = True,
    needs_layer_output: bool = True,
    needs_mixing: bool = True,
    out: tuple[Gradient, Gradient, Gradient, Gradient] | None = None,
) -> tuple[Gradient, Gradient, Gradient, Gradient]:
    """g_x_next and post's arguments, flat -> the gradients of x, layer_output, h_post and h_res; None unless needed.

    `needs_mixing` asks for the last two.
    """
    wanted = (needs_x, needs_layer_output, needs_mixing, needs_mixing)
    arguments = (x, layer_output, h_post, h_res)
    gradients = out or tuple(torch.empty_like(t) if w else None for t, w in zip(arguments, wanted, strict=True))
    g_x, g_layer_output, g_h_post, g_h_res = map(or_unused, gradients, arguments)
    tile = plans.reduction_tile(x.shape[2], x.element_size(), compiler.platform_of(x.device))
    kernel = compiler.kernel(
        "post_backward",
        compiler.target_of(x.device),
        num_streams=x.shape[1],
        hidden_size=x.shape[2],
        dtype=dtype_name(x.dtype),
        layer_dtype=dtype_name(layer_output.dtype),
        tile=tile,
        stream=needs_x,
        layer=needs_layer_output,
        mixing=needs_mixing,
    )
    kernel(
        g_x_next=by_width(g_x_next, tile),
        x=by_width(x, tile),
        layer_output=by_width(layer_output, tile),
        h_post=aligned(h_post),
        h_res=aligned(h_res),
        g_x=by_width(g_x, tile) if needs_x else g_x,
        g_layer_output=by_width(g_layer_output, tile) if needs_layer_output else g_layer_output,
        g_h_post=g_h_post,
        g_h_res=g_h_res,
    )
    return gradients  # type: ignore[return-value]


def coefficients_backward(
    g_h_pre: Gradient,
    g_h_post: Gradient,
    g_h_res: Gradient,
    projected: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the mappings, projected [M + 1, T], alpha [3], bias [M]
    -> g_projected [M + 1, T], g_alpha [3], g_bias [M].
    """
    g_projected, g_alpha, g_bias = out or (torch.empty_like(t) for t in (projected, alpha, bias))
    partial = mappings_backward(g_h_pre, g_h_post, g_h_res, projected, alpha, bias, spec, out=g_projected)
    split_parameters(partial, g_alpha, g_bias)
    return g_projected, g_alpha, g_bias


def mappings_backward(
    g_h_pre: Gradient,
    g_h_post: Gradient,
    g_h_res: Gradient,
    projected: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """The kernel of `coefficients_backward`: writes g_projected to `out`, returns the gradients of alpha and bias with
    their sums over tokens still in parts, [blocks, 3 + M].
    """
    target = compiler.target_of(projected.device)
    given = {"g_h_pre": g_h_pre, "g_h_post": g_h_post, "g_h_res": g_h_res}
    capacity, block = sinkhorn_sizes(spec.num_streams, spec.sinkhorn_iters, target)
    kernel = compiler.kernel(
        "coefficients_backward",
        target,
        num_streams=spec.num_streams,
        hidden_size=spec.hidden_size,
        capacity=capacity,
        block=block,
        pre_given=g_h_pre is not None,
        post_given=g_h_post is not None,
        res_given=g_h_res is not None,
    )
    tensors = {name: or_unused(gradient, projected) for name, gradient in given.items()}
    partial = partial_sums(projected, block, alpha.numel() + bias.numel())
    kernel(
        **tensors,
        projected=projected,
        alpha=aligned(alpha),
        bias=aligned(bias),
        g_projected=out,
        partial=partial,
        iters=spec.sinkhorn_iters,
        sinkhorn_eps=spec.sinkhorn_eps,
        post_scale=spec.post_scale,
    )
    return partial


def head_coefficients_backward(
    g_h_pre: torch.Tensor, projected: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, spec: MHCSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """g_h_pre [T, n], projected [n + 1, T], alpha [1], bias [n] -> g_projected [n + 1, T], g_alpha [1], g_bias [n]."""
    g_projected, g_alpha, g_bias = (torch.empty_like(t) for t in (projected, alpha, bias))
    partial = head_mapping_backward(g_h_pre, projected, alpha, bias, spec, out=g_projected)
    split_parameters(partial, g_alpha, g_bias)
    return g_projected, g_alpha, g_bias


def head_mapping_backward(
    g_h_pre: torch.Tensor,
    projected: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """The kernel of `head_coefficients_backward`: writes g_projected to `out`, returns the gradients of alpha and bias
    with their sums over tokens still in parts, [blocks, 1 + n].
    """
    target = compiler.target_of(projected.device)
    block = plans.tokens_per_block(target)
    kernel = compiler.kernel(
        "head_coefficients_backward",
        target,
        num_streams=spec.num_streams,
        hidden_size=spec.hidden_size,
        block=block,
    )
    partial = partial_sums(projected, block, alpha.numel() + bias.numel())
    kernel(
        g_h_pre=aligned(g_h_pre),
        projected=projected,
        alpha=aligned(alpha),
        bias=aligned(bias),
        g_projected=out,
        partial=partial,
    )
    return partial


def partial_sums(projected: torch.Tensor, block: int, elements: int) -> torch.Tensor:
    """Room for a row of partial sums per block of tokens; a row of zeros where there is no token."""
    num_partials = -(-projected.shape[-1] // block)
    return projected.new_empty(num_partials, elements) if num_partials else projected.new_zeros(1, elements)


def split_parameters(partial: torch.Tensor, g_alpha: torch.Tensor, g_bias: torch.Tensor) -> None:
    """The partial sums added up, and shared out."""
    total = sum_partials(partial)
    g_alpha.copy_(total[: g_alpha.numel()])
    g_bias.copy_(total[g_alpha.numel() :])


def sum_partials(partial: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """partial [partials, elements] -> [elements], in an order that the sizes fix."""
    total = partial.new_empty(partial.shape[1]) if out is None else out
    lanes = plans.partial_lanes(partial.shape[0])
    kernel = compiler.kernel("sum_partials", compiler.target_of(partial.device), lanes=lanes, block=ELEMENTS)
    kernel(partial=partial, total=total)
    return total


def project_backward(
    g_projected: torch.Tensor,
    x: torch.Tensor,
    phi: torch.Tensor,
    *,
    h_pre: Gradient = None,
    g_layer_input: Gradient = None,
    needs_x: bool = True,
    needs_phi: bool = True,
    out: tuple[Gradient, Gradient] | None = None,
) -> tuple[Gradient, Gradient]:
    """g_projected [M + 1, T], x [T, n, C], phi [M, K] -> g_x [T, n, C] and g_phi [M, K], None unless needed.

    With h_pre [T, n] and g_layer_input [T, C], g_x also has what the aggregation adds, h_pre[i] · g_layer_input.
    """
    num_tokens, num_streams, hidden_size = x.shape
    rows = phi.shape[0]
    plan = plans.projection_backward_plan(rows, hidden_size, dtype_name(x.dtype), compiler.platform_of(x.device))
    tokens_per_split = plans.tokens_per_split(num_tokens, plan)
    num_splits = -(-num_tokens // tokens_per_split)
    g_x, g_phi = out or (torch.empty_like(x) if needs_x else None, torch.empty_like(phi) if needs_phi else None)
    if num_tokens == 0:
        return g_x, None if g_phi is None else g_phi.zero_()
    partial = None
    if g_phi is not None:
        own = num_splits == 1  # one range of tokens: its partial sum is the sum
        partial = g_phi.view(1, -1) if own else phi.new_empty(num_splits, phi.numel())
    kernel = compiler.kernel(
        "project_backward",
        compiler.target_of(x.device),
        num_streams=num_streams,
        hidden_size=hidden_size,
        dtype=dtype_name(x.dtype),
        plan=plan,
        stream=needs_x,
        weights=needs_phi,
        aggregated=needs_x and g_layer_input is not None,
    )
    shape = (rows, num_streams, hidden_size)
    kernel(
        g_projected=g_projected,
        x=aligned(x),
        phi=aligned(phi).view(shape) if needs_x else phi.new_empty(1),
        h_pre=or_unused(h_pre if needs_x else None, phi),
        g_layer_input=or_unused(g_layer_input if needs_x else None, x),
        g_x=or_unused(g_x, x),
        partial=or_unused(None if partial is None else partial.view(-1, *shape), phi),
        tokens_per_split=tokens_per_split,
    )
    if g_phi is not None and partial is not None and num_splits > 1:
        sum_partials(partial, out=g_phi.view(-1))
    return g_x, g_phi


def by_width(tensor: torch.Tensor, tile: plans.ReductionTile) -> torch.Tensor:
    """[…, C] as […, C / width, width], where a kernel can read it."""
    return aligned(tensor).view(*tensor.shape[:-1], tensor.shape[-1] // tile.width, tile.width)


def or_unused(tensor: Gradient, like: torch.Tensor) -> torch.Tensor:
    """The tensor, or the one element that a kernel takes for a tensor it does not touch."""
    return like.new_empty(1) if tensor is None else aligned(tensor)
