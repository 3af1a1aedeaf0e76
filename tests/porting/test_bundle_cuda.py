"""CUDA kernels from a bundle, without a GPU: launches, the calls of the driver, cubins, golden vectors.

Would catch: a launch that is computed otherwise than tilelang does, a cubin that is loaded though it was changed,
golden vectors that a GPU's order of sums does not fit. What needs a GPU is marked so.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import pytest
import torch
from helpers_bundle import RUN, SPEC, changed_bytes, make, use

import mhc_tilelang as mhc
from mhc_tilelang import compiler, launch
from mhc_tilelang.bundle import cuda_target, driver, export, golden, launch_size, verify, workload
from mhc_tilelang.checking.inputs import Inputs
from mhc_tilelang.errors import BundleError
from mhc_tilelang.spec import MHCSpec


@pytest.mark.parametrize(
    ("expression", "value", "text"),
    [
        ("1", 1, "1"),
        ("(num_tokens + 63) // 64 * 3", 6, "(((num_tokens + 63) / 64) * 3)"),
        ("T.min(num_tokens, 7) % 4 - splits", 1, "((MHC_MIN(num_tokens, 7) % 4) - splits)"),
        ("max(num_tokens, 7)", 65, "MHC_MAX(num_tokens, 7)"),
    ],
)
def test_expressions(expression: str, value: int, text: str) -> None:
    """Values are equal in Python and in C."""
    assert launch_size.value_of(expression, {"num_tokens": 65, "splits": 2}) == value
    assert launch_size.c_of(expression) == text


@pytest.mark.parametrize("expression", ["missing", "__import__('os')", "a.b", "1 / 2", "(", "7 // 0", "True", "x[0]"])
def test_expressions_are_only_arithmetic(expression: str) -> None:
    """A manifest runs no code: what is not arithmetic of known sizes is refused."""
    with pytest.raises(BundleError, match="expected arithmetic of known sizes"):
        launch_size.value_of(expression, {"x": 1})


def test_a_launch_is_tilelangs() -> None:
    """Grid, block, shared memory and arguments from the manifest are those of the generated source.

    Catches an argument out of order or of the wrong width: a GPU would read past its parameters without a word.
    """
    from mhc_tilelang.compiler import cuda_source

    kernels = workload.kernels_of(SPEC, "bfloat16", "sm_90a", forward_only=True)
    family, parameters = next(each for each in kernels if each[0] == "project")
    source = cuda_source.generate(family, parameters, "sm_90a")
    facts = json.loads(json.dumps(cuda_target.launch_of(source, "sm_90a/project.cubin")))
    pointers = {"x": 0x1000, "phi": 0x2000, "partial": 0x3000}
    for num_tokens in (1, 64, 65, 4097):
        numbers = {"num_tokens": num_tokens, "num_slabs": 1, "chunks_per_split": 3}
        at = driver.launch_at(facts, pointers, numbers)
        assert at.grid == source.grid_at(numbers)
        assert (at.threads, at.shared_bytes) == (source.threads, source.shared_bytes)
        values = {**pointers, **numbers}
        assert [argument.value for argument in at.arguments] == [values[name] for name in source.arguments]
    declared = source.code.split(f"{source.entry}(")[1].split(")")[0].split(",")
    wide = {ctypes.c_void_p: "*", ctypes.c_int32: "int ", ctypes.c_int64: "int64_t "}
    assert all(wide[type(argument)] in text for argument, text in zip(at.arguments, declared, strict=True))


def test_the_driver_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Much shared memory is asked for; parameters are addresses of values that are still there at the call."""
    calls: list[tuple] = []

    def call(name: str, *arguments) -> None:
        if name == "cuLaunchKernel":
            array = arguments[9]
            assert ctypes.c_int32.from_address(array[1]).value == 7
            assert ctypes.c_void_p.from_address(array[0]).value == 0x1000
            arguments = tuple(argument.value for argument in arguments[1:8])
        calls.append((name, *arguments))

    monkeypatch.setattr(driver, "call", call)
    function = driver.load(b"cubin", "post_kernel", 60_000)
    assert [name for name, *_ in calls] == ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"]
    assert calls[2][2:] == (driver.MAX_DYNAMIC_SHARED_SIZE_BYTES, 60_000)
    at = driver.Launch((5, 2, 1), (128, 1, 1), 60_000, (ctypes.c_void_p(0x1000), ctypes.c_int32(7)))
    driver.start(function, at, stream=0)
    assert calls[3] == ("cuLaunchKernel", 5, 2, 1, 128, 1, 1, 60_000)


def test_without_a_driver_the_error_says_so() -> None:
    """Machines without a GPU's driver, as here, get this error."""
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    with pytest.raises(BundleError, match=r"expected the CUDA driver's libcuda\.so\.1"):
        driver.load(b"cubin", "post_kernel", 0)


