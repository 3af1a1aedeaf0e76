"""The package's kernels: what is counted from their code against the formulas, and as it is printed.

Would catch: a kernel that moves a stream tensor twice, a formula that forgets a workspace, a call that launches other
kernels on meta tensors than on a device's, a small tensor taken for a stream, a sum in the table that its rows do not
give.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_tilelang import cli, compiler
from mhc_tilelang.compiler.recording import record_launches
from mhc_tilelang.kernels import FAMILIES, boundary_plans, projection_plans
from mhc_tilelang.perf.calls.cases import (
    BACKWARD_KERNELS,
    BOUNDARY_KERNELS,
    FLOAT8_KERNELS,
    KERNELS,
    POST_PRE,
    POST_PRE_BACKWARD,
    POST_PRE_DELAYED,
    POST_PRE_QUANTIZED,
    Case,
    Shape,
)
from mhc_tilelang.perf.calls.every_call import every_call
from mhc_tilelang.perf.calls.launches import launches
from mhc_tilelang.perf.calls.table import AGGREGATED, CALLS
from mhc_tilelang.perf.traffic.audited import Audited, audit_call
from mhc_tilelang.perf.traffic.command import PARALLEL_BLOCKS
from mhc_tilelang.perf.traffic.formulas import traffic
from mhc_tilelang.perf.traffic.report import BACKWARD, FORWARD, formula

FORWARD_BOUNDARIES = (POST_PRE, POST_PRE_DELAYED, POST_PRE_QUANTIZED)
BLOCKS = {"cuda": PARALLEL_BLOCKS, "cpu": 2}
CLI_SHAPE = Shape(1100, 4, 640, "bfloat16")  # several slabs of x·phi, several partials of g_phi
SHAPES = [
    pytest.param("cuda", CLI_SHAPE, id="slabs-and-partials"),
    pytest.param("cuda", Shape(70, 2, 333, "float16"), id="odd-channels"),
    pytest.param("cuda", Shape(5000, 8, 32, "float32"), id="one-slab-eight-partials"),
    pytest.param("cpu", Shape(1100, 8, 161, "bfloat16"), id="cpu-partials"),
    pytest.param("cpu", Shape(3, 4, 600, "float32"), id="cpu-slabs"),
]
full = pytest.mark.full
SHAPES += [
    pytest.param(target, Shape(tokens, n, C, dtype), id=f"{target}-n{n}-C{C}-{dtype}-T{tokens}", marks=full)
    for target in BLOCKS
    for n in (2, 4, 8)
    for dtype in ("bfloat16", "float16", "float32")
    for C, tokens in ((1, 1), (1280, 4097), (7168, 9_000))
]


def stream_blocks(shape: Shape, target: str) -> int:
    """Blocks of the projection's backward that share a token's streams."""
    n = shape.num_streams
    plan = projection_plans.projection_backward_plan(n * n + 2 * n, shape.hidden_size, shape.dtype, target, n)
    return n // plan.streams if isinstance(plan, projection_plans.WarpsPlan) else n


@pytest.mark.parametrize("kernel", CALLS)
@pytest.mark.parametrize(("target", "shape"), SHAPES)
def test_every_stream_tensor_moves_once(kernel: str, target: str, shape: Shape) -> None:
    """Traffic is the formula's, but for g_layer_input, which the projection's backward reads per block of streams."""
    mixes = kernel.startswith(("post_pre", "post_head", "identity_post_pre")) and kernel.endswith("_backward")
    if mixes and not boundary_plans.backward_is_fused(shape.num_streams, target):
        pytest.skip("separate kernels, which have cases of their own")
    counted = audit_call(Case(kernel, shape), target, BLOCKS[target])
    unit = shape.num_tokens * shape.hidden_size * shape.itemsize
    again = (stream_blocks(shape, target) - 1) * unit if kernel == AGGREGATED else 0
    read, written = formula(kernel, shape.num_streams, shape.itemsize)
    assert counted.repeated == again
    assert (counted.stream_read, counted.stream_written) == (read * unit + again, written * unit)
    assert counted.small <= counted.small_per_block


@pytest.mark.parametrize("kernel", KERNELS + BACKWARD_KERNELS + BOUNDARY_KERNELS + FLOAT8_KERNELS)
@pytest.mark.parametrize(("target", "shape"), SHAPES)
def test_formulas_are_what_the_code_does(kernel: str, target: str, shape: Shape) -> None:
    """The benchmark's bytes, small tensors included."""
    case, n = Case(kernel, shape), shape.num_streams
    plan = projection_plans.projection_plan(n * n + 2 * n, n, shape.hidden_size, shape.dtype, target)
    slabs = num_slabs(kernel if kernel in FORWARD_BOUNDARIES else "project", shape, target)
    stated, counted = traffic(case, plan, slabs), audit_call(case, target, BLOCKS[target])
    again = counted.repeated  # of separate kernels, where the backward of a boundary is not fused
    assert again == 0 or (kernel == POST_PRE_BACKWARD and not boundary_plans.backward_is_fused(n, target))
    assert (stated.stream_read, stated.stream_written) == (counted.stream_read - again, counted.stream_written)
    assert stated.small == counted.small


