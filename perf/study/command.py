"""`mhc-tilelang study gain | train | sinkhorn`."""

from __future__ import annotations

import argparse

from . import gain, sinkhorn, train

STUDIES = {"gain": gain, "train": train, "sinkhorn": sinkhorn}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the studies as sub-commands of their own."""
    parser.epilog = "Each takes --out DIR, for pictures and CSVs, and --json FILE."
    studies = parser.add_subparsers(dest="study", metavar="STUDY", required=True)
    for name, module in STUDIES.items():
        module.add_arguments(studies.add_parser(name, help=module.HELP, description=module.HELP))


def run(args: argparse.Namespace) -> int:
    """Run the study that was asked for."""
    STUDIES[args.study].run(args)
    return 0
