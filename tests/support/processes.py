"""Helpers for tests of several processes: ranks start, end, and fail in finite time."""

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


def run_ranks(function: Callable[..., None], ranks: int, folder: Path, *arguments: Any) -> None:
    """Run function(rank, ranks, *arguments) in as many processes, joined by gloo; an error in one fails the test."""
    mp.spawn(_run_rank, (function, ranks, folder, arguments), nprocs=ranks)


def start_rank(rank: int, ranks: int, folder: Path, seconds: int = 120) -> None:
    """Join the others. Waiting for one of them for that long is an error; hanging for longer ends the process."""
    faulthandler.dump_traceback_later(2 * seconds, exit=True)
    torch.set_num_threads(1)
    meeting, timeout = f"file://{folder / 'rendezvous'}", timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timeout)


def _run_rank(rank: int, function: Callable[..., None], ranks: int, folder: Path, arguments: tuple) -> None:
    start_rank(rank, ranks, folder)
    function(rank, ranks, *arguments)
    dist.barrier()
    # No teardown: PyTorch may free a process group with the GIL held, and wait for a thread that wants it.
    os._exit(0)
