"""Cost of Sinkhorn's iterations on a device: the kernels timed at several iteration counts against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from ... import launch
from ..measure import timing
from ..measure.machine import last_level_cache

Times = dict[str, dict[int, timing.Statistics]]


def measure(
    matrices: int, num_streams: int, eps: float, iters: Sequence[int], repeats: int, device: torch.device
) -> Times:
    """Forward and backward -> iterations -> time; all of them in the same rounds."""
    generator = torch.Generator().manual_seed(0)
    shape = (matrices, num_streams, num_streams)
    logits, g_h_res = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    out = torch.empty_like(logits)
    forward, backward = launch.sinkhorn, launch.sinkhorn_backward
    candidates: dict[str, timing.Run] = {}
    for count in iters:
        candidates[f"forward {count}"] = partial(forward, logits, count, eps, out=out)
        candidates[f"backward {count}"] = partial(backward, g_h_res, logits, count, eps, out=out)
    measured = timing.measure(candidates, timing.clock_for(device, last_level_cache(device)), repeats)
    return {way: {count: measured[f"{way} {count}"] for count in iters} for way in ("forward", "backward")}


def doubtful(times: Times) -> bool:
    """Whether most calls of some point waited for a core."""
    return any(time.doubtful for by_iters in times.values() for time in by_iters.values())


def rows(times: Times) -> list[dict[str, Any]]:
    """Return a row per direction and iteration count, in seconds."""
    return [
        {"direction": way, "iters": n, **asdict(time)} for way, all_of in times.items() for n, time in all_of.items()
    ]
