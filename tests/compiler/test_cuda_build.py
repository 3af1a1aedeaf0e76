"""Every kernel builds for every CUDA architecture, without a GPU, and what came out is as it should be.

Marked `nvcc`: skipped by name where there is no nvcc, never in CI. Would catch: a kernel that nvcc refuses, a fragment
without room for all its elements, too much shared memory, a register spill, an atomic, a narrow access to a stream
tensor, in the source or in the machine code, a number in docs/kernels that is no longer so.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import pytest

from mhc_tilelang import cli
from mhc_tilelang.compiler import tracing
from mhc_tilelang.compiler.toolchain import find_nvdisasm
from mhc_tilelang.kernels import FAMILIES
from mhc_tilelang.perf.inspect import matrix, stored
from mhc_tilelang.perf.inspect.matrix import Subject
from mhc_tilelang.perf.inspect.occupancy import ARCHITECTURES
from mhc_tilelang.perf.inspect.row import Row, hash_source

pytestmark = pytest.mark.nvcc

BUILDS = matrix.representative()
BUILT_ANEW = ("post", "project", "coefficients_backward")
SPILL_FREE = ("sm_90a", "sm_100a")  # what data centres have; the others may spill a little
# For two blocks a multiprocessor, in 128 registers: 20 bytes, which sm_90a holds without a spill, and 32, once a chunk.
SPILLS = {("post_project", "sm_100a"), ("post_project (identity)", "sm_90a")}


@pytest.fixture(autouse=True)
def _nvdisasm() -> None:
    if find_nvdisasm() is None:
        if os.environ.get("MHC_REQUIRE_NVCC") == "1":
            pytest.fail("no nvdisasm, and MHC_REQUIRE_NVCC=1")
        pytest.skip("no nvdisasm")


def name_of(value: object) -> str:
    if not isinstance(value, Subject):
        return str(value)
    sizes = (value.num_streams, value.hidden_size, value.dtype)
    return "-".join([value.label.replace(" ", "_"), *(str(size) for size in sizes if size)])


def takes_long(subject: Subject, arch: str) -> bool:
    """Builds that CI leaves to `make test-full`, at some seconds each.

    It takes those for the main architecture at n = 4 in bfloat16, as calls launch them, and for the others the kernels
    that move most.
    """
    if (subject.num_streams or 4, subject.dtype or "bfloat16") != (4, "bfloat16"):
        return True
    if subject.variant in {variant for _, variant, *_ in matrix.VARIANTS}:  # identity's among them
        return True
    return arch != matrix.MAIN and subject.kernel not in ("post", "aggregate", "post_backward")


def is_built_anew(subject: Subject, arch: str) -> bool:
    """Builds that show that stored ones come out so: by tiles, by warps, by threads."""
    return arch == matrix.MAIN and not takes_long(subject, arch) and subject.label in BUILT_ANEW


def builds() -> list:
    """BUILDS, those that take long marked."""
    return [pytest.param(*pair, marks=[pytest.mark.full] * takes_long(*pair)) for pair in BUILDS]


@cache
def kept_rows() -> dict[tuple, Row]:
    """The stored rows by key, if they were built by the tools that are here."""
    from mhc_tilelang.perf.inspect.compiler import versions

    kept_versions, rows = stored.read(stored.KERNELS)
    same = all(versions()[tool] == kept_versions[tool] for tool in ("nvcc", "tilelang"))
    return {row.key: row for row in rows} if same else {}


def kept_row(subject: Subject, arch: str) -> Row | None:
    return kept_rows().get(subject.key(arch))


@pytest.mark.parametrize(("subject", "arch"), builds(), ids=name_of)
def test_builds(subject: Subject, arch: str) -> None:
    """Every fact of a build: of the stored one, if it was made by these tools from what is lowered now."""
    from mhc_tilelang.perf.inspect.faults import faults

    kept = kept_row(subject, arch)
    func = tracing.trace(subject.kernel, subject.parameters(arch))
    row = kept if kept and kept.made_from == hash_source(func, subject, arch) else build_anew(subject, arch)
    may_spill = arch not in SPILL_FREE or (subject.label, arch) in SPILLS
    assert [fault for fault in faults(row) if not (may_spill and "bytes of spills" in fault)] == []


@pytest.mark.parametrize(("subject", "arch"), [pair for pair in BUILDS if is_built_anew(*pair)], ids=name_of)
def test_a_stored_build_is_what_comes_out(subject: Subject, arch: str) -> None:
    """From nothing: what of CI's builds is by tiles, by warps and by threads."""
    build_anew(subject, arch)