@pytest.mark.nvcc
def test_a_cuda_bundle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One kernel through nvcc, beside the CPU's: its files, its golden vectors, a changed cubin that is refused."""
    targets = ["cpu", "sm_90a"]
    folder = make(tmp_path / "bundle", targets, lambda spec, inputs: [[mhc.expand(inputs.h, spec.num_streams)]])
    facts = verify.check_files(folder)
    (entry,) = facts["targets"]["sm_90a"]["kernels"]
    cubin = folder / entry["launch"]["cubin"]
    assert cubin.read_bytes()[:4] == b"\x7fELF"
    assert 'extern "C" __global__ void __launch_bounds__' in (folder / entry["source"]).read_text()
    assert f"{entry['launch']['function']}(" in (folder / entry["source"]).read_text()
    assert "-fmad=false" in facts["targets"]["sm_90a"]["flags"]
    (vector,) = json.loads((folder / "golden/sm_90a/index.json").read_text())
    assert vector["kernel"] == "expand"
    rows = [(row.target, row.passed, row.note) for row in verify.results(folder, facts)]
    assert rows[0] == ("cpu", True, "")
    assert rows[1][:2] == ("sm_90a", True)
    assert rows[1][2] or torch.cuda.is_available()

    parameters = dict(workload.kernels_of(SPEC, "bfloat16", "sm_90a", forward_only=True))["expand"]
    use(monkeypatch, folder)
    assert compiler.kernel("expand", "sm_90a", **parameters).signature.names == ("h", "x")
    changed_bytes(folder, entry["launch"]["cubin"])
    use(monkeypatch, folder)
    with pytest.raises(BundleError, match=r"expand\.cubin: expected sha256"):
        compiler.kernel("expand", "sm_90a", **parameters)
    assert compiler._kernels == {}


def test_thread_level_kernels_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without golden vectors, and executed, so that those behind have a model's inputs.

    Catches an export that ends at the first of them, as of every bfloat16 model of four streams for a GPU.
    """

    found = []

    def functions(spec: MHCSpec, inputs: Inputs) -> list[list[torch.Tensor]]:
        partial = launch.project(inputs.x, inputs.phi, launch.projection_plan(inputs.x, spec.num_coefficients))
        expected = inputs.x.flatten(1).double() @ inputs.phi.flatten(1).double().T
        found.append((partial[:, : spec.num_coefficients].sum(0).T.double(), expected))
        return [[mhc.expand(inputs.h, spec.num_streams)]]

    monkeypatch.setattr(cuda_target, "call", lambda command: Path(command[-2]).write_bytes(b"no cubin"))
    folder = make(tmp_path / "bundle", ["sm_80"], functions)
    facts = verify.check_files(folder)
    assert [entry["family"] for entry in facts["targets"]["sm_80"]["kernels"]] == ["split_phi", "project", "expand"]
    assert [vector["kernel"] for vector in verify.vectors_of(folder, facts, "sm_80")] == ["expand"]
    torch.testing.assert_close(*found[-1], atol=1e-3, rtol=0)


@pytest.mark.gpu
def test_a_cuda_bundle_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels from cubins have the bits of those that tilelang compiles."""
    device = torch.device("cuda", 0)
    names: dict = {}
    exec(RUN, names)
    torch.set_default_device(device)
    try:
        compiled = names["results"]()
        use(monkeypatch, make(tmp_path / "bundle", [compiler.target_of(device)]))
        loaded = names["results"]()
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(got, wanted) for got, wanted in zip(loaded, compiled, strict=True))


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_cuda_sources_give_the_golden_vectors(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every CUDA source of a bundle, launched as its manifest says by the SIMT executor, is within its tolerances.

    Catches golden vectors or tolerances that a GPU's order of sums does not fit, and a launch that is written down
    wrong: the executor watches every access.
    """
    from mhc_tilelang.compiler.cuda_source import CudaSource
    from mhc_tilelang.compiler.simt import launch as execute

    monkeypatch.setattr(cuda_target, "call", lambda command: Path(command[-2]).write_bytes(b"no cubin"))
    facts = export.export(SPEC, dtype, ["sm_80"], tmp_path / "bundle")
    arrays = golden.arrays_of((tmp_path / "bundle" / golden.ARRAYS).read_bytes())
    entries = {entry["name"]: entry for entry in facts["targets"]["sm_80"]["kernels"]}
    vectors = verify.vectors_of(tmp_path / "bundle", facts, "sm_80")
    described = export.kernels_for(SPEC, dtype, "sm_80", False, None)
    by_threads = {kernel.name for kernel in described if golden.is_by_threads(kernel)}
    assert {vector["kernel"] for vector in vectors} == set(entries) - by_threads
    wrong = {}
    for vector in vectors:
        entry = entries[vector["kernel"]]
        how, code = entry["launch"], (tmp_path / "bundle" / entry["source"]).read_text(encoding="utf-8")
        names, kinds = zip(*how["arguments"], strict=True)
        dtypes = tuple({kind: dtype for dtype, kind in cuda_target.KINDS.items()}[kind] for kind in kinds)
        grid, threads = tuple(how["grid"]), tuple(how["threads"])
        source = CudaSource(how["function"], code, names, grid, threads, how["shared_bytes"], dtypes)
        tensors = {}
        for b in vector["buffers"]:
            unset = torch.full(b["shape"], torch.nan, dtype=getattr(torch, b["dtype"]))
            tensors[b["name"]] = golden.tensor_of(arrays, b).clone() if b["role"] == "in" else unset
        execute(source, "sm_80", {n: t for n, t in tensors.items() if n in names}, vector["numbers"])
        for b in (b for b in vector["buffers"] if b["role"] == "out"):
            share = verify.share_of(b, golden.tensor_of(arrays, b), tensors[b["name"]])
            print(f"{vector['kernel']:60} {b['name']:16} {share:.3f}")
            if share > 1:
                wrong[vector["kernel"], b["name"]] = share
    assert wrong == {}
