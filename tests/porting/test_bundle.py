"""Kernels from a bundle: the bits of a compiled kernel, no compiler, and errors that say what is wrong.

Would catch: a kernel that is compiled all the same, one that is loaded from a damaged or foreign bundle. CUDA
is in test_bundle_cuda.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers_bundle import PYTHON, RUN, blocked_imports, changed_bytes, few_functions, small_bundle, use

import mhc_tilelang as mhc
from mhc_tilelang import cli, compiler
from mhc_tilelang.bundle import cpu_target, export, manifest, workload
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.compiler import trust
from mhc_tilelang.compiler.cpu import build
from mhc_tilelang.errors import BundleError, TrustError
from mhc_tilelang.spec import MHCSpec

ROOT = Path(__file__).resolve().parents[2]


def resealed(folder: Path, change: Callable[[dict], None]) -> Path:
    """A copy of the small bundle with a changed manifest, and a seal that fits it."""
    shutil.copytree(small_bundle(), folder)
    facts = json.loads((folder / manifest.MANIFEST).read_text(encoding="utf-8"))
    change(facts)
    text = json.dumps(facts)
    (folder / manifest.MANIFEST).write_text(text, encoding="utf-8")
    (folder / manifest.SEAL).write_text(f"{manifest.sha256(text.encode())}  {manifest.MANIFEST}\n", encoding="utf-8")
    return folder


def cut(path: Path, left: int) -> None:
    """Truncate a file to this many bytes."""
    path.write_bytes(path.read_bytes()[:left])


def test_no_compiler_is_needed(tmp_path: Path) -> None:
    """A fresh process with no PATH, a bogus CXX, no cache and tilelang blocked returns the compiled kernels' bits.

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


def test_a_missing_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what was wanted and what the bundle has instead; nothing is compiled or kept."""
    use(monkeypatch, small_bundle())
    with pytest.raises(BundleError, match=r"no bundle has the kernel post for cpu with .*hidden_size=128") as error:
        mhc.post(torch.randn(2, 4, 128), torch.randn(2, 128), torch.rand(2, 4), torch.rand(2, 4, 4))
    assert f"{small_bundle()} has post with hidden_size=64, dtype=bfloat16" in str(error.value)
    with pytest.raises(BundleError, match=r"has no expand_backward; it has expand, post, project"):
        mhc.collapse(torch.randn(2, 4, 64).bfloat16())
    with pytest.raises(BundleError, match="kernels for cpu, none for sm_90a"):
        compiler.kernel("post", "sm_90a", num_streams=4)
    assert compiler._kernels == {}


def test_the_first_of_several_bundles_that_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A list of bundles is looked through in order; a damaged one is refused even where another would do."""
    none = resealed(tmp_path / "none", lambda facts: facts["targets"].clear())
    use(monkeypatch, none, small_bundle())
    assert mhc.sinkhorn(torch.randn(3, 4, 4)).shape == (3, 4, 4)
    use(monkeypatch, small_bundle(), tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"nowhere: expected a bundle with manifest\.json"):
        mhc.sinkhorn(torch.randn(3, 4, 4))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: changed_bytes(folder, cpu_target.LIBRARY),
            r"libmhc_kernels\.so: expected sha256 .*was changed",
        ),
        (lambda folder: (folder / cpu_target.LIBRARY).unlink(), r"libmhc_kernels\.so: expected \d+ bytes, got No such"),
        *(
            (
                lambda folder, left=left: cut(folder / cpu_target.LIBRARY, left),
                rf"\.so: expected \d+ bytes, got {left}: it",
            )
            for left in (0, 4096)
        ),
        (lambda folder: cut(folder / manifest.MANIFEST, 4096), r"manifest\.json: expected JSON"),
        (lambda folder: cut(folder / manifest.SEAL, 0), r"manifest\.json: expected sha256"),
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
    damage: Callable[[Path], None], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever was changed is named, and nothing of the bundle is loaded: a library that was cut off ends a process."""
    shutil.copytree(small_bundle(), tmp_path / "bundle")
    damage(tmp_path / "bundle")
    use(monkeypatch, tmp_path / "bundle")
    monkeypatch.setattr(build, "bind", lambda *_: pytest.fail("loaded"))
    with pytest.raises(BundleError, match=message):
        mhc.sinkhorn(torch.randn(3, 4, 4))
    assert compiler._kernels == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts.update(format=3), r"format: expected 2, got 3; export the bundle again"),
        (lambda facts: facts.pop("targets"), r"targets: expected dict, got none"),
        (lambda facts: facts["versions"].update(sources="old"), r"made with this build .*, got one made with old"),
        (lambda facts: facts["targets"]["cpu"].update(machine="m68k"), r"got one for \w+ on m68k"),
        (lambda facts: facts["targets"]["cpu"].update(features=["sse2", "amx9"]), r"expected a processor with amx9"),
        (lambda facts: facts["files"].pop(cpu_target.LIBRARY), r"expected a file that the manifest names"),
        (lambda facts: facts["files"].update(x=7), r"files: x: expected an object, got int"),
        (lambda facts: facts["files"]["cpu/runtime.h"].update(bytes="9"), r"runtime\.h: bytes: expected int, got str"),
        (lambda facts: facts["targets"]["cpu"].pop("library"), r"targets: cpu: library: expected str, got none"),
        (lambda facts: facts["targets"]["cpu"].update(kind="tpu"), r"kind: expected cpu or cuda, got tpu"),
        (lambda facts: facts["targets"]["cpu"].update(kernels=[None]), r"cpu: expected an object, got NoneType"),
        (lambda facts: facts["targets"]["cpu"]["kernels"][0].pop("symbol"), r"symbol: expected str, got none"),
        (
            lambda facts: facts["targets"]["cpu"]["kernels"][0].update(buffers=[3]),
            r"buffers: expected an object, got int",
        ),
        (
            lambda facts: facts["targets"]["cpu"]["kernels"][1].update(symbol="nowhere"),
            r"that this system loads, got .*nowhere",
        ),
    ],
)
def test_a_foreign_bundle_is_refused(
    change: Callable[[dict], None], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One of another format, build, machine or processor."""
    use(monkeypatch, resealed(tmp_path / "bundle", change))
    with pytest.raises(BundleError, match=message):
        mhc.sinkhorn(torch.randn(3, 4, 4))
    assert compiler._kernels == {}


