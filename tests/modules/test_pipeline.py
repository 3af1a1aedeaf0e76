"""Pipeline stages: the streams cross as a tensor, and gradients are those of one process.

Would catch: a write that is lost or merged twice at a boundary, mappings that would have to cross with the streams,
gradients that end at a boundary, a rank that waits for ever for one that died.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import run_ranks, start_rank
from torch import nn
from torch.distributed import pipelining

import mhc_tilelang as mhc

SPECS = {"delayed": mhc.MHCSpec.deepseek_v4_1(64)}
SPEC = mhc.MHCSpec.deepseek_v4(64)
KINDS = ("mhc", "delayed", "hc", "residual")  # "delayed" is "mhc" of another spec
SEQUENCES, TOKENS, SUBLAYERS = 8, 6, 8


class Model(nn.Module):
    """A stack of sublayers between an embedding of the input and a sum, or a part of it that is one stage."""

    def __init__(self, kind: str, dtype: torch.dtype, stage: int = 0, stages: int = 1) -> None:
        super().__init__()
        torch.manual_seed(1)
        spec, kind = SPECS.get(kind, SPEC), kind.replace("delayed", "mhc")
        connections = [mhc.connection(kind, spec, k) for k in range(SUBLAYERS)]
        layers = [nn.Sequential(nn.Linear(64, 64, dtype=dtype), nn.Tanh()) for _ in range(SUBLAYERS)]
        with torch.no_grad():
            for parameter in nn.ModuleList(connections).parameters():
                parameter.add_(torch.randn_like(parameter) / 8)
        mine = slice(stage * SUBLAYERS // stages, (stage + 1) * SUBLAYERS // stages)
        self.connections, self.layers = nn.ModuleList(connections[mine]), nn.ModuleList(layers[mine])
        self.kind, self.first, self.last = kind, stage == 0, stage == stages - 1

    def forward(self, *x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        begin = mhc.ResidualStream if self.first else mhc.ResidualStream.from_streams
        stream = begin(*x, connection=self.kind)
        for connection, layer in zip(self.connections, self.layers, strict=True):
            stream.write(layer(stream.read(connection)))
        return stream.reduce("sum") if self.last else stream.hand_over()


def batch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, g = (torch.randn(SEQUENCES, TOKENS, 64, generator=generator) for _ in range(2))
    return x.to(dtype), g


def micro_batches(stages: int) -> int:
    """Return the number of micro-batches: at least one per stage, as DualPipeV requires."""
    return max(4, stages)


def loss_of(out: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return (out.float() * g).sum()


def alone(kind: str, dtype: torch.dtype, stages: int) -> list[Model]:
    """The stages one after the other in this process, micro-batch by micro-batch, their gradients added up."""
    parts = [Model(kind, dtype, stage, stages) for stage in range(stages)]
    for x, g in zip(*(tensor.chunk(micro_batches(stages)) for tensor in batch(dtype)), strict=True):
        crossing = (x,)
        for part in parts:
            out = part(*crossing)
            crossing = out if isinstance(out, tuple) else (out,)
        loss_of(out, g).backward()
    return parts


def in_pipeline(rank: int, ranks: int, schedule: str, kind: str, dtype: torch.dtype, per_rank: int) -> int:
    """Run a schedule, compare this rank's gradients with those of one process; the bytes that the rank sent."""
    stages = ranks * per_rank
    # Interleaved stages go round the ranks; a V goes there and back.
    mine = [rank, stages - 1 - rank][:per_rank] if schedule == "ScheduleDualPipeV" else range(rank, stages, ranks)
    parts = {k: Model(kind, dtype, k, stages) for k in mine}
    built = [pipelining.PipelineStage(part, k, stages, torch.device("cpu")) for k, part in parts.items()]
    make = getattr(pipelining.schedules, schedule)
    run = make(built if per_rank > 1 else built[0], micro_batches(stages), loss_fn=loss_of, scale_grads=False)
    x, g = batch(dtype)
    with counted() as sent:
        run.step(*([x] if 0 in parts else []), **({"target": g} if stages - 1 in parts else {}))
    expected = alone(kind, dtype, stages)
    for k, part in parts.items():
        for got, wanted in zip(part.parameters(), expected[k].parameters(), strict=True):
            assert torch.equal(got.grad, wanted.grad), (schedule, k)  # the same additions in the same order
    return sum(sent)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of every activation and gradient that this process sends; what describes them is integers."""
    sent: list[int] = []
    original = dist.P2POp.__init__

    def counting(self: dist.P2POp, op: Callable, tensor: torch.Tensor, *rest: Any, **named: Any) -> None:
        original(self, op, tensor, *rest, **named)
        if op is dist.isend and tensor.is_floating_point():
            sent.append(tensor.nbytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist.P2POp, "__init__", counting)
        yield sent


def wire(kind: str, tokens: int, dtype: torch.dtype) -> int:
    return mhc.wire_bytes(SPECS.get(kind, SPEC), tokens, dtype, kind.replace("delayed", "mhc"))


def check_schedules(rank: int, ranks: int, schedules: tuple[tuple, ...]) -> None:
    for schedule, kind, dtype, per_rank in schedules:
        total = torch.tensor(in_pipeline(rank, ranks, schedule, kind, dtype, per_rank))
        dist.all_reduce(total)
        # The turn of a V lies within a rank. Every other boundary carries the streams, and their gradient back.
        crossings = ranks * per_rank - 1 - (schedule == "ScheduleDualPipeV")
        assert total == 2 * crossings * wire(kind, SEQUENCES * TOKENS, dtype), schedule


F32, BF16 = torch.float32, torch.bfloat16
SCHEDULES = (  # name, connections, dtype, stages per rank
    ("Schedule1F1B", "mhc", BF16, 1),
    ("ScheduleInterleaved1F1B", "hc", F32, 2),
    ("ScheduleDualPipeV", "delayed", F32, 2),
)
MORE = (
    ("Schedule1F1B", "mhc", F32, 1),
    ("Schedule1F1B", "residual", BF16, 1),
    ("ScheduleInterleaved1F1B", "mhc", BF16, 2),
    ("ScheduleInterleaved1F1B", "delayed", BF16, 2),
    ("ScheduleDualPipeV", "mhc", BF16, 2),
)


@pytest.mark.parametrize(
    ("ranks", "schedules"),
    [(2, SCHEDULES), *(pytest.param(ranks, MORE, marks=pytest.mark.full) for ranks in (2, 4))],
    ids=["2 ranks", "2 ranks, more", "4 ranks, more"],
)
def test_stages_give_the_gradients_of_one_process(ranks: int, schedules: tuple[tuple, ...], tmp_path: Path) -> None:
    """Gradients are equal to the bit, and the bytes that cross are `wire_bytes`."""
    schedules = tuple(s for s in schedules if hasattr(pipelining.schedules, s[0]))  # an older torch lacks the V
    for kind, dtype in {(kind, dtype) for _, kind, dtype, _ in schedules}:
        alone(kind, dtype, 2)  # compiles the kernels once
    run_ranks(check_schedules, ranks, tmp_path, schedules)


def die_or_wait(rank: int, ranks: int, folder: str) -> None:
    """Rank 1 is gone before its first micro-batch; rank 0 writes down what it is told."""
    start_rank(rank, ranks, Path(folder), seconds=20)
    part = Model("mhc", F32, rank, ranks)
    if rank == 1:
        part.forward = lambda _: os._exit(7)
    stage = pipelining.PipelineStage(part, rank, ranks, torch.device("cpu"))
    run = pipelining.Schedule1F1B(stage, micro_batches(ranks), loss_fn=loss_of)
    x, g = batch(F32)
    try:
        run.step(*([x] if rank == 0 else []), **({"target": g} if rank == 1 else {}))
    except RuntimeError as error:
        (Path(folder) / "error").write_text(str(error))
    os._exit(0)


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path: Path) -> None:
    """Within the process group's timeout, and not a pipeline that stands still."""
    context = mp.start_processes(die_or_wait, (2, str(tmp_path)), nprocs=2, join=False)
    for process in context.processes:
        process.join(60)
    assert [process.exitcode for process in context.processes] == [0, 7]
    assert re.search("(?i)connection|closed|reset|timed out", (tmp_path / "error").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_streams_go_on_where_they_were_handed_over(kind: str) -> None:
    """After any sublayer, the same bits as in one piece; a waiting write is merged once."""
    whole, x = Model(kind, F32), batch(F32)[0]
    for cut in (1, 5, SUBLAYERS):
        first = mhc.ResidualStream(x, connection=whole.kind)
        for k in range(cut):
            first.write(whole.layers[k](first.read(whole.connections[k])))
        handed = first.hand_over()
        crossing = handed if isinstance(handed, tuple) else (handed,)
        second = mhc.ResidualStream.from_streams(*crossing, connection=whole.kind)
        for k in range(cut, SUBLAYERS):
            second.write(whole.layers[k](second.read(whole.connections[k])))
        assert torch.equal(second.reduce("sum"), whole(x))


def test_what_cannot_cross_is_refused() -> None:
    x = torch.randn(2, 4, 64)
    stream = mhc.ResidualStream.from_streams(x)
    stream.read(mhc.HyperConnection(SPEC))
    with pytest.raises(RuntimeError, match=r"ResidualStream.hand_over: expected write\(layer_output\) for the read"):
        stream.hand_over()
    with pytest.raises(ValueError, match=r"ResidualStream.from_streams: x: expected one of .* streams, got 9"):
        mhc.ResidualStream.from_streams(torch.randn(2, 9, 64))
    with pytest.raises(ValueError, match=r"ResidualStream.from_streams: x: expected shape \[..., n, C\], got \[64\]"):
        mhc.ResidualStream.from_streams(torch.randn(64))
    with pytest.raises(TypeError, match=r"ResidualStream.from_streams: x: expected dtype .*, got torch.float64"):
        mhc.ResidualStream.from_streams(x.double())
    with pytest.raises(ValueError, match=r"ResidualStream.from_streams: connection: expected one of"):
        mhc.ResidualStream.from_streams(x, connection="plain")


def test_an_h_pre_crosses_with_delayed_streams_and_no_others() -> None:
    """Would catch a stage that begins with stream 0 again, as the model's first sublayer does."""
    delayed, other = mhc.HyperConnection(SPECS["delayed"]), mhc.HyperConnection(SPEC)
    x, h_pre = torch.randn(2, 4, 64), torch.rand(2, 4)
    with pytest.raises(ValueError, match="connection: expected a spec with delayed_pre=False"):
        mhc.ResidualStream.from_streams(x).read(delayed)
    with pytest.raises(ValueError, match="connection: expected a spec with delayed_pre=True"):
        mhc.ResidualStream.from_streams(x, h_pre).read(other)
    with pytest.raises(ValueError, match=r"from_streams: h_pre: expected shape \[..., 4\], got \[2, 3\]"):
        mhc.ResidualStream.from_streams(x, h_pre[:, :3])
    with pytest.raises(ValueError, match="from_streams: h_pre: expected none for connections of kind 'hc'"):
        mhc.ResidualStream.from_streams(x, h_pre, connection="hc")


def test_bytes_on_the_wire() -> None:
    """Known sizes, and what is not a size."""
    spec = mhc.MHCSpec.deepseek_v4(2560)
    assert mhc.wire_bytes(spec, 4096) == 4096 * 4 * 2560 * 2
    assert mhc.wire_bytes(spec, 4096, connection="residual") == 4096 * 2560 * 2
    assert mhc.wire_bytes(mhc.MHCSpec.deepseek_v4_1(2560), 4096) == 4096 * 4 * (2560 * 2 + 4)
    assert mhc.wire_bytes(spec, 0, F32) == 0
    with pytest.raises(ValueError, match=r"wire_bytes: tokens: expected an int of at least 0, got -1"):
        mhc.wire_bytes(spec, -1)
    with pytest.raises(TypeError, match=r"wire_bytes: dtype: expected .*, got torch.float64"):
        mhc.wire_bytes(spec, 1, torch.float64)
