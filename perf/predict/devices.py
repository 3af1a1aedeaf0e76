"""What the model knows of each device: its constants, from where each is, and how sure it is.

B200's are fitted on the published times (`fit`, `validate`); SMs and clock are not. Nothing of an H100 or H200 is
fitted: their memory is scaled as B200's asymptote stands to its copy, the rest is B200's or assumed, and every
prediction for them spans what the assumed ones leave open. A file with the same names, made by a measurement on the
device, takes the place of all of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from ...errors import MHCError
from .model import Constants

FITTED = "fitted on 140 published times of TileKernels (mhc_bench, B200)"
OF_B200 = "B200's, " + FITTED
ASSUMED = "assumed; nothing measured"


class Constant(NamedTuple):
    """A number, what it may be at least and at most, and where it is from."""

    value: float
    low: float
    high: float
    source: str


def sure(value: float, source: str) -> Constant:
    """A number without a range."""
    return Constant(value, value, value, source)


@dataclass(frozen=True)
class Device:
    """A GPU: its architecture, the bytes of its last-level cache, its constants."""

    name: str
    arch: str
    cache_bytes: int
    table: dict[str, Constant]

    @property
    def constants(self) -> Constants:
        """The values."""
        return Constants(**{name: constant.value for name, constant in self.table.items()})

    @property
    def fastest(self) -> Constants:
        """Every constant at the end of its range that gives the shortest time."""
        return Constants(**{name: min_time(name, constant) for name, constant in self.table.items()})

    @property
    def slowest(self) -> Constants:
        """The other ends."""
        return Constants(**{name: max_time(name, constant) for name, constant in self.table.items()})


FASTER_WHEN_LARGER = ("sms", "clock_ghz", "bandwidth", "overlap")


def min_time(name: str, constant: Constant) -> float:
    """The end of a range that gives the shortest time."""
    return constant.high if name in FASTER_WHEN_LARGER else constant.low


def max_time(name: str, constant: Constant) -> float:
    """The end that gives the longest."""
    return constant.low if name in FASTER_WHEN_LARGER else constant.high


B200_TABLE = {
    "sms": sure(148, "NVIDIA's specification"),
    "clock_ghz": sure(1.9, "fixed before the fit; boost clock under load"),
    "latency": sure(1077.8, FITTED),
    "bandwidth": sure(7.963, FITTED + "; torch's add reaches 7.15 to 7.33 TB/s there"),
    "launch_us": sure(1.494, FITTED),
    "block_cycles": sure(151.9, FITTED),
    "overlap": sure(2.335, FITTED),
    "pace": sure(1.150, FITTED),
    "barrier_cycles": sure(15.59, FITTED),
    "tail": sure(0.547, FITTED),
}
ASYMPTOTE = 7.963 / 7.36  # of B200's fit, over what its copies reach


def hopper(copy: float, source: str) -> dict[str, Constant]:
    """An H100 or H200 whose copies reach so many TB/s."""
    return {
        **{name: constant._replace(source=OF_B200) for name, constant in B200_TABLE.items()},
        "sms": sure(132, "NVIDIA's specification"),
        "clock_ghz": Constant(1.75, 1.75, 1.95, ASSUMED),
        "latency": Constant(900, 700, 1050, ASSUMED),
        "bandwidth": Constant(copy * ASYMPTOTE, copy * ASYMPTOTE * 0.97, copy * ASYMPTOTE * 1.03, source),
    }


DEVICES = {
    "b200": Device("b200", "sm_100a", 126 << 20, B200_TABLE),
    "h200": Device("h200", "sm_90a", 50 << 20, hopper(4.3, "a copy of 4.3 TB/s, assumed; scaled as B200's")),
    "h100": Device(
        "h100",
        "sm_90a",
        50 << 20,
        hopper(3.0, "a copy of 3.0 TB/s, assumed (FlagGems' points agree with it); scaled as B200's"),
    ),
}


def device(name: str) -> Device:
    """A device by its name, or from a JSON file. Raises MHCError for one that has no constants."""
    if name in DEVICES:
        return DEVICES[name]
    path = Path(name)
    if not path.is_file():
        raise MHCError(f"--gpu: expected {', '.join(DEVICES)} or a file with constants, got {name}")
    return from_file(path)


def from_file(path: Path) -> Device:
    """{"name", "arch", "cache_bytes", "constants": {NAME: {"value", "low", "high", "source"}}}; low, high may lack."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        table = {
            name: Constant(
                float(one["value"]),
                float(one.get("low", one["value"])),
                float(one.get("high", one["value"])),
                one["source"],
            )
            for name, one in facts["constants"].items()
        }
        found = Device(str(facts["name"]), str(facts["arch"]), int(facts["cache_bytes"]), table)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MHCError(f"--gpu {path}: expected a device's constants, got {type(error).__name__}: {error}") from error
    wanted = {field.name for field in fields(Constants)}
    if set(table) != wanted:
        raise MHCError(f"--gpu {path}: expected constants {sorted(wanted)}, got {sorted(table)}")
    if wrong := [name for name, one in table.items() if not 0 <= one.low <= one.value <= one.high]:
        raise MHCError(f"--gpu {path}: expected 0 ≤ low ≤ value ≤ high, got {wrong[0]} = {table[wrong[0]][:3]}")
    from .walk import BANK

    if found.arch not in BANK:
        raise MHCError(f"--gpu {path}: arch: expected {', '.join(BANK)}, got {found.arch}")
    return found
