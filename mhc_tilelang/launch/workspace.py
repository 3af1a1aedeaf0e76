"""Counters for kernels whose blocks synchronise: int32, zero before a launch and after it, kept between launches.

The kernel sets them back, so no launch has to clear them, and none is captured in a CUDA graph for it. Two launches
that may run at a time must not share them:

    launches of one stream run one after another: a stream has its own (and a thread, since `cudaStreamPerThread` is one
    handle for many streams)
    a captured launch gets some that no other launch ever gets, for the graph may be replayed beside anything; a graph
    is never replayed beside itself

They are made in a thread of their own: a graph's memory pool, inference mode and whatever notes operations hold for the
thread that calls, and counters outlive all of these.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from ..compiler.kernel import taping

POOL_WORDS = 1 << 19  # 2 MB at a time: 1,600 captured launches of 128 tokens at C = 2560
LINE = 32  # words of 128 bytes, which no two launches share
_lock = threading.Lock()
_pools: dict[torch.device, torch.Tensor] = {}  # what is left of the latest, a device
_kept: dict[tuple[torch.device, int, int, int], torch.Tensor] = {}


def counters(device: torch.device, words: int) -> torch.Tensor | None:
    """`words` zeros for a launch on the current stream; None where none may be made: while a graph is captured, for
    more than were prepared by the launches before it.

    A call that is replayed from its tape asks anew: its stream may be another.
    """
    found = find(device, words)
    if found is not None and taping.recorder is not None:
        taping.recorder.given(found, lambda: find(device, words))
    return found


def find(device: torch.device, words: int) -> torch.Tensor | None:
    """`counters`, for a launch that may be a replayed one."""
    if device.type == "meta":
        return torch.empty(words, dtype=torch.int32, device=device)
    stream = 0
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return take(device, words)
            stream = torch.cuda.current_stream(device).cuda_stream
    key = (device, stream, threading.get_ident(), words)
    if key not in _kept:
        prepare(device, words)
        if (taken := take(device, words)) is not None:
            _kept[key] = taken
    return _kept.get(key)


def prepare(device: torch.device, words: int) -> None:
    """See to it that `words` and as many as some captures take are there, for every stream."""
    with _lock:
        left = _pools.get(device)
        if left is None or len(left) < max(2 * words, POOL_WORDS // 2):
            with ThreadPoolExecutor(1) as thread:
                _pools[device] = thread.submit(make, device, max(4 * words, POOL_WORDS)).result()


def make(device: torch.device, words: int) -> torch.Tensor:
    """Zeros that every stream finds to be zero."""
    made = torch.zeros(words, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return made


def take(device: torch.device, words: int) -> torch.Tensor | None:
    """Zeros that nothing else has; None where not enough are left."""
    with _lock:
        left = _pools.get(device)
        lines = -(-words // LINE) * LINE
        if left is None or len(left) < lines:
            return None
        _pools[device] = left[lines:]
        return left[:words]
