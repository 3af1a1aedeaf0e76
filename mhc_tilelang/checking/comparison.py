"""Checks and comparisons: a kernel's result, the expected one, and the bound of their difference.

A check returns `Comparison`s, one per output. `compare` reduces one to numbers: an output passes when every
element is within its bound, and what is reported is the element that comes closest to its bound or exceeds
it most, its error and its bound both divided by the output's scale there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from .inputs import Case, Inputs

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """One output: the kernel's and plain torch's values, float64's, the bound and the scale of each element."""

    output: str
    got: Array
    torch: Array
    expected: Array
    bound: Array
    scale: Array


@dataclass(frozen=True)
class Verdict:
    """A comparison in numbers, relative to the output's scale."""

    error: float
    tolerance: float
    torch_error: float
    passed: bool


def compare(comparison: Comparison) -> Verdict:
    """Return the worst element of an output; NaN and infinity are errors wherever the reference has neither."""
    error, bound = worst(comparison.got, comparison)
    torch_error, _ = worst(comparison.torch, comparison)
    return Verdict(error, bound, torch_error, bool(error <= bound))


def worst(values: Array, comparison: Comparison) -> tuple[float, float]:
    """Error and bound, over scale, of the element whose error is the largest share of its bound."""
    if values.shape != comparison.expected.shape:
        return float("inf"), 0.0
    if not values.size:
        return 0.0, 0.0
    distance = np.abs(values - comparison.expected)
    distance[~np.isfinite(values) & np.isfinite(comparison.expected)] = np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(distance == 0, 0.0, distance / comparison.bound)
    at = np.unravel_index(np.argmax(share), share.shape)
    scale = comparison.scale[at] or 1.0
    return float(distance[at] / scale), float(comparison.bound[at] / scale)


def numpy64(tensor: torch.Tensor) -> Array:
    """Return a tensor's exact values in float64."""
    return tensor.detach().cpu().double().numpy()


def compare_each(
    names: Iterable[str],
    got: Iterable[torch.Tensor | None],
    plain: Iterable[torch.Tensor],
    expected: Iterable[Array],
    bounds: Iterable[Array],
    scales: Iterable[Array],
) -> list[Comparison]:
    """One `Comparison` for each output."""
    return [
        Comparison(name, numpy64(cast(torch.Tensor, g)), numpy64(p), e, b, s)
        for name, g, p, e, b, s in zip(names, got, plain, expected, bounds, scales, strict=True)
    ]


Check = Callable[[Case, Inputs], list[Comparison]]
CHECKS: dict[str, Check] = {}
OUTPUTS: dict[str, tuple[str, ...]] = {}  # of each check


def check(*outputs: str) -> Callable[[Check], Check]:
    """Enter `check_NAME` into CHECKS as NAME, and what it compares into OUTPUTS."""

    def enter(function: Check) -> Check:
        name = function.__name__.removeprefix("check_")
        CHECKS[name], OUTPUTS[name] = function, outputs
        return function

    return enter