def build_anew(subject: Subject, arch: str) -> Row:
    """Build from nothing, and compare with the stored row if there is one of these tools."""
    from mhc_tilelang.perf.inspect.built import build

    row, kept = build(subject, arch, cached=False), kept_row(subject, arch)
    if subject.kernel == "boundary_backward" and subject.dtype == "float32":
        return row  # what tilelang's prover finds varies: indices are written one way or another, the facts stay
    if kept:
        assert row == kept, "stored rows are stale: make inspect-kernels KERNELS=…"
    return row


def test_every_family_is_built_for_every_architecture() -> None:
    """Catches a family that is added and not built for a GPU."""
    built = {(subject.kernel, arch) for subject, arch in BUILDS}
    assert built == {(family, arch) for family in FAMILIES for arch in ARCHITECTURES}


def test_a_spill_is_seen() -> None:
    """The check above must be able to fail: 1024 threads have 64 registers each, which do not hold 200 products."""
    from mhc_tilelang.perf.inspect.compiler import compile_source
    from mhc_tilelang.perf.inspect.sass import count

    code = """
extern "C" __global__ void __launch_bounds__(1024, 1) spilling(float* __restrict__ x) {
  float v[400];
  #pragma unroll
  for (int i = 0; i < 400; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 400; ++i) x[i * 1024 + threadIdx.x] = v[i] * v[399 - i];
}
"""
    compiled = compile_source(code, "sm_90a")
    counts = count(compiled.listing)
    assert compiled.spill_bytes > 0
    assert counts.local_accesses > 0
    assert counts.barriers == 1
    assert counts.global_loads == {"32": 400}


def test_what_ships_is_what_is_inspected() -> None:
    """The source that tilelang compiles for a call is the one that was built here, flags and all.

    Catches a pass or a flag that one of the two does not get.
    """
    from tilelang.contrib import nvcc

    from mhc_tilelang.compiler import cuda, cuda_source
    from mhc_tilelang.perf.inspect.compiler import COMPILE_FLAGS, nvcc_command

    parameters = matrix.subjects(matrix.STUDIED, ["post"])[0].launch.parameters
    shipped = cuda.build(tracing.trace("post", parameters), matrix.MAIN, "post", parameters)
    assert shipped.get_kernel_source() == cuda_source.generate("post", parameters, matrix.MAIN).code

    commands: list[list[str]] = []
    popen = nvcc.subprocess.Popen

    def recording(command: list[str], **options):
        commands.append(command)
        return popen(command, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvcc.subprocess, "Popen", recording)
        patch.setenv("TILELANG_DISABLE_CACHE", "1")
        cuda.build(tracing.trace("post", parameters), matrix.MAIN, "post", parameters)
    assert commands
    ours = nvcc_command(matrix.MAIN, tuple(COMPILE_FLAGS))
    assert {flag for flag in commands[0] if flag.startswith("-") and flag != "-o"} == set(ours[1:])


def test_command_prints_and_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way, for one kernel on two architectures; then its source and its machine code."""
    file = tmp_path / "rows.json"
    assert cli.main(["inspect", "expand", "--arch", "sm_90a,sm_80", "--widths", "1280", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert shown.index("sm_90a") < shown.index("sm_80")
    assert "faults in 0 of 2 builds" in shown
    written = json.loads(file.read_text())
    assert {"tilelang", "nvcc", "nvdisasm"} <= written["versions"].keys()
    assert [(row["kernel"], row["arch"], row["hidden_size"]) for row in written["rows"]] == [
        ("expand", "sm_90a", 1280),
        ("expand", "sm_80", 1280),
    ]
    assert written["rows"][0]["global_stores"] == {"128": 4}

    assert cli.main(["inspect", "expand", "--arch", "sm_90a", "--source"]) == 0
    assert "__global__ void __launch_bounds__(160, 1) expand_kernel" in capsys.readouterr().out
    assert cli.main(["inspect", "expand", "--arch", "sm_90a", "--sass"]) == 0
    assert "STG.E.128" in capsys.readouterr().out
