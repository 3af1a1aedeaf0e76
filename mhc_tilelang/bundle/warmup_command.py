"""`mhc-tilelang warmup`: have every kernel that a model needs before the first request comes.

Kernels are compiled into the caches on disk, or loaded from the bundles of $MHC_TILELANG_BUNDLE.
"""

from __future__ import annotations

import argparse
import time

from ..cli.device import add_device_argument, pick_device
from ..cli.json_output import add_json_argument, write_json
from ..errors import MHCError
from .options import add_model_arguments, spec_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang warmup`."""
    add_model_arguments(parser, required=True)
    add_device_argument(parser)
    text = "a CUDA architecture, to compile for a machine with another GPU or none at hand (default: the device's)"
    parser.add_argument("--arch", metavar="ARCH", help=text)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Get the kernels, one after the other."""
    from tqdm import tqdm

    from .. import compiler
    from .cuda_target import check_arch
    from .workload import kernels_of

    spec = spec_of(args)
    if args.arch is None:
        target = compiler.target_of(pick_device(args.device))
    elif args.device == "cpu":
        raise MHCError(f"--arch {args.arch}: expected no --device cpu with it, got one")
    else:
        target = args.arch
        check_arch(target)
    kernels = kernels_of(spec, args.dtype, target, args.forward_only, args.rms_norm_eps)
    start = time.monotonic()
    for family, parameters in tqdm(kernels, desc="warmup", unit="kernel", leave=False):
        compiler.kernel(family, target, **parameters)
    seconds = time.monotonic() - start
    print(f"{len(kernels)} kernels for {target} in {seconds:.1f} s")
    families = [family for family, _ in kernels]
    write_json(args.json, {"target": target, "kernels": families, "seconds": seconds})
    return 0
