"""The SIMT executor: each planted defect is named, each twin without it is clean, and what is counted is right.

A defect that is not found here could be in any of the project's kernels, which nothing else executes without a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from simt_kernels import PLANTED, SHARED, Planted, T, source

import mhc_tilelang as mhc
from mhc_tilelang.compiler.simt import LaunchError, SimtError, build, executing, launch
from mhc_tilelang.errors import CompilerError


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_defect_is_named(name: str) -> None:
    """Kind and line of the one defect, and nothing else, but that a read may be early enough to find nothing."""
    planted = PLANTED[name]
    with pytest.raises(SimtError) as raised:
        planted.run(wrong=True)
    also = {"uninitialized shared memory"} if planted.kind == "race" else set()
    assert {planted.kind} <= raised.value.kinds <= {planted.kind, *also}
    assert all(finding.line.startswith("line ") for finding in raised.value.findings)


@pytest.mark.parametrize("name", PLANTED)
def test_its_twin_is_clean(name: str) -> None:
    """No finding, and the threads have done their work."""
    x, y, _ = PLANTED[name].run(wrong=False)
    assert set(y[~y.isnan()].tolist()) <= set(x.tolist())
    assert not y.isnan().all()


def test_a_finding_quotes_thread_tensor_and_line() -> None:
    """A finding says enough to locate the fault."""
    with pytest.raises(SimtError) as raised:
        PLANTED["tail not masked"].run(wrong=True)
    text = str(raised.value)
    assert "thread (36, 0, 0) of block (1, 0, 0) reads 4 bytes at element 100 of x, which has 100" in text
    assert "if (at <= num_elements) y[at] = x[at];" in text


def test_a_launch_that_was_stopped_changes_nothing() -> None:
    """The tensors are copies until a launch has ended well."""
    x, y = torch.zeros(100), torch.ones(100)
    kernel = PLANTED["tail not masked"].twin(wrong=True)
    with pytest.raises(SimtError):
        launch(kernel, "sm_80", {"x": x, "y": y}, {"num_elements": 100})
    assert y.eq(1).all()


def test_a_damaged_library_is_rebuilt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rebuilt file has the same bytes: of two processes that build at once, neither finds the other's damaged."""
    kernel = PLANTED["tail not masked"].twin(wrong=False)
    kernel = replace(kernel, code=f"{kernel.code}\n// damaged by a test\n")
    path = build.library(kernel)
    whole = path.read_bytes()
    path.write_bytes(whole[:4096])
    monkeypatch.setattr(build, "_libraries", {})
    monkeypatch.chdir(path.parent)
    assert build.library(kernel) == path
    assert f"{path}: expected " in capsys.readouterr().err
    assert path.read_bytes() == whole


LIMITS = [
    ({"grid": ("0", "1", "1")}, r"grid\.x: expected 1 to 2147483647 blocks, got 0"),
    ({"grid": ("1", "num_elements", "1")}, r"grid\.y: expected 1 to 65535 blocks, got 65536"),
    ({"grid": ("1", "1", "num_elements")}, r"grid\.z: expected 1 to 65535 blocks, got 65536"),
    ({"threads": (1056, 1, 1)}, r"block\.x: expected 1 to 1024 threads, got 1056"),
    ({"threads": (64, 32, 1)}, "at most 1024 threads a block, got 2048"),
    ({"threads": (1, 1, 65)}, r"block\.z: expected 1 to 64 threads, got 65"),
    ({"shared_bytes": 163 * 1024 + 1}, "shared memory: expected at most 166912 bytes on sm_80, got 166913"),
]


@pytest.mark.parametrize(("changes", "message"), LIMITS)
def test_the_limits_of_a_gpu_hold(changes: dict, message: str) -> None:
    """Launches that the driver refuses; a grid of zero blocks is one."""
    kernel = replace(source(f"y[{T}] = x[{T}];", "const float* x, float* y"), **changes)
    tensors = {"x": torch.zeros(64), "y": torch.zeros(64)}
    with pytest.raises(LaunchError, match=message):
        launch(kernel, "sm_80", tensors, {"num_elements": 65_536})


def test_what_the_header_lacks_is_named() -> None:
    """An instruction without a model must not be skipped."""
    kernel = source(f"y[{T}] = __nanosleep(x[{T}]);", "const float* x, float* y")
    with pytest.raises(CompilerError, match="__nanosleep"):
        launch(kernel, "sm_80", {"x": torch.zeros(64), "y": torch.zeros(64)}, {})


