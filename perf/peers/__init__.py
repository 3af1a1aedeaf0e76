"""Other implementations of the same functions, measured in the kernels' own rounds: `mhc-tilelang bench --peers`.

    peer         what a peer declares: which of our functions it has, how its conventions convert (by `convert`)
    prepare      load those that are asked for, verify a call before it is timed
    report       the table, the lines on what was left out, the JSON

    deepseek     DeepSeek's TileKernels (`tile-kernels`); `deepseek_calls` has the launches, `compiled` what they run
                 on: tilelang's compiler on a GPU, our CPU target on a CPU
    liger        Liger-Kernel, on a GPU
    lucidrains   hyper-connections
    huggingface  the eager modules of transformers' DeepSeek-V4

None is a dependency. One that is missing, or that lacks a function, is named with the reason; one that returns
something else is reported with the difference, and not timed. Loads no torch and no peer.
"""

from __future__ import annotations

from collections.abc import Sequence

# The name on PyPI, and the module here.
PEERS = {
    "tile-kernels": "deepseek",
    "liger-kernel": "liger",
    "hyper-connections": "lucidrains",
    "transformers": "huggingface",
}
CHOICES = (*PEERS, "all", "none")


def select(names: Sequence[str]) -> tuple[str, ...]:
    """Select the peers that `--peers` asks for, in the table's order."""
    return tuple(name for name in PEERS if name in names or "all" in names)
