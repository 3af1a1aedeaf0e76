"""A call's prediction: the sum over its launches, an interval, the regime, the terms, what to change first.

The interval covers what the model was off by on kernels that it had not seen (BANDS), and what a device's assumed
constants leave open. A prediction that a check refuses has no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from ...errors import MHCError
from ..calls.cases import Case, Shape
from ..calls.table import CALLS
from .devices import Device
from .launched import Launched, build_function, fits_cache, walk_launch
from .model import SHORT_US, Work, advice, regime, rows_of, terms
from .schedule import Steady, cycles, steady
from .walk import EndlessError, walk

# A factor up and down: each covers at least nine of ten of the 140 points, every one predicted without its kernel.
BANDS = {"memory": 1.08, "memory and SM": 1.3, "SM": 1.25, "launch and latency": 1.4}
FUSED = (
    *("post_project", "post_pre", "expand_project", "boundary_backward", "replay"),
    *("aggregate_mappings", "coefficients_aggregate", "coefficients_aggregate_backward"),
)
FUSED_BAND = 1.6  # nothing in the published set resembles them: until one is measured
CANNOT_SAY = 1.22  # predicted ratio, below which the faster one of two was wrong too often
REFUSED = "no answer"
MEASURED_BAND = 1.14  # with one measured point of the kernel: the 90th percentile over the 140 points
NO_WIDTH = 2560  # of kernels that do not depend on it


class Part(NamedTuple):
    """One launch's share of a prediction; µs."""

    family: str
    us: float
    low: float
    high: float
    memory_us: float
    sm_us: float
    stack: dict[str, float]
    advice: str
    waves: float


class Prediction(NamedTuple):
    """A row: `us` is None where only an interval is said, `low` and `high` too where there is no answer.

    Attributes:
        regime: what limits it, or "no answer".
        memory_us: bytes over the bandwidth that copies approach; `sm_us`: the SMs, were memory infinitely fast.
        launches: kernels that the call launches.
        reasons: why there is no number; empty where there is one.
        change_first: one sentence.
    """

    name: str
    gpu: str
    tokens: int
    hidden_size: int
    dtype: str
    us: float | None
    low: float | None
    high: float | None
    regime: str
    memory_us: float | None
    sm_us: float | None
    launches: int
    reasons: tuple[str, ...]
    change_first: str
    parts: tuple[Part, ...] = ()

    def as_row(self) -> dict[str, Any]:
        """Return a row of the JSON."""
        return {**self._asdict(), "parts": [part._asdict() for part in self.parts]}


def launches_of(case: Case, device: Device, family: str) -> list[Any]:
    """Return a call's launches, or those of one family."""
    from ..calls.launches import launches

    blocks = 2 * int(device.table["sms"].value)  # of a projection, as the launch functions ask for on a GPU
    return [launch for launch in launches(case, device.arch, blocks) if family in ("", launch.family)]


def predict(case: Case, device: Device, flushed: bool = False, family: str = "") -> Prediction:
    """Predict one call on a device, or of its launches those of one family.

    Args:
        case: a call of `launches` at a shape.
        device: a device of `devices`.
        flushed: the last-level cache is cold before each call.
        family: family of the launches that count; all by default.
    """
    found, reasons = [], []
    for launch in launches_of(case, device, family):
        try:
            found.append(walk_launch(launch, device.arch))
            reasons += [f"{launch.family}: {text}" for text in found[-1].refusals]
        except EndlessError as error:
            reasons.append(f"{launch.family}: {error}")
    if not flushed:
        reasons += fits_cache(sum(each.working_set for each in found), device.cache_bytes)
    return answer(family or case.kernel, case, device, found, reasons)


def answer(name: str, case: Case, device: Device, found: Sequence[Launched], reasons: Sequence[str]) -> Prediction:
    """Numbers, or why there are none."""
    sizes, launches, none = case.shape, len(found), (None, None, None)
    shape = name, device.name, sizes.num_tokens, sizes.hidden_size, sizes.dtype
    if reasons:
        return Prediction(*shape, *none, REFUSED, None, None, launches, tuple(reasons), "")
    parts = tuple(part_of(each.family, each.work, device) for each in found)
    us, low, high, memory, sm = (sum(values) for values in zip(*(part[1:6] for part in parts), strict=True))
    longest = max(parts, key=lambda part: part.us)
    first = longest.advice if len(parts) == 1 else f"{longest.family}, {longest.us / us:.0%} of it: {longest.advice}"
    short = (f"below {SHORT_US:.0f} µs: launch and latency decide, an interval is all there is",)
    said, why = (None, short) if us < SHORT_US else (us, ())
    return Prediction(*shape, said, low, high, regime(us, memory, sm), memory, sm, launches, why, first, parts)


