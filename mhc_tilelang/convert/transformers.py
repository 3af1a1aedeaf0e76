"""Hugging Face's deepseek_v4, glm5_next and hy_v4 (transformers 5.24): DeepSeek's tensors under transformers' names.

    model.layers.0.attn_hc.fn, .base, .scale    and ffn_hc: a `HyperConnection`
    model.hc_head.hc_fn, .hc_base, .hc_scale    a `HyperHead`; glm5_next has a mean, `reduce("mean")`, instead

For running such a model with these kernels no weight needs converting: see `integrations.transformers`. This is for
models of your own. hy_v4 has identity connections: 2n rows, a scale of two numbers, nothing to permute. One eps,
`hc_eps`, serves h_pre and Sinkhorn, in hy_v4 both gates; `rms_norm_eps` is the RMS norm's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..spec import MHCSpec
from . import deepseek
from . import state as checks
from .state import Converted, State

NAMES = ("fn", "scale", "base")
HEAD_NAMES = ("hc_fn", "hc_scale", "hc_base")
KEY = r"(?P<module>(?:.*\.)?(?P<site>attn_hc|ffn_hc|hc_head))\.(?P<name>.+)"


def spec(config: Any) -> MHCSpec:
    """Return the constants of a `DeepseekV4Config`, a `Glm5NextTextConfig` or a `HYV4Config`."""
    if hasattr(config, "hc_magnitude"):
        return MHCSpec.hy4(
            config.hidden_size,
            num_streams=config.hc_mult,
            pre_eps=config.hc_eps,
            post_eps=config.hc_eps,
            rms_eps=config.rms_norm_eps,
            post_scale=config.hc_magnitude,
        )
    return MHCSpec(
        hidden_size=config.hidden_size,
        num_streams=config.hc_mult,
        sinkhorn_iters=config.hc_sinkhorn_iters,
        sinkhorn_eps=config.hc_eps,
        pre_eps=config.hc_eps,
        rms_eps=config.rms_norm_eps,
    )


def import_state(state: State) -> Converted:
    """Convert a state of a `DeepseekV4HyperConnection` or a `HYV4HyperConnection` to that of a `HyperConnection`."""
    if _is_identity(state, "scale"):
        checks.take("transformers.import_state", state, NAMES)
        phi, alpha, bias = (state[name] for name in NAMES)
        checks.identity_sizes("transformers.import_state", phi, alpha, bias, NAMES)
        return {"phi": phi, "alpha": alpha, "bias": bias}
    return deepseek.import_named("transformers.import_state", state, NAMES)


def export_state(state: State) -> Converted:
    """phi, alpha, bias of a `HyperConnection` -> a `DeepseekV4HyperConnection`'s or a `HYV4HyperConnection`'s state."""
    if _is_identity(state, "alpha"):
        checks.take("transformers.export_state", state, checks.OURS)
        tensors = (state["phi"], state["alpha"], state["bias"])
        checks.identity_sizes("transformers.export_state", *tensors, checks.OURS)
        return dict(zip(NAMES, tensors, strict=True))
    return deepseek.export_named("transformers.export_state", state, NAMES)


def import_head(state: State) -> Converted:
    """Convert a `DeepseekV4HyperHead`'s state to phi, alpha, bias of a `HyperHead`; nothing is copied."""
    function = "transformers.import_head"
    checks.take(function, state, HEAD_NAMES)
    phi, alpha, bias = (state[name] for name in HEAD_NAMES)
    checks.head_sizes(function, phi, alpha, bias, HEAD_NAMES)
    return {"phi": phi, "alpha": alpha, "bias": bias}


def export_head(state: State) -> Converted:
    """phi, alpha, bias of a `HyperHead` -> a `DeepseekV4HyperHead`'s state; nothing is copied."""
    checks.our_head("transformers.export_head", state)
    return dict(zip(HEAD_NAMES, (state["phi"], state["alpha"], state["bias"]), strict=True))


def import_model(state: State) -> dict[str, Converted]:
    """Convert a state dict to our states by module, such as "model.layers.0.attn_hc"; other keys are left."""
    return checks.import_model("transformers.import_model", state, KEY, _IMPORTS)


def export_model(connections: Mapping[str, State]) -> Converted:
    """Convert the result of `import_model` back: the model's keys and tensors."""
    return checks.export_model("transformers.export_model", connections, ".", _EXPORTS)


def _is_identity(state: State, name: str) -> bool:
    """Whether a connection has no res rows: 8 rows alone are n² + 2n of two streams, or 2n of four."""
    scale = state.get(name)
    return isinstance(scale, torch.Tensor) and scale.shape == (2,)


_IMPORTS = {"attn_hc": import_state, "ffn_hc": import_state, "hc_head": import_head}
_EXPORTS = {"attn_hc": export_state, "ffn_hc": export_state, "hc_head": export_head}
