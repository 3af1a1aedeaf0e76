"""Writes merged on a CUDA stream of their own, with stand-ins for CUDA: tests/package/test_gpu.py has the real thing.

Would catch: a merge that does not wait for the layer's output, a read that does not wait for the merge, memory that is
given away while the other stream still uses it, a write merged twice or lost, other bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import mhc_tilelang as mhc
from mhc_tilelang.launch import beside
from mhc_tilelang.modules import overlap

SPEC = mhc.MHCSpec.deepseek_v4(64)


class Stream(torch.cuda.Stream):
    """A stand-in for torch.cuda.Stream that lists what it is asked."""

    def __new__(cls, *_: object) -> Stream:  # not torch.cuda's, which needs a GPU
        return object.__new__(cls)

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events
        self.device = torch.device("cpu")

    def wait_stream(self, other: Stream) -> None:
        self.events.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A CPU that says it is a GPU to `overlap`: the streams' events, the merges, the memory that is recorded."""
    events: list[str] = []
    main, side = Stream("main", events), Stream("side", events)
    current = [main]

    @contextmanager
    def switched(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def record(tensor: torch.Tensor, stream: Stream) -> None:
        events.append(f"{list(tensor.shape)} recorded on {stream.name}")

    merge = mhc.HyperConnection.merge

    def merged(*tensors: torch.Tensor) -> torch.Tensor:
        events.append(f"merge on {current[-1].name}")
        return merge(*tensors)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", switched)
    monkeypatch.setattr(torch.Tensor, "record_stream", record)
    monkeypatch.setattr(mhc.HyperConnection, "merge", staticmethod(merged))
    monkeypatch.setattr(overlap.SideStream, "of", lambda _, asked, *__: overlap.SideStream(side) if asked else None)
    return events


EARLY = [
    "side waits for main",
    "merge on side",
    "[3, 4, 64] recorded on side",
    "[3, 64] recorded on side",
    "[3, 4] recorded on side",
    "[3, 4, 4] recorded on side",
]
JOINED = ["main waits for side", "[3, 4, 64] recorded on main"]


def connections() -> list[mhc.HyperConnection]:
    torch.manual_seed(1)
    made = [mhc.HyperConnection(SPEC, k) for k in range(4)]
    with torch.no_grad():
        for parameter in torch.nn.ModuleList(made).parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return made


def test_a_write_is_merged_beside_and_waited_for_at_the_next_read(events: list[str]) -> None:
    """Events come in this order for every way to read; nothing is left to wait for afterwards."""
    first, second, *_ = connections()
    stream = mhc.ResidualStream(torch.randn(3, 64), overlap=True)
    stream.write(torch.tanh(stream.read(first)))
    assert events == EARLY
    stream.write(torch.tanh(stream.read(second)))
    assert events == [*EARLY, *JOINED, *EARLY]
    for read in (lambda: stream.x, stream.hand_over, lambda: stream.reduce("sum"), lambda: stream.read(first)):
        read()
        assert events == [*EARLY, *JOINED, *EARLY, *JOINED]


def test_a_write_can_be_left_to_the_next_read(events: list[str]) -> None:
    """The next read then merges it in its own operator; a stream without overlap does so always."""
    for stream, left in ((mhc.ResidualStream(torch.randn(3, 64), overlap=True), False), (None, True)):
        stream = stream or mhc.ResidualStream(torch.randn(3, 64))
        for connection in connections():
            stream.write(torch.tanh(stream.read(connection)), overlap=left)
        stream.read(connection)
    assert events == []


def run(overlapped: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Values, and the gradients of all parameters and the input."""
    made = connections()
    torch.manual_seed(2)
    h, g = torch.randn(3, 64, requires_grad=True), torch.randn(3, 64)
    stream = mhc.ResidualStream(h, overlap=overlapped)
    for connection in made:
        stream.write(torch.tanh(stream.read(connection)))
    out = stream.reduce("sum")
    leaves = [h, *torch.nn.ModuleList(made).parameters()]
    return out, list(torch.autograd.grad((out * g).sum(), leaves))


def test_values_are_the_same_to_the_bit(events: list[str]) -> None:
    """Gradients are rounded once more at each boundary, in float32: 6e-8 of each of few terms; measured: 4e-7."""
    (out, gradients), (expected, fused) = run(True), run(False)
    assert len(events) == 4 * len(EARLY + JOINED) + 1  # the unoverlapped run merges its last write by itself
    assert torch.equal(out, expected)
    for got, wanted in zip(gradients, fused, strict=True):
        assert (got - wanted).norm() <= 3e-6 * wanted.norm()


def test_a_change_of_what_was_written_is_refused(events: list[str]) -> None:
    """The side stream may not have read it yet."""
    first, second, *_ = connections()
    stream = mhc.ResidualStream(torch.randn(3, 64), overlap=True)
    with torch.no_grad():
        stream.write(layer_output := torch.tanh(stream.read(first)))
        layer_output.zero_()
        with pytest.raises(RuntimeError, match="layer_output: expected it as it was written, got one that was changed"):
            stream.read(second)


def test_a_cpu_has_no_streams() -> None:
    """Writes wait there as ever: values, and gradients too, are those without the option."""
    (out, gradients), (expected, others) = run(True), run(False)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_what_is_no_stream_is_refused() -> None:
    with pytest.raises(TypeError, match=r"ResidualStream: overlap: expected a bool or a torch.cuda.Stream, got str"):
        mhc.ResidualStream(torch.randn(3, 64), overlap="yes")
    elsewhere = Stream("side", [])
    elsewhere.device = torch.device("cuda", 1)
    with pytest.raises(ValueError, match="ResidualStream: overlap: expected a stream on cpu, got one on cuda:1"):
        mhc.ResidualStream(torch.randn(3, 64), overlap=elsewhere)


def test_overlap_and_recomputation_exclude_each_other() -> None:
    """A replay would run on one stream and be read on another, without a wait."""
    x = torch.zeros(3, 4, 8)
    for make, value in ((mhc.ResidualStream, x[:, 0].contiguous()), (mhc.ResidualStream.from_streams, x)):
        with pytest.raises(ValueError, match="overlap: expected False beside recompute=2, got True"):
            make(value, recompute=2, overlap=True)


def test_a_stream_that_goes_on_merges_beside_too(events: list[str]) -> None:
    """`from_streams` passes overlap on, as a stream from an embedding does."""
    first, *_ = connections()
    stream = mhc.ResidualStream.from_streams(torch.randn(3, 4, 64), overlap=True)
    stream.write(torch.tanh(stream.read(first)))
    assert events == EARLY


def delayed_connections() -> list[mhc.HyperConnection]:
    made = connections()
    for module in made:
        module.spec = mhc.MHCSpec.deepseek_v4_1(64)
    return made


def test_coefficients_are_made_beside_the_layer(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked after what they are made from, joined when the layer was launched; the same bits and gradients.

    Would catch: a layer that waits, a merge that does not, memory that is not recorded.
    """
    made = beside.coefficients

    def coefficients(*tensors: object, **out: object) -> object:
        events.append(f"coefficients on {torch.cuda.current_stream(None).name}")
        return made(*tensors, **out)

    monkeypatch.setattr(beside, "coefficients", coefficients)
    results = []
    for side in (True, False):
        torch.manual_seed(2)
        h = torch.randn(3, 64, requires_grad=True)
        modules = delayed_connections()
        stream = mhc.ResidualStream(h, overlap_coefficients=side)
        for module in modules[:2]:
            events.clear()
            u = stream.read(module)
            before, events[:] = list(events), []
            stream.write(torch.tanh(u))
            after = list(events)
            if side:
                assert before[:2] == ["side waits for main", "coefficients on side"]
                # partial sums, alpha, bias, h_pre, h_post, h_res; then `projected`, which the backward reads.
                assert [e.rsplit(" ", 1)[1] for e in before[2:]] == ["side"] * 6 + ["main"]
                assert after == ["main waits for side"]
            else:
                assert before == ["coefficients on main"] * len(before)
                assert after == []
        output = stream.reduce()
        results.append([output, *torch.autograd.grad(output.square().sum(), [h, modules[0].phi, modules[1].bias])])
    assert all(map(torch.equal, *results))


def test_a_prepared_call_has_its_coefficients_beside_too(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape of calls on one stream is not replayed where another stream was asked for, nor kept of such a call."""
    made = beside.coefficients

    def coefficients(*tensors: object, **out: object) -> object:
        events.append(torch.cuda.current_stream(None).name)
        return made(*tensors, **out)

    monkeypatch.setattr(beside, "coefficients", coefficients)
    module, h = delayed_connections()[0], torch.randn(3, 64)

    def launches(**options: bool) -> list[str]:
        events.clear()
        with torch.no_grad():
            mhc.ResidualStream(h, **options).read(module)
        return [one for one in events if one in ("main", "side")]

    assert [launches() for _ in range(4)] == [["main"], ["main"], [], []]  # checked, recorded, replayed twice
    for _ in range(4):
        assert launches(overlap_coefficients=True) == ["side"]
    assert launches() == []


def test_what_the_coefficients_cannot_run_beside() -> None:
    """A layer that waits for them, a recorder, another type; on a CPU nothing changes."""
    connection, delayed = connections()[0], delayed_connections()[0]
    h = torch.randn(3, 64)
    with pytest.raises(ValueError, match="expected a spec with delayed_pre for overlap_coefficients"):
        mhc.ResidualStream(h, overlap_coefficients=True).read(connection)
    with pytest.raises(ValueError, match="overlap_coefficients: expected False beside recompute=2"):
        mhc.ResidualStream(h, recompute=2, overlap_coefficients=True)
    with pytest.raises(TypeError, match=r"overlap_coefficients: expected a bool or a torch.cuda.Stream, got str"):
        mhc.ResidualStream(h, overlap_coefficients="side")
    inputs = [mhc.ResidualStream(h, overlap_coefficients=asked).read(delayed) for asked in (True, False)]
    assert torch.equal(*inputs)
