"""Measure one layer under each connection: check, then time in the same rounds, then ask for the memory.

check_layers    mHC by the kernels against mHC in plain torch, outputs and gradients
measure_layers  the times of every connection and mode, the ratios to the plain residual, the kernels alone
memory          what a training step needs, or keeps for its backward
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from ... import compiler, launch
from ...checking.tolerance import UNIT_ROUNDOFF
from ...compiler.kernel import dtype_name
from ...errors import MHCError
from ...kernels import boundary_plans
from ..calls.cases import Shape
from ..calls.every_call import Given
from ..calls.table import AGGREGATED
from ..calls.workloads import Buffered
from ..measure.timing import WARMUP_ROUNDS, Clock, Run, Sample, Statistics, ratios, sample, summarize
from ..torch_forms.baselines import TOLERANCE, relative_error
from .layers import EAGER, KERNELS, KINDS, RESIDUAL, WAITING, Layer
from .model import SUBLAYERS, TRAINING

FORWARD_KERNELS = ("post_project", "coefficients", "aggregate")
BACKWARD_KERNELS = ("coefficients_aggregate_backward", "boundary_backward", "boundary_sums")
# Where a boundary's backward is not fused, with the sum of post's and pre's gradient of the stream, no kernel of ours.
GRADIENT_SUM = "sum of g_x"
SEPARATE_BACKWARD = ("aggregate_backward", "coefficients_backward", "project_backward", GRADIENT_SUM, "post_backward")

PEAK, SAVED = "peak memory", "saved for backward"


@dataclass(frozen=True)
class Timing:
    """A connection's time in one mode, and its ratio to the plain residual's, round by round."""

    time: Statistics
    ratio: Statistics


@dataclass(frozen=True)
class Measurement:
    """Results of one measured layer.

    Attributes:
        errors: errors of the check, by tensor.
        modes: times by mode, then by connection.
        kernels: time of one call of each kernel alone; a step has two of each.
        memory: bytes by connection, in the sense of `memory_kind`; empty without a training step.
    """

    errors: dict[str, float]
    modes: dict[str, dict[str, Timing]]
    kernels: dict[str, Statistics]
    memory: dict[str, int]
    memory_kind: str

    def kernel_seconds(self, mode: str) -> float:
        """Return the seconds of all kernels that a step of this mode runs."""
        chosen = self.kernels if mode == TRAINING else {name: self.kernels[name] for name in FORWARD_KERNELS}
        return SUBLAYERS * sum(time.median for time in chosen.values())


def tolerance(name: str, dtype: torch.dtype) -> float:
    """Return the largest relative difference between two correct mHC layers, relative to the norm.

    Both compute in float32 and round where the contract says so, but sums differ in their last bits, a few values
    round the other way, and from there on every rounding of the layers inside falls differently: some 24 forward and
    backward, each u/√3 of a value in each layer, together 4 u. Twice that is allowed. The gradients of alpha and bias
    are sums over tokens whose terms cancel: eight times. In float32, the order of the sums decides. (Seen: 2.6 u; 7 u
    of alpha; 5e-6 in float32. A transposed h_res: above 0.1.)
    """
    unit = UNIT_ROUNDOFF[dtype_name(dtype)]
    rounded = (32 if name.endswith(("alpha", "bias")) else 8) * unit
    return max(rounded, TOLERANCE[torch.float32])


def check_layers(layers: Mapping[str, Layer]) -> dict[str, float]:
    """Return the relative errors of the layer's results and gradients. Raises MHCError for the first too large.

    An alpha's is relative to the gradient of its connection's bias where that is larger: it is three numbers, each a
    sum over all tokens and streams, of which little may be left.
    """
    eager, kernels = layers[EAGER], layers[KERNELS]
    names = ["x_next", *WAITING, *(f"g_{name}" for name in kernels.leaves())]
    expected, got = ([*layer.inference(), *layer.training()] for layer in (eager, kernels))
    errors = {}
    norms = {name: float(torch.linalg.vector_norm(one.float())) for name, one in zip(names, expected, strict=True)}
    for name, one, other in zip(names, got, expected, strict=True):
        errors[name], allowed = relative_error(one, other), tolerance(name, kernels.x.dtype)
        if name.endswith("alpha"):
            errors[name] *= min(1.0, norms[name] / norms[name.removesuffix("alpha") + "bias"])
        if not errors[name] <= allowed:  # NaN is refused too
            raise MHCError(
                f"bench overhead: {name}: expected the kernels' layer within {allowed:.0e} of plain torch's, "
                f"got {errors[name]:.1e}; nothing is measured"
            )
    return errors


def measure_layers(
    layers: Mapping[str, Layer], modes: tuple[str, ...], clock: Clock, repeats: int, seconds: float | None = None
) -> Measurement:
    """Check, then measure. Raises MHCError where the check fails."""
    errors = check_layers(layers)
    x = layers[KERNELS].x
    alone = kernels_alone(x, training=TRAINING in modes)
    candidates: dict[str, Run] = dict(alone)
    for mode in modes:
        for kind, layer in layers.items():
            candidates[f"{mode} {kind}"] = layer.training if mode == TRAINING else layer.inference
    total = len(candidates) * (WARMUP_ROUNDS + repeats)
    with tqdm(total=total, desc="bench overhead", unit="call", leave=False) as bar:

        def counted(run: Run) -> Sample:
            taken = clock(run)
            bar.update()
            return taken

        samples = sample(candidates, counted, repeats, seconds)
    timings = {
        mode: {
            kind: Timing(
                summarize(samples[f"{mode} {kind}"]),
                ratios(samples[f"{mode} {kind}"], samples[f"{mode} {RESIDUAL}"]),
            )
            for kind in KINDS
        }
        for mode in modes
    }
    kind, needed = memory_of(x.device)
    memory = {name: needed(layer) for name, layer in layers.items()} if TRAINING in modes else {}
    return Measurement(errors, timings, {name: summarize(samples[name]) for name in alone}, memory, kind)


def kernels_alone(x: torch.Tensor, training: bool) -> dict[str, Run]:
    """Return every kernel of a boundary at the stream's size, by itself; with those of the backward for training."""
    *leading, num_streams, hidden_size = x.shape
    shape = Shape(torch.Size(leading).numel(), num_streams, hidden_size, dtype_name(x.dtype))
    given = Given.of(shape, x.device)
    i = given.inputs
    x_next = torch.empty_like(i.x)
    runs: dict[str, Run] = {
        "post_project": lambda: launch.post_project(i.x, i.layer_output, i.h_post, i.h_res, i.phi, out=(x_next, None)),
        **{name: Buffered(given, name).run for name in ("coefficients", "aggregate")},
    }
    if not training:
        return runs
    fused = boundary_plans.backward_is_fused(num_streams, compiler.platform_of(x.device))
    return {**runs, **(fused_backward(given) if fused else separate_backward(given))}


