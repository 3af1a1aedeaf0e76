"""Results of earlier runs, as `stored_json` reads them. Imports no torch.

Spread            a median and its quartiles, and the ratio of two of them
KernelResults     a file of `bench`: Facts, and a Measurement per kernel and shape
OverheadResults   a file of `bench overhead`: Facts, an OverheadRow per connection and mode, Predictions
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles, in whatever unit; `doubtful` when most samples were disturbed."""

    median: float
    lower_quartile: float
    upper_quartile: float
    doubtful: bool = False

    def over(self, other: Spread) -> Spread:
        """Return the ratio of the medians; as its spread the smallest and the largest ratio of two quartiles.

        It leaves 1 out exactly where the two spreads do not overlap.
        """
        return Spread(
            self.median / other.median,
            self.lower_quartile / other.upper_quartile,
            self.upper_quartile / other.lower_quartile,
            self.doubtful or other.doubtful,
        )

    def times(self, factor: float) -> Spread:
        """Convert to another unit by a positive factor."""
        return Spread(factor * self.median, factor * self.lower_quartile, factor * self.upper_quartile, self.doubtful)


@dataclass(frozen=True)
class Facts:
    """Place and date of a file's measurements. `threads` is empty where the file does not say."""

    path: Path
    device: str
    date: str
    versions: Mapping[str, str]
    threads: str
    method: Mapping[str, str]

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        threads = f"torch threads {self.threads}" if self.threads else ""
        return " · ".join(part for part in (self.device, self.date, versions, threads) if part)


@dataclass(frozen=True)
class TorchForm:
    """A form of plain torch, in seconds a call."""

    form: str
    mode: str
    time: Spread

    def __str__(self) -> str:
        return f"{self.mode}: {self.form}"


@dataclass(frozen=True)
class Measurement:
    """One kernel at one shape: its time, its bytes, a copy of equal size, and plain torch. Times in seconds.

    `separate` is the time of the separate kernels beside a fused one.
    """

    kernel: str
    num_tokens: int
    num_streams: int
    hidden_size: int | None
    dtype: str
    time: Spread
    num_bytes: int
    in_cache: bool
    copy_bytes: int
    copy_time: Spread
    torch: tuple[TorchForm, ...]
    separate: Spread | None = None

    @property
    def name(self) -> tuple[str, ...]:
        """Name in a file: kernel, shape, dtype."""
        return (self.kernel, self.shape, self.dtype)

    @property
    def shape(self) -> str:
        """T × n × C, or T × n."""
        sizes = (self.num_tokens, self.num_streams, self.hidden_size)
        return " × ".join(str(size) for size in sizes if size is not None)

    @property
    def share_of_copy(self) -> Spread:
        """The kernel's bytes per second in units of the copy's."""
        return self.copy_time.over(self.time).times(self.num_bytes / self.copy_bytes)

    @property
    def fastest(self) -> TorchForm | None:
        """The fastest form of plain torch; None where none was timed."""
        return min(self.torch, key=lambda form: form.time.median, default=None)


@dataclass(frozen=True)
class KernelResults:
    """A file of `bench`; `copy_bytes` and `copy_time` are those of its largest copy."""

    facts: Facts
    copy_bytes: int
    copy_time: Spread
    measurements: tuple[Measurement, ...]
    kind = "kernels"

    def times(self) -> dict[tuple[str, ...], Spread]:
        """Seconds by what was measured."""
        return {measurement.name: measurement.time for measurement in self.measurements}


@dataclass(frozen=True)
class OverheadRow:
    """A model with one kind of connection: seconds a step, and per cent over the plain residual."""

    connection: str
    mode: str
    seconds: Spread
    overhead: Spread | None
    memory_bytes: int | None


@dataclass(frozen=True)
class Prediction:
    """Per cent over the plain residual that a model of the traffic predicts."""

    device: str
    mode: str
    variant: str
    overhead: float


@dataclass(frozen=True)
class OverheadResults:
    """A file of `bench overhead`."""

    facts: Facts
    layer: str
    rows: tuple[OverheadRow, ...]
    predictions: tuple[Prediction, ...]
    not_comparable: str
    kind = "overhead"

    def times(self) -> dict[tuple[str, ...], Spread]:
        """Seconds by what was measured."""
        return {(row.connection, row.mode): row.seconds for row in self.rows}
