"""`mhc-tilelang predict`: what a kernel takes on a GPU that is not here, from its machine code alone.

Needs nvcc and nvdisasm, no GPU; `--validate` needs numpy alone.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
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
    from .predicted import Prediction

DEFAULT_CALLS = (
    *("post", "pre", "project", "coefficients", "sinkhorn", "post_pre"),
    *("post_backward", "pre_backward", "project_backward", "coefficients_backward", "sinkhorn_backward"),
    "post_pre_backward",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang predict`."""
    add = parser.add_argument
    text = f"a call that `bench` measures, or a kernel family (default: {', '.join(DEFAULT_CALLS)})"
    add("names", nargs="*", metavar="KERNEL", help=text)
    add("--gpu", default="b200", metavar="GPU", help="b200, h200, h100, or a JSON file of constants (default: b200)")
    add("--tokens", nargs="+", type=positive, default=[4096], metavar="T", help="token counts (default: 4096)")
    add("--width", nargs="+", type=positive, default=[2560], metavar="C", help="hidden sizes (default: 2560)")
    add("--streams", type=int, choices=STREAM_COUNTS, default=4, help="residual streams, n (default: 4)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the stream (default: bfloat16)")
    add("--flushed", action="store_true", help="the last-level cache is cold before each call")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--compare", nargs=2, metavar=("A", "B"), help="which of two is predicted to be faster")
    text = "how far predictions are off, on all published times"
    instead.add_argument("--validate", action="store_true", help=text)
    text = "TileKernels' kernels, published and predicted"
    instead.add_argument("--peers", action="store_true", help=text)
    text = "draw one steady iteration of a kernel's block instead, with --out"
    instead.add_argument("--timeline", action="store_true", help=text)
    add_json_argument(parser)
    add_out_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Predict, compare or validate; print it."""
    refuse_what_is_ignored(args)
    if args.validate:
        return print_validation(args)
    if args.peers:
        return print_peers(args)
    from .devices import device

    gpu = device(args.gpu)
    if args.timeline:
        return draw_timeline(args, gpu)
    names = tuple(args.compare or args.names or DEFAULT_CALLS)
    predictions = [predict_named(name, args, gpu, tokens, width) for tokens, width, name in shapes(names, args)]
    from . import report

    if args.compare:
        from .predicted import compare

        for one, other in zip(predictions[::2], predictions[1::2], strict=True):
            print(f"{one.tokens} tokens, C = {one.hidden_size}: {compare(one, other)}")
    else:
        print(report.table(predictions, gpu, args.flushed))
    write_json(args.json, {"device": facts(gpu), "rows": [as_row(prediction) for prediction in predictions]})

    def draw() -> list[Picture]:
        from .figure import stacks

        return [stacks(predictions)]

    write_pictures(args.out, draw)
    return 0


def shapes(names: tuple[str, ...], args: argparse.Namespace) -> list[tuple[int, int, str]]:
    """Everything that is predicted, in order."""
    return [(tokens, width, name) for width in args.width for tokens in args.tokens for name in names]


def refuse_what_is_ignored(args: argparse.Namespace) -> None:
    """Raise MHCError for options that say nothing beside another one."""
    default = {"names": [], "gpu": "b200", "tokens": [4096], "width": [2560], "streams": 4, "dtype": "bfloat16"}
    ignored: tuple[str, ...] = ()
    mode = ""
    if args.validate or args.peers:
        ignored = (*default, "flushed")
        mode = "validate" if args.validate else "peers"
    elif args.compare:
        ignored, mode = ("names",), "compare"
    elif args.timeline:
        ignored, mode = ("flushed", "json"), "timeline"
        if len(args.names) != 1 or len(args.tokens) != 1 or len(args.width) != 1 or args.out is None:
            raise MHCError("--timeline: expected one KERNEL, one shape and --out DIR")
    for name in ignored:
        if getattr(args, name) != default.get(name, False if name == "flushed" else None):
            option = "KERNEL" if name == "names" else f"--{name}"
            raise MHCError(f"{option}: expected none beside --{mode}, got {getattr(args, name)}")
    if args.out and not (args.timeline or not (args.peers or args.validate or args.compare)):
        raise MHCError(f"--out: expected none beside --{mode}, got {args.out}")


def predict_named(name: str, args: argparse.Namespace, gpu: Device, tokens: int, width: int) -> Prediction:
    """One row, of a call or of the first launch of a family."""
    from .predicted import predict

    case, family = case_of(name, args, tokens, width)
    return predict(case, gpu, args.flushed, family)


def case_of(name: str, args: argparse.Namespace, tokens: int, width: int) -> tuple[Any, str]:
    """The call that a name stands for, and the family if it is not the call itself. Raises MHCError for no name."""
    from ..calls.cases import CALLS, Case, Shape
    from ..calls.launches import launches

    shape = Shape(tokens, args.streams, width, args.dtype)
    if name in CALLS:
        return Case(name, shape), ""
    if name in FAMILIES:
        for call in CALLS:
            if any(launch.family == name for launch in launches(Case(call, shape), "cuda", 1)):
                return Case(call, shape), name
    raise MHCError(f"KERNEL: expected any of {', '.join(dict.fromkeys((*CALLS, *FAMILIES)))}, got {name}")


def as_row(prediction: Prediction) -> dict[str, Any]:
    """A row of the JSON."""
    return asdict(prediction)


def facts(gpu: Device) -> dict[str, Any]:
    """The device with its constants and where each is from."""
    table = {name: constant._asdict() for name, constant in gpu.table.items()}
    return {"name": gpu.name, "arch": gpu.arch, "cache_bytes": gpu.cache_bytes, "constants": table}


def print_validation(args: argparse.Namespace) -> int:
    """The tables, and the JSON."""
    from . import validation_report
    from .validate import validate

    found = validate()
    print(validation_report.text(found))
    write_json(args.json, validation_report.as_json(found))
    return 0


def print_peers(args: argparse.Namespace) -> int:
    """TileKernels at the published shapes."""
    from . import peers

    rows = peers.rows()
    print(peers.table(rows))
    write_json(args.json, {"rows": [row._asdict() for row in rows]})
    return 0


def draw_timeline(args: argparse.Namespace, gpu: Device) -> int:
    """One steady iteration of one kernel."""
    from .steady import steady

    case, family = case_of(args.names[0], args, args.tokens[0], args.width[0])
    found = steady(case, gpu, family)

    def draw() -> list[Picture]:
        from .figure import timeline

        return [timeline(found)]

    write_pictures(args.out, draw)
    print(found.summary())
    return 0