@pytest.mark.parametrize("name", [".", manifest.MANIFEST, manifest.SEAL, cpu_target.LIBRARY])
def test_a_bundle_that_others_can_write_is_refused(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folder and what is loaded of it, by name; $MHC_TILELANG_TRUST takes it all the same."""
    folder = tmp_path / "bundle"
    shutil.copytree(small_bundle(), folder)
    (folder / name).chmod(0o777)
    use(monkeypatch, folder)
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    with pytest.raises(TrustError, match=rf"got {(folder / name).resolve()}, which everyone can write to"):
        mhc.sinkhorn(torch.randn(3, 4, 4))
    assert cli.main(["export", "--verify", str(folder)]) == 1
    monkeypatch.setenv(trust.VARIABLE, str(folder))
    assert mhc.sinkhorn(torch.randn(3, 4, 4)).shape == (3, 4, 4)


def test_threads_load_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads that call at once share one kernel and one check of the library."""
    use(monkeypatch, small_bundle())
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
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`warmup` gets every kernel of the model before the first call, here without compiling one."""
    use(monkeypatch, small_bundle())
    monkeypatch.setattr(workload, "functions", few_functions)
    monkeypatch.setattr(workload, "streams", lambda *_: [])
    options = ["--model", "custom", "--hidden-size", "64", "--forward-only", "--device", "cpu"]
    assert cli.main(["warmup", *options, "--json", str(tmp_path / "warm.json")]) == 0
    assert "4 kernels for cpu in" in capsys.readouterr().out
    assert len(compiler._kernels) == len(json.loads((tmp_path / "warm.json").read_text())["kernels"]) == 4
    assert cli.main(["warmup", "--model", "3b", "--device", "cpu", "--forward-only"]) == 1
    assert "no bundle has the kernel" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("march", ["x86-64-v3", "native"])
def test_a_model_has_the_bits_of_the_jit(march: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a bundle is made for, forward and backward, at 700 tokens: from the bundle and compiled here."""
    spec = MHCSpec(96)
    case = Case(spec.num_streams, spec.hidden_size, torch.bfloat16, 700)

    def results() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        torch.manual_seed(5)

        def gradient(result: torch.Tensor) -> torch.Tensor:
            found.append(result.detach().clone())
            return torch.randn_like(result)

        inputs = Inputs.of(case, torch.device("cpu"))
        leaf = torch.Tensor.requires_grad_
        leaves: list[torch.Tensor] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "requires_grad_", lambda t, on=True: leaves.append(t) or leaf(t, on))
            workload.run(spec, inputs, False, gradient)
        return [*found, *(tensor.grad for tensor in leaves if tensor.grad is not None)]

    compiled = results()
    export.export(spec, "bfloat16", ["cpu"], tmp_path / "bundle", march=march)
    use(monkeypatch, tmp_path / "bundle")
    loaded = results()
    assert len(loaded) == len(compiled) > 60
    assert all(torch.equal(got, wanted) for got, wanted in zip(loaded, compiled, strict=True))
