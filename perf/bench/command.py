"""`mhc-tilelang bench`: check the kernels, then time them against a copy and against plain torch, shape by shape.

No kernel is timed before its check has passed, and no torch form whose result differs.

A first word asks for another measurement instead, `mhc-tilelang bench overhead`: see `MEASUREMENTS`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ...cli.device import add_device_argument, describe, pick_device, versions
from ...cli.json_output import add_json_argument, write_json
from ...errors import MHCError
from ...spec import STREAM_COUNTS
from .. import peers
from ..calls import cases
from ..calls.table import CALLS
from ..options import DTYPES, positive
from ..overhead import command as overhead_command
from ..peers.report import facts as peer_facts
from ..stored import command as report_command
from ..stored import compare
from . import report

if TYPE_CHECKING:
    import torch

# Modules with a line of HELP, add_arguments and run, which load no torch before run.
ROUNDS = "15 on a CPU, 5 of what takes long; 50 on a GPU"
MEASUREMENTS = {"overhead": overhead_command, "report": report_command, "compare": compare}
REPEATS = {"cpu": 15, "cuda": 50}
SECONDS = {"cpu": 0.5, "cuda": None}  # of one candidate's samples: what has taken them leaves early


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang bench`."""
    add_device_argument(parser)
    add = parser.add_argument
    every = cases.KERNELS + cases.BACKWARD_KERNELS + cases.BOUNDARY_KERNELS
    text = (
        f"any of {', '.join(every)} (default: all), {cases.SUBLAYER_INPUT} (default with peers), "
        f"{', '.join(cases.FLOAT8_KERNELS)}, or {cases.BOUNDARY_STEP}, both passes of a boundary by autograd"
    )
    choices = (*every, cases.SUBLAYER_INPUT, *cases.FLOAT8_KERNELS, cases.BOUNDARY_STEP)
    add("--kernels", nargs="+", choices=choices, metavar="KERNEL", help=text)
    text = f"hidden sizes (default: {join_numbers(cases.WIDTHS)}; on a CPU {join_numbers(cases.CPU_WIDTHS)})"
    add("--widths", nargs="+", type=positive, metavar="C", help=text)
    text = (
        "token counts (default: 4096 and 16384 on a GPU, where up to 128 are timed as CUDA graphs; on a CPU enough "
        "for the stream to miss the cache)"
    )
    add("--tokens", nargs="+", type=positive, metavar="T", help=text)
    add("--streams", type=int, choices=STREAM_COUNTS, default=4, help="residual streams, n (default: 4)")
    add("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="dtype of the stream (default: bfloat16)")
    text = (
        "forms of plain torch to compare with: the eager ones that were ever near the fastest in a stored result "
        "(default), all eager ones, or those of torch.compile too, which take minutes more"
    )
    add("--baselines", choices=("fast", "eager", "all"), default="fast", help=text)
    text = f"other implementations to compare with, where installed: {', '.join(peers.CHOICES)} (default: none)"
    add("--peers", nargs="+", choices=peers.CHOICES, default=["none"], metavar="NAME", help=text)
    add("--repeats", type=positive, metavar="R", help=f"rounds that count (default: {ROUNDS})")
    add_json_argument(parser)
    parser.set_defaults(measure=measure_kernels)
    others = parser.add_subparsers(
        action=FirstWord, metavar="MEASUREMENT", title="other measurements, and what earlier ones stored"
    )
    for name, module in MEASUREMENTS.items():
        text = module.HELP.replace("%", "%%")  # argparse formats the one and not the other
        subparser = others.add_parser(name, help=text, description=module.HELP)
        module.add_arguments(subparser)
        subparser.set_defaults(measure=module.run)


class FirstWord(argparse._SubParsersAction):
    """Another measurement, whose options follow it: those in front would be the kernels' and get lost."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Refuse options in front of the word, then parse what follows it."""
        early = [name for name, value in vars(namespace).items() if value != parser.get_default(name)]
        if early and values:
            parser.error(f"--{early[0]}: expected after {values[0]}, got it in front")
        super().__call__(parser, namespace, values, option_string)


def run(args: argparse.Namespace) -> int:
    """Run the measurement that was asked for."""
    status: int = args.measure(args)
    return status


def measure_kernels(args: argparse.Namespace) -> int:
    """Check and measure shape by shape, print each row when it is measured; 1 as soon as a kernel is off."""
    import torch
    from tqdm import tqdm

    from ...checking.command import as_table
    from ..measure.machine import clock_mhz
    from ..measure.timing import FEWEST_ROUNDS, WARMUP_ROUNDS
    from ..peers.prepare import load
    from .ready import FailedCheckError
    from .run import Result, run_cases

    device = pick_device(args.device)
    repeats = args.repeats or REPEATS[device.type]
    seconds = None if args.repeats else SECONDS[device.type]
    rounds = {"warmup_rounds": WARMUP_ROUNDS, "rounds": repeats, "fewest_rounds": FEWEST_ROUNDS, "seconds": seconds}
    wanted = load(peers.select(args.peers), device)
    running = [peer for peer in wanted if peer.peer]
    facts = {
        "device": describe(device),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "method": report.method(device.type, rounds, args.baselines, peer_facts(wanted)),
    }
    print(report.header(facts) + "\n", flush=True)
    every = (*cases.KERNELS, *cases.BACKWARD_KERNELS, *cases.BOUNDARY_KERNELS)
    kernels = args.kernels or (*every, *([cases.SUBLAYER_INPUT] if running else []))
    chosen = cases.make_cases(kernels, shapes(args, device))
    gpu = gpu_name(device)
    table, results = report.Table(chosen, args.baselines == "all", bool(gpu)), list[Result]()
    try:
        with torch.no_grad():
            measured = run_cases(chosen, device, args.baselines, repeats, *running, seconds=seconds)
            for result in tqdm(measured, total=len(chosen), desc="bench", unit="case", leave=False):
                if gpu:
                    result = replace(result, predicted=beside(result.case, gpu))
                tqdm.write(table.line(result) if results else f"{table.head}\n{table.line(result)}")
                sys.stdout.flush()  # a row is there to be read when it is measured, through a pipe too
                results.append(result)
    except FailedCheckError as error:
        print(as_table(error.rows))
        print("\nFAILED: these kernels are wrong, so neither they nor what would follow is measured")
        return 1
    facts["clock_mhz"] = clock_mhz(device)
    print("\n" + report.below(results))
    write_json(args.json, report.as_json(facts, results))
    return 0


def gpu_name(device: torch.device) -> str:
    """Return the name torch gives a GPU, an empty string for a CPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def beside(case: cases.Case, gpu: str) -> str:
    """Return a case's predicted time from a cold L2, in ms as the table prints it; empty where there is none."""
    from ..predict.devices import named
    from ..predict.predicted import predict

    device = named(gpu)
    if device is None or case.kernel not in CALLS:
        return ""
    try:
        found = predict(case, device, flushed=True)
    except (MHCError, OSError):  # no nvcc, no disassembler
        return ""
    if found.low is None or found.high is None:
        return found.regime
    numbers = [found.us] if found.us else [found.low, found.high]
    return " to ".join(report.milliseconds(us / 1e6) for us in numbers)


def join_numbers(numbers: Sequence[int]) -> str:
    """Join numbers for a help text."""
    return ", ".join(map(str, numbers))


def shapes(args: argparse.Namespace, device: torch.device) -> list[cases.Shape]:
    """Return the shapes that the options ask for, on this device."""
    return [
        cases.Shape(tokens, args.streams, width, dtype)
        for dtype in args.dtype
        for width in args.widths or (cases.WIDTHS if device.type == "cuda" else cases.CPU_WIDTHS)
        for tokens in args.tokens or default_tokens(device, args.streams, width, dtype)
    ]


def default_tokens(device: torch.device, num_streams: int, hidden_size: int, dtype: str) -> tuple[int, ...]:
    """Enough tokens that the stream misses the last-level cache."""
    from ..measure.machine import last_level_cache

    if device.type == "cuda":
        return cases.GPU_TOKENS
    itemsize = cases.BYTES[dtype]
    return (cases.cpu_tokens(num_streams, hidden_size, itemsize, last_level_cache(device)),)
