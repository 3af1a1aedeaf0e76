"""`mhc-tilelang predict`: what a kernel takes on a GPU that is not here, from its machine code alone.

Needs nvcc and nvdisasm, no GPU; `--validate` and `--peers` need numpy alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cli.json_output import add_json_argument, write_json
from ...errors import MHCError
from ...kernels import FAMILIES
from ...spec import STREAM_COUNTS
from ..figures.pictures import add_out_argument, write_pictures
from ..options import DTYPES, positive

if TYPE_CHECKING:
    from ..figures.run import Picture
    from .devices import Device

DEFAULT_CALLS = (
    *("post", "aggregate", "project", "coefficients", "sinkhorn", "post_pre"),
    *("post_backward", "aggregate_backward", "project_backward", "coefficients_backward", "sinkhorn_backward"),
    "post_pre_backward",
)
DEFAULTS = {"names": [], "gpu": "b200", "tokens": [4096], "width": [2560], "streams": 4, "dtype": "bfloat16"}
DEFAULTS |= {"flushed": False, "json": None, "measured": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang predict`."""
    add = parser.add_argument
    text = f"a call that `bench` measures, or a kernel family (default: {', '.join(DEFAULT_CALLS)})"
    add("names", nargs="*", metavar="KERNEL", help=text)
    add("--gpu", metavar="GPU", help="b200, h200, h100, or a JSON file of constants (default: b200)")
    add("--tokens", nargs="+", type=positive, metavar="T", help="token counts (default: 4096)")
    add("--width", nargs="+", type=positive, metavar="C", help="hidden sizes (default: 2560)")
    add("--streams", type=int, choices=STREAM_COUNTS, help="residual streams, n (default: 4)")
    add("--dtype", choices=DTYPES, help="dtype of the stream (default: bfloat16)")
    text = "a file of `bench --json` from this GPU: one measured shape of a call scales its predictions"
    add("--measured", type=Path, metavar="FILE", help=text)
    add("--flushed", action="store_true", help="predict for a cold last-level cache before each call")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--compare", nargs=2, metavar=("A", "B"), help="predict which of two is faster")
    text = "print the errors of predictions on all published times"
    instead.add_argument("--validate", action="store_true", help=text)
    text = "TileKernels' kernels, published and predicted"
    instead.add_argument("--peers", action="store_true", help=text)
    text = "draw one steady iteration of a kernel's block instead, with --out"
    instead.add_argument("--timeline", action="store_true", help=text)
    add_json_argument(parser)
    add_out_argument(parser)
    parser.set_defaults(**DEFAULTS)


def run(args: argparse.Namespace) -> int:
    """Predict, compare or validate; print it."""
    refuse_what_is_ignored(args)
    if args.validate or args.peers:
        from . import fit, report

        if args.validate:
            found = fit.validate()
            said, content = report.text(found), report.as_json(found)
        else:
            rows = report.peers()
            said, content = report.peers_table(rows), {"rows": [row._asdict() for row in rows]}
        print(said)
        write_json(args.json, content)
        return 0
    from .devices import device

    return (draw_timeline if args.timeline else predict_calls)(args, device(args.gpu))


def predict_calls(args: argparse.Namespace, gpu: Device) -> int:
    """Predict every name at every shape: a table, or a sentence a pair."""
    from .predicted import compare, measured_factors, predict, scale, table

    cases = [
        case_of(name, args, tokens, width)
        for width in args.width
        for tokens in args.tokens
        for name in args.compare or args.names or DEFAULT_CALLS
    ]
    factors = measured_factors(args.measured, gpu, args.streams) if args.measured else {}
    found = [predict(case, gpu, args.flushed, family) for case, family in cases]
    found = [scale(one, factors.get((one.name, one.hidden_size, one.dtype))) for one in found]
    if args.compare:
        for one, other in zip(found[::2], found[1::2], strict=True):
            print(f"{one.tokens} tokens, C = {one.hidden_size}: {compare(one, other)}")
    else:
        print(table(found, gpu, args.flushed))
    write_json(args.json, {"device": gpu.facts(), "rows": [each.as_row() for each in found]})

    def draw() -> list[Picture]:
        from .figure import stacks

        return [stacks(found)]

    write_pictures(args.out, draw)
    return 0


def draw_timeline(args: argparse.Namespace, gpu: Device) -> int:
    """Draw one steady iteration of one kernel."""
    from .predicted import steady_of

    case, family = case_of(args.names[0], args, args.tokens[0], args.width[0])
    found, family = steady_of(case, gpu, family)

    def draw() -> list[Picture]:
        from .figure import timeline

        return [timeline(found, family, case.shape, gpu)]

    write_pictures(args.out, draw)
    waits = ((kind, found.total(kind)) for kind in ("wait for memory", "wait for another result", "barrier"))
    print(
        f"{family} on {gpu.name}, {case.shape.num_tokens} tokens, C = {case.shape.hidden_size}, {case.shape.dtype}: "
        f"an iteration of a lone warp is predicted to take {found.cycles:.0f} cycles and runs {found.runs}; "
        f"{found.instructions} instructions; {', '.join(f'{kind} {total:.0f}' for kind, total in waits if total)}"
    )
    return 0


def refuse_what_is_ignored(args: argparse.Namespace) -> None:
    """Raise MHCError for options that say nothing beside another one."""
    mode = next((name for name in ("validate", "peers", "compare", "timeline") if getattr(args, name)), "")
    ignored: dict[str, tuple[str, ...]] = {"compare": ("names",), "timeline": ("flushed", "json", "measured"), "": ()}
    if mode == "timeline" and not (len(args.names) == len(args.tokens) == len(args.width) == 1 and args.out):
        raise MHCError("--timeline: expected one KERNEL, one shape and --out DIR")
    for name in ignored.get(mode, tuple(name for name in DEFAULTS if name != "json")):
        if getattr(args, name) != DEFAULTS[name]:
            option = "KERNEL" if name == "names" else f"--{name}"
            raise MHCError(f"{option}: expected none beside --{mode}, got {getattr(args, name)}")
    if args.out and mode not in ("timeline", ""):
        raise MHCError(f"--out: expected none beside --{mode}, got {args.out}")


def case_of(name: str, args: argparse.Namespace, tokens: int, width: int) -> tuple[Any, str]:
    """Return a name's call, and the family if it is not the call itself. Raises MHCError for no name."""
    from ..calls.cases import Case, Shape
    from ..calls.launches import launches
    from ..calls.table import CALLS

    shape = Shape(tokens, args.streams, width, args.dtype)
    if name in CALLS:
        return Case(name, shape), ""
    if name in FAMILIES:
        for call in CALLS:
            if any(launch.family == name for launch in launches(Case(call, shape), "cuda", 1)):
                return Case(call, shape), name
    raise MHCError(f"KERNEL: expected any of {', '.join(dict.fromkeys((*CALLS, *FAMILIES)))}, got {name}")
