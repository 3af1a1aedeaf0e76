"""Argument types shared by the options of all measurements. Imports no torch."""

from __future__ import annotations

DTYPES = ("bfloat16", "float16", "float32")


def positive(text: str) -> int:
    """Return an argument that is a positive integer."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def positive_number(text: str) -> float:
    """Return an argument that is a positive number."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value
