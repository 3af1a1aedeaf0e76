"""Bytes counted from TIR: kernels whose traffic is plain to see, and code that cannot be counted.

Would catch: a loop, a grid axis or a branch that is not counted, a tile's overhang or a guarded-off access that is, a
second read of a tensor that goes unseen, a count that is wrong without a word where the code is not understood.
"""

from __future__ import annotations

from typing import Any

import pytest
import tilelang.language as T

from mhc_tilelang.perf.traffic.audit import BufferTraffic, Movement, audit, audit_function
from mhc_tilelang.perf.traffic.audit.values import AuditError

NOTHING = Movement()


def moved(buffers: dict[str, BufferTraffic], name: str) -> tuple[Movement, Movement]:
    """Elements of four bytes read and written."""
    read, written = buffers[name].read, buffers[name].written
    parts = [(m.accessed, m.per_block, m.distinct) for m in (read, written)]
    assert all(number % 4 == 0 for part in parts for number in part)
    return tuple(Movement(*(number // 4 for number in part)) for part in parts)  # type: ignore[return-value]


@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (7, 16), (8, 13), (1, 1), (17, 33)])
def test_a_copy_counts_what_lies_inside(rows: int, columns: int) -> None:
    """Tiles of 8 × 16 over any matrix: each element once, however the last tiles hang over."""

    @T.prim_func
    def copy(values: T.Tensor[(rows, columns), T.float32], copied: T.Tensor[(rows, columns), T.float32]):
        with T.Kernel(T.ceildiv(rows, 8), T.ceildiv(columns, 16), threads=32) as (r, c):
            tile = T.alloc_shared((8, 16), T.float32)
            T.copy(values[r * 8 : r * 8 + 8, c * 16 : c * 16 + 16], tile)
            T.copy(tile, copied[r * 8, c * 16])

    buffers = audit_function(copy, {})
    once = Movement(*[rows * columns] * 3)
    assert moved(buffers, "values") == (once, NOTHING)
    assert moved(buffers, "copied") == (NOTHING, once)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 100])
