"""DeepSeek's weights: TileKernels' tensors, and the names in the released DeepSeek-V4 checkpoints.

    fn     [n(n+2), n·C]   phi, its res rows as [in, out]
    scale  [3]             alpha
    base   [n(n+2)]        bias, res as [in, out]
    head:  fn [n, n·C], scale [1] or a scalar, base [n]: no res rows, so ours as they are

`comb` is h_res transposed (`convert.comb`). A norm weight is `norm_weight` here, with the same order of columns. Two of
TileKernels' defaults are not V4's: the post multiplier is 1 and there are 10 iterations; `spec` has V4's values.

In a checkpoint a layer has `layers.0.hc_attn_fn`, `…_scale`, `…_base` and `hc_ffn_…`, the model `hc_head_…`: the names
that transformers 5.23 reads. No released checkpoint was loaded here.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..spec import MHCSpec
from . import state as checks
from .state import Converted, State
from .tensors import swapped_rows

NAMES = ("fn", "scale", "base")
KEY = r"(?P<module>(?:.*\.)?(?P<site>hc_(?:attn|ffn|head)))_(?P<name>[^.]+)"


def spec(hidden_size: int, num_streams: int = 4, **changes: float) -> MHCSpec:
    """Return the constants of the released DeepSeek-V4 code: `MHCSpec.deepseek_v4`."""
    return MHCSpec.deepseek_v4(hidden_size, num_streams=num_streams, **changes)


def import_state(state: State) -> Converted:
    """fn, scale, base -> phi, alpha, bias of a `HyperConnection`. fn and base are copied, scale is not."""
    return import_named("deepseek.import_state", state, NAMES)


def export_state(state: State) -> Converted:
    """phi, alpha, bias of a `HyperConnection` -> fn, scale, base."""
    return export_named("deepseek.export_state", state, NAMES)


def import_head(state: State) -> Converted:
    """Convert fn, scale, base of the head to phi, alpha, bias of a `HyperHead`, uncopied. scale may be a scalar."""
    function = "deepseek.import_head"
    checks.take(function, state, NAMES)
    phi, alpha, bias = state["fn"], state["scale"], state["base"]
    alpha = alpha.reshape(1) if alpha.ndim == 0 else alpha
    checks.head_sizes(function, phi, alpha, bias, NAMES)
    return {"phi": phi, "alpha": alpha, "bias": bias}


def export_head(state: State) -> Converted:
    """phi, alpha, bias of a `HyperHead` -> the head's fn, scale [1], base."""
    checks.our_head("deepseek.export_head", state)
    return {"fn": state["phi"], "scale": state["alpha"], "base": state["bias"]}


def import_model(state: State) -> dict[str, Converted]:
    """Convert a checkpoint's state dict to our states by module, "layers.0.hc_attn", "hc_head"; others are left."""
    return checks.import_model("deepseek.import_model", state, KEY, _IMPORTS)


def export_model(connections: Mapping[str, State]) -> Converted:
    """Convert the result of `import_model` back: the checkpoint's keys and tensors."""
    return checks.export_model("deepseek.export_model", connections, "_", _EXPORTS)


def import_named(function: str, state: State, names: tuple[str, str, str]) -> Converted:
    """`import_state` under another framework's names for fn, scale and base."""
    checks.take(function, state, names)
    phi, alpha, bias = (state[name] for name in names)
    n = checks.streams_of(function, names[2], bias.numel())
    checks.check_shape(function, names[2], bias, (n * n + 2 * n,))
    checks.check_shape(function, names[1], alpha, (3,))
    checks.check_projection(function, names[0], phi, bias.numel(), n)
    return {"phi": swapped_rows(phi, n), "alpha": alpha, "bias": swapped_rows(bias, n)}


def export_named(function: str, state: State, names: tuple[str, str, str]) -> Converted:
    """`export_state` under another framework's names for fn, scale and base."""
    n = checks.ours(function, state)
    tensors = (swapped_rows(state["phi"], n), state["alpha"], swapped_rows(state["bias"], n))
    return dict(zip(names, tensors, strict=True))


_IMPORTS = {"hc_attn": import_state, "hc_ffn": import_state, "hc_head": import_head}
_EXPORTS = {"hc_attn": export_state, "hc_ffn": export_state, "hc_head": export_head}
