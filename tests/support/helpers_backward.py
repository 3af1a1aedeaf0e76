"""The backward functions as the tests call them: arguments and outputs by name, and what every one of them must hold.

    BACKWARD   name -> Backward: a call of `perf.calls.table`, its arguments at a case, and the same in float64

Tensors lie as the kernels take them: tokens first, but last in `projected` and `g_projected`, and nowhere in the
parameters and the sums over tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from helpers import CPU, assert_same_bits

from mhc_tilelang import reference
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.families.aggregate_norm import EPS
from mhc_tilelang.checking.inputs import Gradients, Inputs
from mhc_tilelang.perf.calls.every_call import Given, function
from mhc_tilelang.perf.calls.table import CALLS

TOKENS_LAST = ("projected", "g_projected")
PARAMETERS = ("phi", "alpha", "bias", "weight")
SUMS = ("g_phi", "g_alpha", "g_bias", "g_weight")
PADDING = 4096  # elements of NaN before and after: more than a tile of any kernel reaches beyond


@dataclass(frozen=True)
class Backward:
    """A backward call of the table, and the same in float64."""

    name: str
    reference: Callable

    @property
    def outputs(self):
        return CALLS[self.name].results

    def arguments(self, case):
        """Return the arguments by name, `spec` where the function takes it. Tensors kept by a forward are drawn."""
        given = Given(case, Inputs.of(case, CPU), Gradients.of(case, CPU), eps=EPS)
        rows = case.num_streams if self.name.startswith("head") else case.spec.num_coefficients
        return given.arguments(self.name, projected=projected_of(case, rows))

    def __call__(self, arguments, **options):
        """The outputs by name, None included."""
        got = function(self.name)(**arguments, **options)
        return dict(zip(self.outputs, got if isinstance(got, tuple) else (got,), strict=True))

    def float64(self, arguments):
        """The outputs by name, from what the tensors hold exactly."""
        exact = {name: numpy64(a) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}
        with np.errstate(invalid="ignore", over="ignore"):
            got = self.reference(**exact)
        return dict(zip(self.outputs, got, strict=True))


def project_backward64(g_projected, x, phi, h_pre=None, g_layer_input=None):
    """g_x and g_phi in float64, with what the aggregation adds."""
    g_x, g_phi = reference.project_backward(g_projected[:-1].T, g_projected[-1] / 2, x, phi)
    if g_layer_input is not None:
        g_x = g_x + reference.aggregate_backward(g_layer_input, x, h_pre)[0]
    return g_x, g_phi


def through_logits(g_z, projected, alpha_rows, spec):
    """Map g_z [M, T] to g_projected [M + 1, T], g_alpha of every row, and g_bias."""
    m, s = projected[:-1], projected[-1]
    through = g_z * alpha_rows[:, None]
    rho = -(s**2) / spec.stream_size * (through * m).sum(0)
    return np.vstack([through * s, rho]), (g_z * m).sum(1), g_z.sum(1)


def slope(z):
    """σ'(z) = σ(z)·σ(−z), without the 1 − σ(z) that is 0 from 37 on."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-z)) / (1 + np.exp(z))


def coefficients_backward64(g_h_pre, g_h_post, g_h_res, projected, alpha, bias, spec):
    """g_projected, g_alpha and g_bias in float64."""
    n, tokens = spec.num_streams, projected.shape[1]
    rows = reference.alpha_per_row(alpha, n)
    z = rows[:, None] * projected[:-1] + bias[:, None]
    logits = z[2 * n :].T.reshape(tokens, n, n)
    g_res = reference.sinkhorn_backward(g_h_res, logits, spec.sinkhorn_iters, spec.sinkhorn_eps)
    gates = np.concatenate([g_h_pre, spec.post_scale * g_h_post], axis=1).T * slope(z[: 2 * n])
    g_z = np.concatenate([gates, g_res.reshape(tokens, n * n).T])
    g_projected, g_alpha_rows, g_bias = through_logits(g_z, projected, rows, spec)
    return g_projected, np.add.reduceat(g_alpha_rows, [0, n, 2 * n]), g_bias


