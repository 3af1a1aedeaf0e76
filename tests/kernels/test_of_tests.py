"""The tests' tests: what is wrong in a known way must be rejected by every comparison, what is right accepted.

Would catch: inputs so tame, or bounds so wide, that a broken kernel passes.
"""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import CPU, DTYPES, STREAMS, is_built, replace_launch, verdicts

from mhc_tilelang import launch, reference
from mhc_tilelang.checking.comparison import OUTPUTS, compare, numpy64
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.checking.run import CHECKS
from mhc_tilelang.compiler.kernel import dtype_name
from mhc_tilelang.kernels import projection_plans

STREAM_OUTPUTS = ("x", "layer_input", "x_next", "h", "g_h", "g_x", "g_layer_output", "g_u")  # the rest is float32
EVERY_OUTPUT = [(kernel, output) for kernel, outputs in OUTPUTS.items() for output in outputs]
CASES = [Case(n, 192, dtype, 63) for n in STREAMS for dtype in DTYPES]
CASE = Case(4, 192, torch.bfloat16, 63)


def over(cases):
    params = [
        pytest.param(c, id=f"n{c.num_streams}-{dtype_name(c.dtype)}", marks=[pytest.mark.full] * (not is_built(c)))
        for c in cases
    ]
    return pytest.mark.parametrize("case", params)


every_case = over(CASES)
SLOW = ("post_pre_backward", "post_head_backward")  # to compile at n = 8
WITHOUT_RES = ("gates", "gates_backward", "identity_post_pre", "identity_post_pre_backward")  # whose macros others have
every_narrow_case = over([case for case in CASES if case.dtype != torch.float32])


def every_output_of_every_case(test):
    """kernel, output and case."""
    params = [
        pytest.param(
            kernel,
            output,
            case,
            id=f"n{case.num_streams}-{dtype_name(case.dtype)}-{kernel}-{output}",
            marks=[pytest.mark.full] * (not is_built(case) or (kernel in SLOW + WITHOUT_RES and case.num_streams != 4)),
        )
        for kernel, output in EVERY_OUTPUT
        for case in CASES
    ]
    return pytest.mark.parametrize(("kernel", "output", "case"), params)(test)


def transposed(matrices):
    return np.swapaxes(matrices, -1, -2)


def one_wrong_row(values):
    """Token 1 has token 0's result; of a parameter's gradient, row 1 has row 0's."""
    wrong = values.copy()
    wrong[1] = values[0]
    return wrong


def one_element(value):
    """The eighth element, or the last of fewer, replaced."""

    def mutate(values):
        wrong = values.copy()
        wrong.flat[min(7, values.size - 1)] = value
        return wrong

    return mutate


MUTATIONS = {
    "zeroed": np.zeros_like,
    "one-percent-up": lambda values: values * 1.01,
    "one-percent-down": lambda values: values * 0.99,
    "negated": np.negative,
    "one-wrong-row": one_wrong_row,
    "next-token": lambda values: np.roll(values, 1, axis=0),
    "one-nan": one_element(np.nan),
    "one-infinity": one_element(np.inf),
    "all-nan": lambda values: np.full_like(values, np.nan),
    "a-token-less": lambda values: values[1:],
}
OF_SEVERAL_ROWS = ("one-wrong-row", "next-token")  # head's alpha is one element


def comparison_of(kernel, output, case):
    [found] = [c for c, _ in verdicts(kernel, case) if c.output == output]
    return found


def rejected(comparison, got):
    return not compare(replace(comparison, got=np.asarray(got))).passed


def test_every_output_is_known():
    """Catches a check that compares something else than it declares, which would go without mutations."""
    found = [(kernel, c.output) for kernel in CHECKS for c, _ in verdicts(kernel, CASE)]
    assert found == EVERY_OUTPUT


