"""`mhc-tilelang study sinkhorn`: what the iterations do to a matrix, to its gradient, and what they cost."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ...cli.device import add_device_argument, pick_device
from ...cli.json_output import write_json
from ...spec import STREAM_COUNTS
from ..options import positive, positive_number
from . import output

if TYPE_CHECKING:
    from .convergence import Distance
    from .cost import Times
    from .gradients import Error

HELP = "show Sinkhorn step by step: distance from doubly stochastic, gradients against implicit ones, cost"
SCALES = (0.01, 1.0, 3.0, 6.0)
ITERS = (1, 2, 3, 5, 10, 20, 40)
REPEATS = {"cpu": 15, "cuda": 50}
EPS = 1e-6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang study sinkhorn`."""
    add_device_argument(parser)
    add = parser.add_argument
    add(
        "--matrices",
        type=positive,
        default=4096,
        metavar="T",
        help="matrices that statistics are taken over (default: 4096)",
    )
    add("--streams", type=int, choices=STREAM_COUNTS, default=4, help="n, of n × n matrices (default: 4)")
    text = f"standard deviations of logits (default: {', '.join(f'{scale:g}' for scale in SCALES)})"
    add("--scales", nargs="+", type=positive_number, default=SCALES, metavar="S", help=text)
    text = f"iterations (default: {', '.join(map(str, ITERS))})"
    add("--iters", nargs="+", type=positive, default=ITERS, metavar="I", help=text)
    text = "logits' standard deviation of the matrix that is drawn (default: 2)"
    add("--flow-scale", type=positive_number, default=2.0, metavar="S", help=text)
    add("--timed", type=positive, default=16384, metavar="T", help="matrices of a timed call (default: 16384)")
    add("--repeats", type=positive, metavar="R", help="timed rounds (default: 15 on a CPU, 50 on a GPU)")
    add("--seed", type=int, default=0, help="seed of the logits (default: 0)")
    output.add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Measure, print, write what was asked for."""
    output.prepare(args.out)
    from . import convergence, cost, gradients

    device = pick_device(args.device)
    names = ("matrices", "streams", "scales", "iters", "flow_scale", "timed", "seed")
    about = output.facts(device, **{name: getattr(args, name) for name in names}, eps=EPS)
    iters = sorted(args.iters)
    logits = convergence.draw(args.matrices, args.streams, args.seed)
    distances = convergence.measure(logits, args.scales, iters, EPS)
    errors = gradients.measure(logits, args.scales, iters, EPS, args.seed, device)
    repeats = args.repeats or REPEATS[device.type]
    times = cost.measure(args.timed, args.streams, EPS, iters, repeats, device)

    print(f"{output.one_line(about)}\n{args.matrices} matrices of n = {args.streams}, normal logits, eps {EPS:g}\n")
    print(f"{CONVERGENCE}\n\n{distance_table(distances)}\n\n{GRADIENTS}\n\n{error_table(errors)}\n")
    print(f"{cost_text(args.timed, repeats)}\n\n{cost_table(times, args.timed)}")
    results = {
        "convergence": [vars(one) for one in distances],
        "gradients": [vars(one) for one in errors],
        "cost": cost.rows(times),
    }
    write_json(args.json, {"kind": "study sinkhorn", **about, **results})
    if args.out is not None:
        from . import figures_sinkhorn as figures

        matrix = args.flow_scale * convergence.draw(1, args.streams, args.seed)[0]
        pictures = [
            figures.flow(matrix, EPS, about),
            figures.convergence(distances, about),
            figures.gradients(errors, about),
            figures.cost(times, args.timed, about),
        ]
        output.write(args.out, pictures, {f"sinkhorn-{name}": rows for name, rows in results.items()})


CONVERGENCE = """\
How far columns are from summing to 1, float64: median and largest over matrices. Rows are normalised last, and are off
by eps. Rows first and columns last would give rows these figures, since logits have no preferred side.
"order": the largest difference of an entry between the two orders, 99th percentile over matrices."""

GRADIENTS = """\
Errors of the gradient by the logits against exact unrolling in float64, relative to each matrix's norm: median and 99th
percentile, for random upstream gradients. "unrolled": the backward kernel, float32, exact for any number of iterations.
"implicit": differentiated as if the iterations had converged (one linear system of 2n), in float64 and float32."""


def cost_text(matrices: int, repeats: int) -> str:
    """Describe the measuring method."""
    return (
        f"Time of one call for {matrices} matrices, medians of {repeats} interleaved rounds from a cold cache, and "
        "what\nan iteration adds over the shorter run above it."
    )


def distance_table(distances: list[Distance]) -> str:
    """Return a line per scale and iteration count."""
    lines = [
        [
            f"{one.scale:g}",
            str(one.iters),
            *(f"{value:.1e}" for value in (one.median, one.largest, one.order)),
            f"{one.converged:.0%}",
        ]
        for one in distances
    ]
    headers = ["logits' std", "iterations", "median", "largest", "order", "within 1e-3"]
    return output.table(headers, lines, "rrrrrr")


def error_table(errors: list[Error]) -> str:
    """Return a line per scale and iteration count, a pair of columns per method."""
    methods = list(dict.fromkeys(one.method for one in errors))
    found = {(one.scale, one.iters, one.method): one for one in errors}
    lines = [
        [f"{scale:g}", str(iters)]
        + [
            f"{value:.0e}"
            for method in methods
            for value in (found[scale, iters, method].median, found[scale, iters, method].p99)
        ]
        for scale, iters in dict.fromkeys((one.scale, one.iters) for one in errors)
    ]
    headers = ["logits' std", "iterations", *(text for method in methods for text in (method, "p99"))]
    return output.table(headers, lines, "rr" + "rr" * len(methods))


def cost_table(times: Times, matrices: int) -> str:
    """Return a line per direction and iteration count."""
    from . import cost

    lines = []
    for direction, by_iters in times.items():
        before: tuple[int, float] | None = None
        for iters, time in by_iters.items():
            added = ""
            if before is not None:
                each = (time.median - before[1]) / (iters - before[0])
                added = f"{each * 1e6:.2f} ({each / matrices * 1e9:.2f})"
            quartiles = f"{time.lower_quartile * 1e6:.0f} to {time.upper_quartile * 1e6:.0f}"
            mark = " !" if time.doubtful else ""
            lines.append([direction, str(iters), f"{time.median * 1e6:.0f}{mark}", quartiles, added])
            before = iters, time.median
    headers = ["", "iterations", "time, µs", "quartiles", "an iteration, µs (ns a matrix)"]
    text = output.table(headers, lines, "lrrlr")
    return f"{text}\n\n! the machine was busy: most of these calls waited for a core" if cost.doubtful(times) else text
