"""The clock and the statistics, on samples made up for the purpose.

Would catch: rounds in one order only, warm-up that counts, a mean in place of the median, waiting for a core
that counts as the kernel's time, a flush inside the timed region, a GPU's call whose launch is timed, a ratio of
medians in place of a median of ratios.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from mhc_tilelang.perf.measure import timing
from mhc_tilelang.perf.measure.timing import WARMUP_ROUNDS, Sample, Statistics, measure, ratios, summarize

QUIET = [Sample(seconds) for seconds in (5.0, 1.0, 2.0, 100.0, 3.0)]
WAITED = Sample(seconds=50.0, waited=10.0)


def test_quartiles() -> None:
    assert summarize(QUIET) == Statistics(3.0, 2.0, 5.0, samples=5, disturbed=0)


def test_one_sample_is_its_own_quartiles() -> None:
    assert summarize(QUIET[:1]) == Statistics(5.0, 5.0, 5.0, samples=1, disturbed=0)


def test_disturbed_samples_do_not_count() -> None:
    statistics = summarize([*QUIET, *[WAITED] * 5])
    assert statistics == Statistics(3.0, 2.0, 5.0, samples=10, disturbed=5)
    assert not statistics.doubtful


def test_all_samples_count_where_most_are_disturbed() -> None:
    statistics = summarize([*QUIET, *[WAITED] * 6])
    assert statistics.median == 50.0
    assert statistics.disturbed == 6
    assert statistics.doubtful


def test_a_moment_of_waiting_is_no_disturbance() -> None:
    assert not Sample(seconds=1.0, waited=0.04).disturbed
    assert Sample(seconds=1.0, waited=0.06).disturbed


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that slows down from round to round moves no ratio; the ratio of the medians would be 2."""
    baseline = [Sample(seconds) for seconds in (1.0, 2.0, 30.0)]
    samples = [Sample(seconds) for seconds in (4.0, 2.0, 33.0)]
    assert ratios(samples, baseline) == Statistics(1.1, 1.05, 2.55, samples=3, disturbed=0)


def test_a_ratio_is_disturbed_where_either_sample_is() -> None:
    quiet = [Sample(2.0)] * 4
    got = ratios([*quiet, WAITED, *quiet], [WAITED, *quiet, *quiet])
    assert got == Statistics(1.0, 1.0, 1.0, samples=9, disturbed=2)


def test_rounds_alternate_in_order_and_warmup_is_dropped() -> None:
    calls: list[str] = []
    ticks = iter(range(1000))

    def clock(run: timing.Run) -> Sample:
        run()
        return Sample(float(next(ticks)))

    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = measure(candidates, clock, repeats=3)
    assert "".join(calls) == ("abc" + "cba") * 2 + "abc"
    assert WARMUP_ROUNDS == 2
    # The first call that counts is number 6; a is called in places 6, 11 and 12, b in the middle of each round.
    assert times["a"] == summarize([Sample(6.0), Sample(11.0), Sample(12.0)])
    assert times["b"] == summarize([Sample(7.0), Sample(10.0), Sample(13.0)])


def test_what_takes_long_leaves_early_and_rounds_stay_aligned() -> None:
    """Catches a fast candidate that is cut short, a slow one that is not, samples of a ratio from different rounds."""
    clock = {"slow": 0.25, "fast": 0.01}
    calls: list[str] = []

    def timed(run: timing.Run) -> Sample:
        name = run()
        calls.append(name)
        return Sample(clock[name])

    candidates: dict[str, timing.Run] = {name: lambda name=name: name for name in clock}
    samples = timing.sample(candidates, timed, repeats=9, seconds=1.0)
    assert {name: len(taken) for name, taken in samples.items()} == {"slow": timing.FEWEST_ROUNDS, "fast": 9}
    assert calls == ["slow", "fast", "fast", *("slow", "fast", "fast", "slow") * 2, "slow", "fast", *["fast"] * 4]
    assert ratios(samples["slow"], samples["fast"]).samples == timing.FEWEST_ROUNDS


def test_cpu_clock_times_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0

    def pass_time(nanoseconds: int) -> None:
        nonlocal now
        now += nanoseconds

    class Flush:
        def sum(self) -> None:
            pass_time(1_000_000)

    clock = timing.CpuClock(cache_bytes=0)
    monkeypatch.setattr(clock, "flush", Flush())
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: now)
    monkeypatch.setattr(timing, "waiting_nanoseconds", lambda: now // 10)
    assert clock(lambda: pass_time(500)) == Sample(seconds=500e-9, waited=50e-9)


class Gpu:
    """A device that takes a cycle for each unit of time; the host needs `launching` units to queue a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launching: int, flushing: int) -> None:
        self.now = self.done = 0
        self.launching, self.flushing = launching, flushing
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(gpu.done, gpu.now)

            def query(self) -> bool:
                return gpu.now >= self.at

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        monkeypatch.setattr(timing.torch.cuda, "Event", Event)
        monkeypatch.setattr(timing.torch.cuda, "_sleep", self.work)
        monkeypatch.setattr(timing.torch.cuda, "device", lambda _: nullcontext())
        self.clock = timing.CudaClock(timing.torch.device("cpu"), 0)
        self.clock.flush = self  # type: ignore[assignment]

    def work(self, duration: int) -> None:
        self.done = max(self.done, self.now) + duration

    def zero_(self) -> None:
        self.work(self.flushing)

    def call(self) -> None:
        self.now += self.launching
        self.work(300)


@pytest.mark.parametrize("launching", [100, 100_000, 5_000_000])
def test_cuda_clock_leaves_out_the_launch(monkeypatch: pytest.MonkeyPatch, launching: int) -> None:
    """However long a call takes to queue: 300 on the device. Without a wait, 5000300 for the slowest."""
    gpu = Gpu(monkeypatch, launching, flushing=1000)
    assert [gpu.clock(gpu.call).seconds for _ in range(3)] == [0.3] * 3


def test_cuda_clock_gives_up_on_a_call_that_cannot_be_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, launching=100 * timing.LONGEST_WAIT, flushing=1000)
    assert gpu.clock(gpu.call).seconds > 0.3


@pytest.mark.parametrize(("cache_bytes", "flushed"), [(0, 64 << 20), (48 << 20, 96 << 20)])
def test_flush_is_larger_than_the_cache(cache_bytes: int, flushed: int) -> None:
    assert timing.CpuClock(cache_bytes).flush.nbytes == flushed


def test_waiting_is_summed_over_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for one that ends meanwhile, whichever comes first."""
    (tmp_path / "10").mkdir()
    for thread, waited in (("11", 300), ("12", 4)):
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(f"987654321 {waited} 17\n")
    monkeypatch.setattr(timing, "THREADS", tmp_path)
    assert timing.waiting_nanoseconds() == 304


def test_waiting_is_zero_where_it_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "THREADS", tmp_path / "absent")
    assert timing.waiting_nanoseconds() == 0
