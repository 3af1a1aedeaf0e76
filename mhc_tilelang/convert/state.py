"""The checks of state dicts, theirs and ours, and the walk over a whole model's.

A function is named in every message as `module.function`, with the key that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch

from ..errors import ConversionError
from ..spec import STREAM_COUNTS

State = Mapping[str, torch.Tensor]
Converted = dict[str, torch.Tensor]
OURS = ("phi", "alpha", "bias")


def take(function: str, state: State, names: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Refuse a state whose keys are not exactly these, or whose values are no tensors."""
    names = tuple(names)
    missing = [name for name in names if name not in state]
    unknown = [name for name in state if name not in (*names, *optional)]
    if missing or unknown:
        found = [f"{label} {', '.join(keys)}" for label, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise ConversionError(f"{function}: state: expected the keys {', '.join(names)}, got {'; '.join(found)}")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{function}: {name}: expected a torch.Tensor, got {type(value).__name__}")


def check_shape(function: str, name: str, tensor: torch.Tensor, *shapes: tuple[int, ...]) -> None:
    """Refuse a tensor that has none of these shapes."""
    if tuple(tensor.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        hint = " (transposed?)" if tuple(tensor.shape[::-1]) in shapes else ""
        raise ValueError(f"{function}: {name}: expected shape {wanted}, got {list(tensor.shape)}{hint}")


def streams_of(function: str, name: str, rows: int) -> int:
    """n, from the n² + 2n coefficients that a tensor has."""
    for n in STREAM_COUNTS:
        if rows == n * n + 2 * n:
            return n
    wanted = ", ".join(f"{n * n + 2 * n} for {n}" for n in STREAM_COUNTS)
    raise ValueError(f"{function}: {name}: expected n² + 2n coefficients ({wanted} streams), got {rows}")


def check_projection(function: str, name: str, phi: torch.Tensor, rows: int, num_streams: int) -> None:
    """Refuse a projection [rows, K] whose K is no multiple of n, or that has another rank."""
    if phi.ndim != 2 or phi.shape[0] != rows or phi.shape[1] == 0 or phi.shape[1] % num_streams:
        hint = " (transposed?)" if phi.ndim == 2 and phi.shape[1] == rows else ""
        raise ValueError(f"{function}: {name}: expected shape [{rows}, {num_streams}·C], got {list(phi.shape)}{hint}")


def ours(function: str, state: State, optional: Iterable[str] = ()) -> int:
    """Check the state of a `HyperConnection`; returns n."""
    take(function, state, OURS, optional)
    bias = state["bias"]
    n = streams_of(function, "bias", bias.numel())
    check_shape(function, "bias", bias, (n * n + 2 * n,))
    check_shape(function, "alpha", state["alpha"], (3,))
    check_projection(function, "phi", state["phi"], bias.numel(), n)
    return n


def identity_sizes(
    function: str, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, names: tuple[str, ...]
) -> int:
    """Check an identity connection's tensors, under their names for phi, alpha and bias in this order; returns n."""
    named = dict(zip(("phi", "alpha", "bias"), names, strict=True))
    n, odd = divmod(bias.numel(), 2)
    if odd or n not in STREAM_COUNTS:
        raise ValueError(
            f"{function}: {named['bias']}: expected 2n of n in {STREAM_COUNTS} streams, got shape {list(bias.shape)}"
        )
    check_shape(function, named["bias"], bias, (2 * n,))
    check_shape(function, named["alpha"], alpha, (2,))
    check_projection(function, named["phi"], phi, 2 * n, n)
    return n


def our_head(function: str, state: State) -> int:
    """Check the state of a `HyperHead`; returns n."""
    take(function, state, OURS)
    return head_sizes(function, state["phi"], state["alpha"], state["bias"], OURS)


def head_sizes(
    function: str, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, names: tuple[str, str, str]
) -> int:
    """Check a head's tensors, theirs or ours, under their names for phi, alpha and bias; returns n."""
    n = bias.numel()
    if n not in STREAM_COUNTS:
        raise ValueError(
            f"{function}: {names[2]}: expected one of {STREAM_COUNTS} streams, got shape {list(bias.shape)}"
        )
    check_shape(function, names[2], bias, (n,))
    check_shape(function, names[1], alpha, (1,))
    check_projection(function, names[0], phi, n, n)
    return n


Converter = Callable[[State], Converted]


def import_model(function: str, state: State, key: str, converters: Mapping[str, Converter]) -> dict[str, Converted]:
    """Return the connections in a model's state dict, ours, by the name that their keys share.

    Args:
        key: a pattern that a connection's keys match in full, with the groups `module` (what they share, ending
            in) `site` and `name`. All other keys are left alone.
        converters: a converter for each site.
    """
    found: dict[str, tuple[str, Converted]] = {}
    for full, tensor in state.items():
        match = re.fullmatch(key, full)
        if match:
            found.setdefault(match["module"], (match["site"], {}))[1][match["name"]] = tensor
    if not found:
        raise ConversionError(f"{function}: state: expected keys that match {key}, got {_some(state)}")
    return {module: _within(module, converters[site], theirs) for module, (site, theirs) in found.items()}


def export_model(
    function: str, connections: Mapping[str, State], separator: str, converters: Mapping[str, Converter]
) -> Converted:
    """Return a model's state dict from states of ours, by the names that `import_model` gives them."""
    chosen = {}
    for module in connections:
        sites = [site for site in converters if re.search(rf"(^|[._]){site}$", module)]
        if not sites:
            wanted = ", ".join(converters)
            raise ConversionError(f"{function}: connections: expected names that end in {wanted}, got {module}")
        chosen[module] = converters[sites[0]]
    exported = {module: _within(module, chosen[module], state) for module, state in connections.items()}
    return {
        f"{module}{separator}{name}": tensor for module, state in exported.items() for name, tensor in state.items()
    }


def _within(module: str, converter: Converter, state: State) -> Converted:
    """Convert one module's state; an error says whose."""
    try:
        return converter(state)
    except (ConversionError, TypeError, ValueError) as error:
        raise type(error)(f"{module}: {error}") from None


def _some(keys: Iterable[str]) -> str:
    keys = list(keys)
    return f"{', '.join(keys[:4])} and {len(keys) - 4} more" if len(keys) > 5 else ", ".join(keys) or "none"
