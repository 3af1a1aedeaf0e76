"""Kernels from a bundle: the bits of a compiled kernel, no compiler, and errors that say what is wrong.

Would catch: a kernel that is compiled all the same, one that is loaded from a damaged or foreign bundle, a launch that
is computed otherwise than tilelang does.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers_bundle import PYTHON, SPEC, blocked_imports, few_functions, make, small_bundle

import mhc_tilelang as mhc
from mhc_tilelang import cli
from mhc_tilelang import compile as compiler
from mhc_tilelang.bundle import (
    cpu_target,
    cuda_target,
    driver,
    export,
    golden,
    launch_size,
    load,
    manifest,
    verify,
    workload,
)
from mhc_tilelang.errors import BundleError

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import torch
import mhc_tilelang as mhc
from mhc_tilelang import launch

def results():
    torch.manual_seed(3)
    T = 37
    x, f = torch.randn(T, 4, 64).bfloat16(), torch.randn(T, 64).bfloat16()
    return [
        mhc.expand(f, 4),
        mhc.sinkhorn(torch.randn(T, 4, 4)),
        mhc.post(x, f, torch.rand(T, 4), torch.rand(T, 4, 4)),
        launch.project(x, torch.randn(24, 256) / 8),
    ]
"""


@pytest.fixture
def bundle(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the bundles that kernels come from, with nothing loaded yet."""

    def use(*folders: Path) -> None:
        monkeypatch.setattr(compiler, "_kernels", {})
        monkeypatch.setenv(compiler.BUNDLE_VARIABLE, os.pathsep.join(map(str, folders)))
        load.opened.cache_clear()

    return use


def resealed(folder: Path, change: Callable[[dict], None]) -> Path:
    """A copy of the small bundle with a changed manifest, and a seal that fits it."""
    shutil.copytree(small_bundle(), folder)
    facts = json.loads((folder / manifest.MANIFEST).read_text(encoding="utf-8"))
    change(facts)
    text = json.dumps(facts)
    (folder / manifest.MANIFEST).write_text(text, encoding="utf-8")
    (folder / manifest.SEAL).write_text(f"{manifest.sha256(text.encode())}  {manifest.MANIFEST}\n", encoding="utf-8")
    return folder


def test_no_compiler_is_needed(tmp_path: Path) -> None:
    """With no PATH, a bogus CXX, no cache and tilelang blocked, a fresh process returns the bits of compiled kernels.

    The bundle's library is for x86-64-v3 and the compiled one for this processor: vector width moves no bit.
    """
    names: dict = {}
    exec(RUN, names)
    compiled = names["results"]()
    code = blocked_imports("tilelang", "tvm") + RUN + f"torch.save(results(), {str(tmp_path / 'results')!r})"
    environment = {
        "MHC_TILELANG_BUNDLE": str(small_bundle()),
        "CXX": "/bogus",
        "PATH": "",
        "HOME": str(tmp_path / "no"),
    }
    environment |= {"PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
    done = subprocess.run(
        [PYTHON, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = torch.load(tmp_path / "results")
    assert all(torch.equal(got, wanted) for got, wanted in zip(loaded, compiled, strict=True))
    assert not (tmp_path / "no").exists()


def test_a_missing_kernel_is_named(bundle: Callable[..., None]) -> None:
    """What was wanted, what the bundle has instead; nothing is compiled or kept."""
    bundle(small_bundle())
    with pytest.raises(BundleError, match=r"no bundle has the kernel post for cpu with .*hidden_size=128") as error:
        mhc.post(torch.randn(2, 4, 128), torch.randn(2, 128), torch.rand(2, 4), torch.rand(2, 4, 4))
    assert f"{small_bundle()} has post with hidden_size=64, dtype=bfloat16" in str(error.value)
    with pytest.raises(BundleError, match=r"has no expand_backward; it has expand, post, project"):
        mhc.collapse(torch.randn(2, 4, 64).bfloat16())
    with pytest.raises(BundleError, match="kernels for cpu, none for sm_90a"):
        compiler.kernel("post", "sm_90a", num_streams=4)
    assert compiler._kernels == {}


def test_the_first_of_several_bundles_that_has_it(bundle: Callable[..., None], tmp_path: Path) -> None:
    """A list of bundles is looked through in order; a damaged one is refused even where another would do."""
    none = resealed(tmp_path / "none", lambda facts: facts["targets"].clear())
    bundle(none, small_bundle())
    assert mhc.sinkhorn(torch.randn(3, 4, 4)).shape == (3, 4, 4)
    bundle(small_bundle(), tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"nowhere: expected a bundle with manifest\.json"):
        mhc.sinkhorn(torch.randn(3, 4, 4))


def changed_bytes(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: changed_bytes(folder, cpu_target.LIBRARY),
            r"libmhc_kernels\.so: expected sha256 .*was changed",
        ),
        (lambda folder: (folder / cpu_target.LIBRARY).unlink(), r"libmhc_kernels\.so: expected \d+ bytes, got No such"),
        (
            lambda folder: (folder / manifest.SEAL).unlink(),
            r"expected a bundle with manifest\.json and manifest\.sha256",
        ),
        (
            lambda folder: (folder / manifest.MANIFEST).write_text(
                (folder / manifest.MANIFEST).read_text().replace('"threads"', '"thread"').replace("1e-06", "2e-06")
            ),
            r"manifest\.json: expected sha256",
        ),
        (lambda folder: (folder / manifest.MANIFEST).write_text("{"), r"manifest\.json: expected JSON"),
    ],
)
def test_a_damaged_bundle_is_refused(
    damage: Callable[[Path], None], message: str, bundle: Callable[..., None], tmp_path: Path
) -> None:
    """Whatever was changed is named, and nothing of the bundle is loaded."""
    shutil.copytree(small_bundle(), tmp_path / "bundle")
    damage(tmp_path / "bundle")
    bundle(tmp_path / "bundle")
    with pytest.raises(BundleError, match=message):
        mhc.sinkhorn(torch.randn(3, 4, 4))
    assert compiler._kernels == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts.update(format=2), r"format: expected 1, got 2; export the bundle again"),
        (lambda facts: facts.pop("targets"), r"targets: expected dict, got NoneType"),
        (lambda facts: facts["versions"].update(sources="old"), r"made with this build .*, got one made with old"),
        (lambda facts: facts["targets"]["cpu"].update(machine="m68k"), r"got one for \w+ on m68k"),
        (lambda facts: facts["targets"]["cpu"].update(features=["sse2", "amx9"]), r"expected a processor with amx9"),
        (lambda facts: facts["files"].pop(cpu_target.LIBRARY), r"expected a file that the manifest names"),
    ],
)
def test_a_foreign_bundle_is_refused(
    change: Callable[[dict], None], message: str, bundle: Callable[..., None], tmp_path: Path
) -> None:
    """One of another format, build, machine or processor."""
    bundle(resealed(tmp_path / "bundle", change))
    with pytest.raises(BundleError, match=message):
        mhc.sinkhorn(torch.randn(3, 4, 4))
    assert compiler._kernels == {}


def test_threads_load_it_once(bundle: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads that call at once share one kernel and one check of the library."""
    bundle(small_bundle())
    read: list[str] = []
    content_of = manifest.content_of
    monkeypatch.setattr(manifest, "content_of", lambda *args: read.append(args[2]) or content_of(*args))
    logits = torch.randn(64, 4, 4)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: mhc.sinkhorn(logits), range(8)))
    assert all(torch.equal(result, results[0]) for result in results)
    assert read == [cpu_target.LIBRARY]
    assert len(compiler._kernels) == 1


