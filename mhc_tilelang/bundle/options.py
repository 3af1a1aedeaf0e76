"""The options that say which model: shared by `export` and `warmup`. Imports no torch."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import MHCError
from ..spec import HIDDEN_SIZES, STREAM_COUNTS, MHCSpec

CUSTOM = "custom"
DTYPES = ("bfloat16", "float16", "float32")
CONSTANTS = {
    "deepseek-v4": MHCSpec.deepseek_v4,
    "deepseek-v4.1": MHCSpec.deepseek_v4_1,
    "glm-5.3": MHCSpec.glm5_3,
    "hy4": MHCSpec.hy4,
    "paper": MHCSpec.paper,
}


def add_model_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the model, its sizes, its stream's dtype, and `--forward-only`."""
    models = (*HIDDEN_SIZES, CUSTOM)
    sizes = ", ".join(f"{name} {size}" for name, size in HIDDEN_SIZES.items())
    parser.add_argument("--model", choices=models, required=required, help=f"model with this hidden size ({sizes})")
    parser.add_argument("--hidden-size", type=int, metavar="C", help=f"hidden size of --model {CUSTOM}")
    parser.add_argument("--num-streams", type=int, default=4, choices=STREAM_COUNTS, help="streams, n (default: 4)")
    parser.add_argument("--sinkhorn-iters", type=int, default=20, metavar="N", help="Sinkhorn iterations (default: 20)")
    help_text = "eps and scales of released code or of the paper's equations (default: deepseek-v4)"
    parser.add_argument("--constants", choices=tuple(CONSTANTS), default="deepseek-v4", help=help_text)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the stream (default: bfloat16)")
    text = "eps of connections that normalise the layer's input (default: none do)"
    parser.add_argument("--rms-norm-eps", type=float, metavar="EPS", help=text)
    parser.add_argument("--forward-only", action="store_true", help="leave out kernels that only a backward launches")


def spec_of(args: argparse.Namespace) -> MHCSpec:
    """Return the spec of the options. Raises MHCError where they contradict each other or a size is out of range."""
    if (args.hidden_size is None) == (args.model == CUSTOM):
        wanted = f"--hidden-size with --model {CUSTOM}, and with no other"
        raise MHCError(f"expected {wanted}, got --model {args.model} --hidden-size {args.hidden_size}")
    hidden_size = HIDDEN_SIZES.get(args.model, args.hidden_size)
    changes: dict[str, Any] = {"num_streams": args.num_streams, "sinkhorn_iters": args.sinkhorn_iters}
    try:
        return CONSTANTS[args.constants](hidden_size, **changes)
    except (TypeError, ValueError) as error:
        raise MHCError(str(error)) from None
