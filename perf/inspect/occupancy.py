"""Theoretical occupancy: how many blocks of a kernel fit a multiprocessor, and what runs out first.

The limits of an architecture are those of the CUDA programming guide (compute capabilities, technical specifications),
the rules of allocation those of CUDA's own calculator (`cuda_occupancy.h`): registers are given to warps in units of
256 and stay within a quarter of the multiprocessor; shared memory is given in units of 128 bytes after 1 KB that every
block pays; a barrier that a block names is one of a fixed number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

WARP = 32
REGISTERS = 64 * 1024  # of a multiprocessor
REGISTER_UNIT = 256
QUARTERS = 4
RESERVED_SHARED_BYTES = 1024  # of every block, for the system
SHARED_UNIT = 128


@dataclass(frozen=True)
class Architecture:
    """Resources of a multiprocessor.

    Attributes:
        warps: most resident warps.
        blocks: most resident blocks.
        shared_bytes: shared memory, what blocks reserve included.
        barriers: barriers that resident blocks can name together; None where the calculator sets no limit.
    """

    warps: int
    blocks: int
    shared_bytes: int
    barriers: int | None

    @property
    def shared_bytes_per_block(self) -> int:
        """The most that one block may ask for."""
        return self.shared_bytes - RESERVED_SHARED_BYTES


ARCHITECTURES = {
    "sm_80": Architecture(warps=64, blocks=32, shared_bytes=164 * 1024, barriers=None),
    "sm_90a": Architecture(warps=64, blocks=32, shared_bytes=228 * 1024, barriers=64),
    "sm_100a": Architecture(warps=64, blocks=32, shared_bytes=228 * 1024, barriers=64),
    "sm_120a": Architecture(warps=48, blocks=24, shared_bytes=100 * 1024, barriers=24),
}


class Occupancy(NamedTuple):
    """Blocks of a kernel on a multiprocessor, the share of its warps that they fill, and what allows no more."""

    blocks: int
    share: float
    limiter: str


def occupancy(arch: str, threads: int, registers: int, shared_bytes: int, barriers: int = 0) -> Occupancy:
    """Compute the occupancy of blocks of `threads` threads.

    Args:
        arch: one of ARCHITECTURES.
        threads: threads of a block.
        registers: registers of a thread.
        shared_bytes: shared memory of a block, static and dynamic.
        barriers: barriers that a block names, as ptxas counts them.
    """
    limits = ARCHITECTURES[arch]
    warps = round_up(threads, WARP) // WARP
    registers_per_warp = round_up(registers * WARP, REGISTER_UNIT)
    fit = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": REGISTERS // QUARTERS // registers_per_warp * QUARTERS // warps,
        "shared memory": limits.shared_bytes // round_up(shared_bytes + RESERVED_SHARED_BYTES, SHARED_UNIT),
        "barriers": limits.barriers // barriers if barriers and limits.barriers else limits.blocks,
    }
    limiter = min(fit, key=lambda name: fit[name])
    return Occupancy(fit[limiter], fit[limiter] * warps / limits.warps, limiter)


def round_up(value: int, unit: int) -> int:
    """Return the next multiple of `unit`."""
    return -(-value // unit) * unit
