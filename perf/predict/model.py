"""How long a kernel takes, from what one block does, how many there are, and nine constants of the device.

    alone      own cycles of the slowest warp · κ + round trips · latency + barriers · cost · (further warps a
    scheduler) network    n resident blocks share an SM: a closed queueing network, solved by mean value analysis, with
               three stations (the busiest pipe, the shared-memory pipe, the launch of blocks); the rest of `alone` is
               delay
    waves      full ones of n = resident blocks, and the rest with ⌈rest / SMs⌉ blocks on an SM
    join       in each wave SM and memory overlap: (SM^p + memory^p)^(1/p)
    tail       at the end of a memory-bound kernel the SMs run dry one by one: a share of a block's loaded time
    time       launch + waves + tail

Everything is numpy over rows, so that a fit evaluates all points at once; of one kernel the arrays have one element.
No constant belongs to a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np

from .block import Block

SCHEDULERS = 4  # of an SM
ALU_CYCLES, SPECIAL_CYCLES, TENSOR_CYCLES = 2, 8, 8  # a warp's instruction on the pipe of a scheduler: 16 and 4 lanes
REGIME_RATIO = 1.3  # of memory and SM, above which one is called the limit
SHORT_US = 20.0  # below: launch and latency


@dataclass(frozen=True)
class Constants:
    """What the model knows of a device.

    Attributes:
        sms: streaming multiprocessors.
        clock_ghz: under load.
        latency: cycles of a load from memory.
        bandwidth: TB/s that copies approach.
        launch_us: from launch to launch of an empty kernel.
        block_cycles: that an SM takes to start a block.
        overlap: p of the join; 1 would be no overlap, infinity a perfect one.
        pace: κ, on the cycles that the control bits give.
        barrier_cycles: of a barrier for every further warp of a scheduler.
        tail: share of a block's loaded time that the end costs where memory is the limit.
    """

    sms: float
    clock_ghz: float
    latency: float
    bandwidth: float
    launch_us: float
    block_cycles: float
    overlap: float
    pace: float
    barrier_cycles: float
    tail: float


@dataclass(frozen=True)
class Work:
    """One launch: what a block does, how many there are, how many an SM holds, what they move through memory."""

    block: Block
    grid: int
    resident: int
    bytes: int


@dataclass(frozen=True)
class Terms:
    """Where the time goes, in µs; arrays over rows.

    Attributes:
        us: the prediction.
        memory: bytes over bandwidth.
        sm: all waves on the SMs, as if memory were infinitely fast.
        launch: of the kernel.
        tail: at the end.
        pipe, shared, blocks, cycles, trips, barriers: what one block alone asks for: its busiest pipe, its
            shared-memory pipe, its launch; of its slowest warp its own cycles, its exposed round trips, its barriers.
            For proportions.
        waves: of blocks; `paid` rounded up as the last one's blocks need.
    """

    us: np.ndarray
    memory: np.ndarray
    sm: np.ndarray
    launch: np.ndarray
    tail: np.ndarray
    pipe: np.ndarray
    shared: np.ndarray
    blocks: np.ndarray
    cycles: np.ndarray
    trips: np.ndarray
    barriers: np.ndarray
    waves: np.ndarray
    paid: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Works as columns; the names of `Block`, and those of `Work`."""

    columns: dict[str, np.ndarray]

    def __getattr__(self, name: str) -> np.ndarray:
        """A column."""
        try:
            return self.columns[name]
        except KeyError:
            raise AttributeError(name) from None


def rows_of(works: Sequence[Work]) -> Rows:
    """Columns from rows."""
    names = [field.name for field in fields(Block)]
    table = np.array([astuple(work.block) for work in works], dtype=float).reshape(len(works), len(names))
    columns = dict(zip(names, table.T, strict=True))
    for name in ("grid", "resident", "bytes"):
        columns[name] = np.array([getattr(work, name) for work in works], dtype=float)
    return Rows(columns)


def terms(rows: Rows, device: Constants | Any) -> Terms:
    """The model."""
    to_us = 1 / (device.clock_ghz * 1e3)
    pipe = pipe_cycles(rows)
    shared = rows.shared + rows.accesses / 2
    cycles, trips = device.pace * rows.cycles, device.latency * rows.round_trips
    own = cycles + trips

    def barriers(blocks: np.ndarray) -> np.ndarray:
        return rows.barriers * device.barrier_cycles * np.maximum(0, blocks * rows.warps / SCHEDULERS - 1)

    def on_sm(blocks: np.ndarray) -> np.ndarray:
        delay = np.maximum(0, own + barriers(blocks) - pipe - shared)
        start = np.full_like(pipe, device.block_cycles)
        return network((pipe, shared, start), delay, blocks) * to_us

    slots = device.sms * rows.resident
    full, rest = np.divmod(rows.grid, slots)
    last = np.ceil(rest / device.sms)
    memory = rows.bytes / device.bandwidth / 1e6
    in_full, in_rest = memory * slots / rows.grid, memory * rest / rows.grid
    of_full, of_last = on_sm(rows.resident), np.where(rest > 0, on_sm(np.maximum(last, 1)), 0)
    waves = full * join(of_full, in_full, device.overlap)
    waves = waves + np.where(rest > 0, join(of_last, in_rest, device.overlap), 0)
    sm = full * of_full + of_last
    tail = device.tail * np.minimum(in_full, memory) * memory / (memory + sm)
    tail = np.where(rows.grid > slots / 2, tail, 0)
    launch = np.full_like(memory, device.launch_us)
    alone = [pipe, shared, np.full_like(pipe, device.block_cycles), cycles, trips, barriers(rows.resident)]
    names = ("pipe", "shared", "blocks", "cycles", "trips", "barriers")
    return Terms(
        us=launch + waves + tail,
        memory=memory,
        sm=sm,
        launch=launch,
        tail=tail,
        **{name: part * to_us for name, part in zip(names, alone, strict=True)},
        waves=rows.grid / slots,
        paid=full + last / rows.resident,
    )


def pipe_cycles(rows: Rows) -> np.ndarray:
    """Cycles that a block keeps the busiest pipe of a scheduler for: issue, or one behind it."""
    pipes = (rows.issued, rows.alu * ALU_CYCLES, rows.fma, rows.special * SPECIAL_CYCLES, rows.tensor * TENSOR_CYCLES)
    return np.max(pipes, axis=0) / SCHEDULERS


def join(one: np.ndarray, other: np.ndarray, power: float) -> np.ndarray:
    """Two things that overlap as far as `power` says."""
    return (one**power + other**power) ** (1 / power)


def network(demands: Sequence[np.ndarray], delay: np.ndarray, customers: np.ndarray) -> np.ndarray:
    """Time until each of `customers` has passed once through stations and delay: n / throughput, by mean values."""
    queues = np.zeros((len(demands), len(delay)))
    needed, time = np.array(demands), np.zeros_like(delay)
    for number in range(1, int(customers.max(initial=0)) + 1):
        residence = needed * (1 + queues)
        throughput = number / (residence.sum(axis=0) + delay)
        queues = throughput * residence
        time = np.where(customers == number, number / throughput, time)
    return time


def regime(us: float, memory: float, sm: float) -> str:
    """What limits a kernel, in words."""
    if us < SHORT_US:
        return "launch and latency"
    if memory > REGIME_RATIO * sm:
        return "memory"
    return "SM" if sm > REGIME_RATIO * memory else "memory and SM"
