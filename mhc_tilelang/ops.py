"""The public functions: expand, collapse, aggregate, coefficients, sinkhorn, pre, first_pre, post, post_pre, head, and
those of a stream's two ends, expand_pre and post_head.

Each checks its arguments (`arguments`) and calls its operator (`operators`), which autograd differentiates and
torch.compile keeps whole. n streams, C = hidden size, K = n·C, M = n² + 2n; "..." stands for any leading
dimensions, none and empty ones included. Streams are bfloat16, float16 or float32. Everything else that goes in is
too: it is read as it is, and computed with in float32; mappings and matrices that come out are float32. Kernels read
float32, so a 16-bit parameter or mapping is widened by a pass of its own: 6·M·K bytes of phi a call, and nothing where
it is float32. Tensors are dense, contiguous and on one device; DTensors may be sharded over tokens
(`operators.sharding`). Where a spec or a layer_output tells n ≥ 2, x may come packed, [..., n·C]; results have the
shapes below. Gradients have their tensors' shapes and dtypes, rounded once; no second derivatives, no forward mode.

With an identity spec (H_res = I) phi is [2n, K], alpha [2], bias [2n], and there is no h_res: None goes in, none comes
out. expand_pre and post_head are then two calls each, without `out=`; there is no rms_norm_weight.

Tensors on meta, and fake ones, give shapes and dtypes, and no kernel runs. torch.jit.trace records operators and
constants, and no check: what a trace is given later is for its caller to get right in all but the tokens, whose number
and leading dimensions are free.

`out=` writes the results into given buffers, and returns those. Buffers are contiguous, have the results' shapes
and dtypes, and overlap no input. No gradient flows through such a call.

Errors: TypeError for a wrong type or dtype, ValueError for a wrong shape, layout, size or device, GradientError for
a gradient that there is none of: second derivatives, tangents, `out=` of what requires one.
"""

from __future__ import annotations

import torch

from . import operators
from .arguments import Arguments, check_streams, sizes_of
from .operators import sharding
from .ops_arguments import (
    RMS_NORM_EPS,
    call,
    check_delayed,
    check_mixed,
    check_projected,
    check_rms_norm,
    constants,
    of_stream,
    refuse_for_identity,
    sizes,
)
from .ops_prepared import remembered
from .spec import MHCSpec


