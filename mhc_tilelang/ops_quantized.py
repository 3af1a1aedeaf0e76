"""pre and post_pre for layers that begin with an RMSNorm and an FP8 product: the layer's input in float8 with scales.

    pre_quantized, post_pre_quantized   as `pre` and `post_pre` with a rms_norm_weight, but for the layer's input
    Quantized                           which comes as this

What `ops` says of tensors, gradients, `out=` and errors holds here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from . import operators
from .arguments import Arguments
from .errors import GradientError
from .kernels.plans import QUANTIZED_GROUP
from .operators.declaration import Declaration
from .operators.library import needs_gradient
from .ops_arguments import (
    RMS_NORM_EPS,
    call,
    check_delayed,
    check_mixed,
    check_projected,
    check_rms_norm,
    constants,
    refuse_for_identity,
    sizes,
)
from .spec import MHCSpec


class Quantized(NamedTuple):
    """A layer's input as DeepGEMM's FP8 products take it: `(values, scales)` is their first operand.

    Attributes:
        values: [..., C], float8_e4m3fn.
        scales: [..., ⌈C / 128⌉], float32, contiguous: of 128 channels each, the last group the rest of C. With ue8m0
            powers of two.
        layer_input: [..., C] in the stream's dtype, what `pre` returns; None unless kept. It has the gradient.
    """

    values: torch.Tensor
    scales: torch.Tensor
    layer_input: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Values times scales, [..., C], in float32 and rounded once to `dtype`."""
        scales = self.scales.repeat_interleave(QUANTIZED_GROUP, -1)[..., : self.values.shape[-1]]
        return (self.values.float() * scales).to(dtype)


def pre_quantized(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    rms_norm_weight: torch.Tensor,
    rms_norm_eps: float = RMS_NORM_EPS,
    ue8m0: bool = False,
    keeps_layer_input: bool = False,
    h_pre: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    out: tuple[torch.Tensor, ...] | None = None,
) -> tuple[Any, ...]:
    """`pre` with a rms_norm_weight, the layer's input in float8.

    With y the float32 numbers that `pre` rounds to its layer_input, per group of 128 channels

        scale = max(1e-4, max |y|) / 448        value = e4m3(y · (1 / scale))

    in float32, rounded once, to nearest even: C bytes and the scales are written instead of C elements. A group of
    zeros has the scale of 1e-4; one with a NaN or an infinity the scale infinity, and dequantises to NaN throughout.

    Straight through: y's gradient is that of what values and scales stand for. They have none of their own, as a
    gradient has its tensor's dtype, and float8 is none for gradients. So whoever multiplies by them in an
    autograd.Function takes `layer_input` beside them, and returns the gradient as its.

    Args:
        x: as in `pre`, and so are phi, alpha, bias, spec, h_pre and norm_weight.
        rms_norm_weight: of the layer's own norm, with rms_norm_eps, as in `pre`.
        ue8m0: round scales up to powers of two, which are UE8M0 numbers as the exponents of their float32.
        keeps_layer_input: write layer_input, too: for gradients, and for what else reads it.
        out: the results' buffers: values, scales, layer_input if kept, h_post, h_res, and h_pre in the delayed form.

    Returns:
        Quantized(values, scales, layer_input), and h_post and h_res, in the delayed form h_pre, as `pre` does.

    Raises:
        GradientError: a gradient is asked for, and layer_input is not kept.
    """
    arguments, x, phi, alpha, bias = check_projected("pre_quantized", x, phi, alpha, bias, spec, norm_weight)
    h_pre, form = _check(arguments, x, h_pre, rms_norm_weight, rms_norm_eps, ue8m0, spec)
    inputs = (x, phi, alpha, bias, h_pre, rms_norm_weight)
    operator = _pick(arguments, inputs, keeps_layer_input, operators.pre_quantized, operators.pre_quantized_alone)
    return _pack(call(arguments, operator, inputs, form, sizes(spec), out), 0, keeps_layer_input)


def post_pre_quantized(
    x: torch.Tensor,
    layer_output: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    spec: MHCSpec,
    *,
    rms_norm_weight: torch.Tensor,
    rms_norm_eps: float = RMS_NORM_EPS,
    ue8m0: bool = False,
    keeps_layer_input: bool = False,
    h_pre: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    out: tuple[torch.Tensor, ...] | None = None,
) -> tuple[Any, ...]:
    """`post_pre` with a rms_norm_weight, the next layer's input in float8 as `pre_quantized` has it.

    Args:
        x: of the sublayer that ends, as layer_output, h_post and h_res, all as in `post_pre`; the others are those of
            `pre_quantized`.
        out: x_next's buffer, then those of `pre_quantized`.

    Returns:
        x_next [..., n, C], Quantized(values, scales, layer_input), and h_post and h_res of the sublayer that begins, in
        the delayed form its h_pre.
    """
    arguments, x, phi, alpha, bias = check_projected("post_pre_quantized", x, phi, alpha, bias, spec, norm_weight)
    mixed = (x, layer_output, *check_mixed(arguments, x, layer_output, h_post, h_res, spec))
    h_pre, form = _check(arguments, x, h_pre, rms_norm_weight, rms_norm_eps, ue8m0, spec)
    inputs = (*mixed, phi, alpha, bias, h_pre, rms_norm_weight)
    both = operators.post_pre_quantized, operators.post_pre_quantized_alone
    operator = _pick(arguments, inputs, keeps_layer_input, *both)
    return _pack(call(arguments, operator, inputs, form, sizes(spec), out), 1, keeps_layer_input)


def _check(
    arguments: Arguments,
    x: torch.Tensor,
    h_pre: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    ue8m0: bool,
    spec: MHCSpec,
) -> tuple[torch.Tensor | None, tuple[Any, ...]]:
    """h_pre in float32, and the constants of the operators."""
    refuse_for_identity(arguments.function, spec, rms_norm_weight=weight)
    if weight is None:
        raise TypeError(f"{arguments.function}: rms_norm_weight: expected a torch.Tensor, got None")
    h_pre = check_delayed(arguments, h_pre, spec)
    return h_pre, (*constants(spec), check_rms_norm(arguments, weight, eps, spec, x.dtype), bool(ue8m0))


def _pick(
    arguments: Arguments,
    inputs: tuple[torch.Tensor | None, ...],
    keeps_layer_input: bool,
    beside: Declaration,
    alone: Declaration,
) -> Declaration:
    """The operator; the one without layer_input has no gradient."""
    if keeps_layer_input:
        return beside
    if needs_gradient(inputs) or forward_ad._current_level >= 0:
        raise GradientError(
            f"{arguments.function}: keeps_layer_input: expected True where an argument requires a gradient, got False"
        )
    return alone


def _pack(results: tuple[torch.Tensor, ...], first: int, keeps_layer_input: bool) -> tuple[Any, ...]:
    """The results, those from the first of the quantised ones as one."""
    end = first + 2 + keeps_layer_input
    return (*results[:first], Quantized(*results[first:end]), *results[end:])
