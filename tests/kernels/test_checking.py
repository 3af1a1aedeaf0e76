"""`mhc-tilelang check`: its rows, its JSON, and that a broken kernel fails it.

Would catch: a check that always passes, a failure that the exit status hides, a traceback for a bad --text.
"""

import json

import numpy as np
import pytest
import torch
from helpers import replace_launch

from mhc_tilelang import launch
from mhc_tilelang.checking import real_stream, run
from mhc_tilelang.checking.comparison import Comparison, compare
from mhc_tilelang.checking.inputs import Case, Gradients, Inputs
from mhc_tilelang.checking.run import CHECKS
from mhc_tilelang.cli import main

CPU = torch.device("cpu")
TINY = [Case(4, 192, torch.bfloat16, 5), Case(2, 192, torch.float16, 3)]  # as in `test_of_tests`: built once
ROW = {
    "kernel": str,
    "dtype": str,
    "num_streams": int,
    "hidden_size": int,
    "num_tokens": int,
    "error": float,
    "tolerance": float,
    "torch_error": float,
    "passed": bool,
}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command on two cases and the first bytes of a text; returns its options for both files."""
    monkeypatch.setattr(run, "cases", lambda *_: TINY)
    text, report = tmp_path / "text", tmp_path / "report.json"
    text.write_text("a real stream")
    return ["check", "--device", "cpu", "--text", str(text), "--json", str(report)], report


@pytest.fixture
def transposing_post(monkeypatch):
    post = launch.post

    def transposing(x, layer_output, h_post, h_res, **out):
        return post(x, layer_output, h_post, h_res.transpose(1, 2).contiguous(), **out)

    replace_launch(monkeypatch, "post", transposing)


def test_cases_cover_what_they_say():
    """Every n and dtype, wide and odd widths, one channel, no token."""
    full = run.cases()
    pairs = {(n, dtype) for n in (2, 4, 8) for dtype in run.STREAM_DTYPES}
    pairs |= {(n, torch.bfloat16) for n in range(1, 9)}
    assert {(case.num_streams, case.dtype) for case in full} == pairs
    named = {(case.num_streams, case.dtype) for case in run.cases([3])}
    assert named == {(3, dtype) for dtype in run.STREAM_DTYPES}
    assert {1, 2560} <= {case.hidden_size for case in full}
    assert any(case.hidden_size % 2 and case.hidden_size > 256 for case in full)
    assert {0, 1} <= {case.num_tokens for case in full}
    assert max(case.logit_std for case in full) == 6.0


def test_inputs_make_errors_visible():
    """Logits of standard deviation 2 at every K, alphas apart, h_res not symmetric."""
    for size in (1, 64, 2560):
        inputs = Inputs.of(Case(4, size, torch.float32, 500), CPU)
        logits = inputs.x.flatten(1) @ inputs.phi.T
        normed = logits * torch.rsqrt(inputs.x.flatten(1).square().mean(1, keepdim=True))
        assert 1.6 < normed.std() < 2.4
        assert inputs.alpha.unique().numel() == 3
        assert (inputs.h_res - inputs.h_res.mT).abs().mean() > 0.1


def test_upstream_gradients_make_errors_visible():
    """Not constant, not symmetric, not those of another token, and not the inputs again."""
    case = Case(4, 64, torch.float32, 500)
    inputs, gradients = Inputs.of(case, CPU), Gradients.of(case, CPU)
    for gradient in vars(gradients).values():
        assert 0.9 < gradient.std() < 1.1
        assert (gradient[0] != gradient[1]).all()
    assert (gradients.g_h_res - gradients.g_h_res.mT).abs().mean() > 0.5
    for gradient, given in ((gradients.g_x, inputs.x), (gradients.g_h, inputs.h)):
        assert (gradient != given).float().mean() > 0.99


BOUNDARY = [
    *(("post_pre", output) for output in ("x_next", "layer_input", "h_post", "h_res", "h_pre")),
    ("post_pre_delayed", "layer_input"),
    *(("post_pre_backward", f"g_{name}") for name in ("x", "layer_output", "h_post", "h_res", "phi", "alpha", "bias")),
    *(("expand_pre", output) for output in ("x", "layer_input", "h_post", "h_res", "h_pre")),
    *(("expand_pre_backward", f"g_{name}") for name in ("h", "phi", "alpha", "bias")),
    *(("post_head", output) for output in ("x_next", "output")),
    *(("identity_post_pre", output) for output in ("x_next", "layer_input", "h_post", "h_pre")),
    *(("identity_post_pre_backward", f"g_{name}") for name in ("x", "layer_output", "h_post", "phi", "alpha", "bias")),
    *(("post_head_backward", f"g_{name}") for name in ("x", "layer_output", "h_post", "h_res", "phi", "alpha", "bias")),
]
FUSED = {check for check, _ in BOUNDARY}
BACKWARD = [name for name in CHECKS if name.partition("_backward")[1] or name == "aggregate_gradients"]


@pytest.mark.parametrize("kernel", [name for name in BACKWARD if name not in FUSED])
def test_broken_backward_kernel_fails(kernel, monkeypatch):
    """Whatever it returns, a hundredth too large. Catches a check that is listed and compares nothing."""
    function = kernel.removesuffix("_aggregated")
    launched = getattr(launch, function)

    def too_large(*arguments, **options):
        got = launched(*arguments, **options)
        return tuple(gradient * 1.01 for gradient in got) if isinstance(got, tuple) else got * 1.01

    inputs = Inputs.of(TINY[1], CPU)
    assert run.check_case(kernel, TINY[1], inputs).passed
    replace_launch(monkeypatch, function, too_large)
    assert not run.check_case(kernel, TINY[1], inputs).passed


@pytest.mark.parametrize(("check", "output"), BOUNDARY)
def test_broken_output_of_a_boundary_fails(check, output, monkeypatch):
    """Any one of them, a hundredth too large: each has a bound of its own."""
    function = check.replace("_delayed", "")
    launched = getattr(launch, function)

    def too_large(*arguments, **options):
        got = launched(*arguments, **options)
        return got._replace(**{output: getattr(got, output) * 1.01})

    inputs = Inputs.of(TINY[1], CPU)
    assert run.check_case(check, TINY[1], inputs).passed
    replace_launch(monkeypatch, function, too_large)
    assert not run.check_case(check, TINY[1], inputs).passed


def test_json(tiny, capsys):
    """The schema that reports read; a row per case and kernel, in order. Catches numpy numbers and a renamed key.

    An error of 0 would say that a result was compared with itself.
    """
    options, file = tiny
    assert main(options) == 0
    report = json.loads(file.read_text())
    assert set(report) == {"device", "versions", "passed", "kernels"}
    assert report["passed"] is True
    assert {"mhc-tilelang", "torch", "tilelang", "python"} <= set(report["versions"])
    for row in report["kernels"]:
        assert {name: type(value) for name, value in row.items()} == ROW
        assert 0 <= row["error"] <= row["tolerance"]
        assert row["error"] > 0 or row["kernel"] == "expand"
    names = [row["kernel"] for row in report["kernels"]]
    assert names == [*CHECKS, *CHECKS, *["real stream"] * 3]
    assert [row["num_tokens"] for row in report["kernels"][: -3 : len(CHECKS)]] == [case.num_tokens for case in TINY]
    printed = capsys.readouterr().out
    assert f"{len(names)} of {len(names)} cases passed" in printed
    assert "FAILED" not in printed
    assert all(kernel in printed for kernel in CHECKS)


def test_broken_kernel_fails_the_command(tiny, transposing_post, capsys):
    """The exit status, the table, the last line by name, and the JSON all show the failure."""
    options, file = tiny
    assert main(options) == 1
    report = json.loads(file.read_text())
    assert report["passed"] is False
    assert {row["kernel"] for row in report["kernels"] if not row["passed"]} == {"post", "real stream"}
    printed = capsys.readouterr().out
    assert "FAILED: post, real stream" in printed
    passed = [row["passed"] for row in report["kernels"]]
    assert f"{sum(passed)} of {len(passed)} cases passed" in printed


def test_kernel_that_returns_nan_fails(monkeypatch):
    """NaN compares false with everything: an error that is `> bound` would let it pass."""

    def nowhere(x, *_, out=None):
        return (torch.empty_like(x) if out is None else out).fill_(float("nan"))

    replace_launch(monkeypatch, "post", nowhere)
    row = run.check_case("post", TINY[0], Inputs.of(TINY[0], CPU))
    assert not row.passed
    assert row.error == float("inf")


def test_zero_is_a_right_answer():
    """A result of 0 is no error where exact result, bound and scale are 0, as for a zero stream."""
    zero = np.zeros((2, 3))
    assert compare(Comparison("x_next", zero, zero, zero, zero, zero)).passed
    assert not compare(Comparison("x_next", zero + 1, zero, zero, zero, zero)).passed


@pytest.mark.parametrize("content", [None, b""], ids=["missing", "empty"])
def test_bad_text_is_one_line(content, tmp_path, capsys):
    """Before any kernel is compiled, and without a traceback."""
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    assert main(["check", "--device", "cpu", "--text", str(file)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("mhc-tilelang check: ")
    assert f"--text {file}" in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_directory_as_text_is_one_line(tmp_path, capsys):
    assert main(["check", "--device", "cpu", "--text", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_text_of_one_byte(tmp_path):
    """The shortest text there is, and any bytes, UTF-8 or not."""
    file = tmp_path / "text"
    file.write_bytes(b"\xff")
    tokens = real_stream.read_tokens(file)
    assert tokens.tolist() == [255]
    assert real_stream.check_stream(tokens, torch.float32, CPU).passed


@pytest.mark.parametrize("dtype", run.STREAM_DTYPES)
def test_real_stream_sees_a_transposed_mix(dtype, transposing_post):
    tokens = real_stream.read_tokens(real_stream.default_text())
    row = real_stream.check_stream(tokens, dtype, CPU)
    assert not row.passed


@pytest.mark.full
def test_the_command_executes_cuda_code(monkeypatch, capsys, tmp_path):
    """`--device simt` runs a GPU's kernels; a defect in one of them ends the command with its name."""
    monkeypatch.setattr(run, "small_cases", lambda *_: TINY[:1])
    text = tmp_path / "text"
    text.write_text("a real stream")
    assert main(["check", "--device", "simt", "--text", str(text)]) == 0
    assert "the CUDA code of sm_80, executed on" in capsys.readouterr().out


def test_what_the_executor_finds_fails_the_command(monkeypatch, capsys, tmp_path):
    """A kernel that reads and writes beyond its rows: its name, the thread, exit status 1."""
    from dataclasses import replace

    from mhc_tilelang import compiler
    from mhc_tilelang.compiler.simt import target

    generated = target.load_or_generate

    def damaged(family, parameters, arch):
        source, signature = generated(family, parameters, arch)
        return replace(source, code=source.code.replace("threadIdx.x) < 18)", "threadIdx.x) < 19)")), signature

    monkeypatch.setattr(target, "load_or_generate", damaged)
    monkeypatch.setattr(compiler, "_kernels", {})
    monkeypatch.setattr(run, "small_cases", lambda *_: [Case(4, 144, torch.bfloat16, 5)])
    monkeypatch.setattr(run, "CHECKS", {"expand": CHECKS["expand"]})
    assert main(["check", "--device", "simt"]) == 1
    error = capsys.readouterr().err
    assert "mhc-tilelang check: expand_kernel:\n" in error
    assert (
        "out of bounds: thread (18, 0, 0) of block (4, 0, 0) reads 16 bytes at element 720 of h, which has 720" in error
    )
