"""`mhc-tilelang study train`: a small GPT under four connections, with several seeds and equal budgets."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...cli.device import add_device_argument, pick_device
from ...cli.json_output import write_json
from ..options import positive, positive_number
from . import output

HELP = "train a small GPT under a plain residual, HC, mHC and an identity HC, over several seeds, and compare"
KINDS = ("residual", "hc", "mhc", "identity")
WIDTHS = {"width": "channels", "depth": "layers of two sublayers", "heads": "of the attention"}
LENGTHS = {"context": "bytes of a window", "batch": "windows of a step", "steps": "of training"}
FULL = {"width": 256, "depth": 8, "heads": 8, "context": 256, "batch": 8, "steps": 2000, "rate": 1e-3, "seeds": 3}
QUICK = {"width": 64, "depth": 4, "heads": 4, "context": 64, "batch": 8, "steps": 300, "rate": 2e-3, "seeds": 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang study train`."""
    add_device_argument(parser)
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="the bytes to learn, such as enwik8 (default: Python's own modules)")
    add(
        "--connections",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        metavar="KIND",
        help="connections to train (default: all four)",
    )
    add("--quick", action="store_true", help="sizes for minutes on two cores")
    for name, meaning in {**WIDTHS, **LENGTHS, "seeds": "runs of each connection"}.items():
        text = f"{meaning} (default: {FULL[name]}; quick: {QUICK[name]})"
        add(f"--{name}", type=positive, metavar=name[0].upper(), help=text)
    text = f"AdamW's learning rate (default: {FULL['rate']}; quick: {QUICK['rate']})"
    add("--rate", type=positive_number, metavar="R", help=text)
    add("--every", type=positive, metavar="K", help="evaluate every K steps (default: a 40th of the steps)")
    output.add_output_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Train every run, print the comparison, write what was asked for."""
    output.prepare(args.out)
    from tqdm import tqdm

    from . import runs, summary
    from .model import Sizes, read_text

    chosen: dict[str, Any] = {
        name: getattr(args, name) or value for name, value in (QUICK if args.quick else FULL).items()
    }
    seeds = range(chosen.pop("seeds"))
    sizes = Sizes(**chosen)
    check_sizes(sizes.width, sizes.heads)
    every = args.every or max(1, sizes.steps // 40)
    text = read_text(args.text, sizes.context)
    device = pick_device(args.device)
    about = output.facts(
        device, **asdict(sizes), seeds=len(seeds), text=text.name, text_bytes=len(text.training) + len(text.held_out)
    )

    done = []
    with tqdm(total=len(seeds) * len(args.connections) * sizes.steps, desc="train", unit="step", leave=False) as bar:
        for seed in seeds:
            for kind in args.connections:
                bar.set_postfix(connection=kind, seed=seed)
                done.append(runs.train(kind, seed, sizes, text, device, every, bar.update))

    parameters = {run.kind: run.parameters for run in done}
    rows = summary.compare(done)
    print(header(about, parameters))
    print(f"\n{summary.as_table(rows)}\n\n{summary.PUBLISHED}")
    write_json(args.json, {"kind": "study train", **about, "parameters": parameters, "results": rows})
    if args.out is not None:
        from .figures_train import draw

        output.write(args.out, [draw(done, about)], {"train-curves": summary.curves(done), "train-summary": rows})


def check_sizes(width: int, heads: int) -> None:
    """Raises MHCError for a width that the heads do not divide."""
    from ...errors import MHCError

    if width % heads:
        raise MHCError(f"study train: --width: expected a multiple of --heads {heads}, got {width}")


def header(about: dict, parameters: dict[str, int]) -> str:
    """Return the set-up: all that is needed to run it again."""
    setup = about["setup"]
    counts = ", ".join(f"{kind} {count:,}" for kind, count in parameters.items())
    return "\n".join(
        (
            output.one_line(about),
            f"GPT on the bytes of {setup['text']} ({setup['text_bytes']:,}, the last tenth held out), float32;",
            f"{setup['depth']} layers, width {setup['width']}, {setup['heads']} heads, n = 4; parameters: {counts}",
            f"{setup['steps']} steps of {setup['batch']} windows of {setup['context']} bytes; AdamW at "
            f"{setup['rate']:g} after a warm-up of 20 steps, gradients clipped at norm 1",
            f"{setup['seeds']} seed{'s' if setup['seeds'] > 1 else ''}: each fixes the layers' first weights and all "
            "batches, so that differences to the plain residual are taken in pairs",
            "losses in nats per byte; gains and activations on held-out text, gains as means over tokens, the largest "
            "over depth",
        )
    )
