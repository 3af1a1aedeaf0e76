"""Plain torch, against float64, and the guard that keeps a wrong form from being timed.

Would catch: a form that is another function, one that leaves an output unwritten, one that wins by rounding
phi or a product, a block that drops its tail.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mhc_tilelang import reference
from mhc_tilelang.checking.kernels import numpy64
from mhc_tilelang.errors import MHCError
from mhc_tilelang.perf import stream_forms, token_forms
from mhc_tilelang.perf.baselines import COMPILED, EAGER, TOLERANCE, Form, applicable, prepare, relative_error
from mhc_tilelang.perf.bench import FORMS
from mhc_tilelang.perf.cases import KERNELS, Case, Shape
from mhc_tilelang.perf.workloads import Stream, Workload, workload

CPU = torch.device("cpu")
ALL = [pytest.param(kernel, form, mode, id=f"{kernel}-{mode}-{form.name}") for kernel in KERNELS
       for form in FORMS[kernel] if "cpu" in form.devices for mode in form.modes]  # fmt: skip


def make(kernel: str, n: int = 4, dtype: str = "bfloat16", tokens: int = 37) -> Workload:
    shape = Shape(tokens, n, 48, dtype)
    load = workload(Case(kernel, shape), Stream.of(shape, CPU))
    load.run()
    return load


def prepare_form(kernel: str, form: Form, mode: str, load: Workload) -> float:
    [baseline] = prepare(kernel, (form,), (mode,), load.arguments, load.outputs())
    return baseline.error


def float64(kernel: str, arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    """The reference's outputs, named as the forms name them."""
    exact = {k: numpy64(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    if kernel == "expand":
        return {"x": reference.expand(exact["h"], 4)}
    if kernel == "project":
        return dict(zip(("dots", "squares"), reference.project(exact["x"], exact["phi"]), strict=True))
    if kernel == "sinkhorn":
        return {"h_res": reference.sinkhorn(exact["logits"], exact["iters"], exact["eps"])}
    if kernel == "pre":
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_eager_forms_match_float64(kernel: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding: half a unit of the output's dtype, and a few of float32 on the way."""
    monkeypatch.setattr(stream_forms, "BLOCK_BYTES", 10 * 4 * 48 * 4)  # 10 tokens: three blocks and a tail
    monkeypatch.setattr(token_forms, "BLOCK_TOKENS", 10)
    load = make(kernel, dtype=dtype)
    expected = float64(kernel, load.arguments)
    for form in applicable(FORMS[kernel], CPU, dtype):
        if EAGER in form.modes:
            outputs = {name: torch.full_like(tensor, torch.nan) for name, tensor in load.outputs().items()}
            form.function(**load.arguments, **outputs)
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


@pytest.mark.parametrize(
    ("kernel", "wrong", "output"),
    [
        ("project", low_phi, "dots"),
        ("project", tf32_phi, "dots"),
        ("project", forgotten_squares, "squares"),
        ("post", rounded_products, "x_next"),
        ("post", transposed, "x_next"),
        ("pre", no_last_token, "layer_input"),
        ("sinkhorn", one_iteration_less, "h_res"),
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
    assert set(FORMS) == set(KERNELS)
    for device in ("cpu", "cuda"):
        for kernel in KERNELS:
            modes = {mode for form in applicable(FORMS[kernel], torch.device(device), "float32") for mode in form.modes}
            assert modes == {EAGER, COMPILED}


def test_relative_error() -> None:
    wanted = torch.tensor([3.0, 4.0])
    assert relative_error(wanted, wanted) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), wanted) == pytest.approx(0.1)
    assert not relative_error(torch.tensor([3.0, torch.nan]), wanted) <= max(TOLERANCE.values())
