"""`mhc-tilelang inspect`, what needs neither nvcc nor a GPU: occupancy, the counts, the widths, the choice of builds.

Would catch: an instruction that is counted as what it is not, an access whose width goes unseen, an occupancy that
differs from CUDA's own calculator, a kernel or a size that is not built.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import metadata
from math import prod
from pathlib import Path

import pytest

from mhc_tilelang import cli
from mhc_tilelang.compiler.architectures import SHARED_BYTES
from mhc_tilelang.errors import MHCError
from mhc_tilelang.kernels import FAMILIES, plans
from mhc_tilelang.perf.inspect import built, explain, matrix, sass, stored, table
from mhc_tilelang.perf.inspect.faults import faults, with_faults
from mhc_tilelang.perf.inspect.occupancy import ARCHITECTURES, Occupancy, occupancy
from mhc_tilelang.perf.inspect.row import Row
from mhc_tilelang.perf.inspect.source_accesses import accesses

ROW = Row(
    kernel="post",
    variant="",
    arch="sm_90a",
    num_streams=4,
    hidden_size=2560,
    dtype="bfloat16",
    threads=160,
    registers=80,
    spill_bytes=0,
    shared_bytes=0,
    static_shared_bytes=0,
    named_barriers=0,
    occupancy=0.3125,
    blocks=4,
    limiter="registers",
    instructions=298,
    tensor_instructions=0,
    barriers=0,
    global_loads={"128": 5, "32": 20},
    global_stores={"128": 4},
    atomics=0,
    local_accesses=0,
    stream_reads={"x": [16]},
    stream_writes={"x_next": [16]},
    truncated=[],
    machine_reads={"x": {"128": 4}},
    machine_writes={"x_next": {"128": 4}},
)


# The expected numbers are those of cuda_occupancy.h of CUDA 13.0, run on a CPU.
@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "barriers", "blocks", "limiter"),
    [
        ("sm_80", 160, 80, 0, 0, 4, "registers"),
        ("sm_80", 32, 16, 512, 3, 32, "blocks"),
        ("sm_80", 32, 40, 48128, 0, 3, "shared memory"),
        ("sm_90a", 128, 207, 57856, 1, 2, "registers"),
        ("sm_90a", 32, 40, 48128, 0, 4, "shared memory"),
        ("sm_90a", 32, 16, 512, 3, 21, "barriers"),
        ("sm_100a", 224, 61, 0, 0, 4, "registers"),
        ("sm_100a", 256, 255, 86016, 1, 1, "registers"),
        ("sm_120a", 128, 207, 57856, 1, 1, "shared memory"),
        ("sm_120a", 32, 16, 0, 0, 24, "blocks"),
        ("sm_120a", 32, 16, 512, 3, 8, "barriers"),
        ("sm_120a", 128, 163, 512, 3, 3, "registers"),
        ("sm_120a", 256, 32, 0, 0, 6, "warps"),
    ],
)
def test_occupancy_is_that_of_cudas_calculator(
    arch: str, threads: int, registers: int, shared: int, barriers: int, blocks: int, limiter: str
) -> None:
    found = occupancy(arch, threads, registers, shared, barriers)
    assert found == Occupancy(blocks, blocks * -(-threads // 32) / ARCHITECTURES[arch].warps, limiter)


def test_architectures_are_those_of_the_cuda_target() -> None:
    assert {arch: limits.shared_bytes_per_block for arch, limits in ARCHITECTURES.items()} == SHARED_BYTES


LISTING = """
	.section	.text.post_kernel,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   HFMA2.MMA R3, -RZ, RZ, 0, 0 ;
        /*0020*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R4.64] ;
        /*0030*/                   LDG.E.U16 R5, desc[UR4][R4.64+0x80] ;
        /*0040*/                   LDG.E.CONSTANT R6, desc[UR4][R8.64+0x4] ;
        /*0050*/                   LDGSTS.E.BYPASS.LTC128B.64 [R7], desc[UR4][R8.64] ;
        /*0060*/            @!UP1  LDG.E.ENL2.256 R16, R20, desc[UR4][R8.64] ;
        /*0070*/                   LDS.128 R4, [R5] ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*00b0*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
        /*00c0*/              @P3  STG.E.64 desc[UR4][R2.64], R8 ;
        /*00d0*/                   UTMALDG.2D [UR8], [UR4] ;
        /*00e0*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*00f0*/                   REDUX.SUM UR4, R5 ;
        /*0100*/                   STL.64 [R1], R4 ;
        /*0110*/                   EXIT ;
