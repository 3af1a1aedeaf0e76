"""`mhc-tilelang bench overhead`: a whole layer under four connections, and the model that predicts it.

No number is printed over a failed check. What was measured comes first, what a model predicts after it.
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ...cli.device import add_device_argument, describe, pick_device, versions
from ...cli.json_output import add_json_argument, write_json
from ...errors import MHCError
from ...spec import STREAM_COUNTS
from ..options import DTYPES, positive, positive_number
from ..sizes import MODELS, SEQUENCE, LayerSizes
from . import model
from . import report as overhead_report
from .model import DEVICES, MODES, Device, Prediction

if TYPE_CHECKING:
    import torch

HELP = "measure what mHC adds to a whole layer, beside the paper's 6.7 % and a model's prediction"
CUSTOM = "custom"
ROUNDS = "15 on a CPU, 5 of what takes long; 30 on a GPU"
LEADING_DEVICE = "H200"
TOKENS = {"cpu": 512, "cuda": SEQUENCE}
REPEATS = {"cpu": 15, "cuda": 30}
SECONDS = {"cpu": 1.0, "cuda": None}  # of one candidate's samples: what has taken them leaves early


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang bench overhead`."""
    add_device_argument(parser)
    add = parser.add_argument
    text = "model of the layer: C, heads, width of the active experts (default: 3b; custom: by the next four options)"
    add("--model", choices=(*MODELS, CUSTOM), default="3b", help=text)
    add("--hidden-size", type=positive, metavar="C", help="hidden size of a custom layer")
    add("--ffn-width", type=positive, metavar="F", help="width of a custom layer's SwiGLU: all active experts")
    add("--heads", type=positive, metavar="H", help="attention heads of a custom layer")
    add("--head-size", type=positive, metavar="D", help="channels of a head of a custom layer (default: 128)")
    text = f"tokens, in sequences of {SEQUENCE} or in a single shorter one (default: 512 on a CPU, {SEQUENCE} on a GPU)"
    add("--tokens", type=positive, metavar="T", help=text)
    add("--streams", type=int, choices=STREAM_COUNTS, default=4, help="residual streams, n (default: 4)")
    text = "dtype of stream, weights, activations (default: bfloat16; float32 on a CPU that cannot multiply bfloat16)"
    add("--dtype", choices=DTYPES, help=text)
    text = "forward alone, training (forward and backward), or both (default)"
    add("--mode", choices=(*MODES, "both"), default="both", help=text)
    add("--repeats", type=positive, metavar="R", help=f"rounds that count (default: {ROUNDS})")
    group = parser.add_argument_group("the model")
    add = group.add_argument
    text = f"devices to predict for (default: all of {', '.join(DEVICES)})"
    add("--devices", nargs="+", choices=tuple(DEVICES), default=tuple(DEVICES), metavar="DEVICE", help=text)
    text = "bandwidth of this machine, for a prediction beside the measurement; together with --flops"
    add("--bandwidth", type=positive_number, metavar="GB/s", help=text)
    text = "FLOP/s of this machine in the layer's dtype, dense; together with --bandwidth"
    add("--flops", type=positive_number, metavar="TFLOP/s", help=text)
    text = f"share of the bandwidth that memory-bound kernels reach, assumed (default: {model.BANDWIDTH_SHARE})"
    add("--bandwidth-share", type=positive_number, default=model.BANDWIDTH_SHARE, metavar="SHARE", help=text)
    text = f"share of the FLOP/s that matrix products reach, assumed (default: {model.FLOPS_SHARE})"
    add("--flops-share", type=positive_number, default=model.FLOPS_SHARE, metavar="SHARE", help=text)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Predict, check, measure, print."""
    sizes, given = layer_sizes(args), given_device(args)
    import torch

    from ..measure.machine import clock_mhz, last_level_cache
    from ..measure.timing import FEWEST_ROUNDS, WARMUP_ROUNDS, clock_for
    from .layers import make_layers
    from .run import measure_layers

    device = pick_device(args.device)
    args.dtype = args.dtype or default_dtype(device)
    num_tokens, sequence = tokens_and_sequence(args.tokens or TOKENS[device.type])
    modes = MODES if args.mode == "both" else (args.mode,)
    repeats = args.repeats or REPEATS[device.type]
    seconds = None if args.repeats else SECONDS[device.type]
    at_hand = given or device_at_hand(device, args.dtype)
    devices = [DEVICES[name] for name in args.devices]
    table = [predict(args, sizes, one, mode, SEQUENCE, itemsize=2) for one in devices for mode in modes]
    itemsize = 4 if args.dtype == "float32" else 2
    predicted = [predict(args, sizes, at_hand, mode, sequence, itemsize) for mode in modes] if at_hand else []
    facts = {
        "device": describe(device),
        "device_type": device.type,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "layer": {"model": args.model, **vars(sizes), "num_streams": args.streams, "dtype": args.dtype},
        "num_tokens": num_tokens,
        "sequence": sequence,
        "rounds": repeats,
        "warmup_rounds": WARMUP_ROUNDS,
        "fewest_rounds": FEWEST_ROUNDS,
        "seconds": seconds,
    }
    assumptions = {"bandwidth_share": args.bandwidth_share, "flops_share": args.flops_share}

    print("mhc-tilelang bench overhead: checking the layer first", file=sys.stderr)
    layers = make_layers(sizes, num_tokens, sequence, args.streams, getattr(torch, args.dtype), device)
    clock = clock_for(device, last_level_cache(device))
    measured = measure_layers(layers, modes, clock, repeats, seconds)
    facts["clock_mhz"] = clock_mhz(device)

    explained = [*devices, given] if given else devices
    predictions = [overhead_report.model_table(table + (predicted if given else []), explained, assumptions)]
    predictions.append(overhead_report.predicted_kernels(table, sizes, args.streams))
    if any(one.name == LEADING_DEVICE for one in devices):
        predictions.insert(0, overhead_report.headline(table, LEADING_DEVICE, SEQUENCE))
    measurements = [
        overhead_report.conclusion(measured, device.type),
        overhead_report.measured_table(measured, predicted),
        overhead_report.kernel_table(measured),
        overhead_report.notes(measured, device.type, bool(predicted)),
    ]
    print(overhead_report.header(facts, sizes))
    print("\n\n".join((*measurements, *predictions, overhead_report.WHAT_THE_PAPER_SAYS, overhead_report.EVERY_NUMBER)))
    write_json(args.json, overhead_report.as_json(facts, measured, table, predicted, assumptions))
    return 0


def layer_sizes(args: argparse.Namespace) -> LayerSizes:
    """Return the sizes that the options ask for. Raises MHCError for a custom layer without sizes, or the reverse."""
    options = {"--hidden-size": args.hidden_size, "--ffn-width": args.ffn_width, "--heads": args.heads}
    if args.model == CUSTOM:
        if missing := [option for option, value in options.items() if value is None]:
            raise MHCError(f"--model custom: expected {', '.join(options)}, got no {', '.join(missing)}")
        return LayerSizes(args.hidden_size, args.heads, args.ffn_width, args.head_size or 128)
    options["--head-size"] = args.head_size
    if extra := [option for option, value in options.items() if value is not None]:
        raise MHCError(f"{', '.join(extra)}: expected with --model custom only, got --model {args.model}")
    return MODELS[args.model]


def default_dtype(device: torch.device) -> str:
    """Return the dtype that layers are trained in, unless its matrix products take the device many times as long."""
    import torch

    slow = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "float32" if slow else "bfloat16"


def given_device(args: argparse.Namespace) -> Device | None:
    """Return the machine as --bandwidth and --flops describe it. Raises MHCError for one of them alone."""
    if (args.bandwidth is None) != (args.flops is None):
        raise MHCError("--bandwidth, --flops: expected both or neither, got one")
    if args.bandwidth is None:
        return None
    return Device("this machine", args.bandwidth * 1e9, args.flops * 1e12, "as given")


def device_at_hand(device: torch.device, dtype: str) -> Device | None:
    """Return the datasheet of the GPU at hand; None of others, and for float32, which datasheets count differently."""
    return model.known_device(describe(device)) if device.type == "cuda" and dtype != "float32" else None


def tokens_and_sequence(num_tokens: int) -> tuple[int, int]:
    """Return the tokens as whole sequences. Raises MHCError for a part of one beyond the first."""
    sequence = min(num_tokens, SEQUENCE)
    if num_tokens % sequence:
        raise MHCError(f"--tokens: expected at most {SEQUENCE} or a multiple of it, got {num_tokens}")
    return num_tokens, sequence


def predict(
    args: argparse.Namespace, sizes: LayerSizes, device: Device, mode: str, sequence: int, itemsize: int
) -> Prediction:
    """Return the model's answer under the options' assumptions."""
    shares: dict[str, Any] = {"bandwidth_share": args.bandwidth_share, "flops_share": args.flops_share}
    return model.predict(sizes, device, mode, sequence=sequence, num_streams=args.streams, itemsize=itemsize, **shares)
