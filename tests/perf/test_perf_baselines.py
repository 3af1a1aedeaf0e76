"""Plain torch, against float64, and the guard that keeps a wrong form from being timed.

Would catch: a form that is another function, one that leaves an output unwritten, one that wins by rounding
phi or a product, a block that drops its tail, a backward that takes h_res or Sinkhorn's steps the wrong way round.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhc_tilelang import reference
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.errors import MHCError
from mhc_tilelang.perf.bench.run import FORMS
from mhc_tilelang.perf.calls.cases import (
    AGGREGATE_QUANTIZED,
    BACKWARD_KERNELS,
    KERNELS,
    POST_PRE_QUANTIZED,
    Case,
    Shape,
)
from mhc_tilelang.perf.calls.every_call import Given
from mhc_tilelang.perf.calls.workloads import Workload, workload
from mhc_tilelang.perf.torch_forms import backward_post as backward_post_forms
from mhc_tilelang.perf.torch_forms import backward_streams as backward_stream_forms
from mhc_tilelang.perf.torch_forms import backward_tokens as backward_token_forms
from mhc_tilelang.perf.torch_forms import baselines
from mhc_tilelang.perf.torch_forms import streams as stream_forms
from mhc_tilelang.perf.torch_forms import tokens as token_forms
from mhc_tilelang.perf.torch_forms.baselines import (
    COMPILED,
    EAGER,
    TOLERANCE,
    Form,
    applicable,
    bind,
    prepare,
    relative_error,
)
from mhc_tilelang.reference.coefficients import join_groups, sigmoid_slope, sum_groups

CPU = torch.device("cpu")
STORED = Path(__file__).resolve().parents[2] / "perf" / "results"
EVERY_KERNEL = KERNELS + BACKWARD_KERNELS
ALL = [pytest.param(kernel, form, mode, id=f"{kernel}-{mode}-{form.name}") for kernel in EVERY_KERNEL
       for form in FORMS[kernel] if "cpu" in form.devices for mode in form.modes]  # fmt: skip


def make(kernel: str, n: int = 4, dtype: str = "bfloat16", tokens: int = 37) -> Workload:
    shape = Shape(tokens, n, 64, dtype)
    load = workload(Case(kernel, shape), Given.of(shape, CPU))
    load.run()
    return load


def prepare_form(kernel: str, form: Form, mode: str, load: Workload) -> float:
    [baseline] = prepare(kernel, (form,), (mode,), load.arguments, load.outputs())
    return baseline.error


def float64(kernel: str, arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    """The reference's outputs, named as the forms name them."""
    exact = {k: numpy64(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    if kernel in BACKWARD_KERNELS:
        return float64_backward(kernel, exact)
    if kernel == "expand":
        return {"x": reference.expand(exact["h"], 4)}
    if kernel == "project":
        return dict(zip(("dots", "squares"), reference.project(exact["x"], exact["phi"]), strict=True))
    if kernel == "sinkhorn":
        return {"h_res": reference.sinkhorn(exact["logits"], exact["iters"], exact["eps"])}
    if kernel == "aggregate":
        return {"layer_input": reference.aggregate(exact["x"], exact["h_pre"])}
    if kernel == "post":
        return {"x_next": reference.post(exact["x"], exact["layer_output"], exact["h_post"], exact["h_res"])}
    spec = exact["spec"]
    scale = reference.rms_scale(exact["squares"], spec.stream_size, spec.rms_eps)
    alpha = reference.alpha_per_row(exact["alpha"], spec.num_streams)
    logits = reference.compute_logits(exact["dots"].T, scale, alpha, exact["bias"])
    pre, post, res = reference.split_groups(logits, spec.num_streams)
    return {
        "h_pre": reference.gate_pre(pre, spec.pre_eps),
        "h_post": reference.gate_post(post, spec.post_scale),
        "h_res": reference.sinkhorn(res, spec.sinkhorn_iters, spec.sinkhorn_eps),
    }


def float64_backward(kernel: str, exact: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return a backward kernel's outputs in float64, composed of the reference's steps."""
    if kernel == "expand_backward":
        return {"g_h": reference.expand_backward(exact["g_x"], exact["g_x"][:, 0], exact["g_x"].shape[1])}
    if kernel == "sinkhorn_backward":
        return {"g_logits": reference.sinkhorn_backward(**exact)}
    if kernel == "aggregate_backward":
        x = exact["x"]
        return {"g_h_pre": reference.aggregate_backward(exact["g_layer_input"], x, np.zeros(x.shape[:2]))[1]}
    if kernel == "post_backward":
        names = ("g_x", "g_layer_output", "g_h_post", "g_h_res")
        return dict(zip(names, reference.post_backward(**exact), strict=True))
    if kernel == "project_backward":
        g_dots, rho = exact["g_projected"][:-1].T, exact["g_projected"][-1]
        gradients = reference.project_backward(g_dots, rho / 2, exact["x"], exact["phi"])
        return dict(zip(("g_x", "g_phi"), gradients, strict=True))
    spec, scaled, scale = exact["spec"], exact["projected"][:-1].T, exact["projected"][-1]
    n, dots = spec.num_streams, scaled / scale[:, None]
    alpha = reference.alpha_per_row(exact["alpha"], n)
    logits = reference.compute_logits(dots, scale, alpha, exact["bias"])
    pre, post, res = reference.split_groups(logits, n)
    g_logits = join_groups(
        exact["g_h_pre"] * sigmoid_slope(pre),
        spec.post_scale * exact["g_h_post"] * sigmoid_slope(post),
        reference.sinkhorn_backward(exact["g_h_res"], res, spec.sinkhorn_iters, spec.sinkhorn_eps),
    )
    g_dots, g_scale, g_alpha, g_bias = reference.compute_logits_backward(g_logits, dots, scale, alpha, exact["bias"])
    rho = -(scale**3) / spec.stream_size * g_scale
    g_projected = np.concatenate([g_dots.T, rho[None]])
    return {"g_projected": g_projected, "g_alpha": sum_groups(g_alpha, n), "g_bias": g_bias}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kernel", EVERY_KERNEL)
def test_eager_forms_match_float64(kernel: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms match to rounding: half a unit of the output's dtype, and a few of float32 on the way."""
    monkeypatch.setattr(stream_forms, "BLOCK_BYTES", 10 * 4 * 64 * 4)  # 10 tokens: three blocks and a tail
    monkeypatch.setattr(token_forms, "BLOCK_TOKENS", 10)
    load = make(kernel, dtype=dtype)
    expected = float64(kernel, load.arguments)
    for form in applicable(FORMS[kernel], CPU, dtype):
        if EAGER in form.modes:
            outputs = {name: torch.full_like(tensor, torch.nan) for name, tensor in load.outputs().items()}
            bind(form, EAGER, {**load.arguments, **outputs})()
            for name, exact in expected.items():
                rounding = torch.finfo(outputs[name].dtype).eps / 2
                error = np.linalg.norm(numpy64(outputs[name]) - exact) / np.linalg.norm(exact)
                assert error <= rounding + 1e-6, (form.name, name)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize(("kernel", "form", "mode"), [case for case in ALL if case.values[2] == EAGER])
def test_eager_forms_pass_the_guard(kernel: str, form: Form, mode: str, n: int) -> None:
    prepare_form(kernel, form, mode, make(kernel, n))


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("kernel", "form", "mode"), [case for case in ALL if case.values[2] == COMPILED])
def test_compiled_forms_pass_the_guard(kernel: str, form: Form, mode: str, dtype: str) -> None:
    prepare_form(kernel, form, mode, make(kernel, dtype=dtype))


def low_phi(x: torch.Tensor, phi: torch.Tensor, dots: torch.Tensor, squares: torch.Tensor) -> None:
    stream_forms.project_matmul(x, phi.bfloat16().float(), dots, squares)


def tf32_phi(x: torch.Tensor, phi: torch.Tensor, dots: torch.Tensor, squares: torch.Tensor) -> None:
    cut = (phi.view(torch.int32) & ~0x1FFF).view(torch.float32)
    stream_forms.project_matmul(x, cut, dots, squares)


def forgotten_squares(x: torch.Tensor, phi: torch.Tensor, dots: torch.Tensor, squares: torch.Tensor) -> None:
    stream_forms.project_matmul(x, phi, dots, torch.empty_like(squares))


def rounded_products(
    x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor, x_next: torch.Tensor
) -> None:
    mixed = torch.bmm(h_res.to(x.dtype), x)
    x_next.copy_(mixed + h_post.to(x.dtype).unsqueeze(-1) * layer_output.unsqueeze(1))


def transposed(
    x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor, x_next: torch.Tensor
) -> None:
    stream_forms.post_einsum(x, layer_output, h_post, h_res.mT, x_next)


def no_last_token(x: torch.Tensor, h_pre: torch.Tensor, layer_input: torch.Tensor) -> None:
    stream_forms.pre_einsum(x[:-1], h_pre[:-1], layer_input[:-1])


def one_iteration_less(logits: torch.Tensor, iters: int, eps: float, h_res: torch.Tensor) -> None:
    token_forms.sinkhorn_as_written(logits, iters - 1, eps, h_res)


def transposed_backward(
    g_x_next: torch.Tensor, x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor,
    **outputs: torch.Tensor,
) -> None:  # fmt: skip
    post = backward_post_forms.post_backward_einsum
    post(g_x_next, x, layer_output, h_post, h_res.mT, **outputs)


def low_g_dots(g_projected: torch.Tensor, **tensors: torch.Tensor) -> None:
    backward_stream_forms.project_backward_matmul(g_projected.bfloat16().float(), **tensors)


def no_scale(g_projected: torch.Tensor, **tensors: torch.Tensor) -> None:
    without_rho = torch.cat((g_projected[:-1], torch.zeros_like(g_projected[-1:])))
    backward_stream_forms.project_backward_matmul(without_rho, **tensors)


def rows_first(g_h_res: torch.Tensor, logits: torch.Tensor, iters: int, eps: float, g_logits: torch.Tensor) -> None:
    token_gradient = backward_token_forms.logits_gradient
    g_logits.copy_(token_gradient(g_h_res.clone(), logits, iters, eps, columns=-1, rows=-2))


@pytest.mark.parametrize(
    ("kernel", "wrong", "output"),
    [
        ("project", low_phi, "dots"),
        ("project", tf32_phi, "dots"),
        ("project", forgotten_squares, "squares"),
        ("post", rounded_products, "x_next"),
        ("post", transposed, "x_next"),
        ("aggregate", no_last_token, "layer_input"),
        ("sinkhorn", one_iteration_less, "h_res"),
        ("post_backward", transposed_backward, "g_x"),
        ("project_backward", low_g_dots, "g_x"),
        ("project_backward", no_scale, "g_x"),
        ("sinkhorn_backward", rows_first, "g_logits"),
    ],
)
def test_a_wrong_form_is_refused(kernel: str, wrong: Any, output: str) -> None:
    load = make(kernel)
    with pytest.raises(MHCError, match=f"baseline {kernel}, eager: wrong: expected {output} within .* got"):
        prepare_form(kernel, Form("wrong", wrong), EAGER, load)


def test_modes_and_devices_select() -> None:
    load = make("project")
    chosen = applicable(FORMS["project"], CPU, "bfloat16")
    assert "split phi" not in [form.name for form in chosen]
    eager = prepare("project", chosen, (EAGER,), load.arguments, load.outputs())
    assert {baseline.mode for baseline in eager} == {EAGER}
    assert "multiply and sum" not in [baseline.form for baseline in eager]
    cuda = torch.device("cuda")
    assert "split phi" in [form.name for form in applicable(FORMS["project"], cuda, "bfloat16")]
    assert "split phi" not in [form.name for form in applicable(FORMS["project"], cuda, "float32")]


def test_every_kernel_has_an_eager_and_a_compiled_form_everywhere() -> None:
    assert set(FORMS) == {*EVERY_KERNEL, AGGREGATE_QUANTIZED, POST_PRE_QUANTIZED}
    for device in ("cpu", "cuda"):
        for kernel in FORMS:
            modes = {mode for form in applicable(FORMS[kernel], torch.device(device), "float32") for mode in form.modes}
            assert modes == {EAGER, COMPILED}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", ["project_backward", "aggregate_backward", "post_backward"])
def test_tensor_core_forms_are_exact_enough(kernel: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their products are taken in float32, which a CPU lacks for operands of 16 bits."""

    def in_float32(name: str) -> None:
        product = getattr(torch, name)

        def widened(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, **kwargs: Any) -> torch.Tensor:
            assert a.dtype == b.dtype != torch.float32
            assert out_dtype == torch.float32
            return product(a.float(), b.float(), **kwargs)

        def dispatch(a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return (widened if "out_dtype" in kwargs else product)(a, b, **kwargs)

        monkeypatch.setattr(torch, name, dispatch)

    load = make(kernel, dtype=dtype)
    forms = applicable(FORMS[kernel], torch.device("cuda"), dtype)
    [form] = [form for form in forms if "cpu" not in form.devices]
    in_float32("mm")
    in_float32("bmm")
    prepare_form(kernel, form, EAGER, load)


def test_relative_error() -> None:
    wanted = torch.tensor([3.0, 4.0])
    assert relative_error(wanted, wanted) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), wanted) == pytest.approx(0.1)
    assert not relative_error(torch.tensor([3.0, torch.nan]), wanted) <= max(TOLERANCE.values())


def test_beaten_forms_are_those_that_never_came_near_the_fastest() -> None:
    """The ratio of medians in every stored CPU run decides; `beaten_on` says it of every eager form."""
    if not STORED.is_dir():
        pytest.skip("a wheel has no results")
    closest: dict[tuple[str, str], float] = {}
    for file in STORED.glob("amd*/*.json"):
        stored = json.loads(file.read_text(encoding="utf-8"))
        for result in stored["results"] if stored["kind"] == "kernels" else []:
            eager = {form["form"]: form["time"]["median"] for form in result["torch"] if form["mode"] == EAGER}
            for name, seconds in eager.items():
                key, ratio = (result["kernel"], name), seconds / min(eager.values())
                closest[key] = min(closest.get(key, ratio), ratio)
    assert closest
    beaten = {(kernel, form.name) for kernel in FORMS for form in FORMS[kernel] if "cpu" in form.beaten_on}
    known = {(kernel, form.name) for kernel in FORMS for form in FORMS[kernel] if EAGER in form.modes}
    assert beaten == {key for key, ratio in closest.items() if ratio > 1.05 and key in known}
    for kernel in FORMS:
        assert applicable(FORMS[kernel], CPU, "bfloat16", "fast"), kernel


def test_an_error_in_any_piece_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of five elements, the last one shorter: each counts, and NaN in one is NaN of all."""
    monkeypatch.setattr(baselines, "PIECE", 5)
    expected = torch.arange(1.0, 24.0).view(23, 1).to(torch.bfloat16)
    for place in (0, 7, 22):
        got = expected.clone()
        got[place] += 1.0
        wanted = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
        assert relative_error(got, expected) == pytest.approx(wanted, rel=1e-12)
        got[place] = float("nan")
        assert np.isnan(relative_error(got, expected))
