"""DTensor placements: how an operator's inputs and outputs lie on a device mesh.

A stream may be sharded over tokens, by any of its leading dimensions: batch, sequence, or both on two dimensions of a
mesh. Every token is a computation of its own, so that each rank runs the kernels on its part, and nothing is sent:

    stream, layer's input and output, mappings, and their gradients   as the stream lies
    phi, alpha, bias, rms_norm_weight                               replicated
    their gradients                                                   Partial(sum) where tokens are sharded
    projected [rows + 1, T]                                           Shard(1) where tokens are sharded

The stream, `x`, decides. Whatever else lies otherwise is redistributed: a layer's output that is Partial is reduced and
scattered, a sharded parameter gathered. A stream that is Partial is reduced first. One that is sharded over streams
or channels is refused: its mappings need all n·C of a token, and to gather those is for the caller to ask for.

T counts tokens in the order in which a rank holds them. With a sequence sharded, `projected` is therefore no slice of
what one process would have; only the backward of the same call reads it, and that lies as x does, without a choice.

PyTorch's `register_sharding` picks the cheapest of several placements by the upstream gradient too, which might
redistribute `projected`; and it tells calls apart by their int arguments, not by bools. So the rules are registered
with the propagator beneath it, as it does itself. This needs torch.distributed.tensor, which takes 0.6 s to load, and
therefore waits until the caller has loaded it: before, there is no DTensor.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

# What each declared operator returns: t as the tokens lie, d `projected`, g the gradient of a parameter. Of the
# inputs, p are parameters.
RESULTS: dict[str, str] = {}
INPUTS = {"phi": "p", "alpha": "p", "bias": "p", "rms_norm_weight": "p", "projected": "d"}  # all others: t
TOKENS = {"x": 2, "h": 1, "logits": 2}  # the input that decides, and its dimensions that are not tokens

_registered = False


def is_dtensor(value: object) -> bool:
    """Whether a tensor is a DTensor; loads nothing to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, getattr(module, "DTensor", ()))


def register_if_loaded() -> None:
    """Register the rules, once, as soon as there can be a DTensor."""
    if not _registered and hasattr(sys.modules.get("torch.distributed.tensor"), "DTensor"):
        _register()


def place_like(local: torch.Tensor, x: Any, shape: torch.Size) -> torch.Tensor:
    """Return a rank's part of a tensor of that shape as a DTensor, whose tokens lie as those of the stream x do."""
    from torch.distributed.tensor import DTensor

    placements, stride = _placements(x.placements)["t"], torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, x.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def _register() -> None:
    global _registered
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    propagator = DTensor._op_dispatcher.sharding_propagator
    for name in RESULTS:
        operator = getattr(torch.ops.mhc_tilelang, name).default
        arguments = operator._schema.arguments
        # Every constant is part of the propagator's key: a gradient that is not needed is empty.
        first_constant = next((k for k, a in enumerate(arguments) if not _is_tensor(a)), len(arguments))
        info = RuntimeSchemaInfo(static_argnum=first_constant)
        propagator.register_op_strategy(operator, _strategy, info)
    _registered = True


def _strategy(schema: Any) -> Any:
    """Return the one way in which an operator runs on the ranks, from the placements of its tokens."""
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor._op_schema import OpSpec, OpStrategy

    name = schema.op._schema.name.partition("::")[2]
    given = {
        argument.name: value
        for argument, value in zip(schema.op._schema.arguments, schema.args_schema, strict=False)
        if isinstance(value, OpStrategy)
    }
    tokens, trailing = next((key, TOKENS[key]) for key in TOKENS if key in given)
    spec = given[tokens].strategies[0].output_spec
    check_tokens(name, tokens, spec.placements, spec.ndim - trailing)
    for key, value in given.items():
        mesh = value.strategies[0].output_spec.mesh
        if mesh != spec.mesh:  # replicated on another one it might pass for replicated on this
            raise ValueError(f"{name}: {key}: expected the device mesh of {tokens}, {spec.mesh}, got {mesh}")
    placements = _placements(spec.placements)

    def lies(role: str) -> DTensorSpec:
        return DTensorSpec(spec.mesh, placements[role])

    results = tuple(lies(role) for role in RESULTS[name])
    inputs = [lies(INPUTS.get(key, "t")) for key in given]
    return OpStrategy([OpSpec(results if len(results) > 1 else results[0], inputs)])


def check_tokens(function: str, name: str, placements: tuple[Any, ...], leading: int) -> None:
    """Refuse the placements of a stream that is not sharded over one of its `leading` dimensions, or whole."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    for placement in placements:
        over_tokens = type(placement) is Shard and placement.dim < leading
        if not over_tokens and not isinstance(placement, (Replicate, Partial)):
            wanted = f"Shard of dimensions 0 to {leading - 1}" if leading else "no Shard"
            raise ValueError(
                f"{function}: {name}: expected a DTensor sharded over tokens ({wanted}) or whole, "
                f"got placements {placements}; redistribute it first"
            )


def _placements(placements: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """Return the placements of each role, from those of the tokens."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    sharded = [type(placement) is Shard for placement in placements]

    def where_sharded(placement: Any) -> tuple[Any, ...]:
        return tuple(placement if here else Replicate() for here in sharded)

    return {
        "t": tuple(p if here else Replicate() for p, here in zip(placements, sharded, strict=True)),
        "d": where_sharded(Shard(1)),
        "g": where_sharded(Partial()),
        "p": where_sharded(Replicate()),
    }


def _is_tensor(argument: Any) -> bool:
    return "Tensor" in str(argument.type)