@remembered
def expand(h: torch.Tensor, num_streams: int, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Copy an embedding into n equal streams.

    Args:
        h: [..., C], stream dtype.
        num_streams: n.
        out: the result's buffer.

    Returns:
        x [..., n, C] in h's dtype, x[i] = h for every stream i. Exact.
    """
    check_streams("expand", "num_streams", num_streams)
    (hidden_size,) = sizes_of("expand", "h", h, ("C",))
    arguments = Arguments("expand")
    arguments.tensor("h", h, (hidden_size,), batched=True)
    return call(arguments, operators.expand, (h,), (num_streams,), (num_streams, hidden_size), out)


@remembered
def collapse(x: torch.Tensor, *, mean: bool = False, out: torch.Tensor | None = None) -> torch.Tensor:
    """Add the streams up: the plainest way from the stream back to one hidden state, and the adjoint of `expand`.

    Args:
        x: [..., n, C], stream dtype.
        mean: the streams' mean instead, GLM-5.3's head.
        out: the result's buffer.

    Returns:
        [..., C] in x's dtype: Σ_i x[i], or Σ_i x[i]/n, added in float32 and rounded once.
    """
    arguments, x, of_x = of_stream("collapse", x)
    operator = operators.collapse_mean if mean else operators.collapse
    return call(arguments, operator, (x,), (), of_x, out)


@remembered
def aggregate(x: torch.Tensor, h_pre: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Aggregate the streams with weights that are given (Eq. 3, H_pre x): `pre` without its coefficients.

    What a draft head, or code with coefficients of its own, needs.

    Args:
        x: [..., n, C], stream dtype. h_pre: [..., n].
        out: the result's buffer.

    Returns:
        layer_input [..., C] in x's dtype: Σ_i h_pre[i] · x[i], added in float32, streams ascending, rounded once.
    """
    arguments, x, of_x = of_stream("aggregate", x)
    h_pre = arguments.widened("h_pre", h_pre, of_x[:1], batched=True)
    return call(arguments, operators.aggregate, (x, h_pre), (), of_x, out)


@remembered
def sinkhorn(
    logits: torch.Tensor, iters: int = 20, eps: float = 1e-6, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Make matrices doubly stochastic by Sinkhorn-Knopp iterations (Eq. 9): columns first, rows last.

    Args:
        logits: [..., n, n].
        iters: iterations, at least 1.
        eps: added after the softmax over columns and to every later sum. With 0, logits may lie as far apart as
            float32 has differences.
        out: the result's buffer.

    Returns:
        h_res [..., n, n], float32. Rows sum to 1 (to eps); columns as closely as `iters` brings them.
    """
    num_streams, columns = sizes_of("sinkhorn", "logits", logits, ("n", "n"))
    if num_streams != columns:
        raise ValueError(f"sinkhorn: logits: expected square matrices [..., n, n], got {list(logits.shape)}")
    check_streams("sinkhorn", "logits", num_streams)
    try:
        MHCSpec(hidden_size=1, sinkhorn_iters=iters, sinkhorn_eps=eps)
    except (TypeError, ValueError) as error:
        raise type(error)(f"sinkhorn: {str(error).removeprefix('sinkhorn_')}") from None
    arguments = Arguments("sinkhorn")
    logits = arguments.widened("logits", logits, (num_streams, num_streams), batched=True)
    return call(arguments, operators.sinkhorn, (logits,), (iters, float(eps)), (num_streams, 0), out)


@remembered
def coefficients(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    norm_weight: torch.Tensor | None = None,
    out: tuple[torch.Tensor, ...] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Compute the three mappings of a sublayer from its stream (Eq. 14-19).

    Args:
        x: [..., n, C], stream dtype. Σx² is summed in float32: beyond about 1e19/√K it overflows, and the
            logits become their biases.
        phi: [M, K]; rows pre n, post n, res n·n as [out, in] row-major. The columns are x flattened.
        alpha: [3], for the pre, post and res rows. bias: [M], not scaled by the RMS norm.
        spec: sizes and constants.
        norm_weight: [K], the RMS norm's weight; multiplied into phi unless it is absorbed there already.
        out: the results' three buffers, in their order.

    Returns:
        h_pre [..., n], h_post [..., n], h_res [..., n, n], float32. `h_res[j, i]` is the weight of input
        stream i in output stream j.
    """
    arguments, x, phi, alpha, bias = check_projected("coefficients", x, phi, alpha, bias, spec, norm_weight)
    operator = operators.gates if spec.is_identity else operators.coefficients
    return call(arguments, operator, (x, phi, alpha, bias), constants(spec), sizes(spec), out)


@remembered
def pre(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    h_pre: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    rms_norm_weight: torch.Tensor | None = None,
    rms_norm_eps: float = RMS_NORM_EPS,
    out: tuple[torch.Tensor, ...] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Compute the coefficients before a layer, and aggregate the streams to the layer's input (Eq. 3, H_pre x).

    The arguments are those of `coefficients`, and

        h_pre: [..., n]: the delayed form, in which the streams are aggregated with this, from the sublayer
            before; a first sublayer's is `first_pre(x)`. A spec with delayed_pre demands it.
        rms_norm_weight: [C], float32 or x's dtype: the layer's own RMSNorm is part of the aggregation. With
            u[c] = Σ_i h_pre[i] · x[i, c], layer_input[c] = u[c] · rsqrt(mean over c of u² + eps) · weight[c]. u stays
            in float32 and the result is rounded once, where an RMSNorm of `pre`'s result takes a u that was rounded:
            the two differ by that rounding. From |u| of about 1e19/√C on its squares overflow, and the result is 0.
        rms_norm_eps: eps of that norm.

    Returns:
        layer_input [..., C] in x's dtype, rounded once; h_post [..., n] and h_res [..., n, n] for `post`. In the
        delayed form also the sublayer's own h_pre [..., n], for the sublayer after it.
    """
    arguments, x, phi, alpha, bias = check_projected("pre", x, phi, alpha, bias, spec, norm_weight)
    h_pre = check_delayed(arguments, h_pre, spec)
    eps = check_rms_norm(arguments, rms_norm_weight, rms_norm_eps, spec, x.dtype)
    if spec.is_identity:
        return call(arguments, operators.identity_pre, (x, phi, alpha, bias, h_pre), constants(spec), sizes(spec), out)
    inputs = (x, phi, alpha, bias, h_pre, rms_norm_weight)
    return call(arguments, operators.pre, inputs, (*constants(spec), eps), sizes(spec), out)


def first_pre(x: torch.Tensor) -> torch.Tensor:
    """Return the h_pre of a first sublayer in the delayed form, which takes stream 0.

    Args:
        x: [..., n, C], of which only the shape and the device count.

    Returns:
        h_pre [..., n], float32: 1 for stream 0, 0 for the others.
    """
    num_streams, _ = sizes_of("first_pre", "x", x, ("n", "C"))
    check_streams("first_pre", "x", num_streams)
    if sharding.is_dtensor(x):
        return sharding.place_like(first_pre(x.to_local()), x, x.shape[:-1])  # type: ignore[attr-defined]
    # By axes from the end, not x[..., 0]: a trace of that holds for one count of leading dimensions.
    h_pre = torch.zeros_like(x.select(-1, 0), dtype=torch.float32, memory_format=torch.contiguous_format)
    h_pre.select(-1, 0).fill_(1)
    return h_pre


@remembered
def post(
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mix the streams after a layer and add the layer's output to each (Eq. 3).

    x_next[j] = Σ_i h_res[j, i] · x[i] + h_post[j] · layer_output

    Args:
        x: [..., n, C], stream dtype.
        layer_output: [..., C], x's dtype or float32. With a float32 stream any stream dtype, since that is what
            autocast gives. It is read as it is; of float32 beside a 16-bit stream that is 2·C elements instead of C.
        h_post: [..., n]. h_res: [..., n, n], as [out, in]: DeepSeek's `comb` is its transpose. None is the identity.
        out: the result's buffer.

    Returns:
        x_next [..., n, C] in x's dtype, combined in float32 and rounded once.
    """
    arguments, x, of_x = of_stream("post", x, layer_output)
    mappings = check_mixed(arguments, x, layer_output, h_post, h_res)
    operator = operators.identity_post if h_res is None else operators.post
    return call(arguments, operator, (x, layer_output, *mappings), (), of_x, out)


@remembered
def post_pre(
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
    norm_weight: torch.Tensor | None = None,
    rms_norm_weight: torch.Tensor | None = None,
    rms_norm_eps: float = RMS_NORM_EPS,
    out: tuple[torch.Tensor, ...] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Run the boundary between two sublayers: `post` of the one that ends, `pre` of the one that begins.

    The stream crosses memory (3n + 2)·C times instead of (4n + 2)·C, and (4n + 4)·C instead of (9n + 4)·C in the
    backward, where autograd's sum of two gradients of the stream is part of one kernel. Results are those of `post`,
    then `pre`, to the bit; gradients are rounded less often than theirs.

    Args:
        x: [..., n, C], stream dtype.
        layer_output: [..., C], as in `post`.
        h_post: [..., n], h_res: [..., n, n]: of the sublayer that ends.
        phi: [M, K], alpha: [3], bias: [M], norm_weight: [K] or None: of the sublayer that begins, as in `coefficients`.
        spec: sizes and constants.
        h_pre: [..., n]: the delayed form, in which the streams are aggregated with this instead of with
            what x_next's own projection gives; (2n + 2)·C. A spec with delayed_pre demands it.
        rms_norm_weight: [C] of the RMSNorm of the layer's input, as in `pre`. The delayed form then takes (3n + 2)·C
            too, since the norm needs a whole row of x_next.
        rms_norm_eps: its eps.
        out: the results' buffers, in their order.

    Returns:
        x_next [..., n, C] and layer_input [..., C] in x's dtype; h_post [..., n] and h_res [..., n, n] of the sublayer
        that begins, float32. In the delayed form also its h_pre [..., n], for the boundary after it.
    """
    arguments, x, phi, alpha, bias = check_projected("post_pre", x, phi, alpha, bias, spec, norm_weight)
    mappings = check_mixed(arguments, x, layer_output, h_post, h_res, spec)
    h_pre = check_delayed(arguments, h_pre, spec)
    eps = check_rms_norm(arguments, rms_norm_weight, rms_norm_eps, spec, x.dtype)
    inputs = (x, layer_output, *mappings, phi, alpha, bias, h_pre)
    if spec.is_identity:
        return call(arguments, operators.identity_post_pre, inputs, constants(spec), sizes(spec), out)
    return call(arguments, operators.post_pre, (*inputs, rms_norm_weight), (*constants(spec), eps), sizes(spec), out)


@remembered
def head(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    norm_weight: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Aggregate the streams after the last sublayer, by coefficients of their own.

    Args:
        x: [..., n, C], stream dtype.
        phi: [n, K]. alpha: [1]. bias: [n]. norm_weight: [K] or None, as in `coefficients`.
        spec: sizes and constants.
        out: the result's buffer.

    Returns:
        [..., C] in x's dtype: Σ_i h_pre[i] · x[i] with h_pre = sigmoid(alpha · s · x·phi + bias) + pre_eps.
    """
    arguments, x, phi, alpha, bias = check_projected("head", x, phi, alpha, bias, spec, norm_weight, head=True)
    return call(arguments, operators.head, (x, phi, alpha, bias), (spec.pre_eps, spec.rms_eps), sizes(spec), out)


@remembered
def expand_pre(
    h: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    norm_weight: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Run `expand` before the first sublayer, then `pre` of n equal streams, from one projection of h (Eq. 3, 7-9).

    With x[i] = h for every stream, x·phi = h · Σ_i phi[:, i], and layer_input = (Σ_i h_pre[i]) · h. So h is projected
    on phi summed over streams, and the wide stream is written but not read: (n + 3)·C a token instead of (3n + 2)·C,
    and (n + 9)·C instead of (7n + 3)·C in the backward. x is that of `expand`, to the bit. Everything else has its sums
    in another order than `pre` of x, and differs from it within their rounding.

    Args:
        h: [..., C], stream dtype.
        phi: [M, K], alpha: [3], bias: [M], norm_weight: [K] or None: of the first sublayer, as in `coefficients`.
        spec: sizes and constants.
        out: buffers for the results.

    Returns:
        x [..., n, C] and layer_input [..., C] in h's dtype; h_post [..., n] and h_res [..., n, n], float32.
    """
    arguments, h, phi, alpha, bias = check_projected("expand_pre", h, phi, alpha, bias, spec, norm_weight, expands=True)
    if spec.is_identity:
        refuse_for_identity("expand_pre", spec, out=out)
        inputs = (expand(h, spec.num_streams), phi, alpha, bias, None)
        return (inputs[0], *call(arguments, operators.identity_pre, inputs, constants(spec), sizes(spec), None))
    return call(arguments, operators.expand_pre, (h, phi, alpha, bias), constants(spec), sizes(spec), out)


@remembered
def post_head(
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor | None,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    norm_weight: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `post` after the last sublayer, then `head` of what it wrote.

    The stream is read and written once for both: (3n + 2)·C a token instead of (4n + 2)·C, and (4n + 4)·C instead of
    (9n + 4)·C in the backward. Results are those of `post`, then `head`, to the bit; gradients are rounded less often
    than theirs.

    Args:
        x: [..., n, C], stream dtype.
        layer_output: [..., C], as in `post`.
        h_post: [..., n], h_res: [..., n, n]: of the sublayer that ends.
        phi: [n, K], alpha: [1], bias: [n], norm_weight: [K] or None: as in `head`.
        spec: sizes and constants.
        out: buffers for the results.

    Returns:
        x_next [..., n, C] and the head's output [..., C], in x's dtype.
    """
    arguments, x, phi, alpha, bias = check_projected("post_head", x, phi, alpha, bias, spec, norm_weight, head=True)
    mappings = check_mixed(arguments, x, layer_output, h_post, h_res, spec)
    if spec.is_identity:
        refuse_for_identity("post_head", spec, out=out)
        x_next = post(x, layer_output, h_post)
        return x_next, head(x_next, phi, alpha, bias, spec)
    inputs = (x, layer_output, *mappings, phi, alpha, bias)
    return call(arguments, operators.post_head, inputs, (spec.pre_eps, spec.rms_eps), sizes(spec), out)
