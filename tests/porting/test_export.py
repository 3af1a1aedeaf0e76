"""`mhc-tilelang export`: which kernels, which files, and golden vectors that tell right from wrong.

Would catch: a kernel that a model launches and the bundle lacks, a header that C does not take, a golden vector that is
not what the reference says, a tolerance that lets a wrong result pass, a bundle that is left half written.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_bundle import DTYPE, SPEC, make, small_bundle

from mhc_tilelang import cli, ops, reference
from mhc_tilelang.bundle import cpu_target, export, golden, manifest, verify, workload
from mhc_tilelang.bundle.described import name_of
from mhc_tilelang.errors import MHCError
from mhc_tilelang.perf import sizes
from mhc_tilelang.perf.calls.cases import FLOAT8_KERNELS, Case, Shape
from mhc_tilelang.perf.calls.launches import launches
from mhc_tilelang.perf.calls.table import CALLS
from mhc_tilelang.spec import HIDDEN_SIZES, MHCSpec


def arrays(folder: Path, kernel: str) -> dict[str, np.ndarray]:
    """A kernel's golden vector, as float64 in shape."""
    index = json.loads((folder / "golden/cpu/index.json").read_text(encoding="utf-8"))
    (vector,) = (each for each in index if each["kernel"] == kernel)
    stored = golden.arrays_of((folder / golden.ARRAYS).read_bytes())
    return {b["name"]: golden.tensor_of(stored, b).view(b["shape"]).double().numpy() for b in vector["buffers"]}


@pytest.mark.parametrize("target", ["cpu", "sm_90a"])
@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_every_launch_of_the_audit_is_exported(num_streams: int, target: str) -> None:
    """The bundle has every launch of `perf.calls.launches`, at any number of tokens.

    Catches a workload that does not reach a function, a reduction or a form, or a token count that compiles anew.
    Recomputation is left out: a kernel for every length of block. So are float8, which bundles do not have, and the
    boundary in one launch, whose counters their hosts do not know: what a bundle launches instead is there. Calls of
    identity connections have the bundle of such a model.
    """
    with_res = workload.kernels_of(MHCSpec(256, num_streams), DTYPE, target, rms_norm_eps=1e-6)
    without = workload.kernels_of(MHCSpec.hy4(256, num_streams=num_streams), DTYPE, target)
    platform = "cpu" if target == "cpu" else "cuda"
    for num_tokens in (1, 63, 128, 384, 640, 896, 1152, 2176, 20_000):
        shape = Shape(num_tokens, num_streams, 256, DTYPE)
        for call in set(CALLS) - {"replay", *FLOAT8_KERNELS}:
            exported = without if call.startswith(("gates", "identity")) else with_res
            for launch in launches(Case(call, shape), platform, workload.GPU_BLOCKS):
                assert (launch.family, launch.parameters) in exported or launch.family == "post_pre", num_tokens


def test_forward_only_leaves_out_the_backward() -> None:
    """No kernel of a backward but the one that `collapse` runs forward; every forward one."""
    everything = workload.kernels_of(SPEC, DTYPE, "cpu")
    forward = workload.kernels_of(SPEC, DTYPE, "cpu", forward_only=True)
    backward = [each for each in everything if each not in forward]
    others = ("boundary_sums", "sum_partials", "aggregate_gradients", "expand")  # the last in float32, for a gradient
    assert all(family.endswith("_backward") or family in others for family, _ in backward)
    assert {family for family, _ in forward if family.endswith("_backward")} == {"expand_backward"}


def test_names_are_unique_and_widths_agree() -> None:
    """Names tell the kernels of a model apart on both platforms; the models' widths are those of the measurements."""
    for target in ("cpu", "sm_90a"):
        common = {"num_streams": 4, "hidden_size": 1280, "dtype": DTYPE}
        names = [name_of(*each, common) for each in workload.kernels_of(MHCSpec(1280), DTYPE, target)]
        assert len(set(names)) == len(names)
    assert {name: layer.hidden_size for name, layer in sizes.MODELS.items()} == HIDDEN_SIZES


