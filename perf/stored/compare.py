"""`mhc-tilelang bench compare A.json B.json`: what has become slower or faster between two stored results.

The table shows the ratio of the medians, B over A, and how far the quartiles let it go. A row is marked where the two
times' quartiles do not overlap. The copy beside it says whether the machine has changed rather than the kernel.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...cli.json_output import add_json_argument, write_json
from ...errors import MHCError
from ..bench.report import DOUBTFUL, milliseconds
from .from_json import load
from .results import Facts, KernelResults, OverheadResults, Spread

Results = KernelResults | OverheadResults
Name = tuple[str, ...]

HELP = "compare two stored results, for regressions: ratios B over A with their spread"
HEADERS = {"kernels": ("kernel", "shape", "dtype"), "overhead": ("connection", "mode")}
SLOWER, FASTER = "slower", "faster"


@dataclass(frozen=True)
class Change:
    """A time in both files; `copy` is the ratio of the copies' medians, None where none was timed."""

    name: Name
    before: Spread
    after: Spread
    copy: float | None

    @property
    def ratio(self) -> Spread:
        """The time afterwards in units of the time before."""
        return self.after.over(self.before)

    @property
    def verdict(self) -> str:
        """`slower` or `faster` where the quartiles do not overlap, else empty."""
        if self.ratio.lower_quartile > 1:
            return SLOWER
        return FASTER if self.ratio.upper_quartile < 1 else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang bench compare`."""
    parser.add_argument("before", type=Path, metavar="A.json", help="results to compare with")
    parser.add_argument("after", type=Path, metavar="B.json", help="results to compare: ratios are B over A")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print what has changed. The status is 0 whatever it is: noise is no failure, and a person has to judge."""
    before, after = load(args.before), load(args.after)
    changes = compare(before, after)
    differing = differences(before, after)
    print(f"A  {before.facts.path}: {before.facts}\nB  {after.facts.path}: {after.facts}\n")
    for what, (first, second) in differing.items():
        print(f"{what} differs: A {first or 'says nothing'}, B {second or 'says nothing'}")
    print(("\n" if differing else "") + table(before.kind, changes))
    for letter, one, other in (("A", before, after), ("B", after, before)):
        alone = [" ".join(name) for name in one.times() if name not in other.times()]
        if alone:
            print(f"only in {letter}: {', '.join(alone)}")
    write_json(args.json, as_json(before.facts, after.facts, differing, changes))
    return 0


def compare(before: Results, after: Results) -> list[Change]:
    """Return the changes of all times that both files have, in A's order.

    Raises MHCError when the files are of different kinds, or have nothing in common.
    """
    first, second = before.facts.path, after.facts.path
    if before.kind != after.kind:
        raise MHCError(
            f"bench compare: expected two files of one kind, got {first} of kind {before.kind!r} "
            f"and {second} of kind {after.kind!r}"
        )
    old, new = before.times(), after.times()
    copies = copy_medians(before), copy_medians(after)
    changes = [
        Change(name, old[name], new[name], copies[1][name] / copies[0][name] if name in copies[0] else None)
        for name in old
        if name in new
    ]
    if not changes:
        columns = " and ".join(HEADERS[before.kind])
        raise MHCError(f"bench compare: expected a {columns} that both measured, got none in {first} and {second}")
    return changes


def copy_medians(results: Results) -> dict[Name, float]:
    """Seconds that the copy beside each kernel took."""
    if isinstance(results, OverheadResults):
        return {}
    return {measurement.name: measurement.copy_time.median for measurement in results.measurements}


def differences(before: Results, after: Results) -> dict[str, tuple[str, str]]:
    """Return other differences between the runs, dates excluded: A's and B's, empty where one does not say."""
    old, new = labels(before), labels(after)
    keys = [*old, *(key for key in new if key not in old)]
    return {key: (old.get(key, ""), new.get(key, "")) for key in keys if old.get(key) != new.get(key)}


def labels(results: Results) -> dict[str, str]:
    """Whatever a time can depend on."""
    facts = results.facts
    versions = {f"version of {name}": version for name, version in facts.versions.items()}
    model = {"layer": results.layer} if isinstance(results, OverheadResults) else {}
    return {"device": facts.device, "threads": facts.threads, **versions, **facts.method, **model}


def table(kind: str, changes: Iterable[Change]) -> str:
    """Return a row per change, and below what the columns mean."""
    from tabulate import tabulate

    rows = [line(change) for change in changes]
    headers = [*HEADERS[kind], "A, ms", "B, ms", "B/A", "range", "", "copy, B/A"]
    align = ["left"] * len(HEADERS[kind]) + ["right", "right", "right", "left", "left", "right"]
    if kind == "overhead":
        headers, align, rows = headers[:-1], align[:-1], [row[:-1] for row in rows]
    text = tabulate(rows, headers=headers, disable_numparse=True, colalign=align)
    notes = [
        "B/A: ratio of the medians, above 1 where B is slower. range: from B's lower quartile over A's upper one to",
        f"the reverse; {SLOWER} or {FASTER} where it leaves 1 out, which means that the quartiles do not overlap.",
    ]
    if any(change.ratio.doubtful for change in changes):
        notes.append(f"{DOUBTFUL} the machine was busy in one of the runs: most calls waited for a core.")
    return "\n".join((text, "", *notes))


def line(change: Change) -> list[str]:
    """Return one line of the table."""
    ratio = change.ratio
    doubt = DOUBTFUL if ratio.doubtful else ""
    spread = f"{ratio.lower_quartile:.2f} to {ratio.upper_quartile:.2f}"
    times = [milliseconds(change.before.median), milliseconds(change.after.median)]
    copy = "" if change.copy is None else f"{change.copy:.2f}"
    return [*change.name, *times, f"{ratio.median:.2f}{doubt}", spread, change.verdict, copy]


def as_json(
    before: Facts, after: Facts, differing: Mapping[str, tuple[str, str]], changes: Iterable[Change]
) -> dict[str, Any]:
    """Return the content of `--json FILE`; times in seconds."""
    rows = [
        {
            "name": list(change.name),
            "before": asdict(change.before),
            "after": asdict(change.after),
            "ratio": asdict(change.ratio),
            "verdict": change.verdict,
            "copy_ratio": change.copy,
        }
        for change in changes
    ]
    files = {"before": str(before.path), "after": str(after.path)}
    return {"kind": "comparison", **files, "differences": differing, "rows": rows}
