"""Constants of each device for the model, with source and certainty of each; files hold them.

B200's are fitted on the published times (`fit`); SMs and clock are not. Nothing of an H100 or H200 is fitted: their
memory is scaled as B200's asymptote stands to its copy (7.963 to 7.36 TB/s), the rest is B200's or assumed, and every
prediction for them spans what the assumed ones leave open. `perf/on_gpu.sh` measures a device and writes such a file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import MHCError
from .model import Constants

FILES = {name: Path(__file__).with_name(f"{name}.json") for name in ("b200", "h200", "h100")}
FASTER_WHEN_LARGER = ("sms", "clock_ghz", "bandwidth", "overlap")


class Constant(NamedTuple):
    """A number, what it may be at least and at most, and where it is from."""

    value: float
    low: float
    high: float
    source: str


class Device(NamedTuple):
    """A GPU: its architecture, the bytes of its last-level cache, its constants."""

    name: str
    arch: str
    cache_bytes: int
    table: dict[str, Constant]

    @property
    def constants(self) -> Constants:
        return Constants(**{name: constant.value for name, constant in self.table.items()})

    def extreme(self, fastest: bool) -> Constants:
        """Return every constant at the end of its range that gives the shortest time, or the longest."""
        return Constants(
            **{
                name: one.high if (name in FASTER_WHEN_LARGER) == fastest else one.low
                for name, one in self.table.items()
            }
        )

    def facts(self) -> dict[str, object]:
        """Return the device as its file has it."""
        table = {name: constant._asdict() for name, constant in self.table.items()}
        return {"name": self.name, "arch": self.arch, "cache_bytes": self.cache_bytes, "constants": table}


def device(name: str) -> Device:
    """Return a device by its name, or from a JSON file. Raises MHCError for one that has no constants.

    The file: {"name", "arch", "cache_bytes", "constants": {NAME: {"value", "low", "high", "source"}}}; low and high
    may lack.
    """
    path = FILES.get(name, Path(name))
    if not path.is_file():
        raise MHCError(f"--gpu: expected {', '.join(FILES)} or a file with constants, got {name}")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        table = {name: Constant(*numbers(one), str(one["source"])) for name, one in facts["constants"].items()}
        found = Device(str(facts["name"]), str(facts["arch"]), int(facts["cache_bytes"]), table)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MHCError(f"--gpu {path}: expected a device's constants, got {type(error).__name__}: {error}") from error
    if set(table) != set(Constants._fields):
        raise MHCError(f"--gpu {path}: expected constants {sorted(Constants._fields)}, got {sorted(table)}")
    if wrong := [name for name, one in table.items() if not 0 <= one.low <= one.value <= one.high]:
        raise MHCError(f"--gpu {path}: expected 0 ≤ low ≤ value ≤ high, got {wrong[0]} = {table[wrong[0]][:3]}")
    from .walk import BANK

    if found.arch not in BANK:
        raise MHCError(f"--gpu {path}: arch: expected {', '.join(BANK)}, got {found.arch}")
    return found


def named(gpu: str) -> Device | None:
    """Return the device that torch calls so, as in "NVIDIA H200"; None for one without constants."""
    return next((one for name, one in DEVICES.items() if name in gpu.lower()), None)


def numbers(one: dict[str, Any]) -> tuple[float, float, float]:
    """Value, low, high."""
    value = float(one["value"])
    return value, float(one.get("low", value)), float(one.get("high", value))


DEVICES = {name: device(name) for name in FILES}