def count(body: str, elements: int = 64, shared_bytes: int = 8192):
    """The counts of a kernel of 32 threads."""
    return Planted("", body, threads=32, elements=elements, shared_bytes=shared_bytes).run(wrong=False)[2]


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (0, 1)])
def test_sectors(stride: int, sectors: int) -> None:
    """A warp's 4-byte loads: neighbours share the sectors of 32 bytes, strided ones do not."""
    read = count(f"y[{T}] = x[{T} * {stride}];", elements=256).tensors["x"]
    assert (read.read_bytes, read.read_sectors) == (128, sectors)
    assert read.read_distinct == (128 if stride else 4)


def test_repeated_instructions_are_not_taken_for_one() -> None:
    """A loop's turns are warp instructions of their own."""
    read = count(f"for (int k = 0; k < 2; ++k) y[{T} + 32 * k] = x[{T} + 32 * k];").tensors["x"]
    assert (read.read_bytes, read.read_sectors, read.read_distinct) == (256, 8, 256)


@pytest.mark.parametrize(
    ("index", "wide", "passes", "conflicts"),
    [("t", 1, 1, 0), ("t * 2", 1, 2, 1), ("t * 32", 1, 32, 31), ("0", 1, 1, 0), ("t", 4, 4, 0), ("t * 2", 4, 8, 4)],
)
def test_bank_conflicts(index: str, wide: int, passes: int, conflicts: int) -> None:
    """Stores of a warp: 32 banks of 4 bytes; 16-byte ones go a quarter of the warp at a time."""
    vector = {1: "float", 4: "float4"}[wide]
    body = SHARED + f"int t = {T};\n*({vector}*)(tile + ({index}) * {wide}) = *({vector}*)(x + t * {wide});"
    if index == "0":  # a store by all would be a race
        body = SHARED + f"if ({T} == 0) tile[0] = x[0];\n__syncthreads();\ny[{T}] = tile[0];"
        passes += 1  # the store
    counts = count(body, elements=128)
    assert (counts.shared_wavefronts, counts.shared_conflicts) == (passes, conflicts)
    assert bool(counts.worst) == bool(conflicts)


CONVERSIONS = {"bfloat16_t": ml_dtypes.bfloat16, "half_t": np.float16}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_rounding_of_16_bit_floats(name: str) -> None:
    """All values, the points halfway between neighbours and what lies beside them; infinities; not-a-numbers."""
    dtype = CONVERSIONS[name]
    values = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32)
    finite = np.sort(values[np.isfinite(values)])
    halfway = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    tried = [values, halfway, np.nextafter(halfway, np.float32(np.inf)), np.nextafter(halfway, np.float32(-np.inf))]
    x = torch.from_numpy(np.resize(np.concatenate(tried), 262_144))
    y = torch.empty(len(x), dtype=torch.uint16)
    body = f"int at = ((int)blockIdx.x) * 256 + {T};\n(({name}*)y)[at] = ({name})x[at];"
    kernel = source(body, "const float* x, unsigned short* y", threads=256, grid=("1024", "1", "1"))
    launch(kernel, "sm_80", {"x": x, "y": y}, {})
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.numpy().astype(dtype)
    got = y.numpy().view(dtype)
    number = ~np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(got.view(np.uint16)[number], expected.view(np.uint16)[number])
    assert np.isnan(got.astype(np.float32)[~number]).all()

    back = torch.empty(65536)
    body = f"int at = ((int)blockIdx.x) * 256 + {T};\ny[at] = (float)((const {name}*)x)[at];"
    kernel = source(body, "const unsigned short* x, float* y", threads=256, grid=("256", "1", "1"))
    launch(kernel, "sm_80", {"x": torch.arange(65536, dtype=torch.int32).to(torch.uint16), "y": back}, {})
    np.testing.assert_array_equal(back.numpy(), values)


