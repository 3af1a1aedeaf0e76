"""The tests' tests, of the gradients through the logits z = alpha · m + bias: a sublayer's and the head's.

Would catch: bounds that let a token, the slope at another logit, or a factor of ρ be missing.
"""

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import CPU
from helpers_backward import coefficients_backward64, exact_arguments, head_coefficients_backward64
from test_of_tests import CASES, comparison_of, every_case, over, rejected

from mhc_tilelang import launch
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.inputs import Gradients, Inputs

FLOAT64 = {
    "coefficients_backward": coefficients_backward64,
    "head_coefficients_backward": head_coefficients_backward64,
}
every_reader_of_logits = pytest.mark.parametrize("kernel", FLOAT64)


def through_logits(kernel, case):
    """The kernel's arguments as its check has them, in float64: `projected` comes from the forward."""
    inputs, gradients, spec, n = Inputs.of(case, CPU), Gradients.of(case, CPU), case.spec, case.num_streams
    arguments = {**exact_arguments(kernel, case), "spec": spec}
    if kernel == "head_coefficients_backward":
        plan, phi, parameters = launch.projection_plan(inputs.x, n), inputs.phi[:n].contiguous(), (1, n)
        combine = launch.head_coefficients
    else:
        plan, phi, parameters = launch.projection_plan(inputs.x, spec.num_coefficients), inputs.phi, (3, None)
        combine = launch.coefficients
    alpha, bias = inputs.alpha[: parameters[0]], inputs.bias[: parameters[1]]
    *_, projected = combine(launch.project(inputs.x, phi, plan), alpha, bias, spec, plan)
    return {**arguments, "g_h_pre": numpy64(gradients.g_h_pre), "projected": numpy64(projected)}


def by_output(kernel, arguments):
    """The outputs of `OUTPUTS`, laid out as the checks do."""
    g_projected, g_alpha, g_bias = FLOAT64[kernel](**arguments)
    return {"g_dots": g_projected[:-1].T, "rho": g_projected[-1], "g_alpha": g_alpha, "g_bias": g_bias}


@every_case
@every_reader_of_logits
def test_exact_gradients_of_logits_are_accepted(kernel, case):
    for output, values in by_output(kernel, through_logits(kernel, case)).items():
        assert not rejected(comparison_of(kernel, output, case), values), output


@every_case
@every_reader_of_logits
def test_tokens_left_out_of_the_parameters_are_rejected(kernel, case):
    """The last one of 63: as of a block that is not counted."""
    arguments = through_logits(kernel, case)
    for name in ("g_h_pre", "g_h_post", "g_h_res"):
        if name in arguments:
            arguments[name][-1:] = 0
    got = by_output(kernel, arguments)
    for output in ("g_alpha", "g_bias"):
        assert rejected(comparison_of(kernel, output, case), got[output]), output


@every_case
@every_reader_of_logits
def test_bias_scaled_by_the_norm_is_rejected(kernel, case):
    """z = (alpha · dots + bias) · s: another slope."""
    arguments = through_logits(kernel, case)
    tokens = []
    for t in range(case.num_tokens):
        one = {name: arguments[name][t : t + 1] for name in ("g_h_pre", "g_h_post", "g_h_res") if name in arguments}
        projected = arguments["projected"][:, t : t + 1]
        tokens.append(
            by_output(
                kernel, {**arguments, **one, "projected": projected, "bias": arguments["bias"] * projected[-1, 0]}
            )
        )
    got = {output: [token[output] for token in tokens] for output in tokens[0]}
    assert rejected(comparison_of(kernel, "g_dots", case), np.concatenate(got["g_dots"]))
    assert rejected(comparison_of(kernel, "rho", case), np.concatenate(got["rho"]))
    for output in ("g_alpha", "g_bias"):
        assert rejected(comparison_of(kernel, output, case), np.sum(got[output], axis=0))


@every_case
@every_reader_of_logits
def test_rho_of_another_width_is_rejected(kernel, case):
    """1/C instead of 1/K, and a power of s too few."""
    comparison = comparison_of(kernel, "rho", case)
    scale = through_logits(kernel, case)["projected"][-1]
    assert rejected(comparison, comparison.expected * case.num_streams)
    assert rejected(comparison, comparison.expected / scale)


@over([case for case in CASES if case.dtype == torch.float32])
def test_rounded_logits_are_rejected(case):
    """bfloat16 logits or parameters on the way to g_z."""
    for name in ("alpha", "bias"):
        arguments = through_logits("coefficients_backward", case)
        arguments[name] = arguments[name].astype(ml_dtypes.bfloat16).astype(np.float64)
        got = by_output("coefficients_backward", arguments)
        assert rejected(comparison_of("coefficients_backward", "g_dots", case), got["g_dots"])
