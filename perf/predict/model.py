"""A kernel's time from one block's work, the number of blocks and the device's constants.

    alone      own cycles of the slowest warp · κ + round trips · latency + barriers · cost · (warps a scheduler − 1)
    network    n resident blocks share an SM: a closed queueing network, solved by mean value analysis, with
               three stations (the busiest pipe, the shared-memory pipe, the launch of blocks); the rest of `alone` is
               delay
    waves      full ones of n = resident blocks, and the rest with ⌈rest / SMs⌉ blocks on an SM
    join       in each wave SM and memory overlap: (SM^p + memory^p)^(1/p)
    tail       at the end of a memory-bound kernel the SMs run dry one by one: a share of a block's loaded time
    time       launch + waves + tail
    advice     what to change first, by asking what a tenth less of each thing would save; a tenth because the model is
               good at small changes of what it has seen and not at worlds without memory

Everything is numpy over rows, so that a fit evaluates all points at once; of one kernel the arrays have one element.
No constant belongs to a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from .block import Block

SCHEDULERS = 4  # of an SM
PIPE_CYCLES = {"issued": 1, "alu": 2, "fma": 1, "special": 8, "tensor": 8}  # of a scheduler's: 16 and 4 lanes
REGIME_RATIO = 1.3  # of memory and SM, above which one is called the limit
SHORT_US = 20.0  # below: launch and latency
LESS = 0.9
SMALL_GAIN = 0.05  # of the time, for whole waves: below it they are not worth a word
LARGE_SHARE = 2.5  # of the largest gain of a tenth: a quarter of that thing, which is seldom to be had


class Constants(NamedTuple):
    """Constants of a device."""

    sms: float  # streaming multiprocessors
    clock_ghz: float  # under load
    latency: float  # cycles of a load from memory
    bandwidth: float  # TB/s that copies approach
    launch_us: float  # from launch to launch of an empty kernel
    block_cycles: float  # that an SM takes to start a block
    overlap: float  # p of the join; 1 would be no overlap, infinity a perfect one
    pace: float  # κ, on the cycles that the control bits give
    barrier_cycles: float  # of a barrier for every further warp of a scheduler
    tail: float  # share of a block's loaded time that the end costs where memory is the limit


class Work(NamedTuple):
    """One launch: what a block does, how many there are, how many an SM holds, what they move through memory."""

    block: Block
    grid: int
    resident: int
    bytes: int


def rows_of(works: Sequence[Work]) -> Any:
    """Works as columns, by the names of Block and Work."""
    rows = [(*work.block, *work[1:]) for work in works]
    columns = np.array(rows, dtype=float).reshape(len(rows), -1).T
    return SimpleNamespace(**dict(zip((*Block._fields, *Work._fields[1:]), columns, strict=True)))


def terms(rows: Any, device: Constants) -> Any:
    """Split the predicted time into terms, in µs; arrays over rows.

    Returns:
        us: the prediction; memory: bytes over bandwidth; sm: all waves on the SMs, as if memory were infinitely fast.
        launch, tail: of the kernel, at its end; waves: of blocks.
        blocks, cycles, trips, barriers: what one block alone asks for, for proportions: its launch; of its slowest
        warp its own cycles, its exposed round trips, its barriers.
    """
    to_us = 1 / (device.clock_ghz * 1e3)
    pipe = np.max([getattr(rows, name) * cost for name, cost in PIPE_CYCLES.items()], axis=0) / SCHEDULERS
    shared, start = rows.shared + rows.accesses / 2, np.full_like(pipe, device.block_cycles)
    cycles, trips = device.pace * rows.cycles, device.latency * rows.round_trips
    own = cycles + trips

    def barriers(blocks: np.ndarray) -> np.ndarray:
        return rows.barriers * device.barrier_cycles * np.maximum(0, blocks * rows.warps / SCHEDULERS - 1)

    def on_sm(blocks: np.ndarray) -> np.ndarray:
        delay = np.maximum(0, own + barriers(blocks) - pipe - shared)
        return network((pipe, shared, start), delay, blocks) * to_us

    slots = device.sms * rows.resident
    full, rest = np.divmod(rows.grid, slots)
    memory = rows.bytes / device.bandwidth / 1e6
    in_full, in_rest = memory * slots / rows.grid, memory * rest / rows.grid
    of_full, of_last = on_sm(rows.resident), on_sm(np.maximum(np.ceil(rest / device.sms), 1))
    of_last = np.where(rest > 0, of_last, 0)
    waves = full * join(of_full, in_full, device.overlap)
    waves = waves + np.where(rest > 0, join(of_last, in_rest, device.overlap), 0)
    sm = full * of_full + of_last
    tail = device.tail * np.minimum(in_full, memory) * memory / (memory + sm)
    tail = np.where(rows.grid > slots / 2, tail, 0)
    launch = np.full_like(memory, device.launch_us)
    alone = {"blocks": start, "cycles": cycles, "trips": trips, "barriers": barriers(rows.resident)}
    found = {name: part * to_us for name, part in alone.items()}
    found |= {"us": launch + waves + tail, "memory": memory, "sm": sm, "launch": launch, "tail": tail}
    return SimpleNamespace(**found, waves=rows.grid / slots)


def join(one: np.ndarray, other: np.ndarray, power: float) -> np.ndarray:
    """Join two times that overlap as far as `power` says."""
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
    """Name the limit of a kernel."""
    if us < SHORT_US:
        return "launch and latency"
    if memory > REGIME_RATIO * sm:
        return "memory"
    return "SM" if sm > REGIME_RATIO * memory else "memory and SM"


def time(work: Work, device: Constants) -> float:
    """Predicted µs."""
    return float(terms(rows_of([work]), device).us[0])


def advice(work: Work, device: Constants) -> str:
    """Return the first change to make."""
    now, gains, block = time(work, device), {}, work.block
    for sentence, names in {
        f"move fewer bytes: {work.bytes / 1e6:.0f} MB go through memory": ("bytes",),
        f"load earlier: {block.round_trips:.1f} round trips to memory a block that nothing of their warp hides": (
            "round_trips",
        ),
        f"meet less often: {block.barriers:.0f} barriers a block of {block.warps:.0f} warps": ("barriers",),
        f"execute less: {block.issued:.0f} instructions a block, {busiest(block)} the limit": (*PIPE_CYCLES, "cycles"),
        f"go less through shared memory: {block.shared + block.accesses / 2:.0f} wavefronts a block": (
            "shared",
            "accesses",
        ),
        f"launch fewer, longer blocks: {work.grid} are started": ("block_cycles",),
        "launch less often, or within a graph: the launch itself is what counts": ("launch_us",),
    }.items():
        fewer = work._replace(bytes=int(work.bytes * LESS)) if "bytes" in names else work
        fewer = fewer._replace(block=tenth_less(block, names))
        gains[sentence] = (now - time(fewer, tenth_less(device, names))) / now
    slots = device.sms * work.resident
    waves = work.grid / slots
    if waves > 1 and (whole := int(waves)) < waves:
        even = work._replace(grid=int(whole * slots), bytes=int(work.bytes * whole / waves))
        saved = 1 - time(even, device) * waves / whole / now
        if saved > max(SMALL_GAIN, LARGE_SHARE * max(gains.values())):
            return f"even the waves out: of {waves:.2f} waves of {slots:.0f} blocks the last costs {saved:.0%}"
    first = max(gains, key=lambda sentence: gains[sentence])
    return f"{first}; a tenth less saves {gains[first]:.1%}"


def tenth_less(of: Any, names: Sequence[str]) -> Any:
    """Reduce the named fields by a tenth."""
    return of._replace(**{name: getattr(of, name) * LESS for name in names if name in of._fields})


def busiest(block: Block) -> str:
    """Return the pipe that a block's instructions keep busy longest."""
    name = max(PIPE_CYCLES, key=lambda name: getattr(block, name) * PIPE_CYCLES[name])
    pipes = {"issued": "issue", "alu": "the integer pipe", "special": "the special-function pipe"}
    return f"{pipes.get(name, 'the fma pipe')} is" if name != "tensor" else "the tensor cores are"