def test_rounding_of_float8() -> None:
    """cvt.rn.satfinite rounds so: all values, halfway and beside that; large ones are 448, not-a-numbers 0x7F."""
    dtype = ml_dtypes.float8_e4m3fn
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    finite = np.unique(values[np.isfinite(values)])
    halfway = (finite[1:] + finite[:-1]) / 2
    beside = [np.nextafter(halfway, np.float32(side)) for side in (np.inf, -np.inf)]
    large = np.array([464, -465, 1e9, np.inf, -np.inf, -0.0, 1e-30, -np.nan], np.float32)
    x = torch.from_numpy(np.resize(np.concatenate([values, halfway, *beside, large]), 1280))
    y = torch.empty(len(x), dtype=torch.uint8)
    body = f"int at = ((int)blockIdx.x) * 256 + {T};\ny[at] = fp8_e4_t(x[at]).bits;"
    kernel = source(body, "const float* x, unsigned char* y", threads=256, grid=("5", "1", "1"))
    launch(kernel, "sm_80", {"x": x, "y": y}, {})
    numbers = x.numpy()
    expected = np.clip(numbers, -448, 448).astype(dtype).view(np.uint8)
    np.testing.assert_array_equal(y.numpy(), np.where(np.isnan(numbers), 0x7F, expected))


MMA = """
extern __shared__ __align__(1024) uchar buf_dyn_shmem[];
{type}* a_tile = ({type}*)buf_dyn_shmem;
{type}* b_tile = a_tile + 16 * {depth};
int t = ((int)threadIdx.x);
for (int k = t; k < 16 * {depth}; k += 32) a_tile[k] = ({type})a[k];
for (int k = t; k < 8 * {depth}; k += 32) b_tile[k] = ({type})b[{b_index}];
__syncthreads();
unsigned a_registers[4], b_registers[2];
tl::ptx_ldmatrix_x4((&(a_tile[(t % 16) * {depth} + t / 16 * ({depth} / 2)])), (&(a_registers[0])));
{load_b}
{swap}
float sums[4] = {{0.0f, 0.0f, 0.0f, 0.0f}};
tl::mma_sync<tl::DataType::{name}, tl::DataType::{name}, tl::DataType::kFloat32, 16, 8, {k}, false, true>(
    sums, a_registers, b_registers);
for (int e = 0; e < 4; ++e) c[(t / 4 + 8 * (e / 2)) * 8 + 2 * (t % 4) + e % 2] = sums[e];
"""
OPERANDS = {
    "kBFloat16": ("bfloat16_t", 16, lambda v: v.astype(ml_dtypes.bfloat16)),
    "kFloat16": ("half_t", 16, lambda v: v.astype(np.float16)),
    "kTensorFloat32": ("float", 8, lambda v: (v.view(np.uint32) & 0xFFFFE000).view(np.float32)),
}


def product(name: str, transposed: bool, swapped: bool) -> tuple[np.ndarray, np.ndarray]:
    """a · b by ldmatrix and mma.sync, and as it should be. `transposed` loads b from rows of k, as 16-bit types can."""
    ctype, k, rounded = OPERANDS[name]
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, k), np.float32), rng.standard_normal((k, 8), np.float32)
    row = "t % 16 * 8" if transposed else f"t % 8 * {k} + t / 8 % 2 * {k // 2}"
    loader = "tl::ptx_ldmatrix_x2_trans" if transposed else "tl::ptx_ldmatrix_x2"
    text = MMA.format(
        type=ctype,
        depth=k,
        k=k,
        name=name,
        b_index="k" if transposed else f"k % {k} * 8 + k / {k}",
        load_b=f"{loader}((&(b_tile[{row}])), (&(b_registers[0])));",
        swap="unsigned kept = a_registers[1];\na_registers[1] = a_registers[2];\na_registers[2] = kept;"
        if swapped
        else "",
    )
    c = torch.full((16, 8), float("nan"))
    kernel = source(text, "const float* a, const float* b, float* c", threads=32, shared_bytes=2048)
    launch(kernel, "sm_80", {"a": torch.from_numpy(a), "b": torch.from_numpy(b), "c": c}, {})
    return c.numpy(), rounded(a).astype(np.float64) @ rounded(b).astype(np.float64)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", OPERANDS)
def test_matrix_product(name: str, transposed: bool) -> None:
    """Fragments of ldmatrix and mma.sync; one rounding to float32 is all that separates it from float64."""
    if transposed and name == "kTensorFloat32":
        pytest.skip("ldmatrix transposes 16-bit elements alone")
    got, expected = product(name, transposed, swapped=False)
    np.testing.assert_array_equal(got, expected.astype(np.float32))


@pytest.mark.parametrize("name", OPERANDS)
def test_a_wrong_fragment_layout_shows(name: str) -> None:
    """Registers of A in another order give another product."""
    got, expected = product(name, transposed=False, swapped=True)
    assert np.abs(got - expected).max() > 0.1


