"""A stream carried through many sublayers under any of the three connections: Eq. 3 over depth, and so Eq. 4.

`run_stream` gives the end of the walk, `stream_steps` every sublayer of it:

    h = run_stream(h, sublayers, spec, connection="hc", reduction="mean")

    for step in stream_steps(h, sublayers, spec):
        streams.append(step.x)                  # streams that real layers have written
        composite = step.h_res @ composite      # ∏ H^res of Eq. 4

With a spec that has `delayed_pre`, an mHC sublayer is aggregated as `delayed` says.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, Spec, as_float64
from .coefficients import coefficients
from .delayed import first_pre
from .expand import expand
from .hyper_connections import hc_coefficients
from .identity import gates
from .post import post
from .pre import aggregate
from .residual import residual_coefficients

Connection = Literal["mhc", "hc", "residual"]
Reduction = Literal["sum", "mean"]


class Sublayer(NamedTuple):
    """A layer and the parameters of the connection around it; a plain residual takes none.

    The layer maps layer_input [..., C] to layer_output [..., C]. phi is mHC's phi [n² + 2n, n·C] or HC's
    theta [n + 2, C]; alpha [3], bias [n² + 2n] and norm_weight go with it.
    """

    layer: Callable[[Array], ArrayLike]
    phi: ArrayLike | None = None
    alpha: ArrayLike | None = None
    bias: ArrayLike | None = None
    norm_weight: ArrayLike | None = None


class Step(NamedTuple):
    """Tensors that one sublayer read, computed and wrote; n is 1 for a plain residual."""

    x: Array  # [..., n, C]
    h_pre: Array  # [..., n]; what layer_input was aggregated with, in the delayed form the one of the sublayer before
    h_post: Array  # [..., n]
    h_res: Array  # [..., n, n]
    layer_input: Array  # [..., C]
    layer_output: Array  # [..., C]
    x_next: Array  # [..., n, C]


def stream_steps(
    h: ArrayLike, sublayers: Iterable[Sublayer], spec: Spec, connection: Connection = "mhc"
) -> Iterator[Step]:
    """Expand h, then for each sublayer: coefficients, `aggregate`, the layer, `post`.

    Args:
        h: the embedding, [..., C].
        sublayers: sublayers in order.
        spec: as for `coefficients`; a plain residual has one stream whatever num_streams says. An attribute
            `delayed_pre` that is true makes it the delayed form, which of the three only "mhc" has.
        connection: "mhc", "hc" or "residual".

    Returns:
        an iterator that computes one Step per sublayer as it is asked for it.
    """
    return _walk(_first_stream(h, spec, connection), sublayers, spec, connection)


def run_stream(
    h: ArrayLike,
    sublayers: Iterable[Sublayer],
    spec: Spec,
    connection: Connection = "mhc",
    reduction: Reduction = "sum",
) -> Array:
    """Carry h through all sublayers and reduce: the "sum" or the "mean" over the streams of the last x_next.

    The other arguments are those of `stream_steps`.

    Returns:
        [..., C].
    """
    _check_choice("reduction", reduction, get_args(Reduction))
    x = _first_stream(h, spec, connection)
    for step in _walk(x, sublayers, spec, connection):
        x = step.x_next
    return x.sum(axis=-2) if reduction == "sum" else x.mean(axis=-2)


def _first_stream(h: ArrayLike, spec: Spec, connection: str) -> Array:
    _check_choice("connection", connection, get_args(Connection))
    if connection == "hc" and getattr(spec, "delayed_pre", False):
        raise ValueError("spec: expected no delayed_pre for 'hc', which has no delayed form, got one")
    h = as_float64("h", h, (..., spec.hidden_size))
    return expand(h, 1 if connection == "residual" else spec.num_streams)


def _walk(x: Array, sublayers: Iterable[Sublayer], spec: Spec, connection: str) -> Iterator[Step]:
    delayed, earlier_pre = _is_delayed(spec, connection), first_pre(x)
    for sublayer in sublayers:
        own_pre, h_post, h_res = _coefficients(x, sublayer, spec, connection)
        h_pre = earlier_pre if delayed else own_pre
        layer_input = aggregate(x, h_pre)
        layer_output = as_float64("layer_output", sublayer.layer(layer_input), layer_input.shape)
        x_next = post(x, layer_output, h_post, h_res)
        yield Step(x, h_pre, h_post, h_res, layer_input, layer_output, x_next)
        x, earlier_pre = x_next, own_pre


def _is_delayed(spec: Spec, connection: str) -> bool:
    return connection == "mhc" and getattr(spec, "delayed_pre", False)  # not in Spec: ordinary unless it is there


def _coefficients(x: Array, sublayer: Sublayer, spec: Spec, connection: str) -> tuple[Array, Array, Array]:
    _, phi, alpha, bias, norm_weight = sublayer
    if connection == "residual":
        if any(parameter is not None for parameter in sublayer[1:]):
            raise ValueError("sublayer: expected no parameters for a plain residual, got some")
        return residual_coefficients(x)
    if phi is None or alpha is None or bias is None:
        raise ValueError(f"sublayer: expected phi, alpha and bias for {connection!r}, got None among them")
    compute = coefficients if connection == "mhc" else hc_coefficients
    if connection == "mhc" and getattr(spec, "residual_mapping", "") == "identity":
        identity = np.broadcast_to(np.eye(x.shape[-2]), (*x.shape[:-1], x.shape[-2]))
        return (*gates(x, phi, alpha, bias, spec, norm_weight), identity)
    return compute(x, phi, alpha, bias, spec, norm_weight)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
