"""The output of `bench`: header, table, footnotes and JSON. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..peers import report as peer_report

if TYPE_CHECKING:
    from ..calls.cases import Case
    from ..measure.timing import Statistics
    from .run import FormResult, Result

IN_CACHE, DOUBTFUL = "*", "!"
BASELINES = {
    "fast": "eager ones that were near the fastest in a stored result (--baselines eager: all of them)",
    "eager": "eager only (--baselines all for the rest)",
    "all": "eager and torch.compile",
}

METHOD = {
    "cpu": "wall time of single calls from a cold cache, outputs allocated beforehand",
    "cuda": "CUDA events around single calls from a cold L2, outputs allocated beforehand",
}


def method(
    device_type: str, rounds: dict[str, Any], baselines: str, peers: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Describe the measuring method (clock, order, rounds, baselines, peers) for the header and the JSON."""
    some = any(not peer["skipped"] for peer in peers)
    interleaved = "kernel, copy, torch forms and peers" if some else "kernel, copy and torch forms"
    return {
        "clock": METHOD[device_type],
        "order": f"{interleaved} interleaved, every other round reversed",
        **rounds,
        "baselines": baselines,
        "peers": list(peers),
    }


def header(facts: dict[str, Any]) -> str:
    """Return the lines above the table."""
    how = facts["method"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    fewer = f" (of {how['fewest_rounds']} or more where these take {how['seconds']} s)" if how["seconds"] else ""
    return "\n".join(
        (
            f"{facts['device']}, {facts['date']}",
            f"{versions}, torch threads {facts['threads']}",
            f"{how['clock']}; medians and quartiles of {how['rounds']} rounds{fewer},",
            f"{how['order']}",
            f"torch forms: {BASELINES[how['baselines']]}",
            *peer_report.header(how["peers"]),
        )
    )


class Table:
    """A row per result, of columns that are as wide as they will need to be: a row is printed when it is measured."""

    def __init__(self, cases: Sequence[Case], compiled: bool, predicted: bool = False) -> None:
        self.compiled, self.predicted = compiled, predicted
        self.separate = any(case.kernel.startswith("post_pre") for case in cases)
        kernel = max([6, *(len(case.kernel) for case in cases)]) + len(IN_CACHE + DOUBTFUL)
        # Names and widths in characters; a negative width aligns on the left.
        self.columns = [("kernel", -kernel), ("C", 5), ("tokens", 6), ("dtype", -8), ("time, ms", 8)]
        self.columns += [("predicted", 14)] if predicted else []
        self.columns += [
            ("quartiles", -16),
            ("host, µs", 8),
            ("stream, MB", 10),
            ("small, MB", 9),
            ("GB/s", 6),
            ("of copy", 7),
        ]
        self.columns += [("vs separate", 11)] if self.separate else []
        self.columns += [
            ("vs eager", 8),
            ("fastest eager", -28),
            *([("vs torch", 8), ("fastest torch", -38)] * compiled),
        ]

    @property
    def head(self) -> str:
        """The names of the columns, and a rule."""
        return "\n".join(
            (self._joined([name for name, _ in self.columns]), self._joined(["-" * abs(w) for _, w in self.columns]))
        )

    def line(self, result: Result) -> str:
        """Format one result."""
        return self._joined(row(result, self.compiled, self.separate, self.predicted))

    def _joined(self, cells: Sequence[str]) -> str:
        padded = (
            f"{cell:{'<' if size < 0 else '>'}{abs(size)}}" for cell, (_, size) in zip(cells, self.columns, strict=True)
        )
        return "  ".join(padded).rstrip()


def below(results: Sequence[Result]) -> str:
    """Return the text below the table: the legend of its columns and marks, and the peers' table."""
    peers = peer_report.table(results)
    return "\n".join((*footnotes(results), *(["", *peers] if peers else [])))


def row(result: Result, compiled: bool, separate: bool, predicted: bool = False) -> list[str]:
    """Return the cells of a line."""
    case, time, traffic = result.case, result.kernel, result.traffic
    quartiles = f"{milliseconds(time.lower_quartile)} to {milliseconds(time.upper_quartile)}"
    marks = (IN_CACHE if result.in_cache else "") + (DOUBTFUL if is_doubtful(result) else "")
    eager = result.fastest("eager")
    line = [case.kernel + marks, str(case.hidden_size or ""), str(case.shape.num_tokens), case.dtype]
    line += [
        milliseconds(time.median),
        *([result.predicted] if predicted else []),
        quartiles,
        "" if result.host is None else f"{result.host * 1e6:.0f}",
        megabytes(traffic.stream),
        megabytes(traffic.small),
    ]
    line += [f"{result.bandwidth / 1e9:.1f}", f"{result.share_of_copy:.0%}"]
    line += [separate_ratio(result)] if separate else []
    line += [f"{result.speedup(eager):.2f}×", eager.form]
    if compiled:
        fastest = result.fastest()
        line += [f"{result.speedup(fastest):.2f}×", f"{fastest.mode}: {fastest.form}"]
    return line


def separate_ratio(result: Result) -> str:
    """Return the separate kernels' time over the fused one's; empty where there are none."""
    return f"{result.speedup(result.separate):.2f}×" if result.separate else ""


def is_doubtful(result: Result) -> bool:
    """Whether a time that is shown was taken while the system kept interrupting."""
    times = [result.kernel, result.copy, result.fastest("eager").time, result.fastest().time]
    return any(time.doubtful for time in (*times, *([result.separate.time] if result.separate else [])))


def footnotes(results: Sequence[Result]) -> list[str]:
    """Return the legend of the columns and of the marks that occur."""
    lines = [
        "time: one call. GB/s: stream and small bytes, each counted once, over the time. of copy: GB/s over that of a",
        "torch copy of equal size, which reads half and writes half; a kernel that mostly reads can exceed it.",
        "vs: the form's time over the kernel's, above 1 where the kernel is faster.",
    ]
    if any(result.host is not None for result in results):
        lines.append(
            "host: one call of the public function, with kernels that return at once, in thread time (docs/host.md)."
        )
    if any(result.predicted for result in results):
        lines.append("predicted: by `mhc-tilelang predict` from machine code, in ms; not measured.")
    if any(result.separate for result in results):
        lines.append("vs separate: the time of our own kernels one by one over that of the fused ones.")
    if any(result.replayed for result in results):
        lines.append("up to 128 tokens: replays of CUDA graphs, without the time that Python takes to launch a kernel.")
    if any(result.in_cache for result in results):
        text = "all bytes fit the last-level cache, which can keep what is written: GB/s is not memory bandwidth."
        lines.append(f"{IN_CACHE} {text}")
    if any(is_doubtful(result) for result in results):
        lines.append(
            f"{DOUBTFUL} the machine was busy: most calls of the kernel, the copy or a shown form waited for a core."
        )
    return lines


def milliseconds(seconds: float) -> str:
    """Format a time in ms with three significant digits."""
    value = seconds * 1e3
    return f"{value:.{2 if value >= 1 else 3}f}" if value < 100 else f"{value:.0f}"


def megabytes(count: int) -> str:
    """Bytes in units of 10⁶, as GB/s has it; empty for none."""
    return f"{count / 1e6:.{1 if count >= 1e6 else 3}f}" if count else ""


def as_json(facts: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """Return the content of `--json FILE`. Times are in seconds, sizes in bytes, bandwidths in bytes per second."""
    largest = max(results, key=lambda result: result.copy_bytes)
    measured = [result_json(result) for result in results]
    return {"kind": "kernels", **facts, "copy": copy_json(largest), "results": measured}


def copy_json(result: Result) -> dict[str, Any]:
    """Return a result's copy ceiling; at the top level that of the most bytes."""
    return {"bytes": result.copy_bytes, "bandwidth": result.copy_bandwidth, "time": asdict(result.copy)}


def result_json(result: Result) -> dict[str, Any]:
    """One result, with every form of plain torch that was timed."""
    case = result.case
    return {
        "kernel": case.kernel,
        "num_streams": case.shape.num_streams,
        "hidden_size": case.hidden_size,
        "num_tokens": case.shape.num_tokens,
        "dtype": case.dtype,
        "time": asdict(result.kernel),
        "host": result.host,
        "predicted_ms": result.predicted or None,
        "traffic": {**asdict(result.traffic), "total": result.traffic.total},
        "bandwidth": result.bandwidth,
        "share_of_copy": result.share_of_copy,
        "fits_last_level_cache": result.in_cache,
        "copy": copy_json(result),
        "torch": [form_json(result, form) for form in result.torch],
        "separate": separate_json(result),
        "cuda_graph": result.replayed,
        "peers": [peer_report.as_json(result, peer) for peer in result.peers],
    }


def separate_json(result: Result) -> dict[str, Any] | None:
    """Return the separate kernels beside a fused one; None of others."""
    found = result.separate
    if found is None:
        return None
    return {"error": found.error, "time": asdict(found.time), "over_kernel": result.speedup(found)}


def form_json(result: Result, form: FormResult) -> dict[str, Any]:
    """One form of plain torch."""
    time: Statistics = form.time
    facts: dict[str, Any] = {"form": form.form, "mode": form.mode, "error": form.error}
    if form.parts:
        facts["parts"] = list(form.parts)
    return {**facts, "time": asdict(time), "over_kernel": result.speedup(form)}
