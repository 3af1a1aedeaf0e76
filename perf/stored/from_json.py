"""Read the JSON that `bench` and `bench overhead` write, field by field. Imports no torch.

    load     a file as KernelResults or OverheadResults
    Entry    a value of a file and where it stands

What is wrong with a file is an MHCError that names the file, the place in it, what was expected and what is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import MHCError
from ..calls.cases import BACKWARD_KERNELS, BOUNDARY_KERNELS, BOUNDARY_STEP, FLOAT8_KERNELS, KERNELS, SUBLAYER_INPUT
from ..overhead.model import IN_MODE, LABELS
from .results import Facts, KernelResults, Measurement, OverheadResults, OverheadRow, Prediction, Spread, TorchForm

KINDS = ("kernels", "overhead")


def load(path: Path) -> KernelResults | OverheadResults:
    """Return the results in `path`. Raises MHCError when there are none or they are not as `bench` writes them."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MHCError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # broken JSON, or bytes that are no text
        raise MHCError(f"{path}: expected JSON, got something else: {error}") from error
    entry = Entry(str(path), "", content)
    kind = entry["kind"].text() if "kind" in entry else "kernels"  # files from before there were kinds
    if kind not in KINDS:
        raise entry["kind"].error("one of " + ", ".join(map(repr, KINDS)))
    return kernel_results(path, entry) if kind == "kernels" else overhead_results(path, entry)


class Entry:
    """A value in a JSON file. Every accessor raises MHCError where the value is not of its type."""

    def __init__(self, file: str, place: str, value: object) -> None:
        self.file, self.place, self.value = file, place, value

    def error(self, expected: str) -> MHCError:
        """Return the error for an unexpected value, quoted in at most 60 characters."""
        got = json.dumps(self.value)
        where = f"{self.file}: {self.place}" if self.place else self.file
        return MHCError(f"{where}: expected {expected}, got {got if len(got) <= 60 else got[:57] + '...'}")

    def object(self) -> dict[str, object]:
        """Return the value, an object."""
        if not isinstance(self.value, dict):
            raise self.error("an object")
        return self.value

    def __contains__(self, key: str) -> bool:
        return self.object().get(key) is not None

    def __getitem__(self, key: str) -> Entry:
        if key not in self.object():
            raise MHCError(f"{self.file}: {self.place or 'the top level'}: expected {key!r}, which is missing")
        return Entry(self.file, f"{self.place}.{key}" if self.place else key, self.object()[key])

    def items(self) -> Iterator[Entry]:
        """Yield the entries of a list."""
        if not isinstance(self.value, list):
            raise self.error("a list")
        return (Entry(self.file, f"{self.place}[{i}]", value) for i, value in enumerate(self.value))

    def text(self) -> str:
        """Return the value, a string."""
        if not isinstance(self.value, str):
            raise self.error("a string")
        return self.value

    def number(self) -> float:
        """Return the value, a finite number."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)) or not math.isfinite(self.value):
            raise self.error("a finite number")
        return self.value

    def positive(self) -> float:
        """Return the value, a number above 0."""
        if self.number() <= 0:
            raise self.error("a number above 0")
        return self.number()

    def count(self) -> int:
        """Return the value, a whole number above 0."""
        if self.positive() != int(self.number()):
            raise self.error("a whole number above 0")
        return int(self.number())

    def flag(self) -> bool:
        """Return the value, true or false."""
        if not isinstance(self.value, bool):
            raise self.error("true or false")
        return self.value

    def labels(self) -> dict[str, str]:
        """Return an object's values as text, whatever they are."""
        return {name: str(value) for name, value in self.object().items()}


def spread(entry: Entry, positive: bool = True) -> Spread:
    """Median and quartiles, of times or of per cents; the latter may be negative."""
    names = ("lower_quartile", "median", "upper_quartile")
    values = [entry[name].positive() if positive else entry[name].number() for name in names]
    if values != sorted(values):
        raise entry.error("lower_quartile ≤ median ≤ upper_quartile")
    samples = entry["samples"].count() if "samples" in entry else 0
    disturbed = entry["disturbed"].number() if "disturbed" in entry else 0
    return Spread(values[1], values[0], values[2], doubtful=2 * disturbed > samples)