def test_a_bundle_is_whole() -> None:
    """Every file hashes as the manifest says and belongs to something; the manifest says what a host must know."""
    folder = small_bundle()
    facts = verify.check_files(folder)
    kernels = facts["targets"]["cpu"]["kernels"]
    assert [kernel["name"] for kernel in kernels] == ["expand", "sinkhorn", "post", "project_rows24"]
    named = {kernel["source"] for kernel in kernels} | {facts["targets"]["cpu"]["library"]}
    named |= {f"cpu/{name}" for name in ("CMakeLists.txt", "mhc_kernels.h", "mhc_table.h", "runtime.h")}
    golden_files = {name for name in facts["files"] if name.startswith("golden/")}
    assert set(facts["files"]) == named | golden_files
    post = next(kernel for kernel in kernels if kernel["family"] == "post")
    assert [(b["name"], b["role"]) for b in post["buffers"]][-2:] == [("h_res", "in"), ("x_next", "out")]
    assert post["sizes"] == ["num_tokens"]
    assert facts["spec"]["hidden_size"] == SPEC.hidden_size
    with np.load(folder / golden.ARRAYS) as stored:
        index = json.loads((folder / "golden/cpu/index.json").read_text(encoding="utf-8"))
        assert set(stored) == {b["array"] for vector in index for b in vector["buffers"]}
        content = (folder / golden.ARRAYS).read_bytes()
        for b in (b for vector in index for b in vector["buffers"]):  # as a host without numpy reads them
            assert content[b["offset"] :].startswith(stored[b["array"]].tobytes())


def test_the_header_is_plain_c(tmp_path: Path) -> None:
    """C11 and C++17 compilers take the headers without a warning."""
    source = tmp_path / "host.c"
    source.write_text('#include "mhc_table.h"\nsize_t count(void) { return mhc_num_entries + !mhc_entries[0].name; }\n')
    for language in (["-x", "c", "-std=c11"], ["-x", "c++", "-std=c++17"]):
        flags = ["-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{small_bundle() / 'cpu'}"]
        done = subprocess.run(["g++", *language, *flags, str(source)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_golden_vectors_are_the_references() -> None:
    """The float64 arithmetic of a kernel gives what numpy gives, to the rounding of what is stored."""
    folder = small_bundle()
    post, sinkhorn = arrays(folder, "post"), arrays(folder, "sinkhorn")
    expected = reference.post(post["x"], post["layer_output"], post["h_post"], post["h_res"])
    assert np.all(np.abs(post["x_next"] - expected) <= 2.0**-8 * np.abs(expected))
    # float32 holds eps = 1e-6 to 3e-8 of it, and the results to 6e-8.
    exact = reference.sinkhorn(sinkhorn["logits"], SPEC.sinkhorn_iters, SPEC.sinkhorn_eps)
    assert np.abs(sinkhorn["h_res"] - exact).max() <= 1e-7
    expand = arrays(folder, "expand")
    assert np.array_equal(expand["x"], reference.expand(expand["h"], SPEC.num_streams))


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        (lambda x: x, True),
        (lambda x: x * (1 + 2.0**-24 * torch.sign(torch.randn_like(x))), True),
        (torch.zeros_like, False),
        (lambda x: x * 1.01, False),
        (lambda x: x.mT.contiguous(), False),
        (lambda x: x.roll(1, 0), False),
        (lambda x: torch.where(x == x.max(), torch.nan, x), False),
        (lambda x: x.bfloat16().float(), False),
    ],
)
def test_a_tolerance_tells_right_from_wrong(change, passes: bool) -> None:
    """h_res off by a rounding passes; zero, 1 % off, transposed, a token late, with a NaN or in bfloat16 not."""
    folder = small_bundle()
    facts = manifest.read(folder)
    vector = next(v for v in verify.vectors_of(folder, facts, "cpu") if v["kernel"] == "sinkhorn")
    output = vector["buffers"][1]
    expected = golden.tensor_of(golden.arrays_of((folder / golden.ARRAYS).read_bytes()), output)
    share = verify.share_of(output, expected, change(expected.view(output["shape"])))
    assert (share <= 1) == passes


