"""What tests of several processes share: how ranks start, end, and fail in finite time."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120  # after which a rank is taken for hung


def run_ranks(function: Callable[..., None], ranks: int, folder: Path, *arguments: Any) -> None:
    """Run function(rank, ranks, *arguments) in as many processes, joined by gloo; an error in one fails the test."""
    mp.spawn(_run_rank, (function, ranks, str(folder / "rendezvous"), arguments), nprocs=ranks)


def _run_rank(rank: int, function: Callable[..., None], ranks: int, rendezvous: str, arguments: tuple) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, timeout=timeout)
    function(rank, ranks, *arguments)
    dist.barrier()
    # No teardown: PyTorch may free a process group with the GIL held, and wait for a thread that wants it.
    os._exit(0)
