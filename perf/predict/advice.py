"""One sentence: what to change first, by asking the model what a tenth less of each thing would save.

A tenth because the model is good at small changes of what it has seen and not at worlds without memory.
"""

from __future__ import annotations

from dataclasses import replace

from .model import Block, Constants, Work, rows_of, terms

LESS = 0.9
SMALL_GAIN = 0.05  # of the time, for whole waves: below it they are not worth a word
LARGE_SHARE = 2.5  # of the largest gain of a tenth: a quarter of that thing, which is seldom to be had


def advice(work: Work, device: Constants) -> str:
    """What to change first."""
    now = time(work, device)
    gains = {name: (now - time(tried, device)) / now for name, tried in tenths(work).items()}
    for name in ("launch_us", "block_cycles"):
        gains[name] = (now - time(work, replace(device, **{name: getattr(device, name) * LESS}))) / now
    slots = device.sms * work.resident
    waves = work.grid / slots
    if waves > 1 and (whole := int(waves)) < waves:
        even = replace(work, grid=int(whole * slots), bytes=int(work.bytes * whole / waves))
        saved = 1 - time(even, device) * waves / whole / now
        if saved > max(SMALL_GAIN, LARGE_SHARE * max(gains.values())):
            return f"even the waves out: of {waves:.2f} waves of {slots:.0f} blocks the last costs {saved:.0%}"
    name = max(gains, key=lambda name: gains[name])
    return f"{SENTENCES[name](work)}; a tenth less saves {gains[name]:.1%}"


def time(work: Work, device: Constants) -> float:
    """Predicted µs."""
    return float(terms(rows_of([work]), device).us[0])


def tenths(work: Work) -> dict[str, Work]:
    """The work with a tenth less of one thing each."""
    pipes = ("issued", "alu", "fma", "special", "tensor", "cycles")

    def less(*names: str) -> Block:
        return replace(work.block, **{name: getattr(work.block, name) * LESS for name in names})

    return {
        "bytes": replace(work, bytes=int(work.bytes * LESS)),
        "round_trips": replace(work, block=less("round_trips")),
        "barriers": replace(work, block=less("barriers")),
        "instructions": replace(work, block=less(*pipes)),
        "shared": replace(work, block=less("shared", "accesses")),
    }


SENTENCES = {
    "bytes": lambda work: f"move fewer bytes: {work.bytes / 1e6:.0f} MB go through memory",
    "round_trips": lambda work: (
        f"load earlier: {work.block.round_trips:.1f} round trips to memory a block that nothing of their warp hides"
    ),
    "barriers": lambda work: (
        f"meet less often: {work.block.barriers:.0f} barriers a block of {work.block.warps:.0f} warps"
    ),
    "instructions": lambda work: f"execute less: {work.block.issued:.0f} instructions a block, {busiest(work.block)}",
    "shared": lambda work: (
        f"go less through shared memory: {work.block.shared + work.block.accesses / 2:.0f} wavefronts a block"
    ),
    "block_cycles": lambda work: f"launch fewer, longer blocks: {work.grid} are started",
    "launch_us": lambda _: "launch less often, or within a graph: the launch itself is what counts",
}


def busiest(block: Block) -> str:
    """What most of a block's instructions are, by the pipe that they keep busy longest."""
    from .model import ALU_CYCLES, SPECIAL_CYCLES, TENSOR_CYCLES

    busy = {
        "issue is the limit": block.issued,
        "the integer pipe is the limit": block.alu * ALU_CYCLES,
        "the fma pipe is the limit": block.fma,
        "the special-function pipe is the limit": block.special * SPECIAL_CYCLES,
        "the tensor cores are the limit": block.tensor * TENSOR_CYCLES,
    }
    return max(busy, key=lambda name: busy[name])
