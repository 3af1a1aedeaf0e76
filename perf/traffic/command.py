"""`mhc-tilelang traffic`: bytes that the kernels move, counted from their code, beside the paper's.

Needs neither a GPU nor nvcc: the TIR that is counted is what every build starts from. With `--schedule` it counts
nothing and prints how the fused boundary would be shared out over blocks.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from itertools import groupby

from ...cli.json_output import add_json_argument, write_json
from ...errors import MHCError
from ...spec import STREAM_COUNTS
from ..bench.command import DTYPES, positive
from ..calls import cases
from ..calls.table import CALLS
from . import report as traffic_report
from . import schedule as traffic_schedule
from .formulas import PARALLEL_BLOCKS

KERNELS = tuple(CALLS)
DEFAULT_TOKENS = (4096,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang traffic`."""
    add = parser.add_argument
    every = ", ".join(KERNELS)
    add(
        "--kernels",
        nargs="+",
        choices=KERNELS,
        metavar="KERNEL",
        help=f"any of {every} (default: all)",
    )
    add("--streams", type=int, choices=STREAM_COUNTS, default=4, help="residual streams, n (default: 4)")
    add("--widths", nargs="+", type=positive, default=[2560], metavar="C", help="hidden sizes (default: 2560)")
    add("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="dtype of the stream (default: bfloat16)")
    text = "tokens of a batch (default: 4096; with --schedule powers of two from 1 to 16384)"
    add("--tokens", nargs="+", type=positive, metavar="T", help=text)
    text = "whose tiles to count: a GPU with 132 multiprocessors, or this machine's processor (default: cuda)"
    add("--device", choices=("cuda", "cpu"), default="cuda", help=text)
    text = "print instead how the fused boundary is shared out over blocks: regime, tiles, splits; not with --kernels"
    add("--schedule", action="store_true", help=text)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Count, print a table per batch, width and dtype; or print schedules, a table per width and dtype."""
    blocks = PARALLEL_BLOCKS if args.device == "cuda" else os.cpu_count() or 1
    if args.schedule:
        return print_schedules(args, blocks)
    from .audited import audit_call

    rows = []
    for shape in shapes(args, args.tokens or DEFAULT_TOKENS):
        calls = {kernel: audit_call(cases.Case(kernel, shape), args.device, blocks) for kernel in KERNELS}
        chosen = [traffic_report.Row(kernel, shape, calls[kernel]) for kernel in args.kernels or KERNELS]
        print(traffic_report.report(shape, args.device, chosen, calls) + "\n")
        rows += chosen
    print(traffic_report.FOOTNOTES)
    write_json(args.json, [row.as_json() for row in rows])
    return 0


def print_schedules(args: argparse.Namespace, parallel_blocks: int) -> int:
    """Print the boundary's schedules. Raises MHCError for kernels, of which there is nothing to say here."""
    if args.kernels:
        raise MHCError(f"--schedule: expected without --kernels, got {', '.join(args.kernels)}")
    every = shapes(args, args.tokens or traffic_schedule.TOKENS)
    rows = [traffic_schedule.Row.of(shape, args.device, parallel_blocks) for shape in every]
    for _, group in groupby(rows, key=lambda row: (row.shape.dtype, row.shape.hidden_size)):
        print(traffic_schedule.report(args.device, parallel_blocks, list(group)) + "\n")
    print(traffic_schedule.FOOTNOTES)
    write_json(args.json, [row.as_json() for row in rows])
    return 0


def shapes(args: argparse.Namespace, tokens: Sequence[int]) -> list[cases.Shape]:
    """Return every dtype, width and batch."""
    return [
        cases.Shape(batch, args.streams, width, dtype)
        for dtype in args.dtype
        for width in args.widths
        for batch in tokens
    ]
