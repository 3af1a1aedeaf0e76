"""JSON that came from a disk: whether it has the fields that are read, of the types that they should have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def fields(value: Any, kinds: Mapping[str, type], where: str) -> dict[str, Any]:
    """`value`, an object with these fields among others. Raises ValueError with the first that is not as expected."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {type(value).__name__}")
    for name, kind in kinds.items():
        if name not in value:
            raise ValueError(f"{where}: {name}: expected {kind.__name__}, got none")
        if type(value[name]) is not kind:
            raise ValueError(f"{where}: {name}: expected {kind.__name__}, got {type(value[name]).__name__}")
    return value


def strings(value: Any, where: str) -> tuple[str, ...]:
    """Return a list of strings as a tuple. Raises ValueError for anything else."""
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{where}: expected a list of strings, got {value!r:.100}")
    return tuple(value)
