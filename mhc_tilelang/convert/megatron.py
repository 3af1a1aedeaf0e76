"""Megatron-LM's `HyperConnectionModule` (from its source; Megatron is not run here).

    mapping_proj.weight                [M, n·C]   phi
    alpha_pre, alpha_post, alpha_res   [1] each   alpha
    bias                               [M]

Its stream is packed, [s, b, n·C]: `unpack_streams` and `pack_streams` are views of it and back. Versions differ in
H_res, under the same names and shapes. The main branch of 2026 mixes with H_res transposed, as DeepSeek does; before
that it mixed with H_res itself, rows normalised first, as Liger does. Ask `convert.orientation` which one a copy has,
and pass the convention.

Its norm divides by rms + 1e-6, eps outside the root: for a stream of rms 1 that is within 1e-6 of ours, and no spec
makes it equal. Its single-pass form (`mhc_single_pass`) has eps inside the root and is `delayed_pre` here. The earlier
versions had a `norm.weight` in the state which nothing read: leave it out. Contraction is a mean, `reduce("mean")`;
where it is learned (`hc_head_fn`, `…_base`, `…_scale` of the block), those are DeepSeek's (`deepseek.import_head`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..arguments import check_streams, sizes_of
from ..spec import MHCSpec
from . import state as checks
from .conventions import CONVENTIONS, IN_OUT, OUTERMOST, Convention
from .state import Converted, State
from .tensors import swapped_rows

ALPHAS = ("alpha_pre", "alpha_post", "alpha_res")
NAMES = ("mapping_proj.weight", "bias", *ALPHAS)
SITES = ("self_attention_hyper_connection", "mlp_hyper_connection", "cross_attention_hyper_connection")
KEY = rf"(?P<module>(?:.*\.)?(?P<site>{'|'.join(SITES)}))\.(?P<name>.+)"
MAIN = CONVENTIONS["deepseek"]


def spec(hidden_size: int, num_streams: int = 4, **changes: float) -> MHCSpec:
    """Return the constants of the main branch: every eps 1e-6, 20 iterations; see above for its norm."""
    return MHCSpec(hidden_size, **{"num_streams": num_streams, **changes})  # type: ignore[arg-type]


def unpack_streams(hidden_states: torch.Tensor, num_streams: int) -> torch.Tensor:
    """View packed streams [..., n·C] as [..., n, C]; no token changes its place, and nothing is copied.

    Raises:
        ValueError: n·C is no multiple of n, or the tensor is not contiguous, so that functions would need a copy.
    """
    function = "megatron.unpack_streams"
    check_streams(function, "num_streams", num_streams)
    (size,) = sizes_of(function, "hidden_states", hidden_states, ("n·C",))
    if size % num_streams:
        raise ValueError(f"{function}: hidden_states: expected [..., {num_streams}·C], got {list(hidden_states.shape)}")
    _check_contiguous(function, "hidden_states", hidden_states)
    return hidden_states.view(*hidden_states.shape[:-1], num_streams, size // num_streams)


def pack_streams(x: torch.Tensor) -> torch.Tensor:
    """View streams [..., n, C] as [..., n·C], which is what Megatron's pipeline sends. Raises as `unpack_streams`."""
    function = "megatron.pack_streams"
    num_streams, hidden_size = sizes_of(function, "x", x, ("n", "C"))
    _check_contiguous(function, "x", x)
    return x.view(*x.shape[:-2], num_streams * hidden_size)


def import_state(state: State, convention: Convention = MAIN) -> Converted:
    """Convert a `HyperConnectionModule`'s state to phi, alpha, bias.

    Args:
        convention: the version's. For `convention.last` "rows", as in the main branch, a `HyperConnection` computes
            the same, for "columns" a `RowsFirstConnection`.
    """
    function = "megatron.import_state"
    _check_convention(function, convention)
    checks.take(function, state, NAMES)
    phi, bias = state["mapping_proj.weight"], state["bias"]
    n = checks.streams_of(function, "bias", bias.numel())
    checks.check_shape(function, "bias", bias, (n * n + 2 * n,))
    checks.check_projection(function, "mapping_proj.weight", phi, bias.numel(), n)
    for name in ALPHAS:
        checks.check_shape(function, name, state[name], (1,))
    alpha = torch.cat([state[name] for name in ALPHAS])
    return {"phi": _rows(phi, n, convention), "alpha": alpha, "bias": _rows(bias, n, convention)}


def export_state(state: State, convention: Convention = MAIN) -> Converted:
    """phi, alpha, bias of what `import_state` names -> a `HyperConnectionModule`'s state."""
    function = "megatron.export_state"
    _check_convention(function, convention)
    n = checks.ours(function, state)
    phi, bias = _rows(state["phi"], n, convention), _rows(state["bias"], n, convention)
    return {"mapping_proj.weight": phi, "bias": bias, **dict(zip(ALPHAS, state["alpha"].split(1), strict=True))}


def import_model(state: State, convention: Convention = MAIN) -> dict[str, Converted]:
    """Convert a state dict to our states by module, "decoder.layers.0.self_attention_hyper_connection" and so on."""
    converters = dict.fromkeys(SITES, lambda theirs: import_state(theirs, convention))
    return checks.import_model("megatron.import_model", state, KEY, converters)


def export_model(connections: Mapping[str, State], convention: Convention = MAIN) -> Converted:
    """Convert the result of `import_model` back: the model's keys and tensors."""
    converters = dict.fromkeys(SITES, lambda ours: export_state(ours, convention))
    return checks.export_model("megatron.export_model", connections, ".", converters)


def _check_convention(function: str, convention: Convention) -> None:
    if not isinstance(convention, Convention):
        raise TypeError(f"{function}: convention: expected a Convention, got {type(convention).__name__}")
    if convention.streams != OUTERMOST:
        raise ValueError(f"{function}: convention: expected streams outermost, got {convention.streams}")


def _rows(tensor: torch.Tensor, num_streams: int, convention: Convention) -> torch.Tensor:
    """Convert between its order of the res rows and ours."""
    return swapped_rows(tensor, num_streams) if convention.res == IN_OUT else tensor


def _check_contiguous(function: str, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{function}: {name}: expected a contiguous tensor, of which a view is enough, got strides "
            f"{tuple(tensor.stride())} for shape {list(tensor.shape)}; call .contiguous() first"
        )
