"""Checks of the public functions across arguments: what is projected, mixed, normalised, written into.

`ops` calls these; `arguments` checks a tensor at a time.
"""

from __future__ import annotations

from typing import Any

import torch

from .arguments import STREAM_DTYPES, Arguments, check_dense, check_eps, check_spec, check_streams, shape_of, sizes_of
from .operators.declaration import Declaration
from .ops_prepared import note_passed
from .spec import MHCSpec

RMS_NORM_EPS = 1e-6


def of_stream(
    function: str, x: torch.Tensor, layer_output: torch.Tensor | None = None
) -> tuple[Arguments, torch.Tensor, tuple[int, int]]:
    """The arguments of a function of a stream x [..., n, C], which is checked; x, unpacked; n and C.

    Only beside a layer_output [..., C], of which it has as many dimensions, can a packed x be told.
    """
    if layer_output is not None:
        check_dense(function, "x", x)
        check_dense(function, "layer_output", layer_output)
        if x.ndim == layer_output.ndim > 0:
            of_layer = max(shape_of(layer_output)[-1], 1)
            x = unpack(x, shape_of(x)[-1] // of_layer, of_layer)
    num_streams, hidden_size = sizes_of(function, "x", x, ("n", "C"))
    check_streams(function, "x", num_streams)
    arguments = Arguments(function)
    arguments.tensor("x", x, (num_streams, hidden_size), batched=True)
    return arguments, x, (num_streams, hidden_size)


def check_projected(
    function: str,
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    norm_weight: torch.Tensor | None,
    head: bool = False,
    expands: bool = False,
) -> tuple[Arguments, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check the arguments of a function that projects; return x, phi, alpha and bias as the operators take them.

    That is x unpacked, the others in float32, norm_weight multiplied into phi. Where it `expands`, x is an embedding h.
    """
    check_spec(function, spec)
    rows, groups = (spec.num_streams, 1) if head else (spec.num_coefficients, spec.num_groups)
    arguments = Arguments(function)
    if expands:
        arguments.tensor("h", x, (spec.hidden_size,), batched=True)
    else:
        x = unpack(x, spec.num_streams, spec.hidden_size)
        arguments.tensor("x", x, (spec.num_streams, spec.hidden_size), batched=True)
    phi = arguments.widened("phi", phi, (rows, spec.stream_size))
    alpha = arguments.widened("alpha", alpha, (groups,))
    bias = arguments.widened("bias", bias, (rows,))
    if norm_weight is not None:
        phi = phi * arguments.widened("norm_weight", norm_weight, (spec.stream_size,))
    return arguments, x, phi, alpha, bias


def unpack(x: torch.Tensor, num_streams: int, hidden_size: int) -> torch.Tensor:
    """View a packed stream [..., n·C] as [..., n, C]; anything else is left as it is, for the checks.

    With n = 1 either shape could be meant, so a packed one is not taken.
    """
    is_packed = isinstance(x, torch.Tensor) and x.layout is torch.strided and not x.is_nested and num_streams > 1
    if is_packed and shape_of(x)[-1:] == (num_streams * hidden_size,):
        return x.unflatten(-1, (num_streams, hidden_size))
    return x


def check_mixed(
    arguments: Arguments,
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor | None,
    spec: MHCSpec | None = None,
) -> tuple[torch.Tensor, ...]:
    """Check what `post` mixes with a stream x that is checked already; return h_post and h_res in float32.

    An h_res of None is the identity, and not returned. A spec says whether it has to be None.
    """
    if spec is not None and (h_res is None) != spec.is_identity:
        wanted, got = ("None", "a tensor") if spec.is_identity else ("a torch.Tensor", "None")
        mapping = f"the spec has residual_mapping={spec.residual_mapping!r}"
        raise TypeError(f"{arguments.function}: h_res: expected {wanted}, got {got} ({mapping})")
    n, hidden_size = shape_of(x)[-2:]
    arguments.tensor("layer_output", layer_output, (hidden_size,), layer_dtypes(x.dtype), batched=True)
    h_post = arguments.widened("h_post", h_post, (n,), batched=True)
    if h_res is None:
        return (h_post,)
    return h_post, arguments.widened("h_res", h_res, (n, n), batched=True)


def layer_dtypes(stream: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes that a layer's output may have beside a stream: kernels read it as it is."""
    return STREAM_DTYPES if stream == torch.float32 else (stream, torch.float32)


def check_delayed(arguments: Arguments, h_pre: torch.Tensor | None, spec: MHCSpec) -> torch.Tensor | None:
    """Check the h_pre of the delayed form, which a spec may demand; return it in float32."""
    if h_pre is not None:
        return arguments.widened("h_pre", h_pre, (spec.num_streams,), batched=True)
    if spec.delayed_pre:
        raise ValueError(
            f"{arguments.function}: h_pre: expected that of the sublayer before, as the spec has delayed_pre, got None "
            "(a first sublayer's is first_pre(x))"
        )
    return None


def check_rms_norm(
    arguments: Arguments, weight: torch.Tensor | None, eps: float, spec: MHCSpec, dtype: torch.dtype
) -> float:
    """Check the norm of a layer's input; an eps of its own without a weight would be ignored, so it is refused."""
    refuse_for_identity(arguments.function, spec, rms_norm_weight=weight)
    eps = check_eps(arguments.function, eps)
    if weight is not None:
        dtypes = tuple(dict.fromkeys((torch.float32, dtype)))
        arguments.tensor("rms_norm_weight", weight, (spec.hidden_size,), dtypes)
    elif eps != RMS_NORM_EPS:
        raise ValueError(f"{arguments.function}: rms_norm_eps: expected a rms_norm_weight beside it, got {eps} alone")
    return eps


def call(
    arguments: Arguments,
    operator: Declaration,
    inputs: tuple[torch.Tensor | None, ...],
    constants: tuple[float, ...],
    sizes: tuple[int, int],
    out: Any,
) -> Any:
    """Run an operator on checked inputs: its results without what it keeps, or `out` after a check, written.

    `sizes` are n and C. One result is a tensor, several are a tuple in their order, and so is `out`.
    """
    names = operator.public(inputs)
    if out is None:
        results = operator.operator(*inputs, *constants)
        if isinstance(results, tuple):
            results = results[: len(names)] if len(names) > 1 else results[0]
        return note_passed(results, operator, inputs, constants, ())
    buffers = (out,) if len(names) == 1 else out
    if not isinstance(buffers, (tuple, list)) or len(buffers) != len(names):
        got = f"{len(buffers)} of them" if isinstance(buffers, (tuple, list)) else type(buffers).__name__
        raise TypeError(f"{arguments.function}: out: expected a tuple of {', '.join(names)}, got {got}")
    for k, (name, buffer) in enumerate(zip(names, buffers, strict=True)):
        dtype = operator.dtype(name, inputs[0].dtype)  # type: ignore[union-attr]
        shown = "out" if len(names) == 1 else f"out[{k}] ({name})"
        arguments.buffer(shown, buffer, operator.shape(name, *sizes), dtype)
    operator.write(inputs, constants, buffers)
    return note_passed(out if len(names) == 1 else tuple(buffers), operator, inputs, constants, buffers)


def sizes(spec: MHCSpec) -> tuple[int, int]:
    """n and C."""
    return spec.num_streams, spec.hidden_size


def refuse_for_identity(function: str, spec: MHCSpec, **given: object) -> None:
    """Refuse what has no form for an identity hyper-connection."""
    for name, value in given.items():
        if spec.is_identity and value is not None:
            raise ValueError(f"{function}: {name}: expected None with residual_mapping='identity', got one")


def constants(spec: MHCSpec) -> tuple[float, ...]:
    """A spec as an operator takes it; the sizes are those of its tensors."""
    if spec.is_identity:
        return spec.pre_eps, spec.rms_eps, spec.post_scale, spec.post_eps
    return spec.sinkhorn_iters, spec.sinkhorn_eps, spec.pre_eps, spec.rms_eps, spec.post_scale
