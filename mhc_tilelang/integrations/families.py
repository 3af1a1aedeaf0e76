"""The model families of transformers that `transformers.replace` knows: their classes, and what their layers run.

    deepseek_v4    mHC                               the head weighted
    glm5_next      mHC, rms_eps 1e-5 (GLM-5.3)       the head a mean; layers hand top-k indices on
    hy_v4          identity HC (Hy4)                 the head weighted; layers hand top-k indices on
    hy_v4_vl       the same under images

An installed transformers may lack some of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

Layer = Callable[[torch.Tensor], torch.Tensor]  # layer_input -> layer_output
Sublayers = tuple[Layer, Layer, Callable[[torch.Tensor], Any]]  # attention, MLP, x_next -> what the layer returns


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        eager: transformers' module with its classes.
        prefix: common prefix of their names.
        parameters: parameters of its decoder layer's forward, as they are restated in `sublayers`.
        sublayers: the decoder layer and the arguments of its forward behind hidden_states -> what it runs.
        head_is_mean: whether its head is the streams' mean, without parameters.
        is_identity: whether its connections mix no streams: they return post and the collapsed streams.
    """

    eager: ModuleType
    prefix: str
    parameters: tuple[str, ...]
    sublayers: Callable[..., Sublayers]
    head_is_mean: bool = False
    is_identity: bool = False

    def named(self, name: str) -> type[nn.Module]:
        """Return the class of this name behind the prefix."""
        return getattr(self.eager, f"{self.prefix}{name}")

    @property
    def connection(self) -> type[nn.Module]:
        """Returns post, comb (unless it is the identity) and the collapsed streams."""
        return self.named("HyperConnection")

    @property
    def head(self) -> type[nn.Module]:
        """Streams -> a hidden state."""
        return self.named("HyperHead")

    @property
    def layer(self) -> type[nn.Module]:
        """Streams -> streams, by two connections."""
        return self.named("DecoderLayer")

    @property
    def norm(self) -> type[nn.Module]:
        """The norm within a connection."""
        return self.named("UnweightedRMSNorm")


def of_tokens(layer: Any, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Sublayers:
    """DeepSeek-V4's: experts of a layer may be chosen by the tokens."""

    def attention(layer_input: torch.Tensor) -> torch.Tensor:
        return layer.self_attn(layer.input_layernorm(layer_input), **kwargs)[0]

    def mlp(layer_input: torch.Tensor) -> torch.Tensor:
        return layer.mlp(layer.post_attention_layernorm(layer_input), input_ids=input_ids)

    return attention, mlp, lambda x_next: x_next


def of_indices(
    layer: Any,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: Any = None,
    use_cache: bool | None = False,
    position_embeddings: Any = None,
    prev_topk_indices: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Sublayers:
    """GLM-5.3's and Hy4's: an attention returns the indices that it chose for the next layer; linear ones none."""
    chosen: list[torch.Tensor | None] = [None]
    cache = past_key_values if cache is None else cache  # the name that transformers drops in 5.40

    def attention(layer_input: torch.Tensor) -> torch.Tensor:
        given = {"hidden_states": layer.input_layernorm(layer_input), "cache": cache, "attention_mask": attention_mask}
        if getattr(layer, "block_type", None) == "linear_attention":
            return layer.self_attn(**given, **kwargs)
        output, _, chosen[0] = layer.self_attn(
            **given,
            position_ids=position_ids,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            prev_topk_indices=prev_topk_indices,
            **kwargs,
        )
        return output

    def mlp(layer_input: torch.Tensor) -> torch.Tensor:
        return layer.mlp(layer.post_attention_layernorm(layer_input))

    return attention, mlp, lambda x_next: (x_next, chosen[0])


TOKENS = ("self", "hidden_states", "input_ids", "kwargs")
INDICES = (
    *("self", "hidden_states", "attention_mask", "position_ids", "cache", "use_cache", "position_embeddings"),
    *("prev_topk_indices", "kwargs"),
)
HY4 = {"parameters": INDICES, "sublayers": of_indices, "is_identity": True}
KNOWN: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"prefix": "DeepseekV4", "parameters": TOKENS, "sublayers": of_tokens},
    "glm5_next": {"prefix": "Glm5NextText", "parameters": INDICES, "sublayers": of_indices, "head_is_mean": True},
    "hy_v4": {"prefix": "HYV4", **HY4},
    "hy_v4_vl": {"prefix": "HYV4VL", **HY4},
}


def find_loaded() -> list[Family]:
    """Return the families of which a model can exist: transformers loads a family's classes with its first model."""
    modules = {name: sys.modules.get(f"transformers.models.{name}.modeling_{name}") for name in KNOWN}
    return [Family(eager, **KNOWN[name]) for name, eager in modules.items() if eager is not None]


def of_module(module: nn.Module) -> tuple[Family, type[nn.Module]] | None:
    """Return the family of a connection, a head or a decoder layer, and which of the three it is; None for another."""
    for family in find_loaded():
        for kind in (family.connection, family.head, family.layer):
            if isinstance(module, kind):
                return family, kind
    return None
