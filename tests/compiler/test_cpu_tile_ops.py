"""The CPU's tile operations: products in every orientation, sums along rows, and what costs nothing.

    products  A·B, Aᵀ·B and A·Bᵀ of any block sizes
    sums      of a last axis, by whole registers and without

Tiny kernels with a known answer, every index checked; `test_cpu_views` and `test_cpu_lowering` have the rest.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import tilelang.language as T
import torch
from helpers import run_lowered

from mhc_tilelang.compiler.cpu.emit import emit


@pytest.fixture
def run(tmp_path: Path):
    """Compile a traced function with every index checked, call it by names, and return the C++ that ran."""
    return partial(run_lowered, folder=tmp_path)


def integers(*shape: int) -> torch.Tensor:
    """So small that every order of a sum is exact."""
    return torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype"),
    [(1, 16, 16, "float32"), (7, 48, 16, "float32"), (48, 176, 80, "float32"), (13, 112, 48, "bfloat16")],
)
@pytest.mark.parametrize(("transpose_a", "transpose_b"), [(False, False), (True, False), (False, True)])
def test_products(run, m: int, n: int, k: int, transpose_a: bool, transpose_b: bool, dtype: str) -> None:
    """Added to what is there, twice. Catches rows and columns confused, a rest of a block left out, C overwritten."""
    shape_a, shape_b = ((k, m) if transpose_a else (m, k)), ((n, k) if transpose_b else (k, n))

    @T.prim_func
    def product(a: T.Tensor[shape_a, dtype], b: T.Tensor[shape_b, dtype], c: T.Tensor[(m, n), T.float32]):
        with T.Kernel(1, threads=32):
            a_tile = T.alloc_shared(shape_a, dtype)
            b_tile = T.alloc_shared(shape_b, dtype)
            acc = T.alloc_fragment((m, n), T.float32)
            T.copy(a, a_tile)
            T.copy(b, b_tile)
            for row, column in T.Parallel(m, n):
                acc[row, column] = 1.0
            T.gemm(a_tile, b_tile, acc, transpose_A=transpose_a, transpose_B=transpose_b)
            T.gemm(a_tile, b_tile, acc, transpose_A=transpose_a, transpose_B=transpose_b)
            T.copy(acc, c)

    a, b = integers(*shape_a).to(getattr(torch, dtype)), integers(*shape_b).to(getattr(torch, dtype))
    c = torch.full((m, n), torch.nan)
    source = run(product, a=a, b=b, c=c)
    expected = 1 + 2 * (a.float().T if transpose_a else a.float()) @ (b.float().T if transpose_b else b.float())
    assert torch.equal(c, expected)
    assert "a_tile[" in source  # though all of it lies inside its buffer, an operand is no view


@pytest.mark.parametrize(("m", "n", "k"), [(3, 32, 1), (5, 16, 7), (24, 64, 3)])
@pytest.mark.parametrize("transpose_a", [False, True])
def test_products_of_any_depth(run, m: int, n: int, k: int, transpose_a: bool) -> None:
    """Only the result's rows must be whole registers where B is not transposed: 48 tokens, 24 rows, but also 3."""
    shape_a = (k, m) if transpose_a else (m, k)

    @T.prim_func
    def product(a: T.Tensor[shape_a, T.float32], b: T.Tensor[(k, n), T.float32], c: T.Tensor[(m, n), T.float32]):
        with T.Kernel(1, threads=32):
            a_tile = T.alloc_shared(shape_a, T.float32)
            b_tile = T.alloc_shared((k, n), T.float32)
            acc = T.alloc_fragment((m, n), T.float32)
            T.copy(a, a_tile)
            T.copy(b, b_tile)
            T.clear(acc)
            T.gemm(a_tile, b_tile, acc, transpose_A=transpose_a)
            T.copy(acc, c)

    a, b, c = integers(*shape_a), integers(k, n), torch.full((m, n), torch.nan)
    run(product, a=a, b=b, c=c)
    assert torch.equal(c, (a.T if transpose_a else a) @ b)


@pytest.mark.parametrize("size", [1, 13, 16, 24, 48, 512])
def test_sums_of_a_last_axis(run, size: int) -> None:
    """Whole registers are added by lanes; other sizes one by one. Catches a rest left out, and a row of another."""

    @T.prim_func
    def sums(values: T.Tensor[(2, 3, size), T.float32], totals: T.Tensor[(2, 3), T.float32]):
        with T.Kernel(1, threads=32):
            tile = T.alloc_fragment((2, 3, size), T.float32)
            total = T.alloc_fragment((2, 3), T.float32)
            T.copy(values, tile)
            for a, b, c in T.Parallel(2, 3, size):
                tile[a, b, c] += 1.0
            T.reduce_sum(tile, total, dim=2)
            T.copy(total, totals)

    values, totals = integers(2, 3, size), torch.full((2, 3), torch.nan)
    source = run(sums, values=values, totals=totals)
    assert torch.equal(totals, (values + 1).sum(2))
    assert (f"sum_row<{size}>" in source) == (size % 16 == 0)


@pytest.mark.parametrize("wanted", [False, True])
def test_what_is_switched_off_leaves_nothing(run, wanted: bool) -> None:
    """An empty loop body is a statement of nothing, and a tile that is never accessed is not declared.

    The unused one is larger than the stack may be. Catches both refused, and a body of nothing that hides others.
    """

    @T.prim_func
    def switched(values: T.Tensor[(16,), T.float32], result: T.Tensor[(16,), T.float32]):
        with T.Kernel(1, threads=16):
            unused = T.alloc_shared((1 << 20,), T.float32)
            acc = T.alloc_fragment((16,), T.float32)
            T.clear(acc)
            for c in T.Parallel(16):
                for _ in T.unroll(2):
                    if wanted:
                        acc[c] += values[c]
            if wanted:
                for c in T.Parallel(16):
                    acc[c] += 1.0
            T.copy(acc, result)
            if not wanted and result.shape[0] == 0:
                T.clear(unused)

    values, result = integers(16), torch.full((16,), torch.nan)
    source = run(switched, values=values, result=result)
    assert torch.equal(result, 2 * values + 1 if wanted else torch.zeros(16))
    assert "unused" not in source


def test_every_orientation_but_one_is_known() -> None:
    """Aᵀ·Bᵀ is in no kernel and is refused rather than taken for another."""
    from mhc_tilelang.errors import LoweringError

    @T.prim_func
    def product(a: T.Tensor[(16, 16), T.float32], c: T.Tensor[(16, 16), T.float32]):
        with T.Kernel(1, threads=32):
            tile = T.alloc_shared((16, 16), T.float32)
            acc = T.alloc_fragment((16, 16), T.float32)
            T.copy(a, tile)
            T.clear(acc)
            T.gemm(tile, tile, acc, transpose_A=True, transpose_B=True)
            T.copy(acc, c)

    with pytest.raises(LoweringError, match=r"T.gemm with transpose_A, transpose_B = \(True, True\)"):
        emit(product)


def test_waiting_for_the_kernel_before_is_nothing(run) -> None:
    """T.pdl_sync, which kernels for recent GPUs have: on a CPU the kernel before has returned. Catches a refusal."""

    @T.prim_func
    def waiting(values: T.Tensor[(16,), T.float32], result: T.Tensor[(16,), T.float32]):
        with T.Kernel(1, threads=16):
            acc = T.alloc_fragment((16,), T.float32)
            T.pdl_sync()
            T.copy(values, acc)
            T.copy(acc, result)

    values, result = integers(16), torch.full((16,), torch.nan)
    run(waiting, values=values, result=result)
    assert torch.equal(result, values)