def num_slabs(kernel: str, shape: Shape, target: str) -> int:
    """Return the number of slabs of partial sums that the projection of a call writes."""
    [found] = {
        one.arguments["partial"].shape[0]
        for one in launches(Case(kernel, shape), target, BLOCKS[target])
        if "partial" in one.arguments
    }
    return int(found)


@pytest.mark.parametrize("kernel", [POST_PRE, POST_PRE_DELAYED])
@pytest.mark.parametrize("num_tokens", [1, 38])
def test_few_tokens_are_counted_as_they_are_launched(num_tokens: int, kernel: str) -> None:
    """In one launch, which does not read x_next again; blocks' sums and counters included."""
    case = Case(kernel, Shape(num_tokens, 4, 144, "bfloat16"))
    assert [one.family for one in launches(case, "cuda", BLOCKS["cuda"])] == ["post_pre"]
    counted = audit_call(case, "cuda", BLOCKS["cuda"])
    stated = traffic(case, projection_plans.projection_plan(24, 4, 144, "bfloat16", "cuda"), num_slabs=3)
    assert counted.repeated == 0
    assert counted.stream_read == counted.stream_written == 5 * num_tokens * 144 * 2
    assert (stated.stream_read, stated.stream_written) == (counted.stream_read, counted.stream_written)
    assert stated.small == counted.small


def test_shapes_reach_both_forms_of_the_partial_sums() -> None:
    """Otherwise the formulas of slabs and partials would be compared at none."""
    for target in BLOCKS:
        shapes = [one.values[1] for one in SHAPES if one.values[0] == target and not one.marks]
        slabs = {num_slabs("project", s, target) > 1 for s in shapes}
        partials = {len(launches(Case("project_backward", s), target, BLOCKS[target])) for s in shapes}
        assert slabs == {True, False}
        assert partials == {1, 2}


def test_every_family_is_counted() -> None:
    # By warps and by tiles; few tokens.
    shapes = CLI_SHAPE, replace(CLI_SHAPE, dtype="float32"), replace(CLI_SHAPE, num_tokens=1)
    done = {one.family for call, shape in product(CALLS, shapes) for one in launches(Case(call, shape), "cuda", 264)}
    assert done == set(FAMILIES)
    assert set(CALLS) >= {*KERNELS, *BACKWARD_KERNELS, *BOUNDARY_KERNELS}


def test_a_sublayer_is_no_worse_than_the_papers_kernels() -> None:
    """Forward 4n + 2; x is read once by each of the two kernels of pre's backward, and once by post's."""
    shape, n = CLI_SHAPE, CLI_SHAPE.num_streams
    unit = shape.num_tokens * shape.hidden_size * shape.itemsize

    def total(kernels: tuple[str, ...]) -> Audited:
        return sum((audit_call(Case(kernel, shape), "cuda", BLOCKS["cuda"]) for kernel in kernels), start=Audited())

    forward, backward = total(FORWARD), total(BACKWARD)
    assert forward.stream_read + forward.stream_written <= (4 * n + 2) * unit
    assert backward.stream_once == (6 * n + 4) * unit