.L_x_0:
        /*0120*/                   BRA `(.L_x_0);
        /*0130*/                   NOP;
        /*0140*/                   NOP;
"""


def test_machine_code_is_counted() -> None:
    """HFMA2.MMA is no tensor core's, 128B in a modifier no width, REDUX no atomic, a NOP padding."""
    assert sass.count(LISTING) == sass.MachineCode(
        instructions=19,
        barriers=1,
        tensor_instructions=3,
        global_loads={"256": 1, "128": 1, "64": 1, "32": 1, "16": 1, "bulk": 1},
        global_stores={"64": 1},
        atomics=1,
        local_accesses=1,
    )


def kernel_with(*statements: str) -> str:
    parameters = "const bfloat16_t* __restrict__ x, float* __restrict__ h, int num_tokens"
    body = "\n".join(statements)
    return f'extern "C" __global__ void k({parameters});\nextern "C" __global__ void k({parameters}) {{\n{body}\n}}\n'


@pytest.mark.parametrize(
    ("statement", "read", "written"),
    [
        ("*(uint4*)(a + 0) = *(uint4*)(x + ((int)threadIdx.x));", [16], []),
        ("*(uint1*)(x + (8 * i)) = v;", [], [4]),
        ("*(ulonglong4*)(x + 8) = v;", [], [32]),
        ("a[0] = ((float)x[((int)threadIdx.x)]);", [2], []),
        ("x[((int)threadIdx.x)] = ((bfloat16_t)a[0]);", [], [2]),
        ("if (x[0] == x[1]) { a[0] = 1; }", [2], []),
        ("tl::cp_async_gs<16>((&(tile[8])), (&(x[blockIdx.x])));", [16], []),
        ("tl::cp_async_gs_conditional<8>((&(tile[8])), (&(x[0])), (threadIdx.x < num_tokens));", [8], []),
        ("float4 v = *(float4*)(next_x + 4); v.x = threadIdx.x;", [], []),
        ("a[0] = x[0]; *(uint2*)(b + 0) = *(uint2*)(x + 4); *(uint4*)(x + 8) = x[1];", [2, 8], [16]),
    ],
)
def test_widths_are_read_from_the_source(statement: str, read: list[int], written: list[int]) -> None:
    assert accesses(kernel_with(statement)) == {"x": (read, written), "h": ([], [])}


def test_an_access_in_another_spelling_is_refused() -> None:
    """A width that goes unseen would pass for a wide one."""
    with pytest.raises(MHCError, match=r"x: expected a cast, an index or cp_async_gs, got line 2"):
        accesses(kernel_with("tl::tma_load(desc, &(x[0]));"))


def test_full_matrix_has_every_size() -> None:
    full = matrix.full(tuple(FAMILIES))
    assert len({subject.key("") for subject in full}) == len(full)
    for kernel in ("project", "aggregate", "post", "project_backward", "post_backward"):
        sizes = {(s.num_streams, s.hidden_size, s.dtype) for s in full if s.kernel == kernel and not s.variant}
        assert len(sizes) == prod(map(len, (matrix.STREAMS, matrix.WIDTHS, plans.BYTES)))
    for kernel in ("coefficients", "coefficients_backward", "head_coefficients_backward"):
        assert {s.num_streams for s in full if s.kernel == kernel} == set(matrix.STREAMS)


def test_representative_builds_are_part_of_the_full_matrix() -> None:
    """Or the stored rows, which are the full matrix, lacked some of what the builds are compared with."""
    full = {subject.key("") for subject in matrix.full(tuple(FAMILIES))}
    assert {subject.key("") for subject, _ in matrix.representative()} <= full


def test_variants_differ_from_the_kernel() -> None:
    for subject in matrix.variants():
        shape = replace(matrix.STUDIED, dtype=subject.dtype or "bfloat16")
        plain = min(matrix.subjects(shape, [subject.kernel]), key=lambda s: bool(s.variant))
        assert subject.launch.parameters.keys() - {"has_h_res"} == plain.launch.parameters.keys() - {"has_h_res"}
        assert subject.launch.parameters != plain.launch.parameters


@pytest.mark.parametrize("dtype", plans.BYTES)
@pytest.mark.parametrize("n", matrix.STREAMS)
def test_shared_memory_fits_every_architecture(n: int, dtype: str) -> None:
    """Every plan of `project_backward` fits; float32 at n = 4 takes 96.5 of the 99 KB that sm_120 has."""
    from mhc_tilelang.compiler.tracing import trace
    from mhc_tilelang.perf.inspect.fragments import shared_bytes

    shape = replace(matrix.STUDIED, num_streams=n, dtype=dtype)
    for subject in matrix.subjects(shape, ["project_backward"]):
        needed = shared_bytes(trace(subject.kernel, subject.launch.parameters))
        assert needed <= min(limits.shared_bytes_per_block for limits in ARCHITECTURES.values())


def test_a_truncated_fragment_is_found() -> None:
    """A fragment whose first loop covers a part of it."""
    import tilelang.language as T

    from mhc_tilelang.compiler.cuda_source import generate_from
    from mhc_tilelang.perf.inspect.fragments import find_truncated

    @T.prim_func
    def cut(values: T.Tensor[(8, 32), T.float32], halves: T.Tensor[(2, 4, 32), T.float32]):
        with T.Kernel(1, threads=32):
            whole = T.alloc_fragment((8, 32), T.float32)
            T.copy(values, whole)
            for k, t in T.Parallel(4, 32):
                halves[0, k, t] = whole[k, t]
            for k, t in T.Parallel(4, 32):
                halves[1, k, t] = whole[k + 4, t]

    assert find_truncated(cut, generate_from(cut, "sm_90a").code) == ["whole: 4 registers a thread for 8 elements"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"machine_reads": {"x": {"256": 2}}}, None),
        ({"hidden_size": 1281, "stream_reads": {"x": [2]}}, None),
        ({"spill_bytes": 8}, "8 bytes of spills, 0 accesses to local memory"),
        ({"local_accesses": 2}, "0 bytes of spills, 2 accesses to local memory"),
        ({"shared_bytes": 240_000}, "240000 bytes of shared memory, 232448 are available"),
        ({"blocks": 0}, "no block fits a multiprocessor, for its registers"),
        ({"atomics": 1}, "1 atomics"),
        ({"truncated": ["x: 4 registers a thread for 8 elements"]}, "x: 4 registers a thread for 8 elements"),
        ({"stream_reads": {"x": [8, 16]}}, "x read 8 bytes wide"),
        ({"stream_reads": {"x": [4], "h": [4]}}, "x, h read 4 bytes wide"),
        ({"stream_writes": {"x_next": [4]}}, "x_next written 4 bytes wide"),
        (
            {"machine_writes": {"x_next": {"32": 16}}},
            "4 of 4 accesses by which x_next is written split: 16×4 bytes",
        ),
    ],
)
def test_faults_are_named(changes: dict, fault: str | None) -> None:
    row = replace(ROW, **changes)
    assert faults(row) == ([] if fault is None else [fault])
    assert with_faults(row).startswith(f"post, n = 4, C = {row.hidden_size}, bfloat16, sm_90a: ")


def test_table_fits_a_terminal() -> None:
    wide = replace(
        ROW,
        kernel="project_backward",
        variant="16-bit layer",
        dtype="float32",
        shared_bytes=98816,
        limiter="shared memory",
        instructions=12345,
        barriers=100,
        tensor_instructions=160,
        spill_bytes=1000,
        global_loads={"128": 14, "32": 13},
        global_stores={"64": 16, "32": 34},
    )
    text = table.report([ROW, wide, replace(ROW, arch="sm_120a")])
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("sm_120a") == 1
    assert "5×16 20×4" in text


def test_rows_are_stored_and_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"versions": {"nvcc": "13"}, "rows": [vars(ROW)]}))
    assert stored.read(file) == ({"nvcc": "13"}, [ROW])
    file.write_text("{}")
    with pytest.raises(MHCError, match=r"expected stored rows in .*rows\.json, got KeyError"):
        stored.read(file)


def test_unknown_kernel_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "posts"]) == 1
    message = capsys.readouterr().err
    assert "got posts" in message
    assert ", ".join(FAMILIES) in message


def test_peer_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert cli.main(["inspect", "--peers", "tile-kernels"]) == 1
    assert "tile-kernels is not installed (pip install tile-kernels)" in capsys.readouterr().err


def test_peer_is_built_for_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "--peers", "tile-kernels", "--streams", "8"]) == 1
    assert "tile-kernels: expected n = 4, bfloat16, got n = [8], ['bfloat16']" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["sm_70", "sm_90", ","])
def test_unknown_architecture_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["inspect", "post", "--arch", given])
    assert "expected any of sm_80, sm_90a, sm_100a, sm_120a, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--full --widths 1280", "--widths: expected none beside --full, got [1280]"),
        ("--representative --arch sm_80", "--arch: expected none beside --representative, got ['sm_80']"),
        ("sinkhorn --source --json rows.json", "--json: expected none beside --source, got rows.json"),
        ("sinkhorn --explain --streams 2", "--streams: expected none beside --explain, got [2]"),
        ("sinkhorn --peers tile-kernels", "KERNEL: expected none beside --peers, got sinkhorn"),
    ],
)
def test_options_that_would_be_ignored(arguments, message, capsys):
    """Refused, with the one that decides."""
    assert cli.main(["inspect", *arguments.split()]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kernel", FAMILIES)
def test_every_family_is_built(kernel: str) -> None:
    """`inspect` builds it at the studied shape: some call launches it."""
    assert matrix.subjects(matrix.studied_shape(kernel), [kernel])


def test_a_family_that_no_call_launches_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FAMILIES, "forgotten", ("post", "post_kernel"))
    for option in ((), ("--explain",), ("--full",)):
        assert cli.main(["inspect", "forgotten", *option]) == 1
        assert "forgotten: expected a call that launches it, got none of perf.launches" in capsys.readouterr().err


def test_a_family_that_these_sizes_lack_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The error names it: at n = 8 no GPU's boundary is fused backward."""
    assert cli.main(["inspect", "post", "boundary_backward", "--streams", "8"]) == 1
    assert "boundary_backward: expected a call that launches it, got none at these sizes" in capsys.readouterr().err


def test_a_call_names_its_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "post_pre_delayed"]) == 1
    message = capsys.readouterr().err
    assert "post_pre_delayed is a call; expected a kernel, of those it launches: " in message
    for kernel in ("split_phi", "post_project", "coefficients"):
        assert kernel in message
    assert "boundary_backward" not in message


def test_alone_it_shows_what_is_stored(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And builds nothing; any option builds."""
    monkeypatch.setattr(built, "build_all", lambda _: pytest.fail("built something"))
    assert cli.main(["inspect"]) == 0
    out = capsys.readouterr().out
    versions, rows = stored.read(stored.KERNELS)
    assert f"nvcc {versions['nvcc']}" in out
    assert f"of {len(rows)} stored builds" in out
    assert all(arch in out for arch in ARCHITECTURES)
    assert all(f"\n{kernel} " in out for kernel in FAMILIES)
    monkeypatch.setattr(built, "build_all", lambda wanted: [replace(ROW, arch=arch) for _, arch in wanted])
    assert cli.main(["inspect", "--arch", "sm_80"]) == 0
    captured = capsys.readouterr()
    assert "stored builds" not in captured.out
    assert re.search(r"inspect: \d+ builds, about \d+ (s|min) on \d+ cores", captured.err)


@pytest.mark.parametrize("columns", [80, 100])
def test_a_page_fits_a_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No line is longer, no word is lost, no table is left as Markdown, and a legend says what columns mean."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["inspect", "post", "sinkhorn", "--explain"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert not any(line.startswith("|") for line in out.splitlines())
    bare = re.compile(r"[\s|`*:,-]")
    printed = bare.sub("", out)
    pages = "".join(map(explain.page, ("post", "sinkhorn")))
    for line in pages.replace("```python", "").splitlines():
        for cell in line.split("|") if line.startswith("|") else [line]:
            assert bare.sub("", cell) in printed, line
    assert out.rstrip().endswith("what is in a loop counts once.")
    for column in ("registers", "spills", "shared", "blocks", "tensor", "barriers", "read", "written"):
        assert column in out[out.index("## Legend") :]