def part_of(family: str, work: Work, device: Device) -> Part:
    """Predict one launch."""
    found, fast, slow = (
        terms(rows_of([work]), constants)
        for constants in (device.constants, device.extreme(fastest=True), device.extreme(fastest=False))
    )
    one = {name: float(values[0]) for name, values in vars(found).items()}
    us, memory, sm = one["us"], one["memory"], one["sm"]
    band = FUSED_BAND if family in FUSED else BANDS[regime(us, memory, sm)]
    # As a stack: launch, bytes, what SM time adds by its parts, the tail.
    parts = {name: one[name] for name in ("trips", "barriers", "blocks", "cycles")}
    beyond, total = max(0.0, us - one["launch"] - memory - one["tail"]), sum(parts.values())
    stack = {name: beyond * value / total for name, value in parts.items()}
    stack = {"launch": one["launch"], "memory": memory, **stack, "tail": one["tail"]}
    ends = float(fast.us[0]) / band, float(slow.us[0]) * band
    return Part(family, us, *ends, memory, sm, stack, advice(work, device.constants), one["waves"])


def measured_factors(path: Path, device: Device, num_streams: int) -> dict[tuple[str, int, str], float]:
    """Measured over predicted time by call, width and dtype, from what `bench --json` stored on the device.

    Of the row with most tokens, where several have a predicted number. Raises MHCError for a file of something else.
    """
    from ..stored import from_json
    from ..stored.results import KernelResults

    results = from_json.load(path)
    if not isinstance(results, KernelResults):
        raise MHCError(f"--measured {path}: expected what `bench --json` wrote, got an overhead")
    found = {}
    for one in sorted(results.measurements, key=lambda one: one.num_tokens):
        if one.num_streams == num_streams and one.kernel in CALLS:
            shape = Shape(one.num_tokens, num_streams, one.hidden_size or NO_WIDTH, one.dtype)
            if us := predict(Case(one.kernel, shape), device, flushed=True).us:
                found[one.kernel, shape.hidden_size, one.dtype] = 1e6 * one.time.median / us
    return found


def scale(one: Prediction, factor: float | None) -> Prediction:
    """Scale a prediction by one measured point of its kernel; unchanged without a factor or a number."""
    if factor is None or one.us is None:
        return one
    us = one.us * factor
    said = f"scaled by {factor:.2f}, measured over predicted time of one shape"
    return one._replace(us=us, low=us / MEASURED_BAND, high=us * MEASURED_BAND, reasons=(*one.reasons, said))


def compare(one: Prediction, other: Prediction) -> str:
    """Say which of two predictions is faster, or that it cannot be said."""
    pair = f"{one.name} against {other.name}: cannot say; "
    for each in (one, other):
        if each.us is None:
            return f"{pair}{each.name}: {'; '.join(each.reasons)}"
    faster, slower = sorted((one, other), key=lambda each: each.us or 0.0)
    ratio = (slower.us or 0.0) / (faster.us or 0.0)
    numbers = f"predicted {one.us:.1f} µs and {other.us:.1f} µs, a ratio of {ratio:.2f}"
    if ratio < CANNOT_SAY:
        return f"{pair}{numbers}, and below {CANNOT_SAY} the order is a guess"
    fused = {part.family for each in (one, other) for part in each.parts if part.family in FUSED}
    if fused and ratio < FUSED_BAND:
        return f"{pair}{numbers}, and {', '.join(sorted(fused))} resembles nothing measured"
    return f"{faster.name} is predicted to be faster than {slower.name}: {numbers}"


def steady_of(case: Case, device: Device, family: str) -> tuple[Steady, str]:
    """Return the steady iteration of a call's first launch, or of its first launch of a family, and that family."""
    launch = launches_of(case, device, family)[0]
    built = build_function(launch.function, device.arch)
    entry, latency = built.entry(launch.sizes), device.constants.latency
    found = walk(built.code, entry)
    slowest = max(map(found.of_warp, (0, entry.warps - 1)), key=lambda steps: cycles(built.code, steps, latency))
    return steady(built.code, slowest, latency), launch.family


HEADERS = ("predicted", "tokens", "C", "µs", "from", "to", "regime", "memory", "SM", "launches")
FOOTNOTE = """\
from, to: what covered nine of ten published times of kernels that the fit had not seen, and what a device's assumed
constants leave open. memory: bytes over the bandwidth that copies approach; SM: with an infinitely fast memory."""


def table(predictions: Sequence[Prediction], gpu: Device, flushed: bool) -> str:
    """Return a line a prediction, then what to change first or why there is no number."""
    cold = "flushed" if flushed else "as a call before leaves it"
    head = (
        f"Predicted from machine code for {gpu.arch}, constants of {gpu.name}; nothing here was measured. L2: {cold}."
    )
    lines = [
        (p.name, p.tokens, p.hidden_size, *map(digits, p[5:8]), p.regime, *map(digits, p[9:11]), p.launches)
        for p in predictions
    ]
    text = tabulate(lines, HEADERS, tablefmt="simple", disable_numparse=True, colalign=("left", *["right"] * 5, "left"))
    said = [
        f"{p.name}, {p.tokens} × {p.hidden_size}: {'; '.join(filter(None, (*p.reasons, p.change_first)))}"
        for p in predictions
    ]
    return "\n\n".join([head, text, "\n".join(said), FOOTNOTE])


def digits(value: float | None) -> str:
    """Format three digits, or a dash."""
    return "–" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"
