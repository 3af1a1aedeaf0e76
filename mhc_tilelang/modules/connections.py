"""Connections as modules: what stands between the residual stream and a layer, one class per kind.

    HyperConnection               "mhc"       Eq. 7-9: constrained mappings, by the kernels
    UnconstrainedHyperConnection  "hc"        Eq. 5, in plain torch
    ResidualConnection            "residual"  Eq. 1: no parameters, no streams
    HyperHead                     the streams' reduction after the last sublayer; not a connection

A connection is called with the stream x and returns the layer's input, then whatever its `merge` needs to
write the layer's output back (the `Connection` protocol):

    layer_input, *mappings = connection(x)
    x_next = connection.merge(x, layer(layer_input), *mappings)

With a spec that has delayed_pre a HyperConnection also takes an h_pre, and returns one that `merge` has no use for:

    layer_input, h_post, h_res, h_pre = connection(x, h_pre)     mhc.first_pre(x) for the first sublayer

`residual_stream.ResidualStream` makes these calls for a model. Every parameter belongs to the call, none to
`merge`: what wraps a module's call (DDP, FSDP, hooks) sees all of them.

What the modules share, such as parameters that stay float32, is in `stream_module`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from .. import ops, ops_quantized
from ..arguments import check_dense, check_eps, shape_of
from ..operators.library import needs_gradient
from ..ops_arguments import refuse_for_identity
from ..spec import MHCSpec
from .stream_module import INITIAL_ALPHA, Device, StreamModule, SublayerModule, make_parameter

KINDS = ("mhc", "hc", "residual")
IDENTITY_STD = 0.006  # of phi at first, Hy4's


class Connection(Protocol):
    """Interface of a connection for `ResidualStream`: its kind, its sizes, a call, and the merge that goes with it."""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""

    @property
    def spec(self) -> MHCSpec | None:
        """The streams it is made for; None where x is [..., C], a single one."""

    @property
    def merge(self) -> Callable[..., torch.Tensor]:
        """merge(x, layer_output, *mappings) -> x_next, with the x and the mappings of one call."""

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x -> layer_input [..., C] in x's dtype, then the mappings.

        Of kind "mhc" and with delayed_pre: x, h_pre -> layer_input, the mappings, and an h_pre for the next one.
        """


def connection(
    kind: str, spec: MHCSpec, sublayer: int = 0, device: Device = None
) -> HyperConnection | UnconstrainedHyperConnection | ResidualConnection:
    """Return the connection of a kind, so that a model switches by one argument.

    Args:
        kind: "mhc", "hc" or "residual".
        spec: as for `HyperConnection`. A plain residual has no use for it, nor for what follows.
        sublayer: as for `HyperConnection`.
        device: as for `HyperConnection`.

    Raises ValueError for another kind.
    """
    check_kind("connection", "kind", kind)
    if kind == "residual":
        return ResidualConnection()
    make = HyperConnection if kind == "mhc" else UnconstrainedHyperConnection
    return make(spec, sublayer, device)


def check_kind(function: str, name: str, kind: str) -> None:
    """Refuse anything but a kind of connection."""
    if kind not in KINDS:
        wanted = ", ".join(repr(known) for known in KINDS)
        raise ValueError(f"{function}: {name}: expected one of {wanted}, got {kind!r}")


