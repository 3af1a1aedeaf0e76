"""The command line `mhc-tilelang`: which sub-commands there are, and how a run ends.

This is the composition root: the only module of the package that may name `mhc_tilelang.perf`. It holds no
logic of its own. A sub-command is a module with two functions:

    add_arguments(parser: argparse.ArgumentParser) -> None
    run(args: argparse.Namespace) -> int          the exit status

Importing that module and calling add_arguments must load neither torch nor tilelang, because
`mhc-tilelang COMMAND --help` does both; what the command needs, `run` imports.

Exit status: what `run` returns; 1 after an MHCError, printed as one line; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple


class Command(NamedTuple):
    """A sub-command: the module that implements it and its line in `--help`."""

    module: str
    help: str


COMMANDS = {
    "check": Command("mhc_tilelang.checking.command", "compare the kernels with the float64 reference"),
    "bench": Command("mhc_tilelang.perf.bench.command", "measure the kernels: time, bandwidth, ratio to plain torch"),
    "traffic": Command("mhc_tilelang.perf.traffic.command", "count the bytes that the kernels move, from their code"),
    "inspect": Command("mhc_tilelang.perf.inspect.command", "build the CUDA kernels without a GPU, and study them"),
    "predict": Command("mhc_tilelang.perf.predict.command", "predict what kernels take on a GPU that is not here"),
    "study": Command("mhc_tilelang.perf.study.command", "run experiments: gain over depth, training, Sinkhorn"),
    "export": Command("mhc_tilelang.bundle.command", "write a model's kernels as a bundle, for use without a compiler"),
    "warmup": Command("mhc_tilelang.bundle.warmup_command", "compile or load every kernel that a model needs"),
    "memory": Command("mhc_tilelang.perf.memory.command", "model what a backward needs kept, recomputed or not"),
    "simulate": Command("mhc_tilelang.perf.simulation.command", "simulate a pipeline stage: what mHC adds to it"),
    "doctor": Command("mhc_tilelang.cli.doctor", "report what this machine has and what is missing"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(argv).parse_args(argv)

    from mhc_tilelang.errors import MHCError

    try:
        with executor(args):
            status: int = importlib.import_module(COMMANDS[args.command].module).run(args)
        return status
    except MHCError as error:
        print(f"mhc-tilelang {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"mhc-tilelang {args.command}: interrupted", file=sys.stderr)
        return 130  # as a shell has it of SIGINT


def executor(args: argparse.Namespace) -> AbstractContextManager[object]:
    """Return the context a command runs within: the SIMT executor where `--device` asks for it."""
    from mhc_tilelang.cli.device import EXECUTOR

    if getattr(args, "device", None) != EXECUTOR:
        return nullcontext()
    from mhc_tilelang.compiler.simt import executing

    return executing()


def build_parser(argv: list[str]) -> argparse.ArgumentParser:
    """Build the parser; of the sub-commands' modules only the one that `argv` starts with is imported."""
    parser = argparse.ArgumentParser(
        prog="mhc-tilelang", description="The mHC kernels in TileLang: validate them, measure them."
    )
    parser.add_argument("--version", action=VersionAction)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        if argv[:1] == [name]:
            importlib.import_module(command.module).add_arguments(subparser)
    return parser


class VersionAction(argparse.Action):
    """`--version`; reads the installed metadata only when asked."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print the version and leave."""
        from importlib.metadata import version

        print(f"{parser.prog} {version('mhc-tilelang')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