def test_guards_leave_out_what_does_not_run(size: int) -> None:
    """`if`, its else, and if_then_else, over a run-time size; the last block is partly idle."""
    num = T.dynamic("num")

    @T.prim_func
    def guarded(
        values: T.Tensor[(num,), T.float32],
        others: T.Tensor[(num,), T.float32],
        rest: T.Tensor[(32,), T.float32],
        total: T.Tensor[(num,), T.float32],
    ):
        with T.Kernel(T.ceildiv(num, 32), threads=32) as block:
            tile = T.alloc_fragment((32,), T.float32)
            for t in T.Parallel(32):
                tile[t] = T.if_then_else(block * 32 + t < num, values[block * 32 + t], rest[t])
            for t in T.Parallel(32):
                if block * 32 + t < num and t > 0:
                    total[block * 32 + t] = tile[t]
                else:
                    tile[t] = others[block * 32]

    buffers, blocks = audit_function(guarded, {"num": size}), -(-size // 32)
    idle = 32 * blocks - size
    assert moved(buffers, "values")[0] == Movement(size, size, size)
    assert moved(buffers, "rest")[0] == Movement(idle, idle, idle)
    assert moved(buffers, "total")[1] == Movement(*[size - blocks] * 3)
    assert moved(buffers, "others")[0] == Movement(idle + blocks, blocks, blocks)


def test_a_reduction_that_reads_twice_is_found() -> None:
    """The planted double read: two passes over a row show as twice the bytes, though each element is one."""
    num_tokens = T.dynamic("num_tokens")

    @T.prim_func
    def variance(x: T.Tensor[(num_tokens, 100), T.float32], result: T.Tensor[(num_tokens, 1), T.float32]):
        with T.Kernel(num_tokens, threads=32) as token:
            tile = T.alloc_fragment((32,), T.float32)
            sums = T.alloc_fragment((32,), T.float32)
            mean = T.alloc_fragment((1,), T.float32)
            T.clear(sums)
            for step in T.serial(4):
                T.copy(x[token, step * 32], tile)
                for c in T.Parallel(32):
                    sums[c] += tile[c]
            T.reduce_sum(sums, mean, dim=0)
            for step in T.serial(4):
                T.copy(x[token, step * 32], tile)
                for c in T.Parallel(32):
                    sums[c] += (tile[c] - mean[0]) * (tile[c] - mean[0])
            T.reduce_sum(sums, mean, dim=0)
            result[token, 0] = mean[0]

    buffers = audit_function(variance, {"num_tokens": 4096})
    assert moved(buffers, "x")[0] == Movement(2 * 4096 * 100, 4096 * 100, 4096 * 100)
    assert moved(buffers, "result")[1] == Movement(4096, 4096, 4096)


@pytest.mark.parametrize("chunks_per_split", [1, 3, 7, 20])
def test_a_pipelined_loop_with_bounds_of_run_time(chunks_per_split: int) -> None:
    """A split of 7 chunks over blocks: the stream once, the weights once for each block of tokens."""
    num_tokens = T.dynamic("num_tokens")

    @T.prim_func
    def project(
        x: T.Tensor[(num_tokens, 2, 100), T.float32],
        weights: T.Tensor[(16, 2, 100), T.float32],
        partial: T.Tensor[(7, num_tokens, 16), T.float32],
        chunks_per_split: T.int32,
    ):
        with T.Kernel(T.ceildiv(num_tokens, 32), T.ceildiv(7, chunks_per_split), threads=32) as (tile, split):
            x_tile = T.alloc_shared((32, 16), T.float32)
            weight_tile = T.alloc_shared((16, 16), T.float32)
            acc = T.alloc_fragment((32, 16), T.float32)
            first = split * chunks_per_split
            for chunk in T.serial(first, T.min(first + chunks_per_split, 7)):
                T.clear(acc)
                for i in T.Pipelined(2, num_stages=2):
                    T.copy(x[tile * 32 : tile * 32 + 32, i, chunk * 16 : chunk * 16 + 16], x_tile)
                    T.copy(weights[0:16, i, chunk * 16 : chunk * 16 + 16], weight_tile)
                    T.gemm(x_tile, weight_tile, acc, transpose_B=True)
                T.copy(acc, partial[chunk, tile * 32, 0])

    buffers = audit_function(project, {"num_tokens": 70, "chunks_per_split": chunks_per_split})
    assert moved(buffers, "x")[0] == Movement(*[70 * 200] * 3)
    assert moved(buffers, "weights")[0] == Movement(3 * 16 * 200, 3 * 16 * 200, 16 * 200)
    assert moved(buffers, "partial")[1] == Movement(*[7 * 70 * 16] * 3)


def test_distinct_elements_of_several_places() -> None:
    """Windows that overlap, a diagonal, and a scalar of a whole block: a union is not a sum."""

    @T.prim_func
    def windows(
        values: T.Tensor[(40,), T.float32],
        square: T.Tensor[(8, 8), T.float32],
        scale: T.Tensor[(4,), T.float32],
        out: T.Tensor[(4, 16), T.float32],
    ):
        with T.Kernel(4, threads=32) as block:
            tile = T.alloc_fragment((16,), T.float32)
            T.copy(values[block * 8], tile)
            for c in T.Parallel(16):
                out[block, c] = tile[c] * scale[block]
            for c in T.Parallel(8):
                out[block, c] = square[c, c] + square[0, c]

    buffers = audit_function(windows, {})
    assert moved(buffers, "values")[0] == Movement(64, 64, 40)
    assert moved(buffers, "square")[0] == Movement(64, 4 * 15, 15)
    assert moved(buffers, "scale")[0] == Movement(64, 4, 4)
    assert moved(buffers, "out")[1] == Movement(96, 64, 64)


def test_a_fill_counts_as_written() -> None:
    @T.prim_func
    def clear(total: T.Tensor[(5, 32), T.float32]):
        with T.Kernel(2, threads=32):
            T.fill(total, 0.0)

    assert moved(audit_function(clear, {}), "total") == (NOTHING, Movement(320, 320, 160))


def refused(build: str) -> Any:
    """Kernels whose traffic depends on more than sizes."""
    if build == "data":

        @T.prim_func
        def data(values: T.Tensor[(32,), T.float32], out: T.Tensor[(32,), T.float32]):
            with T.Kernel(1, threads=32):
                for t in T.Parallel(32):
                    if values[t] > 0.0:
                        out[t] = 1.0

        return data
    if build == "thread":

        @T.prim_func
        def thread(values: T.Tensor[(32,), T.float32]):
            with T.Kernel(1, threads=32):
                values[T.get_thread_binding()] = 1.0

        return thread
    if build == "outside":

        @T.prim_func
        def outside(values: T.Tensor[(32,), T.float32]):
            with T.Kernel(2, threads=32) as block:
                for t in T.Parallel(32):
                    values[block * 32 + t] = 1.0

        return outside

    @T.prim_func
    def between(values: T.Tensor[(32,), T.float32], out: T.Tensor[(32,), T.float32]):
        with T.Kernel(1, threads=32):
            T.copy(values, out)

    return between


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ("data", r"audit: data: expected indices and guards of sizes and loops, got values\[t\]"),
        ("thread", r"expected indices and guards of sizes and loops, got tx"),
        ("outside", r"audit: outside: values: expected indices from 0 to 31, got 0 to 63"),
        ("between", "expected a copy from or to a tile, got one between global buffers"),
    ],
)
def test_what_cannot_be_counted_is_refused(build: str, message: str) -> None:
    with pytest.raises(AuditError, match=message):
        audit_function(refused(build), {})


def test_sizes_are_named() -> None:
    with pytest.raises(AuditError, match=r"audit: sinkhorn: sizes: expected \['iters', .*\], got \['tokens'\]"):
        audit("sinkhorn", {"num_streams": 2, "block": 32}, {"tokens": 3})


def test_a_word_to_nvcc_is_passed_over() -> None:
    """The annotation of blocks a multiprocessor moves nothing; what follows it counts."""

    @T.prim_func
    def copy(values: T.Tensor[(40,), T.float32], copied: T.Tensor[(40,), T.float32]):
        with T.Kernel(T.ceildiv(40, 16), threads=32) as block:
            tile = T.alloc_shared((16,), T.float32)
            T.annotate_min_blocks_per_sm(2)
            T.copy(values[block * 16], tile)
            T.copy(tile, copied[block * 16])

    buffers = audit_function(copy, {})
    assert moved(buffers, "values")[0] == moved(buffers, "copied")[1] == Movement(40, 40, 40)


def test_more_places_than_a_word_has_bits() -> None:
    """70 places, each of which writes two elements, one of them the next place's first."""

    @T.prim_func
    def spread(result: T.Tensor[(71,), T.float32]):
        with T.Kernel(1, threads=32):
            for place in range(70):
                for t in T.serial(2):
                    result[place + t] = 1.0

    assert moved(audit_function(spread, {}), "result")[1] == Movement(140, 71, 71)