@pytest.mark.parametrize(
    ("call", "most_launches", "most_stream", "most_small"),
    [
        ("post_pre", 3, 14, 0.51),
        ("post_pre_delayed", 3, 10, 0.52),
        ("post_head", 4, 14, 0.5),
        ("identity_post_pre", 3, 14, 0.24),
        ("post_pre_backward", 4, 21, 2.7),
        ("identity_post_pre_backward", 3, 20, 0.73),
        ("post_head_backward", 4, 21, 1.9),
        ("expand_pre", 5, 7, 0.5),
        ("expand_pre_backward", 9, 10, 1.5),
    ],
)
def test_a_boundary_stays_within_its_limits(
    call: str, most_launches: int, most_stream: float, most_small: float
) -> None:
    """Limits at the paper's 27B width: launches, vectors of C a token (3n + 2, 2n + 2, 4n + 5, n + 3, n + 6), small
    bytes.

    Of the forward's small ones, one launch splits phi, whose halves are 0.1C, and 8 slabs of partial sums are 0.3C; of
    the backward's, sums over 64 channels are 1.25C, and the partial g_phi of 13 ranges, which fill the last wave, 1.2C.
    An identity connection has 2n rows of phi instead of n² + 2n, and n sums over channels instead of n² + n.
    """
    shape = Shape(4096, 4, 2560, "bfloat16")
    unit = shape.num_tokens * shape.hidden_size * shape.itemsize
    counted = audit_call(Case(call, shape), "cuda", BLOCKS["cuda"])
    assert len(launches(Case(call, shape), "cuda", BLOCKS["cuda"])) <= most_launches
    assert counted.stream_read + counted.stream_written <= most_stream * unit
    assert counted.small <= most_small * unit


@pytest.mark.parametrize("way", ["post_pre", "post_pre_backward"])
def test_an_identitys_boundary_takes_no_more_than_sinkhorns(way: str) -> None:
    """Of launches for every n and dtype, and of the stream's bytes; small ones have limits of their own above.

    Would catch a launch that is joined with h_res alone.
    """
    for n, dtype, tokens in product((1, 2, 4, 8), ("bfloat16", "float32"), (5, 1100, 4097)):
        shape = Shape(tokens, n, 640, dtype)
        identity, sinkhorn = (len(launches(Case(f"{of}{way}", shape), "cuda", 264)) for of in ("identity_", ""))
        assert identity <= sinkhorn, shape
        assert formula(f"identity_{way}", n) == formula(way, n)  # which are those of the code


@pytest.mark.parametrize("kernel", CALLS)
@pytest.mark.parametrize("shape", [Shape(1100, 2, 80, "bfloat16"), Shape(3, 4, 600, "float32")])
def test_recorded_calls_are_those_on_tensors(kernel: str, shape: Shape, every_kernel_idle: None) -> None:
    """Meta tensors give the families, parameters and scalars of real tensors of the same shapes.

    Catches a decision that looks at something that meta tensors lack.
    """
    found = record_launches(every_call(shape, torch.device("cpu"))[kernel])
    expected = launches(Case(kernel, shape), "cpu", torch.get_num_threads())
    assert [(one.family, one.parameters) for one in found] == [(one.family, one.parameters) for one in expected]
    for one, other in zip(found, expected, strict=True):
        facts = [{name: getattr(value, "shape", value) for name, value in r.arguments.items()} for r in (one, other)]
        assert facts[0] == facts[1]