def test_warmup_loads_a_bundle(
    bundle: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`warmup` gets every kernel of the model before the first call, here without compiling one."""
    bundle(small_bundle())
    monkeypatch.setattr(workload, "functions", few_functions)
    monkeypatch.setattr(workload, "streams", lambda *_: [])
    options = ["--model", "custom", "--hidden-size", "64", "--forward-only", "--device", "cpu"]
    assert cli.main(["warmup", *options, "--json", str(tmp_path / "warm.json")]) == 0
    assert "4 kernels for cpu in" in capsys.readouterr().out
    assert len(compiler._kernels) == len(json.loads((tmp_path / "warm.json").read_text())["kernels"]) == 4
    assert cli.main(["warmup", "--model", "3b", "--device", "cpu", "--forward-only"]) == 1
    assert "no bundle has the kernel" in capsys.readouterr().err


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
    """In Python and in C alike."""
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
    from mhc_tilelang import cuda_source

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
    """On a machine without a GPU's driver, as here."""
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    with pytest.raises(BundleError, match=r"expected the CUDA driver's libcuda\.so\.1"):
        driver.load(b"cubin", "post_kernel", 0)


@pytest.mark.nvcc
def test_a_cuda_bundle(bundle: Callable[..., None], tmp_path: Path) -> None:
    """One kernel through nvcc: its files, golden vectors of its own plan, and a cubin that is refused once changed."""
    folder = make(tmp_path / "bundle", ["sm_90a"], lambda spec, inputs: [[mhc.expand(inputs.h, spec.num_streams)]])
    facts = manifest.read(folder)
    (entry,) = facts["targets"]["sm_90a"]["kernels"]
    cubin = folder / entry["launch"]["cubin"]
    assert cubin.read_bytes()[:4] == b"\x7fELF"
    assert 'extern "C" __global__ void __launch_bounds__' in (folder / entry["source"]).read_text()
    assert f"{entry['launch']['function']}(" in (folder / entry["source"]).read_text()
    assert "-fmad=false" in facts["targets"]["sm_90a"]["flags"]
    (vector,) = json.loads((folder / "golden/sm_90a/index.json").read_text())
    assert vector["kernel"] == "expand"

    parameters = dict(workload.kernels_of(SPEC, "bfloat16", "sm_90a", forward_only=True))["expand"]
    bundle(folder)
    assert compiler.kernel("expand", "sm_90a", **parameters).signature.names == ("h", "x")
    changed_bytes(folder, entry["launch"]["cubin"])
    bundle(folder)
    with pytest.raises(BundleError, match=r"expand\.cubin: expected sha256"):
        compiler.kernel("expand", "sm_90a", **parameters)
    assert compiler._kernels == {}


@pytest.mark.gpu
def test_a_cuda_bundle_on_a_gpu(bundle: Callable[..., None], tmp_path: Path) -> None:
    """Kernels from cubins have the bits of those that tilelang compiles."""
    device = torch.device("cuda", 0)
    names: dict = {}
    exec(RUN, names)
    torch.set_default_device(device)
    try:
        compiled = names["results"]()
        bundle(make(tmp_path / "bundle", [compiler.target_of(device)]))
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
    from mhc_tilelang.cuda_source import CudaSource
    from mhc_tilelang.perf.simt import launch

    monkeypatch.setattr(cuda_target, "call", lambda command: Path(command[-2]).write_bytes(b"no cubin"))
    facts = export.export(SPEC, dtype, ["sm_80"], tmp_path / "bundle")
    arrays = golden.arrays_of((tmp_path / "bundle" / golden.ARRAYS).read_bytes())
    entries = {entry["name"]: entry for entry in facts["targets"]["sm_80"]["kernels"]}
    vectors = verify.vectors_of(tmp_path / "bundle", facts, "sm_80")
    assert {vector["kernel"] for vector in vectors} == set(entries)
    wrong = {}
    for vector in vectors:
        entry = entries[vector["kernel"]]
        how, code = entry["launch"], (tmp_path / "bundle" / entry["source"]).read_text(encoding="utf-8")
        names, kinds = zip(*how["arguments"], strict=True)
        grid, threads = tuple(how["grid"]), tuple(how["threads"])
        source = CudaSource(how["function"], code, names, grid, threads, how["shared_bytes"], kinds)
        tensors = {}
        for b in vector["buffers"]:
            unset = torch.full(b["shape"], torch.nan, dtype=getattr(torch, b["dtype"]))
            tensors[b["name"]] = golden.tensor_of(arrays, b).clone() if b["role"] == "in" else unset
        launch(source, "sm_80", {n: t for n, t in tensors.items() if n in names}, vector["numbers"])
        for b in (b for b in vector["buffers"] if b["role"] == "out"):
            share = verify.share_of(b, golden.tensor_of(arrays, b), tensors[b["name"]])
            print(f"{vector['kernel']:60} {b['name']:16} {share:.3f}")
            if share > 1:
                wrong[vector["kernel"], b["name"]] = share
    assert wrong == {}