@every_output_of_every_case
def test_mutations_are_rejected(kernel, output, case):
    comparison = comparison_of(kernel, output, case)
    assert compare(comparison).passed
    apply = [name for name in MUTATIONS if len(comparison.got) > 1 or name not in OF_SEVERAL_ROWS]
    passed = [name for name in apply if not rejected(comparison, MUTATIONS[name](comparison.got))]
    assert not passed


@every_output_of_every_case
def test_exact_result_is_accepted(kernel, output, case):
    """float64 rounded to the output's dtype. Catches a bound below what rounding alone costs."""
    comparison = comparison_of(kernel, output, case)
    rounded = torch.from_numpy(comparison.expected).to(case.dtype if output in STREAM_OUTPUTS else torch.float32)
    assert not rejected(comparison, numpy64(rounded))


@every_case
@pytest.mark.parametrize("kernel", ["coefficients", "sinkhorn"])
def test_transposed_h_res_is_rejected(kernel, case):
    comparison = comparison_of(kernel, "h_res", case)
    assert rejected(comparison, transposed(comparison.got))


@every_case
def test_mixing_by_the_transpose_is_rejected(case):
    inputs = Inputs.of(case, CPU)
    comparison = comparison_of("post", "x_next", case)
    x, layer_output, h_post, h_res = map(numpy64, (inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res))
    assert rejected(comparison, reference.post(x, layer_output, h_post, transposed(h_res)))


@every_case
@pytest.mark.parametrize("kernel", ["coefficients", "sinkhorn"])
def test_bfloat16_coefficients_are_rejected(kernel, case):
    for output in OUTPUTS[kernel]:
        comparison = comparison_of(kernel, output, case)
        assert rejected(comparison, comparison.expected.astype(ml_dtypes.bfloat16).astype(np.float64))


@every_case
@pytest.mark.parametrize("kernel", ["aggregate", "post"])
def test_mixing_by_bfloat16_coefficients_is_rejected(kernel, case):
    inputs = Inputs.of(case, CPU)
    narrow = {name: getattr(inputs, name).bfloat16().float() for name in ("h_pre", "h_post", "h_res")}
    [mixed] = CHECKS[kernel](case, replace(inputs, **narrow))
    comparison = comparison_of(kernel, OUTPUTS[kernel][0], case)
    assert rejected(comparison, mixed.got)


@every_narrow_case
@pytest.mark.parametrize("kernel", ["aggregate", "post", "head"])
def test_cut_instead_of_rounded_is_rejected(kernel, case):
    """Towards zero, as by dropping the low bits: twice the error of rounding to nearest."""
    comparison = comparison_of(kernel, OUTPUTS[kernel][0], case)
    exact = torch.from_numpy(comparison.expected)
    nearest = exact.to(case.dtype)
    too_large = nearest.double().abs() > exact.abs()
    cut = torch.where(too_large, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)
    assert rejected(comparison, numpy64(cut))


@every_narrow_case
def test_mixing_in_the_streams_dtype_is_rejected(case):
    """Every product and sum rounded to 16 bits."""
    inputs = Inputs.of(case, CPU)
    h_pre, h_post, h_res = (t.to(case.dtype) for t in (inputs.h_pre, inputs.h_post, inputs.h_res))
    aggregated, mixed = inputs.x[:, 0] * h_pre[:, :1], h_post[..., None] * inputs.layer_output[:, None]
    for i in range(case.num_streams):
        aggregated = aggregated + inputs.x[:, i] * h_pre[:, i : i + 1] if i else aggregated
        mixed = mixed + h_res[:, :, i, None] * inputs.x[:, None, i]
    assert rejected(comparison_of("aggregate", "layer_input", case), numpy64(aggregated))
    assert rejected(comparison_of("post", "x_next", case), numpy64(mixed))


