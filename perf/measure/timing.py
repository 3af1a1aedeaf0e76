"""Time things against each other: interleaved rounds, one call a sample, quartiles.

Whatever is compared is timed within the same rounds, so that a slow spell of the machine hits all of it
alike. Every other round runs backwards, so that no candidate always follows the same neighbour. What takes long
leaves after a few rounds. Before each call the last-level cache is emptied: else whoever shares a buffer with
its neighbour finds it there. Clocks:

    CpuClock    wall time of one call, monotonic. Notes how long its threads waited for a core: on a machine
                with other work, a sample measures the scheduler (a kernel of 0.6 ms was seen to take 4 and 8,
                one and two time slices of Linux).
    CudaClock   time between two events around the call.
    GraphReplay the same of a CUDA graph that was captured from the call: for a few tokens, whose kernels take less
                time than Python takes to launch them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

WARMUP_ROUNDS = 2
FEWEST_ROUNDS = 5  # that count, of what takes long
SHORTEST_WAIT, LONGEST_WAIT = 1 << 17, 1 << 25  # cycles of a GPU: 70 us and 17 ms at 2 GHz
WAITING_SHARE = 0.05  # of a call's time; quiet machines stay below it
REPLAYED_TOKENS = 128  # up to so many, calls on a GPU are captured and replayed
THREADS = Path("/proc/self/task")


@dataclass(frozen=True)
class Sample:
    """One call: how long it took, and how long threads of this process waited for a core meanwhile."""

    seconds: float
    waited: float = 0.0

    @property
    def disturbed(self) -> bool:
        return self.waited > WAITING_SHARE * self.seconds


@dataclass(frozen=True)
class Statistics:
    """Median and quartiles of samples in seconds, or of ratios; `disturbed` ones are left out unless over half."""

    median: float
    lower_quartile: float
    upper_quartile: float
    samples: int
    disturbed: int

    @property
    def doubtful(self) -> bool:
        return 2 * self.disturbed > self.samples


Run = Callable[[], object]
Clock = Callable[[Run], Sample]


def measure(
    candidates: Mapping[str, Run], clock: Clock, repeats: int, seconds: float | None = None
) -> dict[str, Statistics]:
    """Return the statistics of every candidate's samples."""
    return {name: summarize(taken) for name, taken in sample(candidates, clock, repeats, seconds).items()}


def sample(
    candidates: Mapping[str, Run], clock: Clock, repeats: int, seconds: float | None = None
) -> dict[str, list[Sample]]:
    """Run every candidate once a round, for WARMUP_ROUNDS that are dropped and `repeats` that count.

    One whose samples have taken `seconds` together leaves after FEWEST_ROUNDS, and is warmed up once.
    """
    warmups: dict[str, list[Sample]] = {name: [] for name in candidates}
    samples: dict[str, list[Sample]] = {name: [] for name in candidates}

    def enough(taken: Sequence[Sample], share: float) -> bool:
        return seconds is not None and sum(one.seconds for one in taken) >= share * seconds

    for round_number in range(WARMUP_ROUNDS + repeats):
        for name in list(candidates)[:: -1 if round_number % 2 else 1]:
            if round_number < WARMUP_ROUNDS:
                if not enough(warmups[name], 1 / FEWEST_ROUNDS):
                    warmups[name].append(clock(candidates[name]))
            elif len(samples[name]) < FEWEST_ROUNDS or not enough(samples[name], 1):
                samples[name].append(clock(candidates[name]))
    return samples


def summarize(samples: Sequence[Sample]) -> Statistics:
    """Median and quartiles of the undisturbed samples, or of all if those are fewer than half."""
    return quartiles([(taken.seconds, taken.disturbed) for taken in samples])


def ratios(samples: Sequence[Sample], baseline: Sequence[Sample]) -> Statistics:
    """Median and quartiles of the ratios to the baseline, round by round: what slows down a whole round cancels.

    A ratio counts as disturbed where either of its samples is; rounds that one of the two had left have none.
    """
    pairs = zip(samples, baseline, strict=False)
    return quartiles([(one.seconds / other.seconds, one.disturbed or other.disturbed) for one, other in pairs])


def quartiles(values: Sequence[tuple[float, bool]]) -> Statistics:
    """Compute the statistics of (value, disturbed) pairs."""
    undisturbed = [value for value, disturbed in values if not disturbed]
    kept = undisturbed if 2 * len(undisturbed) >= len(values) else [value for value, _ in values]
    if len(kept) == 1:
        kept = kept * 2  # a single value is all of its quartiles
    lower, median, upper = statistics.quantiles(kept, n=4, method="inclusive")
    return Statistics(median, lower, upper, len(values), len(values) - len(undisturbed))


