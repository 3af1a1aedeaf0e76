"""The report of a watch: a row per step and connection, as a dict, a CSV, and warnings where limits are crossed.

A step's numbers are one small table on the model's device. On a GPU its copy to the host waits for nothing, and is
read once it has arrived: at a later step, or on request.
"""

from __future__ import annotations

import csv
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import MHCError, MHCWarning
from .measures import amax_gain, composite_gains, entry_saturation, logit_saturation, row_entropy, sum_deviation

MEASURED = (
    "forward_gain",
    "backward_gain",
    "composite_forward_gain",
    "composite_backward_gain",
    "row_deviation",
    "column_deviation",
    "entropy",
    "entry_saturation",
    "logit_saturation",
)
Row = dict[str, int | float | str | None]


@dataclass(frozen=True)
class Thresholds:
    """Limits beyond which a watch warns; None for no limit. A value that is not a number is beyond every limit.

    Attributes:
        composite_gain: limit of either composite gain, at any depth. mHC's forward gain is 1, its backward at most n.
        sum_deviation: limit of a row or column sum's deviation from 1. Plain hyper-connections have none to keep to.
        logit_saturation: share of logits beyond `measures.LOGIT_LIMIT`.
        stream_rms: limit of any stream's root mean square.

    Raises:
        ValueError: a limit that is not positive.
    """

    composite_gain: float | None = 10.0
    sum_deviation: float | None = None
    logit_saturation: float | None = None
    stream_rms: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            limit = getattr(self, field.name)
            if limit is not None and not limit > 0:
                raise ValueError(f"Thresholds: {field.name}: expected a positive number or None, got {limit!r}")


@dataclass(frozen=True)
class Finding:
    """A limit that was crossed: in which step, by which quantity, worst at which connection."""

    step: int
    name: str
    quantity: str
    value: float
    limit: float

    def __str__(self) -> str:
        name = self.name or "the model"  # a watched connection has no name in itself
        return f"step {self.step}: {self.quantity} of {name} is {self.value:.4g}, beyond {self.limit:g}"


class Call(NamedTuple):
    """Record of one call of a connection, for a sample of its tokens, T."""

    name: str
    kind: str
    h_res: torch.Tensor  # [T, n, n]
    stream_rms: torch.Tensor  # [T, n]
    logits: torch.Tensor | None  # [T, n, n]


class Report:
    """A row per step and connection. Filled by `watch`, within and after its block.

    Columns: step, counted from 0 in forward passes; depth, the connection's place in the pass; its name and kind;
    then over the sample of tokens

        forward_gain, backward_gain                        means of `amax_gain`
        composite_forward_gain, composite_backward_gain    means of `composite_gains`, from the first connection and
                                                           to the last one
        row_deviation, column_deviation                    largest `sum_deviation`
        entropy, entry_saturation, logit_saturation        means; logits only where a connection has them
        stream_rms_0, ...                                  root of the mean square of each stream, as it was read

    A plain residual has one stream and h_res = 1.

    Attributes:
        findings: the thresholds' crossings that were read so far.
        h_res: [L, T, n, n], the mappings of the last step that was watched, for functions that no row has; or None.
    """

    def __init__(self, thresholds: Thresholds | None, on_warning: Callable[[Finding], None] | None) -> None:
        self._thresholds, self._on_warning = thresholds, on_warning
        self._rows: list[Row] = []
        self._waiting: deque[_Step] = deque()
        self._beyond: set[str] = set()
        self.findings: list[Finding] = []
        self.h_res: torch.Tensor | None = None

    @property
    def rows(self) -> list[Row]:
        """Every row so far; waits for the device."""
        self.wait()
        return self._rows

    def wait(self) -> None:
        """Read every step so far, which may warn; waits for the device."""
        self._read(wait=True)

    def to_dict(self) -> dict[str, list[int | float | str | None]]:
        """Return a list per column; None where a row has no such number."""
        rows = self.rows
        columns = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in columns}

    def to_csv(self, path: str | Path) -> None:
        """Write the rows with a header line. Raises MHCError when the file cannot be written."""
        columns = self.to_dict()
        try:
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))
        except OSError as error:
            raise MHCError(f"Report.to_csv: cannot write {path}: {error.strerror or error}") from error

    def add(self, step: int, calls: Sequence[Call]) -> None:
        """Take the calls of a step in. Raises ValueError where they are of different streams."""
        shapes = {tuple(call.h_res.shape) for call in calls}
        if len(shapes) > 1:
            got = ", ".join(f"{tokens} of {n}" for tokens, n, _ in sorted(shapes))
            raise ValueError(f"watch: model: expected the same tokens and streams at every connection, got {got}")
        self.h_res = torch.stack([call.h_res for call in calls])
        self._waiting.append(_Step(step, calls, _summarize(self.h_res, calls)))
        self._read(wait=False)

    def _read(self, wait: bool) -> None:
        """Read the steps that have arrived, or all."""
        while self._waiting and (wait or self._waiting[0].arrived()):
            rows = self._waiting.popleft().rows()
            self._rows += rows
            if self._thresholds is not None:
                self._compare(rows, self._thresholds)

    def _compare(self, rows: Sequence[Row], thresholds: Thresholds) -> None:
        """A finding per limit that is crossed; a warning where the step before was within it."""
        limits = [field.name for field in fields(thresholds)]
        found = {name: finding for name in limits if (finding := _worst(rows, name, thresholds))}
        before, self._beyond = self._beyond, set(found)
        self.findings += found.values()
        for finding in [finding for name, finding in found.items() if name not in before]:
            if self._on_warning is None:
                warnings.warn(f"mhc.diagnostics.watch: {finding}", MHCWarning, stacklevel=2)
            else:
                self._on_warning(finding)