class HyperConnection(SublayerModule):
    """A manifold-constrained hyper-connection (mHC, Eq. 7-9): `pre` as a module, with `post` as its merge.

    Args:
        spec: sizes and constants.
        sublayer: the sublayer's place in the model, from 0; attention and MLP count one each. It only picks
            the stream that is read at first.
        device: device of the parameters, as in torch's modules.
        rms_norm_eps: with a number, the connection normalises the layer's input, so that the layer has no RMSNorm of
            its own to begin with (`rms_norm_weight` in `pre`).
        quantized: beside rms_norm_eps, give the layer's input in float8: a `Quantized` with values and scales, and
            where something needs a gradient the layer_input that has it (`pre_quantized`).
        ue8m0: beside quantized, round scales up to powers of two.

    Parameters (float32):
        phi [M, K] starts at 0, so that mappings depend on their biases alone; the paper is silent here, and
            this is our choice. alpha [3] starts at 0.01.
        bias [M] starts at −3 for pre, but +3 at stream `sublayer % n`, at 0 for post and at 6·I − 3 for res:
            h_pre is 0.95 for one stream and 0.05 for the others, h_post 1, and h_res close to the identity.
        With residual_mapping="identity" phi is [2n, K], alpha [2] and bias [2n], which start as Hy4's: phi normal with
            standard deviation 0.006, bias at −log(n − 1) for pre and 0 for post. h_pre is about 1/n and h_post 1.
        rms_norm_weight [C] starts at 1; None without rms_norm_eps.

    They stay float32 in FSDP2 too: where a model is sharded with a mixed-precision policy, call `fully_shard` on
    its connections first, without one.
    """

    kind = "mhc"

    rms_norm_weight: nn.Parameter | None

    def __init__(
        self,
        spec: MHCSpec,
        sublayer: int = 0,
        device: Device = None,
        rms_norm_eps: float | None = None,
        *,
        quantized: bool = False,
        ue8m0: bool = False,
    ) -> None:
        super().__init__(spec, sublayer)
        self.rms_norm_eps, self.quantized, self.ue8m0 = rms_norm_eps, quantized, ue8m0
        if quantized and rms_norm_eps is None:
            raise ValueError("HyperConnection: quantized: expected False without a rms_norm_eps, got True")
        if ue8m0 and not quantized:
            raise ValueError("HyperConnection: ue8m0: expected False where quantized is, got True")
        self.phi = make_parameter(spec.num_coefficients, spec.stream_size, device=device)
        self.alpha = make_parameter(spec.num_groups, device=device)
        self.bias = make_parameter(spec.num_coefficients, device=device)
        self.rms_norm_weight = None
        refuse_for_identity("HyperConnection", spec, rms_norm_eps=rms_norm_eps)
        if rms_norm_eps is not None:
            self.rms_norm_eps = check_eps("HyperConnection", rms_norm_eps)
            self.rms_norm_weight = make_parameter(spec.hidden_size, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The values above, in place."""
        row, identity = self.identity()
        if self.spec.is_identity:
            nn.init.normal_(self.phi, std=IDENTITY_STD)  # with 0 the streams would be equal for ever
            self.reset_static(torch.full_like(row, -math.log(max(self.spec.num_streams - 1, 1))), 0.0, row[:0])
            return
        nn.init.zeros_(self.phi)
        self.reset_static(6 * row - 3, 0.0, 6 * identity - 3)
        if self.rms_norm_weight is not None:
            nn.init.ones_(self.rms_norm_weight)

    def forward(self, x: torch.Tensor, *waiting: Any, expands: bool = False) -> tuple[Any, ...]:
        """x [..., n, C] -> layer_input [..., C], h_post [..., n], h_res [..., n, n], as `pre`; in place of layer_input
        a `Quantized` of a connection that is `quantized`.

        With what the sublayer before has not merged yet, its layer_output, h_post and h_res, the merge and the read
        are one operator, `post_pre`, and x_next [..., n, C] comes before the other results. Where it `expands`, x is an
        embedding [..., C]: `expand_pre`, and the stream [..., n, C] comes before the other results.

        A spec with delayed_pre takes one more, last: the h_pre [..., n] that the sublayer before returned, also last,
        or a first sublayer's, `first_pre(x)`. `merge` has no use for it. It does not expand, nor with a norm.

        With residual_mapping="identity" there is no h_res among what it takes and returns.
        """
        delayed = self.spec.delayed_pre
        mappings = "h_post" if self.spec.is_identity else "h_post, h_res"
        if len(waiting) - delayed not in (0, 2 + (not self.spec.is_identity)):
            also, first = (" and h_pre", "; a first sublayer's is first_pre(x)") if delayed else ("", "")
            raise TypeError(
                f"HyperConnection: expected x{also}, or x, layer_output, {mappings}{also}, got x and {len(waiting)} "
                f"more{first}"
            )
        if expands and (waiting or self.rms_norm()):
            got = f"{len(waiting)} more" if waiting else f"a rms_norm_eps of {self.rms_norm_eps}"
            raise TypeError(f"HyperConnection: expands: expected an embedding alone, and no layer norm, got {got}")
        *written, h_pre = waiting if delayed else (*waiting, None)
        parameters = (self.phi, self.alpha, self.bias, self.spec)
        self.check_parameters(*parameters[:3])
        if expands:
            return ops.expand_pre(x, *parameters)
        pre: Any = ops_quantized.pre_quantized if self.quantized else ops.pre
        post_pre: Any = ops_quantized.post_pre_quantized if self.quantized else ops.post_pre
        options = {**self.rms_norm(), "h_pre": h_pre}
        if self.quantized:
            taken = (x, *waiting, *parameters[:3], self.rms_norm_weight)
            options |= {"ue8m0": self.ue8m0, "keeps_layer_input": needs_gradient(taken)}
        results: tuple[Any, ...]
        if written:
            layer_output, h_post, *h_res = written
            results = post_pre(x, layer_output, h_post, h_res[0] if h_res else None, *parameters, **options)
        else:
            results = pre(x, *parameters, **options)
        return results

    def rms_norm(self) -> dict[str, Any]:
        """Return the arguments of `pre` and `post_pre` for the layer's norm: none without one."""
        if self.rms_norm_eps is None:
            return {}
        return {"rms_norm_weight": self.rms_norm_weight, "rms_norm_eps": self.rms_norm_eps}

    def extra_repr(self) -> str:
        text = super().extra_repr() + (", delayed_pre=True" if self.spec.delayed_pre else "")
        text += ", residual_mapping='identity'" if self.spec.is_identity else ""
        text += f", rms_norm_eps={self.rms_norm_eps}" if self.rms_norm_eps is not None else ""
        return text + (f", quantized=True, ue8m0={self.ue8m0}" if self.quantized else "")

    @staticmethod
    def merge(
        x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x_next [..., n, C], as `post`."""
        return ops.post(x, layer_output, h_post, h_res)


class UnconstrainedHyperConnection(SublayerModule):
    """A plain hyper-connection (HC, Eq. 5; arXiv 2409.19606): no mapping is constrained. Plain torch, for comparison.

    With s[i] = rsqrt(mean over c of x[i, c]² + rms_eps), a norm per stream, and t = tanh(theta · (s·x)ᵀ) [n + 2, n]:

        h_pre  = alpha[0] · t[0] + bias[:n]
        h_post = alpha[1] · t[1] + bias[n:2n]
        h_res  = alpha[2] · t[2:] + bias[2n:] as [n, n], [out, in]

    Arguments are those of `HyperConnection`; of the spec's constants only rms_eps has a meaning here. There is no
    delayed form: a spec with delayed_pre is refused.

    Parameters (float32), which start as in the HC paper:
        theta [n + 2, C], rows pre, post, res n, at 0; alpha [3] at 0.01.
        bias [M], at h_pre = 1 for stream `sublayer % n` and 0 for the others, h_post = 1, h_res = I: every
            stream is a plain residual.
    """

    kind = "hc"

    def __init__(self, spec: MHCSpec, sublayer: int = 0, device: Device = None) -> None:
        super().__init__(spec, sublayer)
        if spec.delayed_pre:
            raise ValueError("UnconstrainedHyperConnection: spec: expected delayed_pre=False, got True")
        if spec.is_identity:
            raise ValueError("UnconstrainedHyperConnection: spec: expected residual_mapping='sinkhorn', got 'identity'")
        self.theta = make_parameter(spec.num_streams + 2, spec.hidden_size, device=device)
        self.alpha = make_parameter(3, device=device)
        self.bias = make_parameter(spec.num_coefficients, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The values above, in place."""
        nn.init.zeros_(self.theta)
        row, identity = self.identity()
        self.reset_static(row, 1.0, identity)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [..., n, C] -> layer_input [..., C] in x's dtype, rounded once; h_post [..., n], h_res [..., n, n]."""
        n, sizes = self.spec.num_streams, (self.spec.num_streams, self.spec.hidden_size)
        check_dense("UnconstrainedHyperConnection", "x", x)
        if tuple(shape_of(x)[-2:]) != sizes:
            wanted, got = ", ".join(map(str, sizes)), list(shape_of(x))
            raise ValueError(f"UnconstrainedHyperConnection: x: expected shape [..., {wanted}], got {got}")
        _check_device("UnconstrainedHyperConnection", "x", x, self.theta.device)
        with _without_autocast(x):
            streams = x.float()
            scale = torch.rsqrt(streams.square().mean(-1, keepdim=True) + self.spec.rms_eps)
            dynamic = torch.tanh(self.theta @ (scale * streams).mT)
            h_pre = self.alpha[0] * dynamic.select(-2, 0) + self.bias[:n]
            h_post = self.alpha[1] * dynamic.select(-2, 1) + self.bias[n : 2 * n]
            h_res = self.alpha[2] * dynamic.narrow(-2, 2, n) + self.bias[2 * n :].view(n, n)
            return (h_pre.unsqueeze(-1) * streams).sum(-2).to(x.dtype), h_post, h_res

    @staticmethod
    def merge(x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor) -> torch.Tensor:
        """x_next [..., n, C], as `post`: float32 inside, rounded once to x's dtype."""
        for name, given in {"x": x, "layer_output": layer_output, "h_post": h_post, "h_res": h_res}.items():
            check_dense("UnconstrainedHyperConnection.merge", name, given)
            _check_device("UnconstrainedHyperConnection.merge", name, given, x.device)
        with _without_autocast(x):
            written = h_post.unsqueeze(-1) * layer_output.float().unsqueeze(-2)
            return (h_res @ x.float() + written).to(x.dtype)


def _check_device(function: str, name: str, value: torch.Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{function}: {name}: expected device {device}, got {value.device}")


def _without_autocast(x: torch.Tensor) -> torch.autocast:
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)  # which knows no meta


class ResidualConnection(nn.Module):
    """The plain residual (Eq. 1): the layer reads x [..., C] itself, and its output is added. No parameters."""

    kind = "residual"
    spec = None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        """x [..., C] -> (x,)."""
        return (x,)

    @staticmethod
    def merge(x: torch.Tensor, layer_output: torch.Tensor) -> torch.Tensor:
        """x + layer_output in x's dtype, rounded once."""
        return (x + layer_output).to(x.dtype)


class HyperHead(StreamModule):
    """`head` as a module: the streams aggregated by coefficients of their own, after the last sublayer.

    Args:
        spec: as for `HyperConnection`.
        device: as for `HyperConnection`.

    Parameters (float32): phi [n, K] starts at 0, alpha [1] at 0.01 and bias [n] at −log(n − 1), where the
    sigmoid gives 1/n. So a head starts as the mean of the streams (to pre_eps); our choice. Of one stream
    bias starts at 0, and the head as half of it: no finite bias gives 1. With residual_mapping="identity" phi starts as
    a connection's, which is Hy4's.
    """

    def __init__(self, spec: MHCSpec, device: Device = None) -> None:
        super().__init__(spec)
        self.phi = make_parameter(spec.num_streams, spec.stream_size, device=device)
        self.alpha = make_parameter(1, device=device)
        self.bias = make_parameter(spec.num_streams, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The values above, in place."""
        if self.spec.is_identity:
            nn.init.normal_(self.phi, std=IDENTITY_STD)
        else:
            nn.init.zeros_(self.phi)
        nn.init.constant_(self.alpha, INITIAL_ALPHA)
        nn.init.constant_(self.bias, -math.log(max(self.spec.num_streams - 1, 1)))

    def forward(self, x: torch.Tensor, *waiting: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """x [..., n, C] -> [..., C] in x's dtype.

        With what the last sublayer has not merged yet, its layer_output, h_post and h_res, the merge and the head are
        one operator, `post_head`, and x_next [..., n, C] comes before the result.
        """
        parameters = (self.phi, self.alpha, self.bias, self.spec)
        self.check_parameters(*parameters[:3])
        if not waiting:
            return ops.head(x, *parameters)
        layer_output, h_post, *h_res = waiting
        return ops.post_head(x, layer_output, h_post, h_res[0] if h_res else None, *parameters)