def facts(path: Path, entry: Entry) -> Facts:
    """Device, date, versions, threads, method; the last three may be missing."""
    optional = {key: entry[key].labels() if key in entry else {} for key in ("versions", "method")}
    threads = str(entry["threads"].count()) if "threads" in entry else ""
    return Facts(path, entry["device"].text(), entry["date"].text(), threads=threads, **optional)


def kernel_results(path: Path, entry: Entry) -> KernelResults:
    """Return a file of kind `kernels`."""
    found = tuple(map(measurement, entry["results"].items()))
    if not found:
        raise entry["results"].error("at least one result")
    refuse_twice(entry["results"], [each.name for each in found])
    copy = entry["copy"]
    return KernelResults(facts(path, entry), copy["bytes"].count(), spread(copy["time"]), found)


def measurement(entry: Entry) -> Measurement:
    """One of the results."""
    known = (*KERNELS, *BACKWARD_KERNELS, *BOUNDARY_KERNELS, SUBLAYER_INPUT, BOUNDARY_STEP, *FLOAT8_KERNELS)
    if entry["kernel"].text() not in known:
        raise entry["kernel"].error("one of " + ", ".join(known))
    forms = entry["torch"].items()
    return Measurement(
        kernel=entry["kernel"].text(),
        num_tokens=entry["num_tokens"].count(),
        num_streams=entry["num_streams"].count(),
        hidden_size=entry["hidden_size"].count() if "hidden_size" in entry else None,
        dtype=entry["dtype"].text(),
        time=spread(entry["time"]),
        num_bytes=entry["traffic"]["total"].count(),
        in_cache=entry["fits_last_level_cache"].flag(),
        copy_bytes=entry["copy"]["bytes"].count(),
        copy_time=spread(entry["copy"]["time"]),
        separate=spread(entry["separate"]["time"]) if entry.object().get("separate") else None,
        torch=tuple(TorchForm(form["form"].text(), form["mode"].text(), spread(form["time"])) for form in forms),
    )


def overhead_results(path: Path, entry: Entry) -> OverheadResults:
    """Return a file of kind `overhead`."""
    rows = tuple(row for mode in entry["measured"].object() for row in overhead_rows(entry, mode))
    if not rows:
        raise entry["measured"].error("at least one mode")
    predictions = tuple(one for each in entry["model"]["predictions"].items() for one in predicted(each))
    doubt = entry["paper"]["not_comparable"].text() if "not_comparable" in entry["paper"] else ""
    return OverheadResults(facts(path, entry), layer(entry), rows, predictions, doubt)


def layer(entry: Entry) -> str:
    """Describe the measured layer in a line."""
    sizes = entry["layer"]
    widths = f"C {sizes['hidden_size'].count()}, FFN {sizes['ffn_width'].count()}, n {sizes['num_streams'].count()}"
    return f"{sizes['model'].text()}: {widths}, {sizes['dtype'].text()}, {entry['num_tokens'].count()} tokens"


def overhead_rows(entry: Entry, mode: str) -> Iterator[OverheadRow]:
    """Yield every connection in one mode; the memory is that of training."""
    measured = entry["measured"][mode]
    if mode not in IN_MODE:
        raise measured.error("a mode, one of " + ", ".join(IN_MODE))
    for connection in measured.object():
        if connection not in LABELS:
            raise measured[connection].error("a connection, one of " + ", ".join(LABELS))
        each, bytes_of = measured[connection], entry["memory"]["bytes"] if mode == "training" else None
        memory = bytes_of[connection].count() if bytes_of and connection in bytes_of else None
        over = None if connection == "residual" else spread(each["overhead"], positive=False).times(100)
        yield OverheadRow(LABELS[connection], IN_MODE[mode], spread(each["time"]), over, memory)


def predicted(entry: Entry) -> Iterator[Prediction]:
    """Yield the predictions for one device and mode."""
    device, mode, overhead = entry["device"].text(), entry["mode"].text(), entry["overhead"]
    return (
        Prediction(device, IN_MODE.get(mode, mode), name, 100 * overhead[name].number()) for name in overhead.object()
    )


def refuse_twice(entry: Entry, names: Sequence[tuple[str, ...]]) -> None:
    """Raise MHCError when two results are of one thing."""
    for i, name in enumerate(names):
        if name in names[:i]:
            what = ", ".join(name)
            raise MHCError(f"{entry.file}: {entry.place}[{i}]: expected each result once, got {what} again")
