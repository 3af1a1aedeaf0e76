"""Measure a shape's cases, once they are ready: the kernel, a copy of equal size, every form of plain torch, the
peers, in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from ..calls.cases import BOUNDARY_KERNELS, BOUNDARY_STEP, SUBLAYER_INPUT, Case, Shape
from ..calls.every_call import Given
from ..calls.workloads import SEPARATE, Workload, workload
from ..measure.host import host_seconds
from ..measure.machine import last_level_cache
from ..measure.timing import REPLAYED_TOKENS, GraphReplay, Statistics, capturable, clock_for, measure
from ..peers.prepare import Loaded, PeerResult, compare
from ..torch_forms import backward_post as backward_post_forms
from ..torch_forms import backward_streams as backward_stream_forms
from ..torch_forms import backward_tokens as backward_token_forms
from ..torch_forms import boundary as boundary_forms
from ..torch_forms import boundary_parts, float8
from ..torch_forms import streams as stream_forms
from ..torch_forms import tokens as token_forms
from ..torch_forms.baselines import Baseline, applicable, prepare, verify
from ..traffic.formulas import Traffic
from .ready import Preparation

FORMS = {
    **stream_forms.FORMS,
    **token_forms.FORMS,
    **backward_stream_forms.FORMS,
    **backward_post_forms.FORMS,
    **backward_token_forms.FORMS,
    **float8.FORMS,
}
COMPOSED_FORMS = {SUBLAYER_INPUT: stream_forms.SUBLAYER_INPUT_FORMS, **boundary_forms.FORMS}
KERNEL, COPY = "kernel", "copy"


@dataclass(frozen=True)
class FormResult:
    """A form of plain torch: its time, its relative distance from the kernel's output, and the forms of its parts."""

    form: str
    mode: str
    error: float
    time: Statistics
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class SeparateResult:
    """Time of the separate kernels beside a fused one, and their relative error against its output."""

    error: float
    time: Statistics


@dataclass(frozen=True)
class Result:
    """A case's times. `copy_bytes` are read and written together; `in_cache` when one call's bytes fit the cache.

    `replayed` when the calls were replays of CUDA graphs, without launches from Python. `predicted` is what
    `mhc-tilelang predict` says of a GPU, in ms. `host` is the host time of a call of the public function, in seconds,
    where there is one that runs just this.
    """

    case: Case
    traffic: Traffic
    in_cache: bool
    kernel: Statistics
    copy: Statistics
    copy_bytes: int
    torch: tuple[FormResult, ...]
    peers: tuple[PeerResult, ...] = ()
    separate: SeparateResult | None = None
    replayed: bool = False
    predicted: str = ""
    host: float | None = None

    @property
    def bandwidth(self) -> float:
        """The kernel's bytes per second."""
        return self.traffic.total / self.kernel.median

    @property
    def copy_bandwidth(self) -> float:
        """The copy's bytes per second."""
        return self.copy_bytes / self.copy.median

    @property
    def share_of_copy(self) -> float:
        """The kernel's bandwidth in units of the copy's."""
        return self.bandwidth / self.copy_bandwidth

    def fastest(self, mode: str | None = None) -> FormResult:
        """Return the fastest form of plain torch, of one mode or of all that ran."""
        return min((form for form in self.torch if mode in (None, form.mode)), key=lambda form: form.time.median)

    def speedup(self, form: FormResult | SeparateResult) -> float:
        """Return the form's time in units of the kernel's: above 1 where the kernel is faster."""
        return form.time.median / self.kernel.median


def run_cases(
    cases: Iterable[Case],
    device: torch.device,
    baselines: str,
    repeats: int,
    *peers: Loaded,
    seconds: float | None = None,
) -> Iterator[Result]:
    """Measure the cases one by one; those of one shape, which are neighbours, share their inputs.

    Before a shape's first, all of its kernels are compiled and checked; the very first case goes ahead of the others
    of its shape, so that a row is there soon. Raises FailedCheckError where a kernel is off.
    """
    preparation = Preparation(device)

    def prepared(of_shape: list[Case], ahead: int) -> Iterator[Case]:
        for part in filter(None, (of_shape[:ahead], of_shape[ahead:])):
            preparation.prepare(part)
            yield from part

    try:
        for number, (shape, group) in enumerate(groupby(cases, key=lambda case: case.shape)):
            of_shape = prepared(list(group), ahead=int(number == 0))
            yield from run_shape(shape, of_shape, device, baselines, repeats, *peers, seconds=seconds)
    finally:
        preparation.close()


