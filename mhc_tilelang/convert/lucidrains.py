"""lucidrains' hyper-connections (0.4.11, run here): its mHC as far as it is the paper's, and its plain HC.

`ManifoldConstrainedHyperConnections` gives each stream a norm of its own and all streams the same weights, where the
paper's norm and phi span the whole stream. So its dynamic part is another function, which no phi is equal to. Its
static part maps exactly:

    static_alpha [n, 1 + n]   pre bias, then the res logits as [in, out]
    static_beta  [n]          post bias
    pre_branch_scale [1], h_post_scale [], residual_scale [1]   alpha
    dynamic_alpha_fn [1, C, 1 + n], dynamic_beta_fn [C], norm.gamma [C]   must be 0, as they start

It normalises columns of H_res last and has no eps: `RowsFirstConnection` with `spec` computes the same.

`HyperConnections`, unconstrained, is this package's `UnconstrainedHyperConnection` but that one scale serves pre and
res; with rms_eps = 0 (`unconstrained_spec`) they are equal. Fractions, several input views and several proposals are
refused by their shapes.

Streams are folded into its batch, [(b n), ..., C] with the stream fastest: `import_stream` and `export_stream`.
"""

from __future__ import annotations

import torch

from ..arguments import check_streams
from ..errors import ConversionError
from ..spec import STREAM_COUNTS, MHCSpec
from . import state as checks
from .state import Converted, State

STATIC = ("static_alpha", "static_beta")
DYNAMIC = ("dynamic_alpha_fn", "dynamic_beta_fn")
SCALES = ("pre_branch_scale", "h_post_scale", "residual_scale")
NAMES = (*STATIC, *DYNAMIC, *SCALES, "norm.gamma")
HC_SCALES = ("dynamic_alpha_scale", "dynamic_beta_scale")
HC_NAMES = (*STATIC, *DYNAMIC, *HC_SCALES, "norm.gamma")
HC_OURS = ("theta", "alpha", "bias")


def spec(hidden_size: int, num_streams: int = 4, **changes: float) -> MHCSpec:
    """Return the constants of its mHC: no eps, 20 iterations. With phi = 0 the RMS norm's eps has no effect."""
    constants = {"num_streams": num_streams, "sinkhorn_eps": 0.0, "pre_eps": 0.0}
    return MHCSpec(hidden_size, **{**constants, **changes})  # type: ignore[arg-type]


def unconstrained_spec(hidden_size: int, num_streams: int = 4) -> MHCSpec:
    """Return the spec with which an `UnconstrainedHyperConnection` equals its `HyperConnections`."""
    return MHCSpec(hidden_size, num_streams=num_streams, rms_eps=0.0)


def import_state(state: State) -> Converted:
    """Convert a `ManifoldConstrainedHyperConnections`' state without dynamic weights to phi (0), alpha, bias.

    Raises ConversionError if a dynamic weight or its norm's is not 0. To keep the static part alone, zero them first.
    """
    function = "lucidrains.import_state"
    checks.take(function, state, NAMES)
    n, channels = _sizes(function, state, (1,))
    for name, shape in zip(SCALES, ((1,), (), (1,)), strict=True):
        checks.check_shape(function, name, state[name], shape)
    for name in (*DYNAMIC, "norm.gamma"):
        if torch.count_nonzero(state[name]):
            raise ConversionError(
                f"{function}: {name}: expected 0, got weights: they are of each stream's own RMS norm and shared "
                "by all streams, and no phi of ours is equal to that"
            )
    alpha = torch.cat([state[name].reshape(1) for name in SCALES])
    phi = state["static_beta"].new_zeros(n * n + 2 * n, n * channels)
    return {"phi": phi, "alpha": alpha, "bias": _import_bias(state)}


def export_state(state: State) -> Converted:
    """phi (0), alpha, bias of a `RowsFirstConnection` -> a `ManifoldConstrainedHyperConnections`' state.

    Raises ConversionError if phi is not 0.
    """
    function = "lucidrains.export_state"
    n = checks.ours(function, state)
    if torch.count_nonzero(state["phi"]):
        raise ConversionError(
            f"{function}: phi: expected 0, got weights: they act on the norm of the whole stream, and none of "
            "hyper-connections' weights are equal to that"
        )
    channels = state["phi"].shape[1] // n
    pre, post, res = state["alpha"].unbind()
    zeros = {
        "dynamic_alpha_fn": state["phi"].new_zeros(1, channels, 1 + n),
        "dynamic_beta_fn": state["phi"].new_zeros(channels),
        "norm.gamma": state["phi"].new_zeros(channels),
    }
    scales = dict(zip(SCALES, (pre.reshape(1), post, res.reshape(1)), strict=True))
    return {**_export_bias(state["bias"], n), **scales, **zeros}