def fused_backward(given: Given) -> dict[str, Run]:
    """Return the launches of `post_pre_backward`, each with what those before it leave; the first may be two."""
    i, left, g = given.inputs, given.after, given.gradients
    g_projected, out = torch.empty_like(left.projected), (torch.empty_like(i.x), torch.empty_like(i.layer_output))
    mixing = (i.x, i.layer_output, left.h_pre, i.h_post, i.h_res, i.phi)

    def mappings() -> torch.Tensor:
        of_mappings = (g.g_h_post, g.g_h_res, left.projected, i.alpha, i.bias, given.spec)
        return launch.coefficients_aggregate_backward(g.g_h, left.x_next, *of_mappings, out=g_projected)

    def boundary() -> tuple[torch.Tensor, ...]:
        return launch.mixing_backward(g.g_x, g.g_h, g_projected, *mixing, out=out)

    partial_parameters = mappings()
    *_, partial_phi, partial_mixing = boundary()
    partial = (partial_phi, partial_mixing, partial_parameters)
    return {
        "coefficients_aggregate_backward": mappings,
        "boundary_backward": boundary,
        "boundary_sums": lambda: launch.boundary_sums(*partial, given.case.num_streams),
    }


def separate_backward(given: Given) -> dict[str, Run]:
    """Return the separate backward kernels that run where none is fused, the sum of both g_x included."""
    one, other = torch.ones_like(given.inputs.x), torch.ones_like(given.inputs.x)
    return {
        "aggregate_backward": Buffered(given, "aggregate_backward").run,
        "coefficients_backward": Buffered(given, "coefficients_backward").run,
        "project_backward": Buffered(given, AGGREGATED).run,
        GRADIENT_SUM: lambda: one.add_(other),
        "post_backward": Buffered(given, "post_backward").run,
    }


def memory_of(device: torch.device) -> tuple[str, Callable[[Layer], int]]:
    """Return the kind of memory figure a device gives, and the function that measures it."""
    return (PEAK, peak_memory) if device.type == "cuda" else (SAVED, saved_for_backward)


def peak_memory(layer: Layer) -> int:
    """Return the most bytes that a training step allocates on its GPU, above what was allocated before it."""
    device = layer.x.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    layer.training()
    return torch.cuda.max_memory_allocated(device) - before


def saved_for_backward(layer: Layer) -> int:
    """Bytes that a forward pass keeps for its backward, each buffer once, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in layer.weights().values()}
    buffers: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            buffers[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that its own node saved would keep itself alive

    with saved_tensors_hooks(note, lambda tensor: tensor):
        results = layer.forward()
    del results  # kept until here, so that no buffer was freed and its address used again
    return sum(buffers.values())