def test_lanes_are_counted_through_a_block_of_two_dimensions() -> None:
    """A lane is the thread's number in the block, not its x."""
    body = "int t = ((int)threadIdx.x) + 16 * ((int)threadIdx.y);\ny[t] = tl::shfl_xor_sync(~0u, x[t], 1);"
    kernel = replace(source(body, "const float* x, float* y"), threads=(16, 4, 1))
    x, y = torch.arange(64.0), torch.zeros(64)
    launch(kernel, "sm_80", {"x": x, "y": y}, {})
    assert torch.equal(y, x.view(32, 2).flip(1).flatten())


def test_a_block_need_not_be_whole_warps() -> None:
    """__syncthreads and __syncwarp need no whole warps; only named barriers count in warps."""
    body = SHARED + f"tile[{T}] = x[{T}];\n__syncwarp();\n__syncthreads();\ny[{T}] = tile[47 - {T}];"
    kernel = source(body, "const float* x, float* y", threads=48, shared_bytes=1024)
    x, y = torch.arange(48.0), torch.zeros(48)
    launch(kernel, "sm_80", {"x": x, "y": y}, {})
    assert torch.equal(y, x.flip(0))


@pytest.mark.parametrize(("static_floats", "shared_bytes"), [(12_289, 0), (5_000, 150_000)])
def test_static_shared_memory_counts(static_floats: int, shared_bytes: int) -> None:
    """48 KB by itself, and with the dynamic part what the architecture has."""
    body = f"__shared__ float kept[{static_floats}];\nkept[{T}] = x[{T}];\ny[{T}] = kept[{T}];"
    kernel = source(body, "const float* x, float* y", shared_bytes=shared_bytes)
    with pytest.raises(SimtError, match=f"{4 * static_floats} bytes of static and {shared_bytes} of dynamic"):
        launch(kernel, "sm_80", {"x": torch.zeros(64), "y": torch.zeros(64)}, {})


def test_what_ended_a_launch_is_told_however_much_came_before() -> None:
    """Twenty races, then an access out of bounds; the rest is counted."""
    races = "".join(f"y[{k}] = x[{T}];\n" for k in range(20))
    kernel = source(f"{races}__syncthreads();\ny[{T} + 1000000] = 1.0f;", "const float* x, float* y")
    with pytest.raises(SimtError, match=r"and \d+ more") as raised:
        launch(kernel, "sm_80", {"x": torch.zeros(64), "y": torch.zeros(64)}, {})
    assert "global out of bounds" in raised.value.kinds


def test_inputs_may_be_read_only(tmp_path) -> None:
    """Memory that a kernel only reads is not written back."""
    np.zeros(64, np.float32).tofile(tmp_path / "x")
    x = torch.from_numpy(np.memmap(tmp_path / "x", np.float32, "c"))
    mapped = np.memmap(tmp_path / "x", np.float32, "r")
    x.set_(torch.frombuffer(memoryview(mapped), dtype=torch.float32).untyped_storage(), 0, (64,))
    y = torch.ones(64)
    launch(source(f"y[{T}] = x[{T}];", "const float* x, float* y"), "sm_80", {"x": x, "y": y}, {})
    assert y.eq(0).all()


BAD_TENSORS = [
    ({"x": torch.zeros(64)}, "expected a tensor or a number for"),
    ({"x": torch.zeros(64), "y": torch.zeros(64), "z": torch.zeros(1)}, "got 'z'"),
    ({"x": torch.zeros(128)[::2], "y": torch.zeros(64)}, r"x: expected a contiguous tensor, got strides \(2,\)"),
]


@pytest.mark.parametrize(("tensors", "message"), BAD_TENSORS)
def test_bad_tensors(tensors: dict, message: str) -> None:
    """Refused by name."""
    with pytest.raises(ValueError, match=message):
        launch(source(f"y[{T}] = x[{T}];", "const float* x, float* y"), "sm_80", tensors, {})


def test_executing_within_executing() -> None:
    """Each sees its own launches, and leaves the other as it was; also where both have seen the same."""
    logits = torch.zeros(1, 4, 4)
    with executing() as outer:
        with executing() as inner:
            mhc.sinkhorn(logits)
        mhc.sinkhorn(logits)
    mhc.sinkhorn(logits)
    assert (len(outer), len(inner)) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"arch": "sm_70"}, "arch"), ({"parallel_blocks": 0}, "at least 1")]
)
def test_bad_arguments_of_executing(arguments: dict, message: str) -> None:
    """Refused by name."""
    with pytest.raises(ValueError, match=message), executing(**arguments):
        pass