class _Step:
    """A step's numbers on their way to the host."""

    def __init__(self, step: int, calls: Sequence[Call], table: torch.Tensor) -> None:
        self._step = step
        self._calls = [(call.name, call.kind, call.logits is not None) for call in calls]
        self._table, self._event = table, None
        if table.is_cuda:
            self._table = table.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(table.device))

    def arrived(self) -> bool:
        return self._event is None or self._event.query()

    def rows(self) -> list[Row]:
        if self._event is not None:
            self._event.synchronize()
        rows: list[Row] = []
        for depth, ((name, kind, has_logits), values) in enumerate(zip(self._calls, self._table.tolist(), strict=True)):
            row: Row = {"step": self._step, "depth": depth, "name": name, "kind": kind}
            row |= zip(MEASURED, values, strict=False)
            if not has_logits:
                row["logit_saturation"] = None
            rows.append(row | {f"stream_rms_{i}": value for i, value in enumerate(values[len(MEASURED) :])})
        return rows


def _summarize(h_res: torch.Tensor, calls: Sequence[Call]) -> torch.Tensor:
    """h_res [L, T, n, n] and the rest of the calls -> [L, len(MEASURED) + n], float32."""
    zeros = torch.zeros_like(h_res[0])
    logits = torch.stack([zeros if call.logits is None else call.logits for call in calls])
    means = (*amax_gain(h_res), *composite_gains(h_res))
    shares = row_entropy(h_res), entry_saturation(h_res), logit_saturation(logits)
    columns = [mean.mean(-1) for mean in means]
    columns += [largest.amax(-1) for largest in sum_deviation(h_res)]
    columns += [share.mean(-1) for share in shares]
    rms = torch.stack([call.stream_rms for call in calls]).square().mean(1).sqrt()
    return torch.cat([torch.stack(columns, -1), rms], -1).float()


def _worst(rows: Sequence[Row], quantity: str, thresholds: Thresholds) -> Finding | None:
    """Return the row that is furthest beyond a limit."""
    limit = getattr(thresholds, quantity)
    if limit is None:
        return None
    columns = {
        "composite_gain": ("composite_forward_gain", "composite_backward_gain"),
        "sum_deviation": ("row_deviation", "column_deviation"),
        "stream_rms": tuple(name for name in rows[0] if name.startswith("stream_rms_")),
    }.get(quantity, (quantity,))
    beyond = [
        Finding(int(row["step"] or 0), str(row["name"]), column, value, limit)
        for column in columns
        for row in rows
        if isinstance(value := row.get(column), float) and not value <= limit
    ]
    # The first that is none is where it came from; a composite gain backward is none at every connection before it.
    not_numbers = [finding for finding in beyond if finding.value != finding.value]
    return not_numbers[0] if not_numbers else max(beyond, key=lambda finding: finding.value, default=None)
