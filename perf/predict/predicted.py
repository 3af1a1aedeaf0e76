"""A call's prediction: the sum over its launches, an interval, the regime, the terms, what to change first.

The interval covers what the model was off by on kernels that it had not seen (BANDS), and what a device's assumed
constants leave open. A prediction that a check refuses has no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..calls.cases import Case
from . import checks
from .advice import advice
from .devices import Device
from .launched import Launched, launched
from .model import SHORT_US, Work, regime, rows_of, terms

# A factor up and down: each covers at least nine of ten of the 140 points, every one predicted without its kernel.
BANDS = {"memory": 1.08, "memory and SM": 1.3, "SM": 1.25, "launch and latency": 1.4}
FUSED = ("post_project", "expand_project", "boundary_backward", "pre_mappings", "replay")
FUSED_BAND = 1.6  # nothing in the published set resembles them: until one is measured
CANNOT_SAY = 1.22  # predicted ratio, below which the faster one of two was wrong too often
REFUSED = "no answer"


@dataclass(frozen=True)
class Part:
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


@dataclass(frozen=True)
class Prediction:
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


def predict(case: Case, device: Device, flushed: bool = False, family: str = "") -> Prediction:
    """Predict one call on a device, or of its launches those of one family.

    Args:
        case: a call of `launches` at a shape.
        device: from `devices`.
        flushed: the last-level cache is cold before each call.
        family: of the launches that count; all by default.
    """
    from ..calls.launches import launches

    blocks = 2 * int(device.table["sms"].value)  # of a projection, as the launch functions ask for on a GPU
    wanted = [launch for launch in launches(case, "cuda", blocks) if family in ("", launch.family)]
    found = [launched(launch, device.arch) for launch in wanted]
    reasons = [f"{each.family}: {text}" for each in found for text in each.refusals]
    if not flushed:
        reasons += checks.fits_cache(sum(each.working_set for each in found), device.cache_bytes)
    return answer(family or case.kernel, case, device, found, reasons)


def answer(name: str, case: Case, device: Device, found: Sequence[Launched], reasons: Sequence[str]) -> Prediction:
    """Numbers, or why there are none."""
    shape = case.shape
    row = Prediction(
        name=name,
        gpu=device.name,
        tokens=shape.num_tokens,
        hidden_size=shape.hidden_size,
        dtype=shape.dtype,
        us=None,
        low=None,
        high=None,
        regime=REFUSED,
        memory_us=None,
        sm_us=None,
        launches=len(found),
        reasons=tuple(reasons),
        change_first="",
    )
    if reasons:
        return row
    parts = tuple(part_of(each.family, each.work, device) for each in found)
    us, memory, sm = (sum(getattr(part, key) for part in parts) for key in ("us", "memory_us", "sm_us"))
    longest = max(parts, key=lambda part: part.us)
    is_short = us < SHORT_US
    return replace(
        row,
        us=None if is_short else us,
        low=sum(part.low for part in parts),
        high=sum(part.high for part in parts),
        regime=regime(us, memory, sm),
        memory_us=memory,
        sm_us=sm,
        reasons=(f"below {SHORT_US:.0f} µs: launch and latency decide, an interval is all there is",)
        if is_short
        else (),
        change_first=longest.advice
        if len(parts) == 1
        else f"{longest.family}, {longest.us / us:.0%} of it: {longest.advice}",
        parts=parts,
    )


def part_of(family: str, work: Work, device: Device) -> Part:
    """One launch."""
    rows = rows_of([work])
    middle, fast, slow = (terms(rows, constants) for constants in (device.constants, device.fastest, device.slowest))
    us, memory, sm = float(middle.us[0]), float(middle.memory[0]), float(middle.sm[0])
    band = FUSED_BAND if family in FUSED else BANDS[regime(us, memory, sm)]
    return Part(
        family,
        us,
        float(fast.us[0]) / band,
        float(slow.us[0]) * band,
        memory,
        sm,
        stack_of(middle),
        advice(work, device.constants),
        float(middle.waves[0]),
    )


def stack_of(found: object) -> dict[str, float]:
    """A prediction as a stack: launch, bytes, what SM time adds by its parts, the tail."""
    launch, memory, tail, us = (float(getattr(found, name)[0]) for name in ("launch", "memory", "tail", "us"))
    parts = {name: float(getattr(found, name)[0]) for name in ("trips", "barriers", "blocks", "cycles")}
    beyond, total = max(0.0, us - launch - memory - tail), sum(parts.values())
    return {"launch": launch, "memory": memory, **{n: beyond * v / total for n, v in parts.items()}, "tail": tail}


def compare(one: Prediction, other: Prediction) -> str:
    """Which of two is predicted to be faster, or that it cannot be said."""
    for each in (one, other):
        if each.us is None:
            return f"{one.name} against {other.name}: cannot say; {each.name}: {'; '.join(each.reasons)}"
    of_one, of_other = one.us or 0.0, other.us or 0.0
    ratio = max(of_one, of_other) / min(of_one, of_other)
    numbers = f"predicted {of_one:.1f} µs and {of_other:.1f} µs, a ratio of {ratio:.2f}"
    if ratio < CANNOT_SAY:
        return f"{one.name} against {other.name}: cannot say; {numbers}, and below {CANNOT_SAY} the order is a guess"
    faster, slower = (one, other) if of_one < of_other else (other, one)
    fused = {part.family for each in (one, other) for part in each.parts if part.family in FUSED}
    if fused and ratio < FUSED_BAND:
        text = f"cannot say; {numbers}, and {', '.join(sorted(fused))} resembles nothing measured"
        return f"{one.name} against {other.name}: {text}"
    return f"{faster.name} is predicted to be faster than {slower.name}: {numbers}"
