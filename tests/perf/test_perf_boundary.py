"""The boundary's baselines: plain torch as a whole and part by part, and the separate kernels; what is timed of them.

Would catch: a form that is another function, one that drops the aggregation's share of a gradient or rounds phi, parts
that are joined at the wrong tensors, a block that drops its tail, the slowest form in place of the fastest, separate
kernels that are not checked, a call that no graph takes and that is timed all the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import replace_launch

from mhc_tilelang import cli, reference
from mhc_tilelang.checking import run as checks
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.errors import MHCError
from mhc_tilelang.perf.bench import run as bench
from mhc_tilelang.perf.calls.cases import (
    BOUNDARY_KERNELS,
    BOUNDARY_STEP,
    POST_PRE,
    POST_PRE_BACKWARD,
    POST_PRE_DELAYED,
    Case,
    Shape,
)
from mhc_tilelang.perf.calls.every_call import Given
from mhc_tilelang.perf.calls.table import GRADIENTS
from mhc_tilelang.perf.calls.workloads import Workload, workload
from mhc_tilelang.perf.figures.flops import flops
from mhc_tilelang.perf.measure.timing import Run, Sample
from mhc_tilelang.perf.torch_forms import boundary as boundary_forms
from mhc_tilelang.perf.torch_forms import boundary_parts
from mhc_tilelang.perf.torch_forms import streams as stream_forms
from mhc_tilelang.perf.torch_forms import tokens as token_forms
from mhc_tilelang.perf.torch_forms.baselines import COMPILED, EAGER, TOLERANCE, Form, bind, prepare

CPU = torch.device("cpu")
EVERY = (*BOUNDARY_KERNELS, BOUNDARY_STEP)
NAMES = ("x", "layer_output", "h_post", "h_res", "phi", "alpha", "bias")


def clock(run: Run) -> Sample:
    run()
    return Sample(1e-3)


def make(kernel: str, n: int = 4, dtype: str = "bfloat16", tokens: int = 37) -> tuple[Case, Given, Workload]:
    case = Case(kernel, Shape(tokens, n, 64, dtype))
    stream = Given.of(case.shape, CPU)
    load = workload(case, stream)
    load.run()
    return case, stream, load


def verified(case: Case, stream: Given, load: Workload, baselines: str = "eager") -> list[Any]:
    """Every form of torch that the benchmark times, and the separate kernels; each through its guard."""
    selection = boundary_parts.Selection(case.shape, stream, baselines, clock)
    with torch.no_grad():
        bench.verify_separate(case, load)
        return bench.torch_forms(case, load, selection)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten tokens at a time: three blocks and a tail."""
    monkeypatch.setattr(stream_forms, "BLOCK_BYTES", 10 * 4 * 64 * 4)
    monkeypatch.setattr(token_forms, "BLOCK_TOKENS", 10)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.full), "float32"])
@pytest.mark.parametrize("kernel", EVERY)
def test_every_form_passes_its_guard(kernel: str, dtype: str) -> None:
    forms = verified(*make(kernel, dtype=dtype))
    blocks = [boundary_parts.BLOCKS] if kernel in (POST_PRE, POST_PRE_DELAYED) else []
    assert [form.form for form in forms] == [boundary_parts.NAME, *blocks]


@pytest.mark.parametrize("kernel", EVERY)
def test_eager_forms_of_the_whole_pass_the_guard(kernel: str) -> None:
    """They are for GPUs: a CPU does not time them."""
    _, _, load = make(kernel)
    [form] = [form for form in boundary_forms.FORMS[kernel] if EAGER in form.modes]
    allowed = boundary_forms.tolerances(kernel, torch.bfloat16)
    assert prepare(kernel, (form,), (EAGER,), load.arguments, load.outputs(), allowed)


@pytest.mark.full
@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("kernel", EVERY)
def test_every_form_passes_its_guard_at_other_stream_counts(kernel: str, n: int) -> None:
    """Of 2000 tokens: the guard is for many elements, of which few are rounded the other way. Of 37 tokens three are
    9e-5 of x_next at n = 8, and g_phi is 3e-4 off.
    """
    assert verified(*make(kernel, n=n, tokens=2000))


@pytest.mark.full
@pytest.mark.parametrize("kernel", EVERY)
def test_compiled_forms_pass_the_guard(kernel: str) -> None:
    assert COMPILED in {form.mode for form in verified(*make(kernel), baselines="all")}


