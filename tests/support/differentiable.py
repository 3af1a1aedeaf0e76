"""The differentiable functions as the tests of operators see them: arguments, a call, the float64 backward.

function = FUNCTIONS["pre"]
tensors = function.tensors(case)                  # by name, in the order of the signature
outputs = function.call(tensors, case.spec)       # always a tuple
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from helpers import CPU

from mhc_tilelang import MHCSpec, ops, reference
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.families.aggregate_norm import EPS, rms_norm_weight
from mhc_tilelang.checking.inputs import Case, Inputs


@dataclass(frozen=True)
class Function:
    """One public function. `constants` of a spec are what it takes besides tensors, by name."""

    name: str
    arguments: tuple[str, ...]
    constants: Callable[[MHCSpec], dict[str, object]]
    reference: str = ""  # the function's name there, if it is another

    def tensors(self, case: Case, leading: tuple[int, ...] | None = None) -> dict[str, torch.Tensor]:
        """Fresh arguments; `leading` shapes the case's tokens."""
        inputs, n = Inputs.of(case, CPU), case.num_streams
        norm_weight = 0.5 + torch.rand(case.spec.stream_size, generator=torch.Generator().manual_seed(case.seed))
        drawn = {**vars(inputs), "norm_weight": norm_weight, "rms_norm_weight": rms_norm_weight(case, CPU)}
        if "head" in self.name:
            drawn.update(phi=inputs.phi[:n].clone(), alpha=inputs.alpha[:1].clone(), bias=inputs.bias[:n].clone())
        if leading is not None:
            for name in {"h", "x", "layer_output", "h_pre", "h_post", "h_res", "logits"} & drawn.keys():
                drawn[name] = drawn[name].view(*leading, *drawn[name].shape[1:])
        return {name: drawn[name] for name in self.arguments}

    def call(self, tensors: dict[str, torch.Tensor], spec: MHCSpec, **more: object) -> tuple[torch.Tensor, ...]:
        outputs = getattr(ops, self.name)(**tensors, **self.constants(spec), **more)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def reference_backward(
        self, g_outputs: list[torch.Tensor | None], tensors: dict[str, torch.Tensor], spec: MHCSpec
    ) -> dict[str, object]:
        """The gradients in float64, by argument."""
        upstream = [None if g is None else numpy64(g) for g in g_outputs]
        arguments = {name: numpy64(tensor.detach()) for name, tensor in tensors.items()}
        backward = getattr(reference, f"{self.reference or self.name}_backward")
        gradients = backward(*upstream, **arguments, **self.constants(spec))
        return dict(zip(self.arguments, gradients if isinstance(gradients, tuple) else (gradients,), strict=True))


@dataclass(frozen=True)
class Normed(Function):
    """A function with `rms_norm_weight`, its last argument: in float64, where nothing is rounded, a norm after it."""

    def reference_backward(
        self, g_outputs: list[torch.Tensor | None], tensors: dict[str, torch.Tensor], spec: MHCSpec
    ) -> dict[str, object]:
        *plain, weight = self.arguments
        arguments = {name: numpy64(tensors[name].detach()) for name in plain}
        forward = getattr(reference, self.reference or self.name)
        index = 1 if self.name == "post_pre" else 0  # of layer_input
        u, g = forward(**arguments, spec=spec)[index], g_outputs[index]
        g_normed = None if g is None else numpy64(g)
        g_u, g_weight = reference.rms_norm_backward(g_normed, u, numpy64(tensors[weight].detach()), EPS)
        upstream = [*g_outputs[:index], torch.from_numpy(g_u), *g_outputs[index + 1 :]]
        without = Function(self.name, tuple(plain), lambda spec: {"spec": spec}, self.reference)
        of_plain = without.reference_backward(upstream, {name: tensors[name] for name in plain}, spec)
        return {**of_plain, weight: g_weight}


_PROJECTED = ("x", "phi", "alpha", "bias", "norm_weight")
_MIXED = ("x", "layer_output", "h_post", "h_res")
FUNCTIONS = {
    function.name: function
    for function in (
        Function("expand", ("h",), lambda spec: {"num_streams": spec.num_streams}),
        Function("collapse", ("x",), lambda _: {}),
        Function("aggregate", ("x", "h_pre"), lambda _: {}),
        Function("sinkhorn", ("logits",), lambda spec: {"iters": spec.sinkhorn_iters, "eps": spec.sinkhorn_eps}),
        Function("coefficients", _PROJECTED, lambda spec: {"spec": spec}),
        Function("pre", _PROJECTED, lambda spec: {"spec": spec}),
        Function("head", _PROJECTED, lambda spec: {"spec": spec}),
        Function("post", _MIXED, lambda _: {}),
        Function("post_pre", (*_MIXED, *_PROJECTED[1:]), lambda spec: {"spec": spec}),
        Function("expand_pre", ("h", *_PROJECTED[1:]), lambda spec: {"spec": spec}),
        Function("post_head", (*_MIXED, *_PROJECTED[1:]), lambda spec: {"spec": spec}),
    )
}
# The delayed form of two of them, by the function's name.
DELAYED = {
    "pre": Function("pre", ("x", "h_pre", *_PROJECTED[1:]), lambda spec: {"spec": spec}, "delayed_pre"),
    "post_pre": Function(
        "post_pre", (*_MIXED, "h_pre", *_PROJECTED[1:]), lambda spec: {"spec": spec}, "delayed_post_pre"
    ),
}
# The same two and their delayed forms with the layer's own norm.
NORMED = {
    f"{form}-normed": Normed(
        function.name,
        (*function.arguments, "rms_norm_weight"),
        lambda spec: {"spec": spec, "rms_norm_eps": EPS},
        function.reference,
    )
    for form, function in {
        **{name: FUNCTIONS[name] for name in DELAYED},
        **{f"{name}-delayed": function for name, function in DELAYED.items()},
    }.items()
}
FORMS = FUNCTIONS | {f"{name}-delayed": function for name, function in DELAYED.items()}
FORMS |= {name: NORMED[name] for name in ("pre-normed", "post_pre-delayed-normed")}
QUANTIZED = ("pre_quantized", "post_pre_quantized")  # and each _alone, which has no gradient
IDENTITY = ("gates", "identity_pre", "identity_post", "identity_post_pre")  # operators, of functions listed above


def upstream(outputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Random gradients of the outputs, in their dtypes."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(output.shape, generator=generator).to(output.dtype) for output in outputs]


def requiring(tensors: dict[str, torch.Tensor], names: tuple[str, ...] | None = None) -> dict[str, torch.Tensor]:
    """The tensors, of which those named (or all) require a gradient."""
    wanted = tensors if names is None else names
    return {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}


def gradients(
    outputs: tuple[torch.Tensor, ...], tensors: dict[str, torch.Tensor], g_outputs: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the gradients, by argument, of those that require one and that the outputs depend on."""
    inputs = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    found = torch.autograd.grad(outputs, list(inputs.values()), g_outputs, allow_unused=True)
    return {name: gradient for name, gradient in zip(inputs, found, strict=True) if gradient is not None}
