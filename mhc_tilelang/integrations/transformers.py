"""transformers' DeepSeek-V4 (`deepseek_v4`) on these kernels: `replace(model)`, and `restore(model)`.

    model = AutoModelForCausalLM.from_pretrained(...)
    mhc.integrations.transformers.replace(model)

replaces, in place, the connections before every attention and MLP, the mixing after them, and the head. A replaced
module is the module that it was, with a class of ours that derives from its own and has its name. So parameters stay
the same objects with transformers' names, shapes and orientation: state dicts, `save_pretrained`, optimizers, hooks and
what looks modules up by class know no difference, and nothing has to be converted back. The res rows of `fn` are
permuted to [out, in] in every call, a copy of M·n·C elements.

Results are those of the eager modules to float32 rounding in a float32 model. In a bfloat16 model these kernels round
less: transformers rounds post, comb and each product to bfloat16, and here the streams are combined in float32.

The forward of the decoder layer is restated here, for it mixes the streams in between; its signature is checked.
Tested with transformers 5.23.0.
"""

from __future__ import annotations

import inspect
from importlib import metadata
from typing import Any

import torch
from torch import nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as eager

from .. import ops
from ..convert.tensors import swapped_rows
from ..errors import ConversionError
from ..spec import MHCSpec

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
FORWARD = ("self", "hidden_states", "input_ids", "kwargs")  # of the decoder layer


class DeepseekV4HyperConnection(eager.DeepseekV4HyperConnection):
    """`DeepseekV4HyperConnection` by `pre`, or with what the sublayer before left to merge by `post_pre`."""

    def forward(self, hidden_streams: torch.Tensor, *waiting: torch.Tensor) -> Any:
        """hidden_streams [B, S, n, C] -> post [B, S, n], comb [B, S, n, n], collapsed [B, S, C], as transformers' own.

        With waiting = (layer_output, post, comb) of the sublayer before: merges that first, and returns the merged
        hidden_streams before the three. post and comb are float32; comb is a view.
        """
        n = self.hc_mult
        phi, bias = swapped_rows(self.fn.float(), n), swapped_rows(self.base.float(), n)
        alpha, x = self.scale.float(), hidden_streams.contiguous()
        if not waiting:
            collapsed, post, h_res = ops.pre(x, phi, alpha, bias, spec(self))
            return post, h_res.mT, collapsed
        merged, collapsed, post, h_res = ops.post_pre(x, *_ours(*waiting), phi, alpha, bias, spec(self))
        return merged, post, h_res.mT, collapsed


class DeepseekV4HyperHead(eager.DeepseekV4HyperHead):
    """`DeepseekV4HyperHead` by `head`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, n, C] -> [B, S, C]."""
        parameters = (self.hc_fn.float(), self.hc_scale.float(), self.hc_base.float(), spec(self))
        return ops.head(x.contiguous(), *parameters)


class DeepseekV4DecoderLayer(eager.DeepseekV4DecoderLayer):
    """`DeepseekV4DecoderLayer` with its two connections fused at the boundary between them."""

    def forward(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """hidden_states [B, S, n, C] -> the same of the next layer."""
        post, comb, collapsed = self.attn_hc(hidden_states)
        attention, _ = self.self_attn(self.input_layernorm(collapsed), **kwargs)
        hidden_states, post, comb, collapsed = self.ffn_hc(hidden_states, attention, post, comb)
        mlp = self.mlp(self.post_attention_layernorm(collapsed), input_ids=input_ids)
        return ops.post(hidden_states, *_ours(mlp, post, comb))


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    eager.DeepseekV4HyperConnection: DeepseekV4HyperConnection,
    eager.DeepseekV4HyperHead: DeepseekV4HyperHead,
    eager.DeepseekV4DecoderLayer: DeepseekV4DecoderLayer,
}


def replace(model: nn.Module) -> tuple[str, ...]:
    """Run a DeepSeek-V4 model's hyper-connections by these kernels from here on, in place.

    Args:
        model: any module with DeepSeek-V4's connections in it, whole models and single layers alike.

    Returns:
        The names of the modules that were replaced.

    Raises:
        ValueError: there is nothing to replace, or a connection has a number of streams or constants without kernels.
        ConversionError: the installed transformers' decoder layer is not the one that is restated here.
        Nothing has been replaced then.
    """
    _check_version()
    return _swap("replace", model, CLASSES)


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undo `replace`: transformers' own modules again, with the parameters that they have now.

    Returns the names of the modules that were restored. Raises ValueError if there are none.
    """
    return _swap("restore", model, {ours: theirs for theirs, ours in CLASSES.items()})


def spec(module: Any) -> MHCSpec:
    """The sizes and constants of a `DeepseekV4HyperConnection` or `DeepseekV4HyperHead`."""
    n = module.hc_mult
    constants = {"num_streams": n, "rms_eps": module.input_norm.eps}
    if isinstance(module, eager.DeepseekV4HyperHead):
        return MHCSpec(module.hc_fn.shape[1] // n, pre_eps=module.eps, **constants)
    eps = {"pre_eps": module.hc_eps, "sinkhorn_eps": module.hc_eps}
    return MHCSpec(module.fn.shape[1] // n, sinkhorn_iters=module.hc_sinkhorn_iters, **eps, **constants)


def _ours(layer_output: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> Tensors:
    """What `post` takes; of our own comb, a view of h_res, nothing is copied."""
    return layer_output.contiguous(), post.contiguous(), comb.mT.contiguous()


def _swap(function: str, model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> tuple[str, ...]:
    found = {name: module for name, module in model.named_modules() if type(module) in classes}
    if not found:
        wanted = ", ".join(known.__name__ for known in classes)
        raise ValueError(f"{function}: model: expected a module with {wanted}, got {type(model).__name__} with none")
    for name, module in found.items():
        if not isinstance(module, eager.DeepseekV4DecoderLayer):
            try:
                spec(module)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{function}: {name}: {error}") from None
    for module in found.values():
        module.__class__ = classes[type(module)]
    return tuple(found)


def _check_version() -> None:
    parameters = tuple(inspect.signature(eager.DeepseekV4DecoderLayer.forward).parameters)
    if parameters != FORWARD:
        raise ConversionError(
            f"replace: transformers {metadata.version('transformers')}: expected DeepseekV4DecoderLayer.forward with "
            f"the parameters {', '.join(FORWARD)}, as in 5.23.0, got {', '.join(parameters)}"
        )
