"""The tests' tests, of the backward kernels: what is wrong in a way of their own must be rejected by every comparison.

The mutations that every output must reject are in `test_of_tests`, the gradients of logits in
`test_of_tests_coefficients_backward`. Would catch: bounds so wide that a gradient of
another iteration count, of the transpose or of narrower operands passes.
"""

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import CPU, DTYPES, STREAMS
from helpers_backward import BACKWARD, exact_arguments, project_backward64
from test_of_tests import OUTPUTS, comparison_of, every_case, rejected, transposed

from mhc_tilelang import reference
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.inputs import Case, Gradients, Inputs
from mhc_tilelang.kernels import projection_plans

LOGIT_CASES = [Case(n, 192, torch.float32, 63, logit_std=std) for n in STREAMS for std in (2.0, 6.0)]
every_logit_case = pytest.mark.parametrize("case", LOGIT_CASES, ids=lambda c: f"n{c.num_streams}-std{c.logit_std}")
COEFFICIENTS = {
    "sinkhorn_backward": OUTPUTS["sinkhorn_backward"],
    "aggregate_backward": OUTPUTS["aggregate_backward"],
    "post_backward": ("g_h_post", "g_h_res"),
    "project_backward_aggregated": ("g_phi",),
    "coefficients_backward": OUTPUTS["coefficients_backward"],
    "head_coefficients_backward": OUTPUTS["head_coefficients_backward"],
}


def sinkhorn_arguments(case):
    return numpy64(Gradients.of(case, CPU).g_h_res), numpy64(Inputs.of(case, CPU).logits)


def tf32(tensor):
    """Cut to 10 bits of mantissa."""
    return (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32)


def bfloat16(tensor):
    return tensor.bfloat16().float()


@every_case
def test_exact_gradients_are_accepted(case):
    """The float64 functions of `helpers_backward`, which the tests below spoil, agree with the checks'."""
    for kernel in ("aggregate_backward", "post_backward", "project_backward_aggregated"):
        exact = BACKWARD[kernel].float64(BACKWARD[kernel].arguments(case))
        for output in OUTPUTS[kernel]:
            assert not rejected(comparison_of(kernel, output, case), exact[output])


@every_case
def test_transposed_mixing_is_rejected(case):
    """g_x mixed by h_res instead of its transpose, and the transpose of g_h_res."""
    arguments = exact_arguments("post_backward", case)
    g_x, *_ = reference.post_backward(**{**arguments, "h_res": transposed(arguments["h_res"])})
    assert rejected(comparison_of("post_backward", "g_x", case), g_x)
    comparison = comparison_of("post_backward", "g_h_res", case)
    assert rejected(comparison, transposed(comparison.got))


@every_case
def test_streams_in_another_order_are_rejected(case):
    """One stream's gradient in the next one's place, for everything that has streams."""
    for kernel, output in (("aggregate_backward", "g_h_pre"), ("post_backward", "g_x"), ("post_backward", "g_h_post")):
        comparison = comparison_of(kernel, output, case)
        assert rejected(comparison, np.roll(comparison.got, 1, axis=1))


@every_logit_case
@pytest.mark.parametrize("iters", [19, 21])
def test_another_iteration_count_is_rejected(iters, case):
    comparison = comparison_of("sinkhorn_backward", "g_logits", case)
    assert rejected(comparison, reference.sinkhorn_backward(*sinkhorn_arguments(case), iters))


@every_logit_case
def test_truncated_sinkhorn_is_rejected(case):
    """Only the last 5 iterations undone, and the scaling that the first 15 found taken for a constant."""
    gradient, logits = sinkhorn_arguments(case)
    matrix, steps = np.exp(logits - logits.max(1, keepdims=True)), []
    matrix = matrix / matrix.sum(1, keepdims=True) + 1e-6
    for axis in [2] + [1, 2] * 19:
        denominator = matrix.sum(axis, keepdims=True) + 1e-6
        matrix = matrix / denominator
        steps.append((axis, denominator))
    for axis, denominator in steps[:-11:-1]:
        gradient = (gradient - (gradient * matrix).sum(axis, keepdims=True)) / denominator
        matrix = matrix * denominator
    assert rejected(comparison_of("sinkhorn_backward", "g_logits", case), gradient * matrix)


@every_logit_case
def test_implicit_sinkhorn_is_rejected(case):
    """The gradient of the limit: P · (g − a − b) with a and b such that its rows and columns add up to zero."""
    gradient, logits = sinkhorn_arguments(case)
    P, n = reference.sinkhorn(logits), case.num_streams
    implicit = np.empty_like(P)
    for token, (p, g) in enumerate(zip(P, gradient, strict=True)):
        system = np.block([[np.diag(p.sum(1)), p], [p.T, np.diag(p.sum(0))]])
        sums = np.concatenate([(p * g).sum(1), (p * g).sum(0)])
        a, b = np.split(np.linalg.lstsq(system, sums, rcond=None)[0], [n])
        implicit[token] = p * (g - a[:, None] - b)
    assert rejected(comparison_of("sinkhorn_backward", "g_logits", case), implicit)


