"""Runs of `study train` compared: per kind over seeds, in pairs with the plain residual, beside the published ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .output import table

if TYPE_CHECKING:
    from .runs import Run

LAST = 20  # steps whose mean is the final training loss
NAMES = {"residual": "plain residual", "hc": "HC", "mhc": "mHC", "identity": "identity HC"}
QUANTITIES: dict[str, Callable[[Run], float]] = {
    "held-out loss, lowest": lambda run: min(one.loss for one in run.evaluations),
    "held-out loss, final": lambda run: run.evaluations[-1].loss,
    "training loss, lowest": lambda run: min(run.losses),
    f"training loss, mean of last {LAST}": lambda run: statistics.fmean(run.losses[-LAST:]),
    "gradient norm, largest": lambda run: max(run.gradient_norms),
    "composite forward gain, largest": lambda run: max(one.forward_gain for one in run.evaluations),
    "composite backward gain, largest": lambda run: max(one.backward_gain for one in run.evaluations),
    "last / first activation, largest": lambda run: max(one.activation_ratio for one in run.evaluations),
}
PAIRED = tuple(name for name in QUANTITIES if "loss" in name)
PUBLISHED = """\
A public reproduction on enwik8 bytes (8 layers, width 256, n = 4, 2000 steps) states, for plain residual / HC / mHC:
lowest loss 1.841 / 1.844 / 1.787, largest gradient norm 6.18 / 6.73 / 4.46, largest last / first activation ratio
41.8 / 61.3 / 11.7. Its mappings are static, which the paper's are not, and the final loss of its mHC, unlike the
lowest, is worse than its plain residual's. The paper's own figure is of a 27B model: final loss 0.021 below the
baseline's, largest composite gain near 3000 under HC and about 1.6 under mHC."""


def compare(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row per quantity and kind: mean, lowest, highest over seeds; differences to the plain residual's runs.

    Largest and lowest of a run with a value that is not a number are not to be trusted, so that they are none either.
    """
    rows = []
    for name, quantity in QUANTITIES.items():
        for kind in dict.fromkeys(run.kind for run in runs):
            values = {run.seed: _checked(run, quantity) for run in runs if run.kind == kind}
            row: dict[str, Any] = {"quantity": name, "connection": kind, **_spread("", list(values.values()))}
            base = {run.seed: _checked(run, quantity) for run in runs if run.kind == "residual"}
            if base and kind != "residual" and name in PAIRED:
                row |= _spread("difference_", [values[seed] - base[seed] for seed in values])
            rows.append(row)
    return rows


def _checked(run: Run, quantity: Callable[[Run], float]) -> float:
    values = [*run.losses, *run.gradient_norms, *(one.loss for one in run.evaluations)]
    return quantity(run) if all(map(math.isfinite, values)) else math.nan


def _spread(prefix: str, values: list[float]) -> dict[str, float]:
    return {f"{prefix}mean": statistics.fmean(values), f"{prefix}lowest": min(values), f"{prefix}highest": max(values)}


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a line per quantity and connection."""
    lines, before = [], None
    for row in rows:
        signed = f"{row['difference_mean']:+.4f}" if "difference_mean" in row else ""
        range_ = f"{row['difference_lowest']:+.4f} to {row['difference_highest']:+.4f}" if signed else ""
        digits = ".4f" if "loss" in row["quantity"] else ".3g"
        lines.append(
            [
                row["quantity"] if row["quantity"] != before else "",
                NAMES[row["connection"]],
                format(row["mean"], digits),
                f"{row['lowest']:{digits}} to {row['highest']:{digits}}",
                signed,
                range_,
            ]
        )
        before = row["quantity"]
    headers = ["", "connection", "mean", "over seeds", "− residual", "over seeds"]
    return table(headers, lines, "llrlrl")


def curves(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row per run and step: what was recorded there."""
    rows = []
    for run in runs:
        evaluations = {one.step: one for one in run.evaluations}
        for step in range(len(run.losses) + 1):
            row: dict[str, Any] = {"connection": run.kind, "seed": run.seed, "step": step}
            row |= {"loss": f"{run.losses[step - 1]:.6g}" if step else ""}
            row |= {"gradient_norm": f"{run.gradient_norms[step - 1]:.6g}" if step else ""}
            if one := evaluations.get(step):
                measured = {"held_out_loss": one.loss, "composite_forward_gain": one.forward_gain}
                measured |= {"composite_backward_gain": one.backward_gain, "activation_ratio": one.activation_ratio}
                row |= {name: f"{value:.6g}" for name, value in measured.items()}
            rows.append(row)
    return rows
