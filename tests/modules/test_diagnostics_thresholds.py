"""Every limit of a watch, by every quantity that it is compared with.

Would catch: a limit that never fires, or only by one of the numbers that it is of; a warning that does not come back
after a step within the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch

from mhc_tilelang.diagnostics import Finding, Thresholds
from mhc_tilelang.diagnostics.report import Call, Report

N, TOKENS = 4, 3
# Which rows a limit is compared with, as `Thresholds` says.
QUANTITIES = {
    "composite_gain": ("composite_forward_gain", "composite_backward_gain"),
    "sum_deviation": ("row_deviation", "column_deviation"),
    "logit_saturation": ("logit_saturation",),
    "stream_rms": tuple(f"stream_rms_{i}" for i in range(N)),
}
CASES = [(limit, quantity) for limit, quantities in QUANTITIES.items() for quantity in quantities]


def step(
    *,
    h_res: torch.Tensor | None = None,
    stream_rms: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
) -> list[Call]:
    """A healthy step of three connections, of which the second has these instead."""

    def one(k: int) -> Call:
        changed = k == 1
        return Call(
            f"connections.{k}",
            "mhc",
            (torch.eye(N) if h_res is None or not changed else h_res).expand(TOKENS, N, N),
            (torch.ones(N) if stream_rms is None or not changed else stream_rms).expand(TOKENS, N),
            (torch.zeros(N, N) if logits is None or not changed else logits).expand(TOKENS, N, N),
        )

    return [one(k) for k in range(3)]


def beyond(quantity: str) -> list[Call]:
    """A step in which this quantity is furthest off: a row that sums to 8, or a column, logits of 11, a stream of 8."""
    if quantity == "logit_saturation":
        return step(logits=torch.full((N, N), 11.0))
    if quantity.startswith("stream_rms"):
        return step(stream_rms=torch.where(torch.arange(N) == int(quantity[-1]), 8.0, 1.0))
    h_res = torch.eye(N) / N
    h_res[1] = 8 / N
    return step(h_res=h_res if quantity in ("composite_forward_gain", "row_deviation") else h_res.mT)


def watched(limits: Thresholds, *steps: list[Call]) -> tuple[Report, list[Finding]]:
    """The report of these steps, and what it warned of."""
    warned: list[Finding] = []
    report = Report(limits, warned.append)
    for number, calls in enumerate(steps):
        report.add(number, calls)
    return report, warned


def test_every_limit_is_tried() -> None:
    assert set(QUANTITIES) == {field.name for field in fields(Thresholds)}


@pytest.mark.parametrize(("limit", "quantity"), CASES)
def test_a_limit_fires_by_each_of_its_quantities(limit: str, quantity: str) -> None:
    """Worst at the connection that is to blame, named by the quantity; a limit just above it stays quiet."""
    calls = beyond(quantity)
    report, _ = watched(Thresholds(composite_gain=None), calls)
    value = max(row[quantity] for row in report.rows)
    others = [max(row[other] for row in report.rows) for other in QUANTITIES[limit] if other != quantity]
    assert value > max(others, default=0.0)
    lowest = (value + max(others, default=0.0)) / 2
    _, warned = watched(Thresholds(**{"composite_gain": None, limit: lowest}), calls)
    assert [(finding.quantity, finding.value, finding.limit) for finding in warned] == [(quantity, value, lowest)]
    if "composite" not in quantity:  # of which every connection after it, or before, has its share
        assert warned[0].name == "connections.1"
    _, warned = watched(Thresholds(**{"composite_gain": None, limit: value * 1.001}), calls)
    assert warned == []


@pytest.mark.parametrize("make", [lambda: beyond("stream_rms_3"), lambda: beyond("composite_backward_gain")])
def test_a_warning_comes_again_after_a_step_within(make: Callable[[], list[Call]]) -> None:
    """Beyond, beyond, within, beyond: findings of three steps, warnings in the first and the last."""
    limits = Thresholds(composite_gain=4.0, stream_rms=4.0)
    report, warned = watched(limits, make(), make(), step(), make())
    assert [finding.step for finding in report.findings] == [0, 1, 3]
    assert [finding.step for finding in warned] == [0, 3]