@pytest.mark.parametrize("n", STREAMS)
@pytest.mark.parametrize("std", [2.0, 6.0])
def test_rows_first_is_rejected(n, std):
    """Rows first is rejected at the checks' 20 iterations; test_sinkhorn has fewer, which show it better."""
    case = Case(n, 192, torch.float32, 63, logit_std=std)
    logits = numpy64(Inputs.of(case, CPU).logits)
    rows_first = transposed(reference.sinkhorn(transposed(logits)))
    assert rejected(comparison_of("sinkhorn", "h_res", case), rows_first)


@pytest.mark.parametrize("n", STREAMS)
@pytest.mark.parametrize("iters", [19, 21])
def test_another_iteration_count_is_rejected(n, iters):
    case = Case(n, 192, torch.float32, 63)
    logits = numpy64(Inputs.of(case, CPU).logits)
    assert rejected(comparison_of("sinkhorn", "h_res", case), reference.sinkhorn(logits, iters))


@every_case
def test_bias_scaled_by_the_norm_is_rejected(case):
    """z = (alpha · dots + bias) · s."""
    inputs, spec = Inputs.of(case, CPU), case.spec
    x, phi, alpha, bias = map(numpy64, (inputs.x, inputs.phi, inputs.alpha, inputs.bias))
    scale = reference.rms_scale(np.square(x).sum((1, 2)), spec.stream_size, spec.rms_eps)
    tokens = [reference.coefficients(one, phi, alpha, bias * s, spec) for one, s in zip(x, scale, strict=True)]
    for output, *got in zip(OUTPUTS["coefficients"], *tokens, strict=True):
        assert rejected(comparison_of("coefficients", output, case), got)


@pytest.mark.parametrize("size", [64, 333, 2560])
def test_last_chunk_left_out_is_rejected(size):
    """The last channels of every stream, as few as a chunk of the GPU has: 32."""
    case = Case(4, size, torch.bfloat16, 63)
    inputs = Inputs.of(case, CPU)
    x, phi = numpy64(inputs.x), numpy64(inputs.phi)
    short = x.copy()
    short[..., -(size % 32 or 32) :] = 0
    dots, squares = reference.project(short, phi)
    assert rejected(comparison_of("project", "dots", case), dots)
    assert rejected(comparison_of("project", "squares", case), squares)
    wrong = reference.coefficients(short, phi, numpy64(inputs.alpha), numpy64(inputs.bias), case.spec)
    for output, got in zip(OUTPUTS["coefficients"], wrong, strict=True):
        assert rejected(comparison_of("coefficients", output, case), got)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("operand", ["phi", "x"])
@pytest.mark.parametrize("size", [192, 2560])
def test_narrow_operands_are_rejected(size, operand, target, monkeypatch):
    """TF32 (cut to 10 mantissa bits) and bfloat16 operands, at float32 streams, under either plan's bound."""
    case = Case(4, size, torch.float32, 63)
    replace_launch(
        monkeypatch,
        "projection_plan",
        lambda _, rows: projection_plans.projection_plan(rows, 4, size, "float32", target),
    )
    inputs = Inputs.of(case, CPU)
    comparison = comparison_of("project", "dots", case)
    exact = getattr(inputs, operand)
    tf32 = (exact.view(torch.int32) & ~0x1FFF).view(torch.float32)
    for narrow in (tf32, exact.bfloat16().float()):
        changed = replace(inputs, **{operand: narrow})
        dots, _ = reference.project(numpy64(changed.x), numpy64(changed.phi))
        assert rejected(comparison, dots)


@pytest.mark.usefixtures("poisoned")
def test_an_unwritten_token_is_rejected(monkeypatch):
    """Tests the fixture: outputs that are not written are NaN, and the comparison sees it."""

    def all_but_the_last_token(x, *arguments, out=None):
        x_next = torch.empty_like(x) if out is None else out
        x_next[:-1] = post(x, *arguments)[:-1]
        return x_next

    post = launch.post
    replace_launch(monkeypatch, "post", all_but_the_last_token)
    [(_, verdict)] = verdicts("post", CASE)
    assert not verdict.passed
    assert verdict.error == np.inf
