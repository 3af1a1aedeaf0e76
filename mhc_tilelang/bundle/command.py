"""`mhc-tilelang export`: write a bundle, or check one with `--verify`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..cli.json_output import add_json_argument, write_json
from ..errors import MHCError
from .options import add_model_arguments, spec_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang export`."""
    add_model_arguments(parser, required=False)
    parser.add_argument("--arch", metavar="LIST", help="cpu, CUDA architectures such as sm_90a, or several: sm_90a,cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write the bundle: a new or an empty folder")
    text = "processors of the cpu target: an x86-64 level or native (default: x86-64-v3; elsewhere native)"
    parser.add_argument("--march", metavar="NAME", help=text)
    text = "write nothing: check the bundle in DIR, and run its kernels where this machine can"
    parser.add_argument("--verify", type=Path, metavar="DIR", help=text)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Export or verify; 1 when a kernel of a verified bundle is off."""
    if args.verify is not None:
        if given := [name for name in ("model", "arch", "out", "march") if getattr(args, name) is not None]:
            raise MHCError(f"--verify DIR: expected no --{given[0]}, got one")
        return run_verify(args)
    if missing := [name for name in ("model", "arch", "out") if getattr(args, name) is None]:
        raise MHCError(f"expected --model, --arch and --out, or --verify; got no --{missing[0]}")
    return run_export(args)


def run_export(args: argparse.Namespace) -> int:
    """Write a bundle, and say what it holds."""
    from tqdm import tqdm

    from .export import export, total_bytes

    spec, targets = spec_of(args), list(dict.fromkeys(args.arch.split(",")))
    bar: tqdm[Any] | None = None

    def started(steps: int) -> Any:
        nonlocal bar
        bar = tqdm(total=steps, desc="export", unit="step", leave=False)
        return bar.update

    try:
        facts = export(
            spec,
            args.dtype,
            targets,
            args.out,
            forward_only=args.forward_only,
            rms_norm_eps=args.rms_norm_eps,
            march=args.march,
            started=started,
        )
    finally:
        if bar is not None:
            bar.close()
    kernels = {target: len(part["kernels"]) for target, part in facts["targets"].items()}
    size = total_bytes(facts)
    counts = ", ".join(f"{count} kernels for {target}" for target, count in kernels.items())
    print(f"{args.out}: {counts}; {len(facts['files'])} files, {size / 1e6:.1f} MB")
    write_json(args.json, {"folder": str(args.out), "kernels": kernels, "bytes": size, "manifest": facts})
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Check a bundle, and print a row per result of a kernel."""
    from tabulate import tabulate
    from tqdm import tqdm

    from .verify import check_files, results

    facts = check_files(args.verify)
    rows = list(tqdm(results(args.verify, facts), desc="verify", unit="result", leave=False))
    shown = [
        (row.target, row.kernel, row.output, f"{row.share:.3f}" if row.ran else row.note, "" if row.passed else "WRONG")
        for row in rows
    ]
    if shown:
        print(tabulate(shown, headers=("target", "kernel", "output", "share of tolerance", ""), disable_numparse=True))
    failed = [row for row in rows if not row.passed]
    ran = sum(row.ran for row in rows)
    print(f"{len(facts['files'])} files as exported; {ran} results computed, {len(failed)} of them off")
    write_json(args.json, {"folder": str(args.verify), "results": [vars(row) for row in rows], "passed": not failed})
    return 1 if failed else 0
