"""Hardware counters of every kernel beside what is counted from its code: `python -m mhc_tilelang.perf.gpu.counters`.

Runs itself under Nsight Compute (`ncu`), where each kernel is launched once after a warm-up, and compares the bytes
that memory saw with `audit`, 5 % allowed. ncu empties the caches before a launch, so what is read comes from memory.
What is written may still lie in the second-level cache when the kernel ends: memory sees between all of it less that
cache, and all of it; so the bytes that leave the multiprocessors are compared too. The clocks are left alone.

    Launched   one kernel, and its bytes by the audit       launch     launches them, in order: the inner run
    parse      ncu's CSV, a row a launch                     compared   both, side by side
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

from ...cli.device import pick_device
from ...cli.json_output import add_json_argument, write_json
from ...errors import MHCError
from ...spec import STREAM_COUNTS
from ..calls.cases import Shape
from ..options import DTYPES, positive

if TYPE_CHECKING:
    import torch

    from ...compiler.recording import Recorded

ALLOWED = 0.05
READ, WRITTEN, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
LEFT = "l1tex__m_l1tex2xbar_write_bytes.sum"  # bytes that multiprocessors wrote to the second-level cache
MEMORY, ARITHMETIC = (f"{unit}__throughput.avg.pct_of_peak_sustained_elapsed" for unit in ("dram", "sm"))
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
CONFLICTS = "l1tex__data_bank_conflicts_pipe_lsu.sum"
STALLS = ("long_scoreboard", "short_scoreboard", "barrier", "math_pipe_throttle", "lg_throttle", "mio_throttle", "wait")
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
ESSENTIAL = (READ, WRITTEN, TIME)
METRICS = (*ESSENTIAL, LEFT, MEMORY, ARITHMETIC, OCCUPANCY, CONFLICTS, *map(STALL.format, STALLS))
PROBE = "torch.add"  # bytes known beforehand: what the counters say of it, they say of the others
PROBE_BYTES = 512 << 20


@dataclass(frozen=True)
class Launched:
    """One launch: the call that it belongs to, its family, and its bytes by the audit.

    Attributes:
        read, written: each element once.
        read_again: the same with every repetition within a stream tensor, and of small ones that of every block: the
            most that memory can be asked for.
    """

    call: str
    family: str
    read: int
    written: int
    read_again: int


@dataclass(frozen=True)
class Compared:
    """A launch, what the counters said, and whether they agree; None where a counter is not known to this ncu."""

    launched: Launched
    kernel: str
    metrics: dict[str, float]
    read_error: float
    left_error: float | None
    agrees: bool

    @property
    def stall(self) -> str:
        """The stall reason of most warps between two instructions, and how many; empty where none is known."""
        known = {name: self.metrics[STALL.format(name)] for name in STALLS if STALL.format(name) in self.metrics}
        name = max(known, key=lambda one: known[one], default="")
        return f"{name} {known[name]:.1f}" if name else ""


def launches_at(shape: Shape, device: torch.device) -> list[tuple[str, Recorded]]:
    """Return every kernel of every call, each once, run already."""
    from ...compiler.recording import record_launches
    from ..calls.every_call import every_call

    found: dict[tuple[object, ...], tuple[str, Recorded]] = {}
    for call, run in every_call(shape, device).items():
        for one in record_launches(run):
            told = replace(one, streams=one.wide(shape.num_tokens, shape.hidden_size))
            found.setdefault((one.family, *one.parameters.items()), (call, told))
    return list(found.values())


def audit_launch(call: str, one: Recorded) -> Launched:
    """Count the bytes of a launch from its code."""
    from ..traffic.audit import audit_function

    buffers = audit_function(one.function, one.sizes)
    again = (b.read.accessed if name in one.streams else b.read.per_block for name, b in buffers.items())
    return Launched(
        call,
        one.family,
        read=sum(b.read.distinct for b in buffers.values()),
        written=sum(b.written.distinct for b in buffers.values()),
        read_again=sum(again),
    )


def launch(shape: Shape, device: torch.device, manifest: Path) -> None:
    """The inner run: say what is launched, then launch each kernel once between the profiler's start and stop."""
    import torch

    from ... import compiler

    chosen = launches_at(shape, device)
    source = torch.ones(PROBE_BYTES // 4 if device.type == "cuda" else 1, device=device)
    target = torch.empty_like(source)
    probe = Launched(PROBE, PROBE, source.nbytes, source.nbytes, source.nbytes)
    facts = [probe, *(audit_launch(call, one) for call, one in chosen)]
    manifest.write_text(json.dumps([asdict(one) for one in facts]), encoding="utf-8")
    if device.type == "cuda":
        torch.add(source, 1, out=target)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    torch.add(source, 1, out=target)
    for _, one in chosen:
        compiler.kernel(one.family, compiler.target_of(device), **one.parameters)(**one.arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def parse(text: str) -> list[dict[str, str]]:
    """ncu's `--csv --page raw`: a row a launch, by column. The row of units and what is not CSV is left out."""
    lines = text.splitlines()
    start = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise MHCError(f'ncu: expected a line of CSV that starts with "ID", got {" ".join(lines[-3:])[:300]!r}')
    rows = csv.DictReader(line for line in lines[start:] if line.startswith('"'))
    return [row for row in rows if row["ID"]]


def number(text: str) -> float:
    """Return a figure, with or without commas between thousands; NaN for what is none."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return float("nan")


def compare_all(launched: Sequence[Launched], rows: Sequence[Mapping[str, str]], cache_bytes: int) -> list[Compared]:
    """Compare launches with rows, in order. Raises MHCError where there is not a row for each."""
    if len(launched) != len(rows):
        raise MHCError(f"ncu: expected {len(launched)} launches, got {len(rows)}")
    return [compare_one(one, row, cache_bytes) for one, row in zip(launched, rows, strict=True)]


def compare_one(one: Launched, row: Mapping[str, str], cache_bytes: int) -> Compared:
    """One launch."""
    metrics = {name: number(row[name]) for name in METRICS if name in row}
    read_error = metrics[READ] / max(one.read, 1) - 1
    left_error = metrics[LEFT] / max(one.written, 1) - 1 if LEFT in metrics else None
    wrote = one.written - cache_bytes <= metrics[WRITTEN] * (1 + ALLOWED)
    wrote = wrote and metrics[WRITTEN] <= one.written * (1 + ALLOWED)
    agrees = abs(read_error) <= ALLOWED and wrote and (left_error is None or abs(left_error) <= ALLOWED)
    return Compared(one, row["Kernel Name"], metrics, read_error, left_error, agrees)


def table(results: Iterable[Compared]) -> str:
    """Return a line a kernel. `read`, `written`: counters' bytes against the audit's; written as it left the SMs."""
    from tabulate import tabulate

    lines = []
    for one in results:
        seconds = one.metrics[TIME] / 1e9
        moved = one.metrics[READ] + one.metrics[WRITTEN]
        left = "" if one.left_error is None else f"{one.left_error:+.1%}"
        shares = [
            f"{one.metrics[name]:.0f} %" if name in one.metrics else "" for name in (MEMORY, ARITHMETIC, OCCUPANCY)
        ]
        conflicts = f"{one.metrics[CONFLICTS]:.0f}" if CONFLICTS in one.metrics else ""
        start = (one.launched.call, one.launched.family, f"{seconds * 1e6:.1f}", f"{moved / seconds / 1e9:.0f}")
        bytes_ = (f"{one.read_error:+.1%}", left, "" if one.agrees else "DIFFERS")
        lines.append((*start, *bytes_, *shares, conflicts, one.stall))
    headers = ("call", "kernel", "us", "GB/s", "read", "written", "", "memory", "SM", "warps", "conflicts", "stall")
    return tabulate(lines, headers=headers, disable_numparse=True, colalign=("left", "left", *["right"] * 9, "left"))


def profile(shape: Shape, metrics: Sequence[str], csv_file: Path | None) -> tuple[list[Launched], list[dict[str, str]]]:
    """Run `launch` under ncu. Raises MHCError with the end of what ncu said where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "launches.json"
        inner = [sys.executable, "-m", __spec__.name, *options(shape), "--launch", str(manifest)]
        ncu = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
        command = [*ncu, "--print-units", "base", "--metrics", ",".join(metrics), *inner]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if csv_file is not None:
            csv_file.write_text(done.stdout, encoding="utf-8")
        if done.returncode or not manifest.is_file():
            raise MHCError(f"ncu: exit status {done.returncode}: {(done.stderr or done.stdout)[-600:].strip()}")
        launched = [Launched(**one) for one in json.loads(manifest.read_text(encoding="utf-8"))]
        return launched, parse(done.stdout)


def options(shape: Shape) -> list[str]:
    """Return the shape as options of this command."""
    sizes = {"--tokens": shape.num_tokens, "--streams": shape.num_streams, "--width": shape.hidden_size}
    return [*(str(part) for option in sizes.items() for part in option), "--dtype", shape.dtype]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    one = argparse.ArgumentParser(prog="python -m mhc_tilelang.perf.gpu.counters", description=__doc__.split("\n")[0])
    one.add_argument("--tokens", type=positive, default=16384, metavar="T", help="token count (default: 16384)")
    one.add_argument("--streams", type=int, choices=STREAM_COUNTS, default=4, help="residual streams, n (default: 4)")
    one.add_argument("--width", type=positive, default=2560, metavar="C", help="hidden size (default: 2560)")
    one.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the stream (default: bfloat16)")
    one.add_argument("--csv", type=Path, metavar="FILE", help="keep ncu's output in FILE")
    one.add_argument("--launch", type=Path, metavar="FILE", help="only launch the kernels, and list them in FILE")
    add_json_argument(one)
    return one


def main(argv: Sequence[str] | None = None) -> int:
    """Profile, compare, print; 1 where a kernel's bytes are not the audit's."""
    args = parser().parse_args(argv)
    shape = Shape(args.tokens, args.streams, args.width, args.dtype)
    if args.launch:
        launch(shape, pick_device("auto"), args.launch)
        return 0
    try:
        if which("ncu") is None:
            raise MHCError("no ncu: the counters are Nsight Compute's")
        results = measure(shape, args.csv)
    except MHCError as error:
        print(f"counters: {error}", file=sys.stderr)
        return 1
    print(table(results))
    differ = [one for one in results if not one.agrees]
    print(f"{len(results) - len(differ)} of {len(results)} kernels move what the audit counts, to {ALLOWED:.0%}")
    payload: dict[str, Any] = {"shape": asdict(shape), "allowed": ALLOWED, "kernels": [asdict(one) for one in results]}
    write_json(args.json, payload)
    return 1 if differ else 0


def measure(shape: Shape, csv_file: Path | None) -> list[Compared]:
    """Return all metrics, or where this ncu does not know one of them, those that the comparison needs."""
    try:
        launched, rows = profile(shape, METRICS, csv_file)
    except MHCError as error:
        print(f"counters: {error}; once more with {', '.join(ESSENTIAL)}", file=sys.stderr)
        launched, rows = profile(shape, ESSENTIAL, csv_file)
    return compare_all(launched, rows, cache_bytes())


def cache_bytes() -> int:
    """Return the second-level cache's size."""
    from ..measure.machine import last_level_cache

    return last_level_cache(pick_device("auto"))


if __name__ == "__main__":
    sys.exit(main())