def head_coefficients_backward64(g_h_pre, projected, alpha, bias, spec):
    """Compute the coefficients' backward of the pre group alone, in float64."""
    z = alpha * projected[:-1] + bias[:, None]
    rows = np.repeat(alpha, spec.num_streams)
    g_projected, g_alpha_rows, g_bias = through_logits(g_h_pre.T * slope(z), projected, rows, spec)
    return g_projected, g_alpha_rows.sum(keepdims=True), g_bias


def aggregate_norm_backward64(g_layer_input, x, h_pre, weight, eps):
    """g_u, g_h_pre and g_weight in float64."""
    g_u, g_weight = reference.rms_norm_backward(g_layer_input, reference.aggregate(x, h_pre), weight, eps)
    return g_u, reference.aggregate_backward(g_u, x, h_pre)[1], g_weight


def projected_of(case, rows):
    """m and s as a forward leaves them: m of the case's standard deviation, s positive."""
    generator = torch.Generator().manual_seed(case.seed + 17)
    projected = torch.randn(rows + 1, case.num_tokens, generator=generator) * case.logit_std
    projected[-1].exp_()
    return projected


REFERENCES = {
    "expand_backward": lambda g_x: (g_x.sum(1),),
    "sinkhorn_backward": lambda **arguments: (reference.sinkhorn_backward(**arguments),),
    "aggregate_backward": lambda g_layer_input, x: (np.einsum("tc,tic->ti", g_layer_input, x),),
    "aggregate_gradients": reference.aggregate_backward,
    "post_backward": reference.post_backward,
    "project_backward_aggregated": project_backward64,
    "coefficients_backward": coefficients_backward64,
    "head_coefficients_backward": head_coefficients_backward64,
    "aggregate_norm_backward": aggregate_norm_backward64,
}
BACKWARD = {name: Backward(name, float64) for name, float64 in REFERENCES.items()}


def exact_arguments(name, case):
    """The arguments of a function at a case, in float64."""
    arguments = BACKWARD[name].arguments(case)
    return {key: numpy64(a) if isinstance(a, torch.Tensor) else a for key, a in arguments.items()}


def token_axis(name):
    """The axis that counts tokens; None for parameters, and for their gradients."""
    return None if name in PARAMETERS + SUMS else 1 if name in TOKENS_LAST else 0


def take_tokens(tensors, places):
    """Every tensor that has tokens, at these places; the rest as it is."""
    return {name: take(name, value, places) for name, value in tensors.items()}


def take(name, value, places):
    if not isinstance(value, torch.Tensor) or token_axis(name) is None:
        return value
    return value[places] if token_axis(name) == 0 else value[:, places].contiguous()


def in_nan(tensor, offset):
    """Copy a tensor, contiguous, with NaN in the memory before and after it."""
    buffer = torch.full((2 * PADDING + offset + tensor.numel(),), torch.nan, dtype=tensor.dtype)
    view = buffer[PADDING + offset : PADDING + offset + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def assert_reads_nothing_else(function, case):
    """Every tensor inside a buffer of NaN, at an aligned place and at an odd one, gives the bits of lone tensors.

    Catches a row beyond the last token that is multiplied by zero, and an aligned vector load.
    """
    arguments = function.arguments(case)
    expected = function(arguments)
    for offset in (0, 1):
        inside = {n: in_nan(a, offset) if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
        assert_same_bits(function(inside).values(), expected.values())


def assert_special_values_stay(function, case, field, value):
    """One NaN or infinity in an argument: results are non-finite where the float64 function's are, and nowhere else.

    Where it sits in one token, no bit of another token's results moves. Catches a masked lane or a row of padding
    that is multiplied into a sum, and a maximum that swallows NaN.
    """
    arguments = function.arguments(case)
    before = function(arguments)
    spoilt = arguments[field].clone()
    axis, token = token_axis(field), case.num_tokens // 2
    place = spoilt if axis is None else spoilt.select(axis, token)
    index = np.unravel_index(place.numel() // 2, place.shape)
    place[tuple(map(int, index))] = value
    arguments = {**arguments, field: spoilt}
    expected = function.float64(arguments)
    others = torch.arange(case.num_tokens) != token
    for name, got in function(arguments).items():
        np.testing.assert_array_equal(np.isfinite(numpy64(got)), np.isfinite(expected[name]), err_msg=name)
        if axis is not None and token_axis(name) is not None:
            assert_same_bits([take(name, got, others)], [take(name, before[name], others)])
    assert not all(np.isfinite(values).all() for values in expected.values())