def float64(kernel: str, arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    """The reference's results, named as the forms name them."""
    exact = {name: numpy64(t) if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
    taken = [exact[name] for name in NAMES]
    results: tuple[Any, ...] = ()
    if kernel == POST_PRE_DELAYED:
        found = reference.delayed_post_pre(*taken[:4], exact["h_pre"], *taken[4:], exact["spec"])
        return dict(zip((*boundary_forms.FORWARD_RESULTS, "h_pre_next"), found, strict=True))
    if kernel != POST_PRE_BACKWARD:
        results = reference.post_pre(*taken, exact["spec"])
    named = dict(zip(boundary_forms.FORWARD_RESULTS, results, strict=bool(results)))
    if kernel == POST_PRE:
        return named
    upstream = [exact[name] for name in boundary_forms.UPSTREAM]
    gradients = reference.post_pre_backward(*upstream, *taken, exact["spec"])
    return named | dict(zip(GRADIENTS, gradients, strict=False))


@pytest.mark.parametrize("kernel", EVERY)
def test_forms_and_kernels_match_float64(kernel: str) -> None:
    """A float32 stream, whose rounding hides nothing: what all are compared with is the paper's formulas."""
    _, _, load = make(kernel, dtype="float32")
    expected = float64(kernel, load.arguments)
    results = {"kernel": load.outputs()}
    for form in boundary_forms.FORMS[kernel]:
        if EAGER in form.modes:
            outputs = {name: torch.full_like(tensor, torch.nan) for name, tensor in load.outputs().items()}
            bind(form, EAGER, {**load.arguments, **outputs})()
            results[form.name] = outputs
    for name, got in results.items():
        assert set(got) == set(expected)
        for output, exact in expected.items():
            error = np.linalg.norm(numpy64(got[output]) - exact) / np.linalg.norm(exact)
            assert error <= TOLERANCE[torch.float32], (name, output)


def low_phi(phi: torch.Tensor, **tensors: Any) -> None:
    boundary_forms.post_pre(phi=(phi.view(torch.int32) & ~0x1FFF).view(torch.float32), **tensors)


def transposed(h_res: torch.Tensor, **tensors: Any) -> None:
    boundary_forms.post_pre(h_res=h_res.mT, **tensors)


def not_aggregated(g_layer_input: torch.Tensor, **tensors: Any) -> Callable[[], None]:
    return boundary_forms.backward_recorded(g_layer_input=torch.zeros_like(g_layer_input), **tensors)


def from_outside_only(g_x_next: torch.Tensor, **tensors: Any) -> Callable[[], None]:
    return boundary_forms.backward_recorded(g_x_next=1.01 * g_x_next, **tensors)


@pytest.mark.parametrize(
    ("kernel", "wrong", "output"),
    [
        (POST_PRE, low_phi, "layer_input|h_post_next|h_res_next"),
        (POST_PRE, transposed, "x_next"),
        (POST_PRE_BACKWARD, not_aggregated, "g_x"),
        (POST_PRE_BACKWARD, from_outside_only, "g_x"),
    ],
)
def test_a_wrong_form_is_refused(kernel: str, wrong: Any, output: str) -> None:
    """Phi in TF32, a transposed matrix, a share of a gradient that is missing, one that is 1 % off."""
    _, _, load = make(kernel)
    form = Form("wrong", wrong, modes=(EAGER,), binds=kernel == POST_PRE_BACKWARD)
    allowed = boundary_forms.tolerances(kernel, torch.bfloat16)
    with pytest.raises(MHCError, match=f"eager: wrong: expected ({output}) within"):
        prepare(kernel, (form,), (EAGER,), load.arguments, load.outputs(), allowed)


def test_wrong_parts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that forgets what came in from outside."""

    def forgetful(g_x_next: torch.Tensor, **tensors: torch.Tensor) -> None:
        boundary_parts.sum_as_written(g_x_next=torch.zeros_like(g_x_next), **tensors)

    case, stream, load = make(POST_PRE_BACKWARD)
    selection = boundary_parts.Selection(case.shape, stream, "eager", clock)
    selection.complete(case)
    selection.ranked[boundary_parts.SUM] = [(Form("forgetful", forgetful), EAGER)]
    with pytest.raises(MHCError, match="fastest parts: expected g_x within"):
        boundary_parts.prepare_parts(case, selection, load.arguments, load.outputs(), {})


def test_wrong_separate_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case, _, load = make(POST_PRE_BACKWARD)
    replace_launch(monkeypatch, "aggregate_backward", lambda *_, out, **__: out.zero_())
    with pytest.raises(MHCError, match="separate kernels: expected g_"):
        bench.verify_separate(case, load)


def test_the_fastest_part_of_each_mode_is_taken() -> None:
    """Times are made up: a form takes the less, the later it is timed for the first time."""
    case, stream, _ = make(POST_PRE)
    seconds: dict[Run, float] = {}
    selection = boundary_parts.Selection(
        case.shape, stream, "eager", lambda run: Sample(seconds.setdefault(run, 1.0 / (1 + len(seconds))))
    )
    last = stream_forms.FORMS["post"][-1]
    assert selection.fastest("post", EAGER) == (last, EAGER)
    compiled = Form("quick", stream_forms.post_streams)
    selection.ranked["post"].insert(0, (compiled, COMPILED))
    assert selection.fastest("post", EAGER) == (last, EAGER)
    assert selection.fastest("post", COMPILED) == (compiled, COMPILED)


def test_flops_are_those_of_the_parts() -> None:
    """n = 2, C = 3: the backward adds three gradients of the stream up."""
    parts = ("post", "project", "coefficients", "aggregate")
    forward, backward = (sum(flops(part + way, 2, 3, 5) for part in parts) for way in ("", "_backward"))
    assert flops(POST_PRE, 2, 3, 5) == flops(POST_PRE_DELAYED, 2, 3, 5) == forward
    assert flops(POST_PRE_BACKWARD, 2, 3, 5) == backward + 5 * 3 * 2 * 3
    assert flops(BOUNDARY_STEP, 2, 3, 5) == forward + flops(POST_PRE_BACKWARD, 2, 3, 5)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    """The file and the table of a benchmark of every boundary kernel, with a clock that makes each call take longer."""
    ticks = iter(range(1, 100_000))

    def slower(run: Run) -> Sample:
        run()
        return Sample(1e-3 * next(ticks))

    monkeypatch.setattr(bench, "clock_for", lambda *_: slower)
    monkeypatch.setattr(checks, "iterate", lambda *_: [])
    file = tmp_path / "boundary.json"
    options = ["--device", "cpu", "--widths", "64", "--tokens", "32", "--repeats", "2", "--kernels", *EVERY]
    assert cli.main(["bench", *options, "--json", str(file)]) == 0
    return file, capsys.readouterr().out


def test_table_and_json(results: tuple[Path, str]) -> None:
    file, out = results
    found = {result["kernel"]: result for result in json.loads(file.read_text(encoding="utf-8"))["results"]}
    assert tuple(found) == EVERY
    for kernel, result in found.items():
        separate = result["separate"]
        assert separate["over_kernel"] == pytest.approx(separate["time"]["median"] / result["time"]["median"])
        assert separate["error"] == 0  # the same bits: a CPU's backward is by the separate kernels
        [line] = [line for line in out.splitlines() if line.split(" ")[0].rstrip("*") == kernel]
        assert f"  {separate['over_kernel']:.2f}×  " in line
        parts = next(form["parts"] for form in result["torch"] if form["form"] == boundary_parts.NAME)
        assert parts[0].startswith("aggregate_backward: " if kernel == POST_PRE_BACKWARD else "post: ")
        assert not result["cuda_graph"]
    unit = 32 * 64 * 2
    assert found[POST_PRE]["traffic"]["stream_read"] == 9 * unit
    assert found[POST_PRE_BACKWARD]["traffic"]["stream_written"] == 9 * unit  # project_backward's, post_backward's
    assert found[BOUNDARY_STEP]["traffic"]["total"] == sum(
        found[kernel]["traffic"]["total"] for kernel in (POST_PRE, POST_PRE_BACKWARD)
    )


def test_report(results: tuple[Path, str], tmp_path: Path) -> None:
    """Pictures of their own, with a bar for the separate kernels."""
    pytest.importorskip("matplotlib")
    file, _ = results
    separate = json.loads(file.read_text(encoding="utf-8"))["results"][0]["separate"]["over_kernel"]
    assert cli.main(["bench", "report", str(file), "--out", str(tmp_path / "report")]) == 0
    pictures = {path.stem for path in (tmp_path / "report").glob("boundary-*.svg")}
    assert pictures == {f"boundary-{kind}-boundary" for kind in ("roofline", "bandwidth", "speedup")}
    speedup = (tmp_path / "report" / "boundary-speedup-boundary.svg").read_text(encoding="utf-8")
    assert f"{separate:.2f}×  our separate kernels" in speedup
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    [line] = [line for line in text.splitlines() if line.startswith("| `post_pre`")]
    assert line.endswith(f"| {separate:.2f}× |")