def import_unconstrained(state: State) -> Converted:
    """Convert a `HyperConnections`' state, dynamic weights included, to an `UnconstrainedHyperConnection`'s.

    Its norm's weight, norm.gamma + 1, is multiplied into theta. Its tanh must be on, the default.
    """
    function = "lucidrains.import_unconstrained"
    checks.take(function, state, HC_NAMES)
    _sizes(function, state, ())
    for name in HC_SCALES:
        checks.check_shape(function, name, state[name], ())
    alpha_fn, beta_fn = (state[name] for name in DYNAMIC)
    rows = torch.stack((alpha_fn[:, 0], beta_fn, *alpha_fn[:, 1:].unbind(1)))
    scale, beta_scale = (state[name] for name in HC_SCALES)
    theta = rows * (state["norm.gamma"] + 1)
    return {"theta": theta, "alpha": torch.stack((scale, beta_scale, scale)), "bias": _import_bias(state)}


def export_unconstrained(state: State) -> Converted:
    """theta, alpha, bias of an `UnconstrainedHyperConnection` -> a `HyperConnections`' state, with norm.gamma 0.

    Raises ConversionError if alpha differs between pre and res, which share a scale there.
    """
    function = "lucidrains.export_unconstrained"
    checks.take(function, state, HC_OURS)
    theta, alpha, bias = (state[name] for name in HC_OURS)
    n = checks.streams_of(function, "bias", bias.numel())
    checks.check_shape(function, "bias", bias, (n * n + 2 * n,))
    checks.check_shape(function, "alpha", alpha, (3,))
    if theta.ndim != 2 or theta.shape[0] != n + 2:
        raise ValueError(f"{function}: theta: expected shape [{n + 2}, C], got {list(theta.shape)}")
    pre, post, res = alpha.unbind()
    if not torch.equal(pre, res):
        raise ConversionError(
            f"{function}: alpha: expected one value for pre and res, which share a scale there, got {alpha.tolist()}"
        )
    return {
        **_export_bias(bias, n),
        "dynamic_alpha_fn": torch.cat((theta[:1], theta[2:])).T.contiguous(),
        "dynamic_beta_fn": theta[1],
        "dynamic_alpha_scale": pre,
        "dynamic_beta_scale": post,
        "norm.gamma": torch.zeros_like(theta[1]),
    }


def import_stream(residuals: torch.Tensor, num_streams: int) -> torch.Tensor:
    """Convert its [(b n), ..., C] to our [b, ..., n, C], contiguous."""
    function = "lucidrains.import_stream"
    check_streams(function, "num_streams", num_streams)
    if residuals.ndim < 2 or residuals.shape[0] % num_streams:
        got = list(residuals.shape)
        raise ValueError(f"{function}: residuals: expected shape [b·{num_streams}, ..., C], got {got}")
    return residuals.unflatten(0, (-1, num_streams)).movedim(1, -2).contiguous()


def export_stream(x: torch.Tensor) -> torch.Tensor:
    """Convert our [b, ..., n, C] to its [(b n), ..., C], contiguous."""
    if x.ndim < 3:
        raise ValueError(f"lucidrains.export_stream: x: expected shape [b, ..., n, C], got {list(x.shape)}")
    return x.movedim(-2, 1).flatten(0, 1).contiguous()


def _sizes(function: str, state: State, proposals: tuple[int, ...]) -> tuple[int, int]:
    """n and C, after a check of the shapes that both classes share."""
    n, channels = state["static_beta"].numel(), state["norm.gamma"].numel()
    if n not in STREAM_COUNTS:
        raise ValueError(f"{function}: static_beta: expected one of {STREAM_COUNTS} streams, got {n}")
    checks.check_shape(function, "static_beta", state["static_beta"], (n,))
    checks.check_shape(function, "static_alpha", state["static_alpha"], (n, n + 1))
    checks.check_shape(function, "norm.gamma", state["norm.gamma"], (channels,))
    checks.check_shape(function, "dynamic_alpha_fn", state["dynamic_alpha_fn"], (*proposals, channels, n + 1))
    checks.check_shape(function, "dynamic_beta_fn", state["dynamic_beta_fn"], (channels,))
    return n, channels


def _import_bias(state: State) -> torch.Tensor:
    """Our bias [M]: pre, post, res [out, in]."""
    pre, res = state["static_alpha"][:, 0], state["static_alpha"][:, 1:]
    return torch.cat((pre, state["static_beta"], res.T.flatten()))


def _export_bias(bias: torch.Tensor, num_streams: int) -> Converted:
    """static_alpha [n, 1 + n] and static_beta [n] of our bias."""
    n = num_streams
    pre, post, res = bias.split((n, n, n * n))
    return {"static_alpha": torch.cat((pre.unsqueeze(1), res.view(n, n).T), dim=1), "static_beta": post}
