"""`mhc-tilelang inspect`: build the kernels for CUDA architectures without a GPU, and study what came out.

Needs nvcc and nvdisasm, `--explain` and `--source` neither.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...cli.json_output import add_json_argument
from ...errors import MHCError
from ...kernels import FAMILIES
from ...spec import STREAM_COUNTS
from ..options import DTYPES, positive
from .occupancy import ARCHITECTURES

if TYPE_CHECKING:
    from .matrix import Subject

    Builds = Sequence[tuple[Subject, str]]

PEERS = ("tile-kernels",)
DEFAULTS: dict[str, Any] = {
    "kernels": [],
    "arch": list(ARCHITECTURES),
    "streams": [4],
    "widths": [2560],
    "dtype": ["bfloat16"],
    **dict.fromkeys(("full", "representative", "source", "sass", "explain"), False),
    "peers": [],
    "json": None,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang inspect`."""
    add = parser.add_argument
    text = f"any of {', '.join(FAMILIES)} (default: all; without any option, the stored builds are shown)"
    add("kernels", nargs="*", metavar="KERNEL", help=text)
    text = f"separated by commas, of {', '.join(ARCHITECTURES)} (default: all)"
    add("--arch", type=architectures, default=list(ARCHITECTURES), metavar="ARCH,…", help=text)
    add("--streams", nargs="+", type=int, choices=STREAM_COUNTS, default=[4], help="residual streams, n (default: 4)")
    add("--widths", nargs="+", type=positive, default=[2560], metavar="C", help="hidden sizes (default: 2560)")
    add("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="dtype of the stream (default: bfloat16)")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--full", action="store_true", help="every n, width and dtype, and every variant: about an hour on two cores"
    )
    sizes.add_argument("--representative", action="store_true", help="CI's builds, each for its architectures")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--source", action="store_true", help="print the generated CUDA source instead")
    instead.add_argument("--sass", action="store_true", help="print the machine code instead")
    instead.add_argument(
        "--explain",
        action="store_true",
        help="print the page of each kernel instead: equation, source, traffic, launch",
    )
    text = "another implementation's kernels instead, n = 4, bfloat16; where installed: tile-kernels"
    instead.add_argument("--peers", nargs="+", choices=PEERS, default=[], metavar="NAME", help=text)
    add_json_argument(parser)


def architectures(text: str) -> list[str]:
    """Return a list of architectures, in the order given."""
    names = text.split(",")
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        raise argparse.ArgumentTypeError(f"expected any of {', '.join(ARCHITECTURES)}, got {', '.join(unknown)}")
    return names


def run(args: argparse.Namespace) -> int:
    """Build what was asked for, print it."""
    from . import matrix

    refuse_what_is_ignored(args)
    kernels = matrix.chosen_kernels(args.kernels)
    if nothing_asked(args):
        return show_stored()
    if args.explain:
        return explain(kernels)
    if args.peers:
        return inspect_peers(args)
    if args.representative:
        wanted = sorted(matrix.representative(kernels), key=lambda pair: list(ARCHITECTURES).index(pair[1]))
    else:
        sizes = (args.streams, args.widths, args.dtype)
        subjects = matrix.full(kernels) if args.full else matrix.cross(kernels, *sizes)
        wanted = [(subject, arch) for arch in args.arch for subject in subjects]
    if args.kernels:
        matrix.refuse_unbuilt(kernels, [subject for subject, _ in wanted])
    if args.source or args.sass:
        return print_code(wanted, args.sass)
    return inspect_kernels(wanted, args)


def nothing_asked(args: argparse.Namespace) -> bool:
    """Whether the command stands alone."""
    return all(value == DEFAULTS[name] for name, value in vars(args).items() if name in DEFAULTS)


