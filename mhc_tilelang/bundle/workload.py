"""Kernels that a model needs: the package's functions are called, and their launches are recorded.

Nothing is decided here a second time: `compile.emulating` takes every launch, so the kernels are those that a model
asks for. They are the ones of a `ResidualStream` with each reduction, plain and delayed, and of every public
function, forward and backward, for all token counts; in training also with a frozen embedding and with frozen
connections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import torch

from .. import compiler, ops
from ..checking.inputs import Case, Inputs
from ..compiler.kernel import Kernel
from ..modules.connections import HyperConnection, HyperHead
from ..modules.residual_stream import ResidualStream
from ..spec import MHCSpec

# Token counts between which what is compiled may differ: gradients of parameters are one partial sum or several, and
# added in 1 or 16 lanes: by warps from some dozens of tokens on, by tiles from between 512 and 1024.
TOKEN_COUNTS = (1, 63, 128, 520, 640, 800, 2048)
GPU_BLOCKS = 2 * 132  # of a projection on an H100 or H200; shares out work, and changes no kernel
GOLDEN_TOKENS = 3
Key = tuple[str, tuple[tuple[str, Any], ...]]


def kernels_of(
    spec: MHCSpec, dtype: str, target: str, forward_only: bool = False, rms_norm_eps: float | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """Family and parameters of every kernel that a model of this width needs on "cpu" or a CUDA architecture.

    With rms_norm_eps also those of connections that normalise the layer's input, which identity connections cannot.
    """
    found: dict[Key, None] = {}

    def load(family: str, parameters: dict[str, Any]) -> Kernel:
        found.setdefault((family, tuple(parameters.items())))
        return cast(Kernel, lambda **_: None)

    with compiler.emulating(emulator(target, load)):
        for num_tokens in TOKEN_COUNTS:
            inputs = unset(inputs_of(spec, dtype), num_tokens)
            run(spec, inputs, forward_only, torch.empty_like, rms_norm_eps)
    return [(family, dict(parameters)) for family, parameters in found]


def emulator(target: str, load: Any) -> compiler.Emulator:
    """Return an emulator that takes every launch on CPU tensors as the target's."""
    platform = "cpu" if target == "cpu" else "cuda"
    return compiler.Emulator(target, load, GPU_BLOCKS, platform, {}, has_counters=False)


def inputs_of(spec: MHCSpec, dtype: str) -> Inputs:
    """The arguments of GOLDEN_TOKENS tokens; of an identity connection the parameters of its gates."""
    case = Case(spec.num_streams, spec.hidden_size, getattr(torch, dtype), GOLDEN_TOKENS)
    inputs, rows = Inputs.of(case, torch.device("cpu")), spec.num_coefficients
    parameters = {"phi": inputs.phi[:rows], "alpha": inputs.alpha[: spec.num_groups], "bias": inputs.bias[:rows]}
    return replace(inputs, **parameters)


def unset(inputs: Inputs, num_tokens: int) -> Inputs:
    """Placeholders of the same kind for more tokens, never read: memory that is not touched costs nothing."""
    names = ("h", "x", "layer_output", "h_pre", "h_post", "h_res", "logits")
    tensors = {name: getattr(inputs, name) for name in names}
    return replace(inputs, **{name: t.new_empty(num_tokens, *t.shape[1:]) for name, t in tensors.items()})


def run(
    spec: MHCSpec,
    inputs: Inputs,
    forward_only: bool,
    gradient: Callable[[torch.Tensor], torch.Tensor],
    rms_norm_eps: float | None = None,
) -> None:
    """Call everything once, and its backward with these gradients of results."""
    norms = (None,) if rms_norm_eps is None else (None, rms_norm_eps)
    for results in chain(functions(spec, inputs), *(streams(spec, inputs, eps) for eps in norms)):
        if not forward_only:
            torch.autograd.backward(results, [gradient(result) for result in results])


def streams(spec: MHCSpec, inputs: Inputs, eps: float | None) -> Iterator[list[torch.Tensor]]:
    """The output of a model of three sublayers: for each reduction, then with a part of it frozen."""
    for reduction in ("sum", "mean", HyperHead(spec)):
        yield stream(spec, inputs, reduction, True, True, eps)
    for each in (spec, replace(spec, delayed_pre=True)):
        yield stream(each, inputs, "sum", False, True, eps)
        yield stream(each, inputs, "sum", True, False, eps)
        yield stream(each, inputs, "sum", True, True, eps)


def stream(
    spec: MHCSpec, inputs: Inputs, reduction: str | HyperHead, embedding: bool, connections: bool, eps: float | None
) -> list[torch.Tensor]:
    """The output of one; which parts of it are trained, and the eps of its layers' norms."""
    h = inputs.h.clone().requires_grad_(embedding)
    stream = ResidualStream(h, spec.num_streams)
    for sublayer in range(3):
        connection = HyperConnection(spec, sublayer, rms_norm_eps=eps).requires_grad_(connections)
        with torch.no_grad():
            connection.phi.copy_(inputs.phi)
        stream.write(stream.read(connection) * 0.5)
    return [stream.reduce(reduction)]


def functions(spec: MHCSpec, inputs: Inputs) -> Iterator[list[torch.Tensor]]:
    """The results of every public function."""
    n = spec.num_streams
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in vars(inputs).items()}
    parameters = (leaves["phi"], leaves["alpha"], leaves["bias"], replace(spec, delayed_pre=False))
    mixed = (leaves["x"], leaves["layer_output"], leaves["h_post"], None if spec.is_identity else leaves["h_res"])
    yield [ops.expand(leaves["h"], n)]
    yield [ops.collapse(leaves["x"])]
    if not spec.is_identity:
        yield [ops.sinkhorn(leaves["logits"], spec.sinkhorn_iters, spec.sinkhorn_eps)]
    yield [*ops.coefficients(leaves["x"], *parameters)]
    yield [*ops.pre(leaves["x"], *parameters)]
    yield [*ops.pre(leaves["x"], *parameters, h_pre=leaves["h_pre"])]
    yield [ops.aggregate(leaves["x"], leaves["h_pre"])]
    yield [ops.post(*mixed)]
    yield [*ops.post_pre(*mixed, *parameters)]
    yield [*ops.post_pre(*mixed, *parameters, h_pre=leaves["h_pre"])]
    rows = (leaves["phi"][:n].contiguous(), leaves["alpha"][:1], leaves["bias"][:n])
    yield [ops.head(leaves["x"], *rows, spec)]
    yield [*ops.expand_pre(leaves["h"], *parameters)]
    yield [*ops.post_head(*mixed, *rows, spec)]