def test_verify_runs_the_kernels(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`export --verify`: a row per result, all within; a file that is gone, changed or added is named."""
    assert cli.main(["export", "--verify", str(small_bundle()), "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["results"]
    assert len(rows) == 4
    assert all(row["ran"] for row in rows)
    assert "4 results computed, 0 of them off" in capsys.readouterr().out

    damaged = tmp_path / "bundle"
    shutil.copytree(small_bundle(), damaged)
    for added in (damaged / "cpu/libgomp.so.1", damaged / "sitecustomize.py", damaged / "build"):
        added.mkdir() if added.name == "build" else added.write_bytes(b"")
        assert cli.main(["export", "--verify", str(damaged)]) == 1
        got = added.relative_to(damaged).as_posix()
        assert f"expected no files but those of the manifest, got {got}\n" in capsys.readouterr().err
        added.rmdir() if added.name == "build" else added.unlink()
    victim = damaged / golden.ARRAYS
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert cli.main(["export", "--verify", str(damaged)]) == 1
    assert f"{victim.name}: expected sha256" in capsys.readouterr().err
    victim.unlink()
    assert cli.main(["export", "--verify", str(damaged)]) == 1
    assert f"{victim.name}: expected {len(content)} bytes, got No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model 3b --arch cpu", "no --out"),
        ("--model custom --arch cpu --out DIR", "--hidden-size with --model custom"),
        ("--model 3b --hidden-size 8 --arch cpu --out DIR", "--hidden-size with --model custom"),
        ("--model custom --hidden-size 0 --arch cpu --out DIR", "hidden_size: expected at least 1, got 0"),
        ("--model 3b --arch sm_70 --out DIR", "--arch: expected cpu or any of sm_80"),
        ("--model 3b --arch cpu --march i386 --out DIR", "--march: expected one of"),
        ("--verify DIR --arch cpu", "expected no --arch"),
        ("--verify DIR", "expected a bundle with manifest.json"),
    ],
)
def test_bad_options_are_named(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, before anything is compiled or written."""
    words = [str(tmp_path / "new") if word == "DIR" else word for word in arguments.split()]
    assert cli.main(["export", *words]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with files is refused and kept; a compiler that fails leaves no folder."""

    def small(spec: MHCSpec, inputs) -> Iterator[list[torch.Tensor]]:
        yield [ops.expand(inputs.h, spec.num_streams)]

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    with pytest.raises(MHCError, match="expected a new or an empty folder"):
        make(tmp_path / "taken", ["cpu"], small)
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(MHCError, match="failed"):
        make(tmp_path / "new", ["cpu"], small)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("elements", [0, 1, golden.MANY, golden.MANY + 1, 24 * 28672, 5 * 28672, 3 * 2**20])
def test_a_step_visits_every_place(elements: int) -> None:
    """About MANY elements are kept, of every row and channel alike."""
    step = golden.step_of(elements)
    assert -(-elements // step) <= golden.MANY
    assert step == 1 or (elements // step > golden.MANY // 4 and math.gcd(step, elements) == 1)


@pytest.mark.skipif(not cpu_target.is_x86(), reason="levels of x86-64")
def test_features_are_asked_for() -> None:
    """x86-64-v3 asks for AVX2 and FMA, and this processor is no less than what native says."""
    assert {"avx2", "fma"} <= set(cpu_target.features_of("x86-64-v3"))
    assert set(cpu_target.features_of("native")) == cpu_target.processor_features()


@pytest.mark.full
@pytest.mark.parametrize(("num_streams", "dtype"), [(2, "float16"), (4, "float32"), (8, "bfloat16")])
def test_a_whole_model_is_within_its_tolerances(num_streams: int, dtype: str, tmp_path: Path) -> None:
    """Every kernel of a model, forward and backward, on its golden vectors."""
    folder = tmp_path / "bundle"
    facts = export.export(MHCSpec(96, num_streams), dtype, ["cpu"], folder)
    rows = list(verify.results(folder, facts))
    assert {row.kernel for row in rows} == {kernel["name"] for kernel in facts["targets"]["cpu"]["kernels"]}
    assert [row for row in rows if not row.passed] == []