def show_stored() -> int:
    """Show the builds that the repository has, at the studied shape: nothing is built, which would take minutes."""
    from . import matrix, stored, table

    versions, rows = stored.read(stored.KERNELS)
    subjects = [one for kernel in FAMILIES for one in matrix.subjects(matrix.studied_shape(kernel), [kernel])]
    keys = {subject.key(arch) for arch in ARCHITECTURES for subject in subjects}
    shown = [row for row in rows if row.key in keys]
    print(table.report(shown))
    tools = ", ".join(f"{name} {number}" for name, number in versions.items())
    print(
        f"\n{len(shown)} of {len(rows)} stored builds, made with {tools}; a kernel that was changed since has others.\n"
        "mhc-tilelang inspect KERNEL builds one anew, inspect --arch sm_90a all for an architecture."
    )
    return 0


def refuse_what_is_ignored(args: argparse.Namespace) -> None:
    """Raise MHCError for options that say nothing beside another one."""
    decided = {
        "full": ("streams", "widths", "dtype"),
        "representative": ("arch", "streams", "widths", "dtype"),
        "source": ("json",),
        "sass": ("json",),
        "explain": ("arch", "streams", "widths", "dtype", "json"),
    }
    for option, others in decided.items():
        if getattr(args, option):
            for other in others:
                if getattr(args, other) != DEFAULTS[other]:
                    raise MHCError(f"--{other}: expected none beside --{option}, got {getattr(args, other)}")
    if args.peers and args.kernels:
        raise MHCError(f"KERNEL: expected none beside --peers, got {', '.join(args.kernels)}")


def inspect_kernels(wanted: Builds, args: argparse.Namespace) -> int:
    """Build, print the tables, write the rows."""
    from tqdm import tqdm

    from . import stored, table
    from .built import build_all
    from .faults import faults, known_splits, place, with_faults

    print(f"mhc-tilelang inspect: {estimate(wanted)}", file=sys.stderr)
    rows = list(tqdm(build_all(wanted), total=len(wanted), desc="inspect", unit="kernel", leave=False))
    print(table.report(rows))
    faulty = [row for row in rows if faults(row)]
    print(f"\nfaults in {len(faulty)} of {len(rows)} builds", *map(with_faults, faulty), sep="\n")
    if known := [f"{place(row)}: {split}" for row in rows for split in known_splits(row)]:
        print("\nknown and no fault:", *known, sep="\n")
    stored.write(args.json, rows)
    return 0


def estimate(wanted: Builds) -> str:
    """Return an upper bound of the build time, in words."""
    from ..gpu.building import Job

    cores = os.cpu_count() or 1
    seconds = sum(Job(subject.kernel, subject.launch.parameters).seconds for subject, _ in wanted) / cores
    took = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return f"{len(wanted)} builds, about {took} on {cores} cores, less for those that are kept from before"


def inspect_peers(args: argparse.Namespace) -> int:
    """Print the rows of another implementation's kernels."""
    from tqdm import tqdm

    from . import stored, table, tile_kernels

    if args.streams != [tile_kernels.NUM_STREAMS] or args.dtype != ["bfloat16"]:
        got = f"n = {args.streams}, {args.dtype}"
        raise MHCError(f"--peers: {tile_kernels.PACKAGE}: expected n = {tile_kernels.NUM_STREAMS}, bfloat16, got {got}")
    wanted = [(name, width, arch) for arch in args.arch for width in args.widths for name in tile_kernels.KERNELS]
    built = (tile_kernels.build(*each) for each in wanted)
    rows = list(tqdm(built, total=len(wanted), desc="inspect", unit="kernel", leave=False))
    print(table.report(rows))
    stored.write(args.json, rows, tile_kernels.versions())
    return 0


def print_code(wanted: Builds, machine_code: bool) -> int:
    """CUDA source or machine code of each kernel."""
    from ...compiler.cuda_source import generate
    from .compiler import compile_source

    for subject, arch in wanted:
        code = generate(subject.kernel, subject.launch.parameters, arch).code
        print(f"// {subject.label} for {arch}: {subject.launch.parameters}")
        print(compile_source(code, arch).listing if machine_code else code)
    return 0


def explain(kernels: tuple[str, ...]) -> int:
    """Print the page of each kernel, for a terminal."""
    from . import terminal
    from .explain import page

    pages = "\n".join([*(page(kernel) for kernel in kernels), terminal.LEGEND])
    print(terminal.fit(pages, terminal.width()))
    return 0
