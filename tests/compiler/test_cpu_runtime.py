"""cpu/runtime.h against numpy and ml_dtypes: 16-bit floats, exp, the matrix product of a tile.

One small library is compiled for all of it, with the flags of the kernels.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mhc_tilelang.bundle.cpu_target import is_x86
from mhc_tilelang.compiler.cpu import build
from mhc_tilelang.perf.measure.machine import CPU_CACHES, parse_size

SOURCE = """
#include "runtime.h"
#define EACH(NAME, FROM, TO, EXPRESSION)                          \\
  extern "C" void NAME(const FROM* from, TO* to, int64_t size) {  \\
    for (int64_t k = 0; k < size; ++k) to[k] = EXPRESSION(from[k]); \\
  }
#define ROW(NAME, TO) \\
  extern "C" void NAME(const float* from, TO* to, int64_t size) { mhc::copy_row(to, from, size); }
#define GEMM(NAME, A, M, N, K) \\
  extern "C" void NAME(const A* a, const float* b, float* c, int64_t) { mhc::gemm_nt<M, N, K>(a, b, c); }
EACH(widen_bfloat16, mhc::bfloat16, float, float)
EACH(widen_float16, mhc::float16, float, float)
EACH(narrow_bfloat16, float, mhc::bfloat16, mhc::bfloat16)
EACH(narrow_float16, float, mhc::float16, mhc::float16)
EACH(narrow_float8, float, mhc::float8_e4m3fn, mhc::float8_e4m3fn)
EACH(exponential, float, float, mhc::exp)
ROW(row_bfloat16, mhc::bfloat16)
ROW(row_float16, mhc::float16)
extern "C" void past_cache(const mhc::bfloat16* from, mhc::bfloat16* to, int64_t size) {
  mhc::copy_out(to, from, size, int64_t(1) << 60);
  mhc::finish_rows();
}
extern "C" int64_t cache_bytes() { return mhc::last_level_cache(); }
GEMM(gemm_float, float, 6, 10, 48)
GEMM(gemm_bfloat16, mhc::bfloat16, 8, 24, 64)
GEMM(gemm_float16, mhc::float16, 3, 5, 32)
GEMM(gemm_blocks, float, 4, 8, 48)
GEMM(gemm_one, float, 1, 1, 48)
"""
# The products and sums of the projection's tiles.
TILES = """
#include "runtime.h"
extern "C" void dots(const mhc::bfloat16* a, const float* b, float* c) { mhc::gemm_nt<32, 24, 256>(a, b, c); }
extern "C" void few_dots(const float* a, const float* b, float* c) { mhc::gemm_nt<6, 10, 48>(a, b, c); }
extern "C" void g_phi(const float* a, const mhc::bfloat16* b, float* c) { mhc::gemm_tn<24, 128, 48>(a, b, c); }
extern "C" void g_x(const float* a, const float* b, float* c) { mhc::gemm_nn<48, 128, 24>(a, b, c); }
extern "C" void total(const float* a, const float*, float* c) { *c = mhc::sum_row<128>(a); }
"""
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("runtime")
    (folder / "runtime.cpp").write_text(SOURCE)
    build.run_compiler(folder / "runtime.cpp", folder / "runtime.so")
    return ctypes.CDLL(str(folder / "runtime.so"))


def call(function, *arrays: np.ndarray) -> None:
    function(*(ctypes.c_void_p(array.ctypes.data) for array in arrays), ctypes.c_int64(arrays[0].size))


def interesting_floats() -> np.ndarray:
    """Random bit patterns of every exponent, ties between 16-bit neighbours, subnormals, infinities, NaNs."""
    random = np.random.default_rng(0).integers(0, 2**32, 400_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    halves = np.arange(65536, dtype=np.uint16)
    exact = [halves.view(dtype).astype(np.float32) for dtype in DTYPES.values()]
    with np.errstate(over="ignore", invalid="ignore"):
        ties = [(value + np.nextafter(value, np.inf, dtype=value.dtype)) / 2 for value in exact]
        between = [
            ((v.view(np.uint32) & 0xFFFF0000) | tail).view(np.float32)
            for v in exact
            for tail in (0x7FFF, 0x8000, 0x8001)
        ]
        between += [
            ((v.view(np.uint32) & 0xFFFFE000) | tail).view(np.float32)
            for v in exact
            for tail in (0x0FFF, 0x1000, 0x1001)
        ]
    return np.concatenate([random, *exact, *ties, *between])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_value_widens_exactly(library: ctypes.CDLL, dtype: str) -> None:
    """Catches a wrong bias, lost subnormals, infinities that become numbers."""
    bits = np.arange(65536, dtype=np.uint16)
    got = np.empty(bits.size, np.float32)
    call(getattr(library, f"widen_{dtype}"), bits, got)
    expected = bits.view(DTYPES[dtype]).astype(np.float32)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", ["narrow", "row"])
def test_narrowing_rounds_to_nearest_even(library: ctypes.CDLL, function: str, dtype: str) -> None:
    """Catches truncation, ties away from zero, flushed subnormals, overflow to the largest number, NaN to infinity.

    `row` is the processor's own conversion where it has one; both must give the same bits.
    """
    values = interesting_floats()
    got = np.full(values.size, 0x7FFF, np.uint16)
    call(getattr(library, f"{function}_{dtype}"), values, got)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(DTYPES[dtype]).view(np.uint16)
    is_nan = np.isnan(values)
    assert np.isnan(got[is_nan].view(DTYPES[dtype]).astype(np.float32)).all()
    np.testing.assert_array_equal(got[~is_nan], expected[~is_nan])


def test_float8_rounds_to_nearest_even_and_saturates(library: ctypes.CDLL) -> None:
    """ml_dtypes rounds so up to 464, halfway to what would come after 448; all that is larger is 448, NaN 0x7F."""
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    finite = np.unique(every[np.isfinite(every)])
    ties = (finite[1:] + finite[:-1]) / 2
    beside = [np.nextafter(ties, np.float32(side)) for side in (np.inf, -np.inf)]
    values = np.concatenate([interesting_floats(), every, ties, *beside])
    got = np.empty(values.size, np.uint8)
    call(library.narrow_float8, values, got)
    is_nan, is_large = np.isnan(values), np.abs(values) >= 448
    assert (got[is_nan] == 0x7F).all()
    np.testing.assert_array_equal(got[is_large], np.where(values[is_large] < 0, 0xFE, 0x7E))
    expected = values[~is_nan & ~is_large].astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(got[~is_nan & ~is_large], expected)


def test_rows_of_any_length_are_converted_to_the_end(library: ctypes.CDLL) -> None:
    """Catches a vector loop that forgets its tail, or writes past it."""
    values = np.random.default_rng(1).standard_normal(70).astype(np.float32)
    for size in range(70):
        got = np.full(80, 0x1234, np.uint16)
        call(library.row_bfloat16, values[:size].copy(), got)
        np.testing.assert_array_equal(got[:size], values[:size].astype(ml_dtypes.bfloat16).view(np.uint16))
        assert (got[size:] == 0x1234).all()


def test_exp_is_within_two_ulp(library: ctypes.CDLL) -> None:
    """Two ULP is what `tolerance` counts on; over the whole range where float32 has a normal result."""
    values = np.linspace(-87, 88.7, 2_000_001).astype(np.float32)
    got = np.empty_like(values)
    call(library.exponential, values, got)
    exact = np.exp(values.astype(np.float64))
    ulp = np.exp2(np.floor(np.log2(exact)) - 23)
    assert (np.abs(got - exact) / ulp).max() < 2


def test_exp_at_its_limits(library: ctypes.CDLL) -> None:
    """Catches NaN that becomes a number, overflow that wraps, subnormal results lost."""
    values = np.array([np.nan, np.inf, -np.inf, 89, 1e30, -120, -1e30, 0, -0.0, -100], np.float32)
    got = np.empty_like(values)
    call(library.exponential, values, got)
    assert np.isnan(got[0])
    np.testing.assert_array_equal(got[1:9], [np.inf, 0, np.inf, np.inf, 0, 0, 1, 1])
    np.testing.assert_allclose(got[9], np.exp(-100.0), atol=2**-148)


@pytest.mark.parametrize(
    ("function", "dtype", "m", "n", "k"),
    [
        ("gemm_float", np.float32, 6, 10, 48),
        ("gemm_bfloat16", ml_dtypes.bfloat16, 8, 24, 64),
        ("gemm_float16", np.float16, 3, 5, 32),
    ],
)
def test_gemm_adds_a_times_b_transposed(library: ctypes.CDLL, function: str, dtype, m: int, n: int, k: int) -> None:
    """Small integers, so the result is exact: catches a swapped index, a lost lane, a C that is overwritten."""
    random = np.random.default_rng(2)
    a, b = random.integers(-8, 9, (m, k)), random.integers(-8, 9, (n, k))
    c = random.integers(-8, 9, (m, n)).astype(np.float32)
    expected = c + a @ b.T
    call(getattr(library, function), a.astype(dtype), b.astype(np.float32), c)
    np.testing.assert_array_equal(c, expected)


def test_sums_of_a_block_have_the_bits_of_sums_one_by_one(library: ctypes.CDLL) -> None:
    """Lanes are added in one order, however many sums are taken together. Catches a shuffle that pairs other lanes."""
    random = np.random.default_rng(3)
    a, b, c = (random.standard_normal(shape).astype(np.float32) for shape in ((4, 48), (8, 48), (4, 8)))
    expected = c.copy()
    for row in range(4):
        for column in range(8):
            one = expected[row, column : column + 1].copy()
            call(library.gemm_one, a[row].copy(), b[column].copy(), one)
            expected[row, column] = one[0]
    call(library.gemm_blocks, a, b, c)
    np.testing.assert_array_equal(c.view(np.int32), expected.view(np.int32))


def compile_tiles(folder: Path, name: str, march: str, *options: str) -> Path:
    """TILES for another processor of this kind, with the flags of the kernels."""
    (folder / "tiles.cpp").write_text(TILES)
    tool = build.cxx()
    command = [tool.path, *tool.arguments, *build.flags(march), *options, f"-I{build.HERE}", "tiles.cpp", "-o", name]
    subprocess.run(command, cwd=folder, check=True)
    return folder / name


@pytest.mark.skipif(not is_x86(), reason="levels of x86-64")
def test_width_of_the_registers_moves_no_bit(tmp_path: Path) -> None:
    """Catches partial sums that are as many as a register's lanes: 4 here, 8 or 16 in this processor's own code."""
    results = []
    for march in ("x86-64-v2", "native"):
        library, random = ctypes.CDLL(str(compile_tiles(tmp_path, f"{march}.so", march))), np.random.default_rng(4)
        for name, dtypes in (
            ("dots", ("bfloat16", "float32")),
            ("few_dots", ("float32", "float32")),
            ("g_phi", ("float32", "bfloat16")),
            ("g_x", ("float32", "float32")),
            ("total", ("float32", "float32")),
        ):
            a, b = (random.standard_normal(1 << 14).astype(DTYPES.get(dtype, np.float32)) for dtype in dtypes)
            c = random.standard_normal(1 << 14).astype(np.float32)
            getattr(library, name)(*(ctypes.c_void_p(array.ctypes.data) for array in (a, b, c)))
            results.append(c.tobytes())
    half = len(results) // 2
    assert results[:half] == results[half:]


@pytest.mark.skipif(not is_x86(), reason="names of x86-64's instructions")
@pytest.mark.parametrize(("march", "register"), [("x86-64-v3", "ymm"), ("x86-64-v4", "zmm")])
def test_products_are_vector_code(tmp_path: Path, march: str, register: str) -> None:
    """Catches vectors that a compiler takes apart, which made the projection fourteen times as slow."""
    text = compile_tiles(tmp_path, "tiles.s", march, "-S").read_text()
    assert set(re.findall(r"vfmadd\w+\s.*%(.mm)", text)) == {register}
    assert not re.findall(r"vfmadd\w+ss|v(?:insert|extract)ps|vp(?:insr|extr)|call.*fmaf", text)


def test_rows_written_past_the_cache(library: ctypes.CDLL) -> None:
    """Rows of any length, from and to any element of a line: each element arrives, none beside them changes."""
    source = np.random.default_rng(1).integers(1, 2**16, 400).astype(np.uint16)
    for first, start, size in itertools.product((0, 1, 7), (0, 1, 15, 16, 31), (0, 1, 15, 16, 33, 257)):
        target = np.zeros(400, np.uint16)
        call(library.past_cache, source[first : first + size], target[start : start + size])
        expected = np.zeros_like(target)
        expected[start : start + size] = source[first : first + size]
        np.testing.assert_array_equal(target, expected)


def test_the_last_level_cache_is_the_one_that_is_flushed(library: ctypes.CDLL) -> None:
    """Kernels write past the cache that benchmarks flush. Catches another level, and bytes for kilobytes."""
    library.cache_bytes.restype = ctypes.c_int64
    level3 = CPU_CACHES / "index3" / "size"
    assert library.cache_bytes() == (parse_size(level3.read_text()) if level3.exists() else 32 << 20)
