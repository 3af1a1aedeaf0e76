"""The table that `mhc-tilelang predict` prints."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from .devices import Device
from .predicted import Prediction

HEADERS = ("predicted", "tokens", "C", "µs", "from", "to", "regime", "memory", "SM", "launches")


def table(predictions: Sequence[Prediction], gpu: Device, flushed: bool) -> str:
    """A line a prediction, then what to change first or why there is no number."""
    cold = "flushed" if flushed else "as a call before leaves it"
    head = (
        f"Predicted from machine code for {gpu.arch}, constants of {gpu.name}; nothing here was measured. L2: {cold}."
    )
    lines = [line(each) for each in predictions]
    text = tabulate(lines, HEADERS, tablefmt="simple", disable_numparse=True, colalign=("left", *["right"] * 5, "left"))
    said = [f"{each.name}, {each.tokens} × {each.hidden_size}: {sentence(each)}" for each in predictions]
    return "\n\n".join([head, text, "\n".join(said), FOOTNOTE])


FOOTNOTE = """\
from, to: what covered nine of ten published times of kernels that the fit had not seen, and what a device's assumed
constants leave open. memory: bytes over the bandwidth that copies approach; SM: with an infinitely fast memory."""


def line(each: Prediction) -> tuple[str, ...]:
    """One prediction."""
    numbers = (each.us, each.low, each.high)
    terms = (each.memory_us, each.sm_us)
    return (
        each.name,
        str(each.tokens),
        str(each.hidden_size),
        *map(number, numbers),
        each.regime,
        *map(number, terms),
        str(each.launches),
    )


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "–" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def sentence(each: Prediction) -> str:
    """Why there is no number, or what to change first."""
    return "; ".join(filter(None, (*each.reasons, each.change_first)))
