"""`mhc-tilelang simulate`: what mHC adds to a simulated pipeline stage, and what has to be assumed for 6.7 %."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...cli.json_output import add_json_argument, write_json
from ...errors import MHCError
from ...spec import STREAM_COUNTS
from ..figures.pictures import add_out_argument, write_pictures
from ..options import positive, positive_number
from ..overhead.model import DEVICES
from ..sizes import MODELS, NUM_LAYERS
from . import measured, report
from .costs import Assumptions, forms

if TYPE_CHECKING:
    from ..figures.run import Picture

DEFAULT = Assumptions()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang simulate`."""
    add = parser.add_argument
    add("--model", choices=tuple(MODELS), default=DEFAULT.model, help="model to simulate (default: %(default)s)")
    text = f"GPU: {', '.join(DEVICES)} (default: {DEFAULT.device}, or that of --results)"
    add("--device", choices=tuple(DEVICES), metavar="DEVICE", help=text)
    add(
        "--streams",
        type=int,
        choices=STREAM_COUNTS,
        default=DEFAULT.num_streams,
        help="streams, n (default: %(default)s)",
    )
    text = f"kernels whose traffic the connections have: {', '.join(forms())} (default: %(default)s)"
    add("--form", choices=tuple(forms()), default=DEFAULT.form, metavar="FORM", help=text)
    text = "a file of `bench --json` from a GPU at the model's C: its times instead of the form's traffic"
    add("--results", type=Path, metavar="FILE", help=text)
    add("--stages", type=positive, default=DEFAULT.stages, metavar="P", help="pipeline stages (default: %(default)s)")
    text = "micro-batches of a step, each one sequence (default: %(default)s)"
    add("--micro-batches", type=positive, default=DEFAULT.micro_batches, metavar="M", help=text)
    text = "share of the datasheet's bandwidth that kernels reach (default: %(default)s)"
    add("--bandwidth-share", type=positive_number, default=DEFAULT.bandwidth_share, metavar="SHARE", help=text)
    text = "share of the datasheet's FLOP/s that products reach (default: %(default)s)"
    add("--flops-share", type=positive_number, default=DEFAULT.flops_share, metavar="SHARE", help=text)
    text = "attainable bandwidth to other GPUs' experts, each direction (default: %(default)g)"
    add("--expert-bandwidth", type=positive_number, default=DEFAULT.expert_bandwidth / 1e9, metavar="GB/s", help=text)
    text = "attainable bandwidth between stages, each direction (default: %(default)g)"
    add("--send-bandwidth", type=positive_number, default=DEFAULT.send_bandwidth / 1e9, metavar="GB/s", help=text)
    text = "copies of a token sent to other GPUs' experts (default: %(default)s)"
    add("--expert-copies", type=positive, default=DEFAULT.expert_copies, metavar="K", help=text)
    add("--no-overlap", action="store_true", help="let compute wait for all communication")
    add("--no-recompute", action="store_true", help="keep every stream, recompute none")
    add("--own-stream", action="store_true", help="run connections beside everything else, at no cost to it")
    add_out_argument(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Simulate, solve, print, draw."""
    given = assumptions(args)
    # A benchmark has one model's sizes, so the other models are left out beside it.
    models = (args.model,) if given.measured else tuple(m for m in MODELS if given.stages <= NUM_LAYERS[m])
    results = report.simulate(given, models)
    print(report.report(results))

    def draw() -> list[Picture]:
        from . import figure

        return [figure.schedule(given), figure.step(given), figure.sensitivity(results)]

    write_pictures(args.out, draw)
    write_json(args.json, report.as_json(results))
    return 0


def assumptions(args: argparse.Namespace) -> Assumptions:
    """Return the assumptions that the options state. Raises MHCError for options that contradict each other."""
    if args.stages > NUM_LAYERS[args.model]:
        raise MHCError(
            f"--stages: expected at most the {NUM_LAYERS[args.model]} layers of {args.model}, got {args.stages}"
        )
    given = Assumptions(
        model=args.model,
        device=args.device or DEFAULT.device,
        num_streams=args.streams,
        form=args.form,
        stages=args.stages,
        micro_batches=args.micro_batches,
        bandwidth_share=args.bandwidth_share,
        flops_share=args.flops_share,
        expert_bandwidth=1e9 * args.expert_bandwidth,
        send_bandwidth=1e9 * args.send_bandwidth,
        expert_copies=args.expert_copies,
        overlapped=not args.no_overlap,
        recompute=not args.no_recompute,
        own_stream=args.own_stream,
    )
    if args.results is None:
        return given
    if args.form != DEFAULT.form:
        raise MHCError(f"--form: expected without --results, whose kernels are measured, got {args.form!r}")
    found, device = measured.read(args.results, given.sizes, args.streams)
    if args.device not in (None, device):
        raise MHCError(f"--device: expected {device}, which --results was measured on, got {args.device}")
    return replace(given, device=device, measured=found)
