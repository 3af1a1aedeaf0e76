"""Numbers that say how healthy mappings, logits and streams are; plain torch, batched, of any float dtype.

h_res[j, i] is the weight of input stream i in output stream j. A forward pass multiplies streams by it from the
left, so its row sums Σ_i are what equal streams become; a backward pass multiplies gradients by its transpose, so
its column sums Σ_j are what equal gradients become. The paper's Amax gain magnitude is the largest absolute row sum
for the forward pass and the largest absolute column sum for the backward pass, of one mapping or of the product of
all over depth (Eq. 4). Sums are signed: Σ, then | |.

"..." stands for any leading dimensions. TypeError for what is no float tensor, ValueError for a wrong shape or limit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..spec import MHCSpec

LOGIT_LIMIT = 10.0  # e^-10 is 5e-5: beyond it an exp in Sinkhorn hardly answers to its logit
ENTRY_MARGIN = 1e-3  # of h_res from 0 and from 1; the initial one, 6·I - 3, has 0.9926 and 0.0025


class Gain(NamedTuple):
    """Amax gain magnitudes: `forward` from row sums, `backward` from column sums."""

    forward: torch.Tensor
    backward: torch.Tensor


def amax_gain(h_res: torch.Tensor) -> Gain:
    """Return the largest absolute row sum and column sum of each matrix.

    Args:
        h_res: [..., n, n], [out, in]; a single mapping or a `composite`.

    Returns:
        forward [...]: max over j of |Σ_i h_res[j, i]|. backward [...]: max over i of |Σ_j h_res[j, i]|.
    """
    _check_square("amax_gain", h_res)
    return Gain(h_res.sum(-1).abs().amax(-1), h_res.sum(-2).abs().amax(-1))


def composite(h_res: torch.Tensor) -> torch.Tensor:
    """Return the product over depth, H_{L−1} ··· H_1 H_0 (Eq. 4): what L sublayers make of the streams before them.

    Args:
        h_res: [L, ..., n, n] with L ≥ 1, the first sublayer first.

    Returns:
        [..., n, n], [out, in].
    """
    _check_depth("composite", h_res)
    product = h_res[0]
    for mapping in h_res[1:]:
        product = mapping @ product
    return product


def composite_gains(h_res: torch.Tensor) -> Gain:
    """Amax gains over depth, of what reaches each sublayer from either end.

    Args:
        h_res: [L, ..., n, n] with L ≥ 1, the first sublayer first.

    Returns:
        forward [L, ...]: entry l is that of H_l ··· H_0, which carries the embedding past sublayer l.
        backward [L, ...]: entry l is that of H_{L−1} ··· H_l, which carries the last gradient back past sublayer l.
    """
    _check_depth("composite_gains", h_res)
    product, forward = h_res[0], [amax_gain(h_res[0]).forward]
    for mapping in h_res[1:]:
        product = mapping @ product
        forward.append(amax_gain(product).forward)
    product, backward = h_res[-1], [amax_gain(h_res[-1]).backward]
    for mapping in h_res[:-1].flip(0):
        product = product @ mapping
        backward.append(amax_gain(product).backward)
    return Gain(torch.stack(forward), torch.stack(backward[::-1]))


def sum_deviation(h_res: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each matrix's distance from doubly stochastic: h_res [..., n, n] -> rows [...], columns [...].

    rows: max over j of |Σ_i h_res[j, i] − 1|, which Sinkhorn leaves at its eps. columns: the same over i of Σ_j.
    """
    _check_square("sum_deviation", h_res)
    return (h_res.sum(-1) - 1).abs().amax(-1), (h_res.sum(-2) - 1).abs().amax(-1)


def spectral_norm(h_res: torch.Tensor) -> torch.Tensor:
    """Return the largest singular value, h_res [..., n, n] -> [...]; 1 for a doubly stochastic one.

    By a singular value decomposition, which waits for the device: not part of `watch`.
    """
    _check_square("spectral_norm", h_res)
    return torch.linalg.svdvals(h_res)[..., 0]


def row_entropy(h_res: torch.Tensor) -> torch.Tensor:
    """The mean entropy of rows in nats, h_res [..., n, n] -> [...]: 0 where outputs copy one stream, log n at the mean.

    Of p[i] = |h_res[j, i]| / Σ_i |h_res[j, i]|, which is the row itself where it is a distribution. A zero row has 0.
    """
    _check_square("row_entropy", h_res)
    weights = h_res.abs()
    shares = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(h_res.dtype).tiny)
    return -torch.xlogy(shares, shares).sum(-1).mean(-1)


def entry_saturation(h_res: torch.Tensor, margin: float = ENTRY_MARGIN) -> torch.Tensor:
    """Return the share of entries within `margin` of 0 or of 1, h_res [..., n, n] -> [...]: where gradients vanish."""
    _check_square("entry_saturation", h_res)
    _check_positive("entry_saturation", "margin", margin)
    return ((h_res.abs() < margin) | ((h_res - 1).abs() < margin)).to(h_res.dtype).mean((-2, -1))


def logit_saturation(logits: torch.Tensor, limit: float = LOGIT_LIMIT) -> torch.Tensor:
    """Return the share of logits before Sinkhorn with |logit| > limit, [..., n, n] -> [...]."""
    _check_square("logit_saturation", logits, "logits")
    _check_positive("logit_saturation", "limit", limit)
    return (logits.abs() > limit).to(logits.dtype).mean((-2, -1))


def stream_rms(x: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of each stream over its channels, in float32: x [..., n, C] -> [..., n]."""
    _check_float("stream_rms", "x", x)
    if x.ndim < 2:
        raise ValueError(f"stream_rms: x: expected shape [..., n, C], got {list(x.shape)}")
    return x.float().square().mean(-1).sqrt()


def res_logits(
    x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, spec: MHCSpec
) -> torch.Tensor:
    """Return the logits that `coefficients` gives to Sinkhorn and does not return (Eq. 14-16), in float32 plain torch.

    Args: as for `coefficients`.

    Returns:
        [..., n, n], [out, in].
    """
    _check_float("res_logits", "x", x)
    n, sizes = spec.num_streams, (spec.num_streams, spec.hidden_size)
    if tuple(x.shape[-2:]) != sizes:
        raise ValueError(f"res_logits: x: expected shape [..., {sizes[0]}, {sizes[1]}], got {list(x.shape)}")
    if tuple(phi.shape) != (spec.num_coefficients, spec.stream_size):
        wanted = [spec.num_coefficients, spec.stream_size]
        raise ValueError(f"res_logits: phi: expected shape {wanted}, got {list(phi.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        flat = x.flatten(-2).float()
        scale = torch.rsqrt(flat.square().mean(-1, keepdim=True) + spec.rms_eps)
        return (alpha[2] * scale * (flat @ phi[2 * n :].mT) + bias[2 * n :]).unflatten(-1, (n, n))


def _check_float(function: str, name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise TypeError(f"{function}: {name}: expected a float tensor, got {got}")


def _check_square(function: str, matrices: torch.Tensor, name: str = "h_res") -> None:
    _check_float(function, name, matrices)
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"{function}: {name}: expected square matrices [..., n, n], got shape {list(matrices.shape)}")


def _check_depth(function: str, h_res: torch.Tensor) -> None:
    _check_square(function, h_res)
    if h_res.ndim < 3 or not h_res.shape[0]:
        raise ValueError(f"{function}: h_res: expected shape [L, ..., n, n] with L ≥ 1, got {list(h_res.shape)}")


def _check_positive(function: str, name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{function}: {name}: expected a positive number, got {value!r}")
