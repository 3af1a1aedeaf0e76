"""The public functions: expand, coefficients, sinkhorn, pre, post, head.

Each checks its arguments (`arguments`), flattens the leading dimensions to T tokens, launches kernels
(`launch`) and puts the dimensions back. n streams, C = hidden size, K = n·C, M = n² + 2n; "..." stands for
any leading dimensions, none and empty ones included. Streams are bfloat16, float16 or float32; everything
else is float32. Tensors are contiguous and on one device. Errors: TypeError for a wrong type or dtype,
ValueError for a wrong shape, layout, size or device, GradientError where a gradient is asked for.
"""

from __future__ import annotations

import torch

from . import launch
from .arguments import STREAM_DTYPES, Arguments, check_spec, check_streams, sizes_of
from .spec import MHCSpec


def expand(h: torch.Tensor, num_streams: int) -> torch.Tensor:
    """Copy an embedding into n equal streams.

    Args:
        h: [..., C], stream dtype.
        num_streams: n.

    Returns:
        x [..., n, C] in h's dtype, x[i] = h for every stream i. Exact.
    """
    check_streams("expand", "num_streams", num_streams)
    (hidden_size,) = sizes_of("expand", "h", h, ("C",))
    arguments = Arguments("expand")
    h = arguments.tensor("h", h, (hidden_size,), STREAM_DTYPES, batched=True)
    return arguments.output(launch.expand(h, num_streams))


def sinkhorn(logits: torch.Tensor, iters: int = 20, eps: float = 1e-6) -> torch.Tensor:
    """Make matrices doubly stochastic by Sinkhorn-Knopp iterations (Eq. 9): columns first, rows last.

    Args:
        logits: [..., n, n], float32.
        iters: iterations, at least 1.
        eps: added after the softmax over columns and to every later sum. With 0, a row that lies more than
            104 below the largest entry of each of its columns gives NaN.

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
    logits = arguments.tensor("logits", logits, (num_streams, num_streams), batched=True)
    return arguments.output(launch.sinkhorn(logits, iters, float(eps)))


def coefficients(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    norm_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three mappings of a sublayer from its stream (Eq. 14-19).

    Args:
        x: [..., n, C], stream dtype. Σx² is summed in float32: beyond about 1e19/√K it overflows, and the
            logits become their biases.
        phi: [M, K]; rows pre n, post n, res n·n as [out, in] row-major. The columns are x flattened.
        alpha: [3], for the pre, post and res rows.
        bias: [M], not scaled by the RMS norm.
        spec: sizes and constants.
        norm_weight: [K], the RMS norm's weight; multiplied into phi unless it is absorbed there already.

    Returns:
        h_pre [..., n], h_post [..., n], h_res [..., n, n], float32. `h_res[j, i]` is the weight of input
        stream i in output stream j.
    """
    arguments, x, phi, alpha, bias = _projected("coefficients", x, phi, alpha, bias, spec, norm_weight)
    h_pre, h_post, h_res = _coefficients(x, phi, alpha, bias, spec)
    return arguments.output(h_pre), arguments.output(h_post), arguments.output(h_res)


def pre(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    norm_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Before a layer: the coefficients, and the streams aggregated to the layer's input (Eq. 3, H_pre x).

    The arguments are those of `coefficients`.

    Returns:
        layer_input [..., C] in x's dtype, rounded once; h_post [..., n] and h_res [..., n, n] for `post`.
    """
    arguments, x, phi, alpha, bias = _projected("pre", x, phi, alpha, bias, spec, norm_weight)
    h_pre, h_post, h_res = _coefficients(x, phi, alpha, bias, spec)
    return arguments.output(launch.aggregate(x, h_pre)), arguments.output(h_post), arguments.output(h_res)


def post(x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor) -> torch.Tensor:
    """After a layer: mix the streams and add the layer's output to each (Eq. 3).

    x_next[j] = Σ_i h_res[j, i] · x[i] + h_post[j] · layer_output

    Args:
        x: [..., n, C], stream dtype.
        layer_output: [..., C], x's dtype.
        h_post: [..., n], float32.
        h_res: [..., n, n], float32, as [out, in]. DeepSeek's `comb` is its transpose.

    Returns:
        x_next [..., n, C] in x's dtype, combined in float32 and rounded once.
    """
    num_streams, hidden_size = sizes_of("post", "x", x, ("n", "C"))
    check_streams("post", "x", num_streams)
    arguments = Arguments("post")
    x = arguments.tensor("x", x, (num_streams, hidden_size), STREAM_DTYPES, batched=True)
    layer_output = arguments.tensor("layer_output", layer_output, (hidden_size,), (x.dtype,), batched=True)
    h_post = arguments.tensor("h_post", h_post, (num_streams,), batched=True)
    h_res = arguments.tensor("h_res", h_res, (num_streams, num_streams), batched=True)
    return arguments.output(launch.post(x, layer_output, h_post, h_res))


def head(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    norm_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """After the last sublayer: aggregate the streams by coefficients of their own.

    Args:
        x: [..., n, C], stream dtype.
        phi: [n, K]. alpha: [1]. bias: [n]. norm_weight: [K] or None, as in `coefficients`.
        spec: sizes and constants.

    Returns:
        [..., C] in x's dtype: Σ_i h_pre[i] · x[i] with h_pre = sigmoid(alpha · s · x·phi + bias) + pre_eps.
    """
    arguments, x, phi, alpha, bias = _projected("head", x, phi, alpha, bias, spec, norm_weight, head=True)
    plan = launch.projection_plan(x, spec.num_streams)
    h_pre, _ = launch.head_coefficients(launch.project(x, phi, plan), alpha, bias, spec, plan)
    return arguments.output(launch.aggregate(x, h_pre))


def _projected(
    function: str,
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    norm_weight: torch.Tensor | None,
    head: bool = False,
) -> tuple[Arguments, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check the arguments of a function that projects; x flat, norm_weight multiplied into phi."""
    check_spec(function, spec)
    rows, groups = (spec.num_streams, 1) if head else (spec.num_coefficients, 3)
    arguments = Arguments(function)
    x = arguments.tensor("x", x, (spec.num_streams, spec.hidden_size), STREAM_DTYPES, batched=True)
    phi = arguments.tensor("phi", phi, (rows, spec.stream_size))
    alpha = arguments.tensor("alpha", alpha, (groups,))
    bias = arguments.tensor("bias", bias, (rows,))
    if norm_weight is not None:
        phi = phi * arguments.tensor("norm_weight", norm_weight, (spec.stream_size,))
    return arguments, x, phi, alpha, bias


def _coefficients(
    x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, spec: MHCSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    plan = launch.projection_plan(x, spec.num_coefficients)
    return launch.coefficients(launch.project(x, phi, plan), alpha, bias, spec, plan)[:3]