@every_logit_case
def test_rows_first_is_rejected(case):
    gradient, logits = sinkhorn_arguments(case)
    rows_first = transposed(reference.sinkhorn_backward(transposed(gradient), transposed(logits)))
    assert rejected(comparison_of("sinkhorn_backward", "g_logits", case), rows_first)


@every_case
@pytest.mark.parametrize("kernel", COEFFICIENTS)
def test_bfloat16_gradients_of_coefficients_are_rejected(kernel, case):
    for output in COEFFICIENTS[kernel]:
        comparison = comparison_of(kernel, output, case)
        assert rejected(comparison, comparison.expected.astype(ml_dtypes.bfloat16).astype(np.float64)), output


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("size", [192, 2560])
@pytest.mark.parametrize(
    ("operand", "outputs"), [("x", ["g_phi"]), ("phi", ["g_x"]), ("g_projected", ["g_x", "g_phi"])]
)
def test_narrow_operands_are_rejected(operand, outputs, size, target, monkeypatch):
    """TF32 and bfloat16 operands, at float32 streams, under either plan's bound."""
    plan = projection_plans.projection_backward_plan
    monkeypatch.setattr(projection_plans, "projection_backward_plan", lambda *sizes: plan(*sizes[:3], target))
    case = Case(4, size, torch.float32, 63)
    arguments = BACKWARD["project_backward_aggregated"].arguments(case)
    for narrow in (tf32, bfloat16):
        changed = narrow(arguments[operand])
        if operand == "g_projected":
            changed[-1] = arguments[operand][-1]  # ρ is no operand
        got = BACKWARD["project_backward_aggregated"].float64({**arguments, operand: changed})
        for output in outputs:
            assert rejected(comparison_of("project_backward_aggregated", output, case), got[output]), output


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [192, 2560])
def test_narrow_g_dots_are_rejected_in_g_phi(size, dtype):
    """Also of 16-bit streams, whose g_phi is float32: one product of rounded g_dots is not enough."""
    case = Case(4, size, dtype, 63)
    arguments = BACKWARD["project_backward_aggregated"].arguments(case)
    got = BACKWARD["project_backward_aggregated"].float64(
        {**arguments, "g_projected": bfloat16(arguments["g_projected"])}
    )
    assert rejected(comparison_of("project_backward_aggregated", "g_phi", case), got["g_phi"])


@every_case
def test_a_missing_term_of_g_x_is_rejected(case):
    """Rejected are a missing ρ·x, a missing share of the aggregation, and a missing row of phi."""
    arguments = exact_arguments("project_backward_aggregated", case)
    without_rho, without_row = arguments["g_projected"].copy(), arguments["g_projected"].copy()
    without_rho[-1], without_row[-2] = 0, 0
    spoilt = [
        {**arguments, "g_projected": without_rho},
        {**arguments, "g_layer_input": None},
        {**arguments, "g_projected": without_row},
    ]
    for wrong in spoilt:
        g_x, _ = project_backward64(**wrong)
        assert rejected(comparison_of("project_backward_aggregated", "g_x", case), g_x)


@pytest.mark.parametrize("size", [64, 333, 2560])
@pytest.mark.parametrize("kernel", ["aggregate_backward", "post_backward"])
def test_last_channels_left_out_are_rejected(kernel, size):
    """Rejected are as few channels as a CPU's float32 tile has: 16, or what hangs over."""
    case = Case(4, size, torch.bfloat16, 63)
    function, arguments = BACKWARD[kernel], BACKWARD[kernel].arguments(case)
    for name in ("x", "layer_output", "g_layer_input"):
        if name in arguments:
            arguments[name][..., -(size % 16 or 16) :] = 0
    got = function.float64(arguments)
    for output in COEFFICIENTS[kernel]:
        assert rejected(comparison_of(kernel, output, case), got[output])


@every_case
@pytest.mark.parametrize("missing", [1, 15, 48])
def test_last_tokens_left_out_of_g_phi_are_rejected(missing, case):
    """63 tokens are a tile of 48 and one of 15."""
    arguments = exact_arguments("project_backward_aggregated", case)
    arguments["g_projected"][:, -missing:] = 0
    _, g_phi = project_backward64(**arguments)
    assert rejected(comparison_of("project_backward_aggregated", "g_phi", case), g_phi)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 30))
@pytest.mark.parametrize("n", STREAMS)
def test_sound_results_pass_at_every_seed(n, seed):
    """The kernels as they are, at other numbers. Catches a bound that holds by luck."""
    for case in (
        Case(n, 192, torch.bfloat16, 511, seed=seed),
        Case(n, 192, torch.float32, 511, logit_std=6.0, seed=seed),
    ):
        for kernel in BACKWARD:
            for output in OUTPUTS[kernel]:
                comparison = comparison_of(kernel, output, case)
                assert not rejected(comparison, comparison.got), (kernel, output)