def run_shape(
    shape: Shape,
    cases: Iterable[Case],
    device: torch.device,
    baselines: str,
    repeats: int,
    *peers: Loaded,
    seconds: float | None = None,
) -> Iterator[Result]:
    """Measure the cases of one shape, whose kernels are checked."""
    cache_bytes = last_level_cache(device)
    events = clock_for(device, cache_bytes)
    given = Given.of(shape, device)
    replayed = device.type == "cuda" and shape.num_tokens <= REPLAYED_TOKENS
    clock = GraphReplay(events, device) if replayed else events
    selection = boundary_parts.Selection(shape, given, baselines, clock)
    for case in cases:
        load = workload(case, given)
        load.run()
        verified = torch_forms(case, load, selection)
        copy, copy_bytes = make_copy(load.traffic.total, device)
        calls = [compare(peer, case.kernel, load.arguments, load.outputs()) for peer in peers]
        candidates = {KERNEL: load.run, COPY: copy, **{form.name: form.run for form in verified}}
        candidates |= {call.name: call.run for call in calls if call.run is not None}
        error = verify_separate(case, load)
        if load.separate:
            candidates[SEPARATE] = load.separate.run
        times = measure(capturable(candidates, clock, needed=(KERNEL, COPY, SEPARATE)), clock, repeats, seconds)
        in_cache = load.traffic.total <= cache_bytes
        torch_results = tuple(form_result(form, times) for form in verified if form.name in times)
        peer_results = tuple(PeerResult(call, times.get(call.name)) for call in calls)
        yield Result(
            case,
            load.traffic,
            in_cache,
            times[KERNEL],
            times[COPY],
            copy_bytes,
            torch_results,
            peer_results,
            SeparateResult(error, times[SEPARATE]) if SEPARATE in times else None,
            replayed,
            host=host_seconds(case.kernel, given),
        )


def torch_forms(case: Case, load: Workload, selection: boundary_parts.Selection) -> list[Baseline]:
    """Return the forms of plain torch, verified; of a boundary also those put together from the fastest parts."""
    x, expected, modes = selection.given.inputs.x, load.outputs(), selection.modes
    forms = applicable((FORMS | COMPOSED_FORMS)[case.kernel], x.device, case.shape.dtype, selection.baselines)
    if case.kernel not in (*BOUNDARY_KERNELS, BOUNDARY_STEP):
        return prepare(case.kernel, forms, modes, load.arguments, expected)
    allowed = boundary_forms.tolerances(case.kernel, x.dtype)
    selection.complete(case)
    whole = prepare(case.kernel, forms, modes, load.arguments, expected, allowed)
    return [*whole, *boundary_parts.prepare_parts(case, selection, load.arguments, expected, allowed)]


def verify_separate(case: Case, load: Workload) -> float:
    """Return the separate kernels' relative error against the fused one. Raises MHCError above what is allowed."""
    if load.separate is None:
        return 0.0
    run, outputs = load.separate
    run()
    expected, allowed = load.outputs(), boundary_forms.tolerances(case.kernel, getattr(torch, case.shape.dtype))
    got = outputs()
    buffers = {name: torch.empty_like(tensor) for name, tensor in expected.items()}

    def copy_over() -> None:
        for name, buffer in buffers.items():
            buffer.copy_(got[name])

    return verify(f"{case.kernel}: {SEPARATE}", copy_over, buffers, expected, allowed)


def form_result(baseline: Baseline, times: dict[str, Statistics]) -> FormResult:
    """Return a baseline's result: form, mode, error, time, parts."""
    return FormResult(baseline.form, baseline.mode, baseline.error, times[baseline.name], baseline.parts)


def make_copy(num_bytes: int, device: torch.device) -> tuple[Callable[[], object], int]:
    """Return a copy that reads and writes about `num_bytes` together, and how many it does.

    Of ones: pages that were never written are all backed by one page of zeros, which stays in the cache.
    """
    source = torch.ones(max(1, num_bytes // 8), dtype=torch.float32, device=device)
    destination = torch.ones_like(source)
    return lambda: destination.copy_(source), 2 * source.nbytes
