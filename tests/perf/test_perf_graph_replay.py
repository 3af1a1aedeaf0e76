"""Calls of few tokens on a GPU, timed as replays of CUDA graphs; here with stand-ins for torch.cuda.

Would catch: a call that is captured before it was compiled, or captured at every sample; a replay that is not what is
timed; a form that no graph takes and that is timed all the same, or left out without a word; a kernel that is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mhc_tilelang.perf.measure import timing
from mhc_tilelang.perf.measure.timing import GraphReplay, Run, Sample


def clock(run: Run) -> Sample:
    run()
    return Sample(1e-3)


class Graph:
    """Stands in for a CUDA graph: it remembers what was run while it was captured, and runs that again."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        self.calls: list[Run] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda replaced by what `GraphReplay` needs of it; the list has what happened."""
    happened: list[str] = []

    @contextmanager
    def scope(*what: Any) -> Iterator[None]:
        [one] = what
        if isinstance(one, Graph):
            Graph.capturing = one
            happened.append("capture")
        yield
        Graph.capturing = None

    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, value in (
        ("device", scope),
        ("stream", scope),
        ("graph", scope),
        ("CUDAGraph", Graph),
        ("Stream", lambda: stream),
        ("current_stream", lambda: stream),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    return happened


def launching(happened: list[str], name: str) -> Run:
    """A call whose launch is recorded while a graph is being captured, and run otherwise."""

    def run() -> None:
        if Graph.capturing:
            Graph.capturing.calls.append(lambda: happened.append(f"replayed {name}"))
        else:
            happened.append(f"ran {name}")

    return run


def test_a_replay_is_captured_once_after_a_call(graphs: list[str]) -> None:
    replay = GraphReplay(clock, torch.device("cuda"))
    kernel, copy = launching(graphs, "kernel"), launching(graphs, "copy")
    times = timing.measure({"kernel": kernel, "copy": copy}, replay, repeats=1)
    assert set(times) == {"kernel", "copy"}
    assert graphs[:3] == ["ran kernel", "capture", "replayed kernel"]
    assert graphs.count("capture") == 2
    assert graphs.count("replayed kernel") == graphs.count("replayed copy") == timing.WARMUP_ROUNDS + 1
    assert graphs.count("ran kernel") == 1


def test_what_no_graph_takes_is_left_out_by_name(graphs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """But not a kernel: that ends the measurement."""

    def waits() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    replay = GraphReplay(clock, torch.device("cuda"))
    kernel = launching(graphs, "kernel")
    assert timing.capturable({"kernel": kernel, "eager: autograd": waits}, replay) == {"kernel": kernel}
    said = "eager: autograd: no CUDA graph takes it, left out: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().err == f"mhc-tilelang bench: {said}"
    with pytest.raises(RuntimeError, match="not permitted"):
        timing.capturable({"kernel": waits}, replay, needed=("kernel",))
    assert timing.capturable({"eager: autograd": waits}, clock) == {"eager: autograd": waits}
