"""The pass from TileLang to C++: tiny kernels with a known answer, and the real ones with every index checked."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tilelang.language as T
import torch
from helpers import run_lowered

from mhc_tilelang import compiler
from mhc_tilelang.compiler.cpu import build
from mhc_tilelang.compiler.cpu.emit import emit
from mhc_tilelang.errors import LoweringError


@pytest.fixture
def run(tmp_path: Path):
    """Compile a traced function with every index checked, and call it with tensors and scalars by name."""

    return partial(run_lowered, folder=tmp_path)


@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (7, 16), (8, 13), (1, 1), (17, 33)])
def test_copies_clip_at_every_edge(run, rows: int, columns: int) -> None:
    """Tiles of 8 × 16 over any matrix: what hangs over reads as zero and is not written. Catches a wrong clip."""

    @T.prim_func
    def sums(
        values: T.Tensor[(rows, columns), T.float32],
        copied: T.Tensor[(rows, columns), T.float32],
        totals: T.Tensor[(T.ceildiv(rows, 8), T.ceildiv(columns, 16)), T.float32],
    ):
        with T.Kernel(T.ceildiv(rows, 8), T.ceildiv(columns, 16), threads=32) as (r, c):
            tile = T.alloc_shared((8, 16), T.float32)
            total = T.alloc_fragment((16,), T.float32)
            whole = T.alloc_fragment((1,), T.float32)
            T.copy(values[r * 8 : r * 8 + 8, c * 16 : c * 16 + 16], tile)
            T.reduce_sum(tile, total, dim=0)
            T.reduce_sum(total, whole, dim=0)
            totals[r, c] = whole[0]
            T.copy(tile, copied[r * 8, c * 16])

    values = torch.randint(-9, 9, (rows, columns)).float()
    copied, totals = torch.full_like(values, torch.nan), torch.full((-(-rows // 8), -(-columns // 16)), torch.nan)
    run(sums, values=values, copied=copied, totals=totals)
    padded = torch.nn.functional.pad(values, (0, -columns % 16, 0, -rows % 8))
    assert torch.equal(copied, values)
    assert torch.equal(totals, padded.unflatten(0, (-1, 8)).unflatten(2, (-1, 16)).sum((1, 3)))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("kind", ["sum", "max"])
def test_reduces_along_any_axis(run, kind: str, axis: int) -> None:
    """Catches a wrong axis, a missing start value (all entries are negative), kept axes in the wrong order."""
    shape = [3, 4, 8]
    kept = [size for k, size in enumerate(shape) if k != axis]
    reduce = T.reduce_sum if kind == "sum" else T.reduce_max

    @T.prim_func
    def reduced(values: T.Tensor[tuple(shape), T.float32], result: T.Tensor[tuple(kept), T.float32]):
        with T.Kernel(1, threads=32):
            tile = T.alloc_fragment(tuple(shape), T.float32)
            small = T.alloc_fragment(tuple(kept), T.float32)
            T.copy(values, tile)
            for a, b, c in T.Parallel(*shape):
                tile[a, b, c] += 0.0  # a tile of its own, not a view
            reduce(tile, small, dim=axis)
            T.copy(small, result)

    values, result = -torch.randint(1, 99, shape).float(), torch.full(kept, torch.nan)
    run(reduced, values=values, result=result)
    assert torch.equal(result, values.sum(axis) if kind == "sum" else values.amax(axis))


def test_a_view_is_not_taken_where_the_source_changes(run) -> None:
    """An in-place update: reading the tile in place would see what was already overwritten."""

    @T.prim_func
    def reverse(values: T.Tensor[(16,), T.float32]):
        with T.Kernel(1, threads=16):
            tile = T.alloc_fragment((16,), T.float32)
            T.copy(values, tile)
            for k in T.serial(16):
                values[k] = tile[15 - k]

    values = torch.arange(16.0)
    run(reverse, values=values)
    assert torch.equal(values, torch.arange(15.0, -1, -1))


def test_an_output_is_not_written_in_place_where_it_is_read(run) -> None:
    """A shift by one: a tile that were its own output would see the values it has just written."""

    @T.prim_func
    def shift(values: T.Tensor[(16,), T.float32]):
        with T.Kernel(1, threads=16):
            tile = T.alloc_fragment((16,), T.float32)
            for k in T.Parallel(16):
                tile[k] = values[(k + 15) % 16]
            T.copy(tile, values)

    values = torch.arange(16.0)
    run(shift, values=values)
    assert torch.equal(values, torch.arange(16.0).roll(1))


def test_a_tile_that_is_copied_out_twice_is_no_view(run) -> None:
    """The second copy must find what the tile held, in both outputs."""

    @T.prim_func
    def twice(once: T.Tensor[(16,), T.float32], again: T.Tensor[(16,), T.float32]):
        with T.Kernel(1, threads=16):
            tile = T.alloc_fragment((16,), T.float32)
            for k in T.Parallel(16):
                tile[k] = 3.0
            T.copy(tile, once)
            for k in T.Parallel(16):
                tile[k] += 1.0
            T.copy(tile, again)

    once, again = torch.full((16,), torch.nan), torch.full((16,), torch.nan)
    run(twice, once=once, again=again)
    assert once.tolist() == [3.0] * 16
    assert again.tolist() == [4.0] * 16


def test_elements_in_registers_start_from_what_the_tile_holds(run) -> None:
    """A loop that updates before it sets, twice: catches a variable that is not loaded, or not written back."""

    @T.prim_func
    def updated(values: T.Tensor[(2, 16), T.float32]):
        with T.Kernel(1, threads=16):
            tile = T.alloc_fragment((2, 16), T.float32)
            T.copy(values, tile)
            for _ in T.serial(3):
                for k in T.Parallel(16):
                    for row in T.unroll(2):
                        tile[row, k] = tile[row, k] * 2.0
                        tile[row, k] += 1.0
            T.copy(tile, values)

    values = torch.arange(32.0).view(2, 16)
    expected = values * 8 + 7
    run(updated, values=values)
    assert torch.equal(values, expected)


def test_unknown_operations_are_refused_by_name() -> None:
    """A construct that the pass does not know must not be dropped."""

    @T.prim_func
    def cumulative(values: T.Tensor[(16,), T.float32]):
        with T.Kernel(1, threads=16):
            tile = T.alloc_shared((16,), T.float32)
            T.copy(values, tile)
            T.cumsum(tile, dim=0)
            T.copy(tile, values)

    with pytest.raises(LoweringError, match="cumsum"):
        emit(cumulative)


def test_thread_indices_are_refused() -> None:
    """One block is one CPU thread: a kernel written in terms of threadIdx would run as thread 0 only."""

    @T.prim_func
    def by_thread(values: T.Tensor[(16,), T.float32]):
        with T.Kernel(1, threads=16):
            values[T.get_thread_binding()] = 1.0

    with pytest.raises(LoweringError, match="thread"):
        emit(by_thread)


def test_a_checked_build_stops_at_an_index_out_of_bounds(tmp_path: Path) -> None:
    """The checked builds below would prove nothing if they let this pass."""
    script = tmp_path / "script.py"
    script.write_text(
        "import tilelang.language as T, torch\n"
        "from pathlib import Path\n"
        "from mhc_tilelang.compiler.tracing import signature_of\n"
        "from mhc_tilelang.compiler.cpu import build\n"
        "from mhc_tilelang.compiler.cpu.emit import emit\n"
        "@T.prim_func\n"
        "def beyond(values: T.Tensor[(16,), T.float32]):\n"
        "    with T.Kernel(1, threads=16):\n"
        "        for k in T.serial(17):\n"
        "            values[k] = 1.0\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "(folder / 'k.cpp').write_text(emit(beyond, checked=True))\n"
        "build.run_compiler(folder / 'k.cpp', folder / 'k.so')\n"
        "build.bind(folder / 'k.so', 'k', 'beyond', signature_of(beyond))(values=torch.zeros(16))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode < 0
    assert "values: index 16 outside its 16 elements" in done.stderr


def test_no_kernel_leaves_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel, every index checked, at shapes with a tail on every axis: catches a missing guard."""
    from mhc_tilelang.checking.inputs import Case, Inputs
    from mhc_tilelang.checking.run import CHECKS, check_case

    monkeypatch.setattr(compiler, "_kernels", {})
    monkeypatch.setattr(compiler, "_load", lambda family, _, parameters: build.load(family, parameters, checked=True))
    case = Case(num_streams=2, hidden_size=1037, dtype=torch.bfloat16, num_tokens=67)
    inputs = Inputs.of(case, torch.device("cpu"))
    assert all(check_case(kernel, case, inputs).passed for kernel in CHECKS)