@pytest.fixture
def every_kernel_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is compiled or run."""
    monkeypatch.setattr(compiler, "_load", lambda *_: lambda **_: None)
    monkeypatch.setattr(compiler, "_kernels", {})


def test_streams_are_told_from_small_tensors() -> None:
    """A stream may have as many tokens as phi has rows, and as few channels as there are coefficients.

    They are told apart in whatever parts a kernel sees the stream's channels.
    """
    for shape in (Shape(24, 4, 24, "float32"), Shape(1, 4, 1, "bfloat16"), Shape(4096, 4, 2560, "bfloat16")):
        for target in BLOCKS:

            def streams(kernel: str, shape: Shape = shape, target: str = target) -> list[tuple[str, ...]]:
                return [one.streams for one in launches(Case(kernel, shape), target, BLOCKS[target])]

            assert streams("project")[-1] == ("x",)
            assert streams("coefficients") == [()]
            assert streams("aggregate_backward") == [("g_layer_input", "x")]
            of_streams = [set(names) for names in streams("expand_pre") if names]
            assert of_streams == [{"h", "x"}, {"x", "layer_input"}]
            mixing = [names for names in streams("post_pre_backward") if "g_x" in names]
            assert len(mixing) == (1 if boundary_plans.backward_is_fused(4, target) else 2)
            assert set(mixing[-1]) >= {"g_x_next", "x", "layer_output", "g_x", "g_layer_output"}


SIZES = ["--widths", "640", "--tokens", "1100"]


def rows_of(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    file = tmp_path / "traffic.json"
    assert cli.main(["traffic", *SIZES, *options, "--json", str(file)]) == 0
    loaded: list[dict[str, Any]] = json.loads(file.read_text())
    return loaded


def test_json(tmp_path: Path) -> None:
    rows = {row["kernel"]: row for row in rows_of(tmp_path)}
    assert set(rows) == {*CALLS}
    keys = "kernel num_streams hidden_size dtype num_tokens reads_C writes_C small_C"
    keys += " paper_reads_C paper_writes_C floor_C"
    for row in rows.values():
        assert list(row) == keys.split()
        assert (row["num_streams"], row["hidden_size"], row["dtype"]) == (4, 640, "bfloat16")
        assert (row["reads_C"], row["writes_C"]) == formula(row["kernel"], 4)
    papers = {name: (row["paper_reads_C"], row["paper_writes_C"], row["floor_C"]) for name, row in rows.items()}
    assert papers["post"] == (5, 4, 9)
    assert papers["project"] == (4, 0, 4)
    assert papers["post_backward"] == (None, None, 14)
    assert papers["sinkhorn"] == (None, None, None)
    assert rows["sinkhorn"]["small_C"] == pytest.approx(2 * 16 * 4 / (640 * 2))


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sums are those of the rows, and what is read again is marked."""
    rows = {row["kernel"]: row for row in rows_of(tmp_path)}
    out = capsys.readouterr().out
    assert "cuda, n = 4, C = 640, bfloat16, 1100 tokens" in out
    assert line(out, "post ") == ["5", "4", f"{rows['post']['small_C']:.3f}"]
    assert line(out, AGGREGATED)[:2] == ["5", "4"]
    small = {way: sum(rows[kernel]["small_C"] for kernel in way) for way in (FORWARD, BACKWARD)}
    forward, backward = out.split("a sublayer, forward")[1].split("a sublayer, backward")
    apart, fused = "ours, kernel by kernel ", "ours, fused across the boundary, as ResidualStream runs it "
    assert line(forward, apart) == ["13", "5", "18"]
    assert forward.split(apart)[1].split()[3] == f"{small[FORWARD]:.3f}"
    assert line(backward, apart) == ["19", "9", "28"]
    assert backward.split(apart)[1].split()[3] == f"{small[BACKWARD]:.3f}"
    assert line(forward, fused) == ["9", "5", "14"]
    assert line(backward, fused) == ["15", "5", "20"]
    assert line(forward, "the paper's kernels, 4n + 2 ") == ["13", "5", "18"]
    assert line(forward, "the paper's Table 2, unfused, 8n + 2 ") == ["21", "13", "34"]
    assert line(backward, "the released kernels, both g_x added, 9n + 3 ") == ["26", "13", "39"]


def line(text: str, start: str) -> list[str]:
    """The three cells behind the first line that starts so."""
    [found, *_] = [one for one in text.splitlines() if one.startswith(start)]
    return found.removeprefix(start).split()[:3]


@pytest.mark.full
def test_options_arrive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A CPU multiplies phi whole: no halves, so fewer small bytes than a GPU."""
    options = ("--kernels", "project", "--device", "cpu", "--streams", "2", "--dtype", "float32", "float16")
    rows = rows_of(tmp_path, *options)
    assert [(row["kernel"], row["num_streams"], row["dtype"]) for row in rows] == [
        ("project", 2, "float32"),
        ("project", 2, "float16"),
    ]
    assert "cpu, n = 2, C = 640, float16, 1100 tokens" in capsys.readouterr().out
    [gpu] = rows_of(tmp_path, "--kernels", "project", "--streams", "2", "--dtype", "float32")
    assert rows[0]["small_C"] < gpu["small_C"]


@pytest.mark.parametrize(
    "options", [["--kernels", "head"], ["--tokens", "0"], ["--streams", "9"], ["--dtype", "int8"], ["--device", "gpu"]]
)
def test_bad_options_exit_2(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["traffic", *options])
    assert f"argument {options[0]}: invalid" in capsys.readouterr().err


def test_what_cannot_be_counted_is_one_line_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens beyond what the loops that depend on them can be laid out for."""
    assert cli.main(["traffic", "--kernels", "sinkhorn", "--widths", "1", "--tokens", "100000000"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mhc-tilelang traffic: audit: ")
    assert error.count("\n") == 1
