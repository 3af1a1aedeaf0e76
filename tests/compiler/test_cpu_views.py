"""Tiles that need no copy on a CPU: read or written in place in a loop, and copied wherever that would show.

Tiny kernels with a known answer, every index checked, and a look at the C++ that ran.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import tilelang.language as T
import torch
from helpers import run_lowered
from test_cpu_tile_ops import integers


@pytest.fixture
def run(tmp_path: Path):
    """Compile a traced function with every index checked, call it by names, and return the C++ that ran."""
    return partial(run_lowered, folder=tmp_path)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_tile_that_is_reduced_is_no_view(run, axis: int) -> None:
    """A token's [n, block] of [T, n, C]: in place, axis 1 of the tile would be taken for axis 1 of the stream."""
    kept = (32,) if axis == 0 else (4,)

    @T.prim_func
    def sums(values: T.Tensor[(3, 4, 32), T.float32], totals: T.Tensor[(3, *kept), T.float32]):
        with T.Kernel(3, threads=32) as token:
            tile = T.alloc_fragment((4, 32), T.float32)
            total = T.alloc_fragment(kept, T.float32)
            T.copy(values[token, 0, 0], tile)
            T.reduce_sum(tile, total, dim=axis)
            T.copy(total, totals[token, 0])

    values, totals = integers(3, 4, 32), torch.full((3, *kept), torch.nan)
    run(sums, values=values, totals=totals)
    assert torch.equal(totals, values.sum(1 + axis))


def test_a_tile_copied_in_a_loop_is_read_and_written_in_place(run) -> None:
    """Neither copy costs anything on a CPU, and the result is the same."""

    @T.prim_func
    def doubled(values: T.Tensor[(5, 32), T.float32], result: T.Tensor[(5, 32), T.float32]):
        with T.Kernel(1, threads=32):
            tile = T.alloc_fragment((32,), T.float32)
            twice = T.alloc_fragment((32,), T.float32)
            for row in T.serial(5):
                T.copy(values[row, 0], tile)
                for c in T.Parallel(32):
                    twice[c] = tile[c] * 2.0
                T.copy(twice, result[row, 0])

    values, result = integers(5, 32), torch.full((5, 32), torch.nan)
    source = run(doubled, values=values, result=result)
    assert torch.equal(result, values * 2)
    assert "copy_row" not in source
    assert "tile[" not in source
    assert "twice[" not in source


def test_a_tile_used_after_its_loop_is_no_view(run) -> None:
    """It holds the last row then; seen in place, it would be at an index that no longer is."""

    @T.prim_func
    def last(values: T.Tensor[(5, 32), T.float32], sums: T.Tensor[(32,), T.float32], kept: T.Tensor[(32,), T.float32]):
        with T.Kernel(1, threads=32):
            tile = T.alloc_fragment((32,), T.float32)
            acc = T.alloc_fragment((32,), T.float32)
            T.clear(acc)
            for row in T.serial(5):
                T.copy(values[row, 0], tile)
                for c in T.Parallel(32):
                    acc[c] += tile[c]
            for c in T.Parallel(32):
                kept[c] = tile[c]
            T.copy(acc, sums)

    values, sums, kept = integers(5, 32), torch.full((32,), torch.nan), torch.full((32,), torch.nan)
    source = run(last, values=values, sums=sums, kept=kept)
    assert torch.equal(sums, values.sum(0))
    assert torch.equal(kept, values[-1])
    assert "tile[32]" in source


def test_a_tile_used_before_its_copy_in_a_loop_is_no_view(run) -> None:
    """It still holds what came before, from outside the loop or from the last round."""

    @T.prim_func
    def shifted(values: T.Tensor[(5, 32), T.float32], result: T.Tensor[(5, 32), T.float32]):
        with T.Kernel(1, threads=32):
            tile = T.alloc_fragment((32,), T.float32)
            T.clear(tile)
            for row in T.serial(5):
                for c in T.Parallel(32):
                    result[row, c] = tile[c]
                T.copy(values[row, 0], tile)

    values, result = integers(5, 32), torch.full((5, 32), torch.nan)
    run(shifted, values=values, result=result)
    assert torch.equal(result, torch.cat([torch.zeros(1, 32), values[:-1]]))


def test_a_buffer_written_elsewhere_has_no_views(run) -> None:
    """Row after row, each from the one before, which the loop has just changed."""

    @T.prim_func
    def running(values: T.Tensor[(5, 32), T.float32]):
        with T.Kernel(1, threads=32):
            tile = T.alloc_fragment((32,), T.float32)
            for row in T.serial(4):
                T.copy(values[row, 0], tile)
                for c in T.Parallel(32):
                    values[row + 1, c] = values[row + 1, c] + tile[31 - c]
                for c in T.Parallel(32):
                    values[row, c] = tile[c] + 100.0

    values = integers(5, 32)
    expected = values.clone()
    for row in range(4):
        before = expected[row].clone()
        expected[row + 1] += before.flip(0)
        expected[row] = before + 100
    source = run(running, values=values)
    assert torch.equal(values, expected)
    assert "tile[32]" in source


def test_a_tile_that_hangs_over_is_no_view(run) -> None:
    """The last of three tiles of 16 over 40 channels: the rest is zero, and not the next row."""

    @T.prim_func
    def sums(values: T.Tensor[(2, 40), T.float32], result: T.Tensor[(2, 16), T.float32]):
        with T.Kernel(2, threads=32) as row:
            tile = T.alloc_fragment((16,), T.float32)
            acc = T.alloc_fragment((16,), T.float32)
            T.clear(acc)
            for k in T.serial(3):
                T.copy(values[row, k * 16], tile)
                for c in T.Parallel(16):
                    acc[c] += tile[c]
            T.copy(acc, result[row, 0])

    values, result = integers(2, 40), torch.full((2, 16), torch.nan)
    source = run(sums, values=values, result=result)
    assert torch.equal(result, torch.nn.functional.pad(values, (0, 8)).unflatten(1, (3, 16)).sum(1))
    assert "tile[16]" in source
