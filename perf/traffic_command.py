"""`mhc-tilelang traffic`: bytes that the kernels move, counted from their code, beside the paper's.

Needs neither a GPU nor nvcc: the TIR that is counted is what every build starts from.
"""

from __future__ import annotations

import argparse
import os

from ..json_output import add_json_argument, write_json
from ..spec import STREAM_COUNTS
from . import cases, launches, launches_norm, traffic_report
from .command import DTYPES, positive

KERNELS = (*cases.KERNELS, *cases.BACKWARD_KERNELS, launches.AGGREGATED, *launches.BOUNDARY, *launches_norm.NORM)
PARALLEL_BLOCKS = 2 * 132  # of a projection, on the multiprocessors of an H100 or H200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang traffic`."""
    add = parser.add_argument
    every = ", ".join(KERNELS)
    add(
        "--kernels",
        nargs="+",
        choices=KERNELS,
        default=KERNELS,
        metavar="KERNEL",
        help=f"any of {every} (default: all)",
    )
    add("--streams", type=int, choices=STREAM_COUNTS, default=4, help="residual streams, n (default: 4)")
    add("--widths", nargs="+", type=positive, default=[2560], metavar="C", help="hidden sizes (default: 2560)")
    add("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="of the stream (default: bfloat16)")
    add("--tokens", type=positive, default=4096, metavar="T", help="tokens of the batch (default: 4096)")
    text = "whose tiles to count: a GPU with 132 multiprocessors, or this machine's processor (default: cuda)"
    add("--target", choices=("cuda", "cpu"), default="cuda", help=text)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Count, print a table per width and dtype."""
    from .audited import audited

    blocks = PARALLEL_BLOCKS if args.target == "cuda" else os.cpu_count() or 1
    rows = []
    for dtype in args.dtype:
        for width in args.widths:
            shape = cases.Shape(args.tokens, args.streams, width, dtype)
            calls = {kernel: audited(cases.Case(kernel, shape), args.target, blocks) for kernel in KERNELS}
            chosen = [traffic_report.Row(kernel, shape, calls[kernel]) for kernel in args.kernels]
            print(traffic_report.report(shape, args.target, chosen, calls) + "\n")
            rows += chosen
    print(traffic_report.FOOTNOTES)
    write_json(args.json, [row.as_json() for row in rows])
    return 0
