"""`mhc-tilelang check`: compile every kernel for the device, compare it with float64, then a real stream."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli.device import EXECUTOR, add_device_argument, describe, pick_device, versions
from ..cli.json_output import add_json_argument, write_json
from ..spec import STREAM_COUNTS

if TYPE_CHECKING:
    from .run import Row


EXECUTED_TOKENS = 64  # of the real stream, by an executor that runs a thread at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang check`."""
    add_device_argument(parser, EXECUTOR)
    streams = "check these numbers of residual streams alone, in every dtype (default: all, and other sizes)"
    parser.add_argument("--streams", nargs="+", type=int, choices=STREAM_COUNTS, metavar="N", help=streams)
    text = "carry the bytes of FILE through the real stream (default: a source file of the Python installation)"
    parser.add_argument("--text", type=Path, metavar="FILE", help=text)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print a row per kernel and case; 1 when one is off."""
    from tqdm import tqdm

    from ..arguments import STREAM_DTYPES
    from . import real_stream
    from . import run as checks

    device = pick_device(args.device)
    tokens = real_stream.read_tokens(args.text or real_stream.default_text())
    executed = args.device == EXECUTOR
    if executed:
        tokens = tokens[:EXECUTED_TOKENS]
    cases = checks.small_cases(args.streams) if executed else checks.cases(args.streams)
    streams = (real_stream.check_stream(tokens, dtype, device) for dtype in STREAM_DTYPES)
    total = len(cases) * len(checks.CHECKS) + len(STREAM_DTYPES)
    rows = list(
        tqdm(chain(checks.iterate(device, cases), streams), total=total, desc="check", unit="case", leave=False)
    )
    ran_on = f"the CUDA code of sm_80, executed on {describe(device)}" if executed else describe(device)

    failed = [row for row in rows if not row.passed]
    print(f"{ran_on}\n")
    print(as_table(rows))
    print(f"\n{len(rows) - len(failed)} of {len(rows)} cases passed")
    if failed:
        print(f"FAILED: {', '.join(dict.fromkeys(row.kernel for row in failed))}")
    write_json(args.json, as_json(ran_on, rows))
    return 1 if failed else 0


def as_table(rows: list[Row]) -> str:
    """Tabulate, for every kernel and dtype, the case closest to its tolerance, and every case that failed.

    Errors are relative to the output's scale; `torch's error` is plain torch's at the same case.
    """
    from tabulate import tabulate

    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.dtype), []).append(row)
    order = list(dict.fromkeys(row.kernel for row in rows))
    lines = []
    for (kernel, dtype), group in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
        shown = [row for row in group if not row.passed] or [max(group, key=lambda row: share(row))]
        for row in shown:
            sizes = (row.num_streams, row.hidden_size, row.num_tokens)
            errors = [f"{value:.1e}" for value in (row.error, row.tolerance, row.torch_error)]
            lines.append((kernel, dtype, *sizes, *errors, len(group), "ok" if row.passed else "FAILED"))
    headers = ("kernel", "dtype", "n", "C", "tokens", "error", "tolerance", "torch's error", "cases", "")
    align = ("left", "left", *["right"] * 7, "left")
    return tabulate(lines, headers=headers, disable_numparse=True, colalign=align)


def share(row: Row) -> float:
    """Return the share of its tolerance that an error takes."""
    return row.error / row.tolerance if row.tolerance else row.error


def as_json(device: str, rows: list[Row]) -> dict[str, Any]:
    """Return the content of `--json FILE`."""
    return {
        "device": device,
        "versions": versions(),
        "passed": all(row.passed for row in rows),
        "kernels": [asdict(row) for row in rows],
    }
