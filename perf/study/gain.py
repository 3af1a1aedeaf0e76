"""`mhc-tilelang study gain`: how far signals and gradients grow over depth, without and with the constraint."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ...cli.device import add_device_argument, pick_device
from ...cli.json_output import write_json
from ...spec import STREAM_COUNTS
from ..options import positive, positive_number
from . import output

if TYPE_CHECKING:
    from .matrices import Curve

HELP = "show the composite gain over depth, forward and backward, of HC and of mHC at several iteration counts"
SCALES = (0.01, 0.1, 0.3, 1.0, 3.0)
ITERS = (1, 2, 3, 5, 10, 20)
MARKS = (16, 64, 128)  # sublayers, in the table
LARGE = 100
SETUP = """\
The set-up. One draw g of standard normal numbers [sublayer, token, n, n] and one factor a serve both connections:
  HC    H = I + a·tanh(g)                 Eq. 5, with the bias that HC starts from
  mHC   H = Sinkhorn(a·g + 6·I − 3)       Eq. 7-9, with the bias that mHC starts from; float32, the kernel
a stands for alpha, which both papers start at 0.01, and g for the projections of a normalised stream.
independent: g drawn anew for every sublayer. repeated: one g for all, as where sublayers learn the same direction.
Gains: of the product H_{L−1} ··· H_0 in float64, forward the largest |row sum|, backward the largest |column sum|, each
the mean over tokens, as the paper reports it. Two sublayers are a transformer layer. Nothing is trained here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang study gain`."""
    add_device_argument(parser)
    add = parser.add_argument
    add("--depth", type=positive, default=128, metavar="L", help="sublayers (default: 128, of 64 layers)")
    add(
        "--tokens",
        type=positive,
        default=256,
        metavar="T",
        help="tokens that the gains are averaged over (default: 256)",
    )
    add("--streams", type=int, choices=STREAM_COUNTS, default=4, help="residual streams, n (default: 4)")
    text = f"factors a of the set-up (default: {', '.join(f'{scale:g}' for scale in SCALES)})"
    add("--scales", nargs="+", type=positive_number, default=SCALES, metavar="A", help=text)
    text = f"Sinkhorn iterations (default: {', '.join(map(str, ITERS))}); the last one is that of the first table"
    add("--iters", nargs="+", type=positive, default=ITERS, metavar="I", help=text)
    add("--seed", type=int, default=0, help="seed of g (default: 0)")
    output.add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Draw, multiply, print; write what was asked for."""
    output.prepare(args.out)
    from .matrices import measure

    device = pick_device(args.device)
    setup = {name: getattr(args, name) for name in ("depth", "tokens", "streams", "scales", "iters", "seed")}
    about = output.facts(device, **setup)
    curves = measure(args.depth, args.tokens, args.streams, args.scales, args.iters, args.seed, device)
    iters = args.iters[-1]
    marks = [mark for mark in MARKS if mark < args.depth] + [args.depth]
    print(f"{output.one_line(about)}\n{args.tokens} tokens, n = {args.streams}, seed {args.seed}\n\n{SETUP}\n")
    print(f"Gains by number of sublayers; mHC at {iters} iterations:\n\n{by_depth(curves, iters, marks)}\n")
    print(f"mHC by iterations, after {mark_of(marks)} sublayers:\n\n{by_iterations(curves, mark_of(marks))}\n")
    print(conclusion(curves, iters, mark_of(marks), args.streams))
    rows = [row for curve in curves for row in curve.rows() if row["sublayers"] <= 8 or row["sublayers"] % 8 == 0]
    write_json(args.json, {"kind": "study gain", **about, "results": rows})
    if args.out is not None:
        from .figures_gain import by_depth as draw_depth
        from .figures_gain import by_iterations as draw_iterations

        pictures = [draw_depth(curves, iters, about), draw_iterations(curves, mark_of(marks), about)]
        output.write(args.out, pictures, {"gain": rows})


def mark_of(marks: list[int]) -> int:
    """Return 64 sublayers, or all if there are fewer."""
    return 64 if 64 in marks else marks[-1]


def by_depth(curves: list[Curve], iters: int, marks: list[int]) -> str:
    """Return a line per structure, connection and scale."""
    lines = []
    for curve in curves:
        if curve.iters in (None, iters):
            gains = [f"{way[mark - 1]:.4g}" for mark in marks for way in (curve.forward, curve.backward)]
            lines.append([curve.structure, curve.name, f"{curve.scale:g}", *gains])
    headers = ["g", "connection", "a", *(f"{way} {mark}" for mark in marks for way in ("forward", "backward"))]
    return output.table(headers, lines, "llr" + "rr" * len(marks))


def by_iterations(curves: list[Curve], mark: int) -> str:
    """Return a line per iteration count; the backward gain per scale, and how far single mappings are off."""
    constrained = [curve for curve in curves if curve.iters is not None]
    scales = list(dict.fromkeys(curve.scale for curve in constrained))
    found: dict[tuple[Any, ...], Curve] = {(one.structure, one.iters, one.scale): one for one in constrained}
    lines = [
        [structure, str(iters)]
        + [
            f"{one.backward[mark - 1]:.4f} ({one.column_deviation:.0e})"
            for one in (found[structure, iters, a] for a in scales)
        ]
        for structure, iters in dict.fromkeys((one.structure, one.iters) for one in constrained)
    ]
    text = output.table(["g", "iterations", *(f"a = {scale:g}" for scale in scales)], lines, "lr" + "r" * len(scales))
    largest = max(abs(value - 1) for curve in constrained for value in curve.forward)
    return (
        f"{text}\n\nBackward gain; in parentheses the largest deviation of a single mapping's column sum from 1.\n"
        f"The forward gain of every line is 1, to {largest:.0e}: rows are normalised last."
    )


def conclusion(curves: list[Curve], iters: int, mark: int, num_streams: int) -> str:
    """Summarise the curves' numbers in words."""
    largest = max(max(one.forward[mark - 1], one.backward[mark - 1]) for one in curves if one.iters == iters)
    lines = [f"After {mark} sublayers mHC at {iters} iterations has gained {largest:.4g} at most, at any of these a."]
    for structure in dict.fromkeys(one.structure for one in curves):
        found = {
            one.scale: max(one.forward[mark - 1], one.backward[mark - 1])
            for one in curves
            if (one.structure, one.iters) == (structure, None)
        }
        gains = ", ".join(f"{gain:.4g} at {a:g}" for a, gain in sorted(found.items()))
        beyond = [a for a, gain in sorted(found.items()) if gain > LARGE]
        passed = f"passes {LARGE} from a = {beyond[0]:g} on" if beyond else f"stays below {LARGE} at every a"
        lines.append(f"HC, {structure} sublayers, {passed}: {gains}.")
    lines += [
        "mHC's backward gain has a bound without convergence: rows of the product sum to 1, so all of it sums to n, "
        f"and no column sum exceeds {num_streams}."
    ]
    return "\n".join(lines)
