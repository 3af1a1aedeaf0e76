"""`mhc-tilelang traffic --schedule`: the heuristic's choice for a batch, without a device.

Would catch: chunks that no split takes, another choice than that of a tensor, an option that is accepted and ignored.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import replace_launch

from mhc_tilelang import cli, launch


def schedules(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    file = tmp_path / "schedule.json"
    assert cli.main(["traffic", "--schedule", *options, "--json", str(file)]) == 0
    loaded: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return loaded


def test_schedule_of_every_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Batches from decoding to thousands of tokens; the splits take every chunk, and none is without one."""
    rows = schedules(tmp_path)
    out = capsys.readouterr().out
    assert [row["num_tokens"] for row in rows] == [1 << k for k in range(15)]
    assert (rows[0]["slabs"], rows[-1]["slabs"]) == (rows[0]["num_chunks"], 8)  # a slab a chunk, then a slab a group
    assert [row["regime"] for row in rows] == ["one launch"] * 8 + ["channels"] * 7
    for row in rows:
        assert (
            row["chunks_per_split"] * row["splits"] >= row["num_chunks"] > row["chunks_per_split"] * (row["splits"] - 1)
        )
        assert f"{row['token_blocks']} × {row['splits']} = {row['token_blocks'] * row['splits']}" in out


def test_schedule_is_that_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_launch(monkeypatch, "parallel_blocks", lambda _: os.cpu_count() or 1)
    options = ("--device", "cpu", "--widths", "600", "--tokens", "3", "100", "--dtype", "float32", "--streams", "2")
    for row in schedules(tmp_path, *options):
        found = launch.boundary_schedule(torch.zeros(row["num_tokens"], 2, 600), rows=8)
        counts = (found.token_blocks, found.chunks_per_split, found.splits, found.slabs)
        assert counts == tuple(row[key] for key in ("token_blocks", "chunks_per_split", "splits", "slabs"))


def test_a_schedule_has_no_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["traffic", "--schedule", "--kernels", "aggregate"]) == 1
    assert "--schedule: expected without --kernels, got aggregate" in capsys.readouterr().err