def test_no_variant_of_a_backward_leaves_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An absent operand is a one-element placeholder: an access to it is out of bounds."""
    from helpers_backward import BACKWARD

    from mhc_tilelang.checking.inputs import Case

    monkeypatch.setattr(compiler, "_kernels", {})
    monkeypatch.setattr(compiler, "_load", lambda family, _, parameters: build.load(family, parameters, checked=True))
    case = Case(num_streams=2, hidden_size=17, dtype=torch.bfloat16, num_tokens=67)
    post, coefficients = BACKWARD["post_backward"], BACKWARD["coefficients_backward"]
    project = BACKWARD["project_backward_aggregated"]
    wanted = ("needs_g_x", "needs_g_layer_output", "needs_g_mappings")
    for only in wanted:
        post(post.arguments(case), **{name: name == only for name in wanted})
    arguments = project.arguments(case)
    project(arguments, needs_g_x=False)
    project({**arguments, "h_pre": None, "g_layer_input": None}, needs_g_phi=False)
    arguments = coefficients.arguments(case)
    for given in ("g_h_pre", "g_h_post", "g_h_res"):
        absent = {name: None for name in ("g_h_pre", "g_h_post", "g_h_res") if name != given}
        coefficients({**arguments, **absent})


def test_no_stream_is_cast_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 copy of a stream would double the traffic: nothing outside the kernels may convert one."""
    import mhc_tilelang as mhc
    from mhc_tilelang.checking.inputs import Case, Inputs

    case = Case(num_streams=4, hidden_size=192, dtype=torch.bfloat16, num_tokens=5)
    inputs = Inputs.of(case, torch.device("cpu"))

    def refuse(*_args, **_kwargs):
        raise AssertionError("a tensor was converted")

    def contiguous(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.is_contiguous() else refuse()

    for method in ("float", "to", "type", "double", "clone"):
        monkeypatch.setattr(torch.Tensor, method, refuse)
    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    with torch.no_grad():
        layer_input, h_post, h_res = mhc.pre(inputs.x, inputs.phi, inputs.alpha, inputs.bias, case.spec)
        mhc.post(inputs.x, layer_input, h_post, h_res)


def test_a_word_to_nvcc_is_passed_over(run) -> None:
    """The annotation of blocks a multiprocessor means nothing on a CPU. Catches a body that is dropped with it."""

    @T.prim_func
    def copy(values: T.Tensor[(40,), T.float32], copied: T.Tensor[(40,), T.float32]):
        with T.Kernel(T.ceildiv(40, 16), threads=32) as block:
            tile = T.alloc_shared((16,), T.float32)
            T.annotate_min_blocks_per_sm(2)
            T.copy(values[block * 16], tile)
            T.copy(tile, copied[block * 16])

    values, copied = torch.randn(40), torch.full((40,), torch.nan)
    run(copy, values=values, copied=copied)
    assert torch.equal(copied, values)


def test_names_of_the_grid_loop(run) -> None:
    """Tensors and a loop named like what the C++ declares for its grid. Catches one that hides the other."""

    @T.prim_func
    def twice(block: T.Tensor[(40,), T.float32], blocks: T.Tensor[(40,), T.float32]):
        with T.Kernel(T.ceildiv(40, 16), threads=32) as tile:
            for threads in T.Parallel(16):
                if tile * 16 + threads < 40:
                    blocks[tile * 16 + threads] = 2.0 * block[tile * 16 + threads]

    values, doubled = torch.randn(40), torch.full((40,), torch.nan)
    run(twice, block=values, blocks=doubled)
    assert torch.equal(doubled, 2 * values)