def clock_for(device: torch.device, cache_bytes: int) -> Clock:
    """Return the device's clock; `cache_bytes` is the size of its last-level cache, 0 if unknown."""
    return CudaClock(device, cache_bytes) if device.type == "cuda" else CpuClock(cache_bytes)


class CpuClock:
    """Time one call on the wall, after reading twice the last-level cache, at least 64 MiB, on every thread.

    Reading, since the lines of a write would have to be written back while the call runs.
    """

    def __init__(self, cache_bytes: int) -> None:
        self.flush = torch.ones(max(2 * cache_bytes, 64 << 20) // 4)

    def __call__(self, run: Run) -> Sample:
        """Time one call."""
        self.flush.sum()
        waited = waiting_nanoseconds()
        start = time.perf_counter_ns()
        run()
        nanoseconds = time.perf_counter_ns() - start
        return Sample(nanoseconds / 1e9, (waiting_nanoseconds() - waited) / 1e9)


def waiting_nanoseconds() -> int:
    """Return how long this process's threads have been runnable without a core so far; 0 if not on Linux."""
    total = 0
    for thread in THREADS.glob("*"):  # none where the system is not Linux
        with suppress(OSError):  # it has just ended
            total += int((thread / "schedstat").read_text().split()[1])
    return total


class CudaClock:
    """Time one call between two events, after writing four times L2, at least 512 MiB.

    A call shall be queued whole before the device gets to its first event, or the time to launch its kernels from
    Python is measured with them. Where the write does not take that long, the device waits after it, by call as long as
    was found to be needed; a call that cannot be queued ahead (it waits for the device itself, or is longer than the
    queue) is taken as it is after the longest wait.
    """

    def __init__(self, device: torch.device, cache_bytes: int) -> None:
        self.device = device
        self.flush = torch.empty(max(4 * cache_bytes, 512 << 20), dtype=torch.uint8, device=device)
        self.start, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.waits: WeakKeyDictionary[Run, int] = WeakKeyDictionary()  # strong keys would keep every call's tensors

    def __call__(self, run: Run) -> Sample:
        """Time one call; again with a longer wait where the device got there too early."""
        with torch.cuda.device(self.device):
            while self._too_early(run) and self.waits.get(run, 0) < LONGEST_WAIT:
                self.waits[run] = max(SHORTEST_WAIT, 4 * self.waits.get(run, 0))
        return Sample(self.start.elapsed_time(self.end) / 1e3)

    def _too_early(self, run: Run) -> bool:
        """Run between the events; whether the device had passed the first one before all was queued."""
        self.flush.zero_()
        if wait := self.waits.get(run, 0):
            torch.cuda._sleep(wait)
        self.start.record()
        run()
        self.end.record()
        passed = self.start.query()
        self.end.synchronize()
        return passed


class GraphReplay:
    """A clock for what a CUDA graph replays: each call is captured once, by `capture` or when it is first timed.

    What runs in the graph is what the call launched, at the addresses that it had: a call must use the same tensors
    every time, and what it allocates stays the graph's own.
    """

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self.clock, self.device = clock, device
        self.graphs: dict[Run, torch.cuda.CUDAGraph] = {}

    def capture(self, run: Run) -> None:
        """Capture a call, after running it on a stream of its own, which compiles and allocates what it needs.

        Raises RuntimeError for a call that cannot be captured.
        """
        with torch.cuda.device(self.device):
            own = torch.cuda.Stream()
            own.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(own):
                run()
            torch.cuda.current_stream().wait_stream(own)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
        self.graphs[run] = graph

    def __call__(self, run: Run) -> Sample:
        """Time one replay."""
        if run not in self.graphs:
            self.capture(run)
        return self.clock(self.graphs[run].replay)


def capturable(candidates: Mapping[str, Run], clock: Clock, needed: Sequence[str] = ()) -> dict[str, Run]:
    """Return the candidates that a graph-replaying clock can capture; others are reported, raised if `needed`.

    Autograd that was recorded outside of a graph cannot be captured, nor can what waits for the GPU. Other clocks take
    everything.
    """
    if not isinstance(clock, GraphReplay):
        return dict(candidates)
    found = {}
    for name, run in candidates.items():
        try:
            clock.capture(run)
        except RuntimeError as error:
            if name in needed:
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"mhc-tilelang bench: {name}: no CUDA graph takes it, left out: {reason}", file=sys.stderr)
        else:
            found[name] = run
    return found
