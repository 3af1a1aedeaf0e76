"""`mhc-tilelang memory`: what a model keeps for its backward, with and without recomputation; counted, if asked, too.

No number is printed where a count and its formula differ.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ...cli.json_output import add_json_argument, write_json
from ...errors import MHCError
from ...spec import STREAM_COUNTS
from ..figures.pictures import add_out_argument, write_pictures
from ..options import positive
from ..sizes import MODELS, NUM_LAYERS
from . import report as memory_report
from .estimate import Stage, stage_of

if TYPE_CHECKING:
    from ..figures.run import Picture
    from .measured import Count

COUNTED = (1, 2, 4, 8, 16)  # lengths that are counted, besides L_r*


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang memory`."""
    add = parser.add_argument
    add("--model", choices=tuple(MODELS), default="27b", help="model with these sizes (default: 27b)")
    add("--streams", type=int, choices=STREAM_COUNTS, default=4, help="residual streams, n (default: 4)")
    text = "pipeline stages; figures are those of the first under 1F1B, a micro-batch in flight for each (default: 1)"
    add("--stages", type=positive, default=1, metavar="P", help=text)
    text = "also run the same number of sublayers forward, of small sizes, and count what their graph keeps"
    add("--measure", action="store_true", help=text)
    add_out_argument(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Compute, count, print, draw."""
    num_layers = NUM_LAYERS[args.model]
    if args.stages > num_layers:
        raise MHCError(f"--stages: expected at most the {num_layers} layers of {args.model}, got {args.stages}")
    stage = stage_of(num_layers, args.streams, args.stages)
    counts = count_checked(stage) if args.measure else []
    sizes = MODELS[args.model]
    print(memory_report.report(args.model, sizes, stage, counts))

    def draw() -> list[Picture]:
        from .figure import draw

        return [draw(args.model, sizes, stage, counts)]

    write_pictures(args.out, draw)
    write_json(args.json, memory_report.as_json(args.model, sizes, stage, counts))
    return 0


def count_checked(stage: Stage) -> list[Count]:
    """Count the bytes kept, beside their formulas. Raises MHCError where one differs."""
    from .measured import count

    print("mhc-tilelang memory: running the forward, to count what it keeps", file=sys.stderr)
    counts = count(stage, sorted({stage.papers_length, *(one for one in COUNTED if one <= stage.num_sublayers)}))
    for one in counts:
        if one.formula != one.measured:
            raise MHCError(
                f"memory: {one.connection}, L_r {one.length}: expected {one.formula} bytes per token, "
                f"counted {one.measured}"
            )
    return counts
