"""The eager modules of transformers' DeepSeek-V4 (`deepseek_v4`).

`DeepseekV4HyperConnection` is all that precedes a layer, in float32. What follows a layer is no function of its own
but a line of the decoder layer's `forward`, repeated here; it rounds post, comb and both products to the stream's
dtype. One eps serves h_pre and Sinkhorn, and the post multiplier is 2.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from ...convert import comb, transformers
from ..calls.cases import SUBLAYER_INPUT
from .peer import Call, Function, Inputs, Outputs, Peer, copy_to, recorded_backward, require

MODULE = "transformers.models.deepseek_v4.modeling_deepseek_v4"
PARTS = "not apart from the rest of its module"


def load(device: torch.device) -> Peer:
    """Import the modules of DeepSeek-V4."""
    return declare(import_module(MODULE).DeepseekV4HyperConnection, device)


def declare(connection: Callable[[Any], torch.nn.Module], device: torch.device) -> Peer:
    """Return the functions, over the class of the connection."""

    def sublayer_input(inputs: Inputs, outputs: Outputs) -> Call:
        """x, phi, alpha, bias -> post, comb, layer_input."""
        x, spec = inputs["x"], inputs["spec"]
        n = spec.num_streams
        require(spec.post_scale == 2, f"post_scale = 2, got {spec.post_scale}")
        require(spec.pre_eps == spec.sinkhorn_eps, "pre_eps = sinkhorn_eps")
        config = SimpleNamespace(
            hidden_size=spec.hidden_size,
            hc_mult=n,
            hc_sinkhorn_iters=spec.sinkhorn_iters,
            hc_eps=spec.sinkhorn_eps,
            rms_norm_eps=spec.rms_eps,
        )
        module = connection(config).to(device)
        module.load_state_dict(transformers.export_state({name: inputs[name] for name in ("phi", "alpha", "bias")}))
        batch = x.unsqueeze(0)

        def run() -> tuple[torch.Tensor, ...]:
            post, matrices, collapsed = module(batch)
            return post, matrices.mT, collapsed

        return Call(run, copy_to(outputs, "h_post", "h_res", "layer_input"))

    rounded = {"allowed": 1e-2, "because": "it rounds coefficients and products to the stream's dtype"}
    return Peer(
        {
            SUBLAYER_INPUT: Function("DeepseekV4HyperConnection", sublayer_input),
            "post": Function("DeepseekV4DecoderLayer, mixing", post, **rounded),  # type: ignore[arg-type]
            "post_backward": Function("DeepseekV4DecoderLayer, mixing, backward", post_backward, **rounded),  # type: ignore[arg-type]
        },
        left_out={"expand": "a line of the model's forward"},
        otherwise=PARTS,
    )


def mix(x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Compute the decoder layer's line, to the letter but for the names."""
    dtype = x.dtype
    return h_post.to(dtype).unsqueeze(-1) * layer_output.unsqueeze(-2) + torch.matmul(
        matrices.to(dtype).transpose(-1, -2), x
    )


def batched(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """x, layer_output, h_post, comb as a batch of one sequence."""
    tensors = (inputs["x"], inputs["layer_output"], inputs["h_post"], comb(inputs["h_res"]))
    return tuple(tensor.unsqueeze(0) for tensor in tensors)


def post(inputs: Inputs, outputs: Outputs) -> Call:
    """x, layer_output, h_post, comb -> x_next."""
    tensors = batched(inputs)
    return Call(lambda: mix(*tensors), copy_to(outputs, "x_next"))


def post_backward(inputs: Inputs, outputs: Outputs) -> Call:
    """Return the call of autograd's backward through `post`'s line."""
    backward = recorded_backward(mix, batched(inputs), inputs["g_x_next"].unsqueeze(0))

    def run() -> tuple[torch.Tensor, ...]:
        *others, g_comb = backward()
        return (*others, g_comb.mT)

    return Call(run, copy_to(outputs, "g_x", "g_layer_output", "g_h_post", "g_h_res"))
