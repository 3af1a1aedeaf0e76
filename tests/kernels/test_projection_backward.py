"""projection, backward: g_x and g_phi by the CPU's plan and, run on the CPU, by the GPU's with its split operands.

Would catch: a tile or a range of tokens left out or added twice, rows beyond the last token that leak into g_phi,
ρ or the aggregation's share left out, operands rounded to the tensor core's.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    CPU,
    DTYPES,
    assert_matches_float64,
    assert_same_bits,
    every_n_and_dtype,
    named,
    replace_launch,
    verdicts,
)
from helpers_backward import BACKWARD, assert_reads_nothing_else, assert_special_values_stay
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_tilelang import launch
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.inputs import Case, Gradients, Inputs
from mhc_tilelang.compiler.kernel import dtype_name
from mhc_tilelang.kernels import projection_plans

pytestmark = pytest.mark.usefixtures("poisoned")
CASE = Case(4, 333, torch.bfloat16, 63)
FUNCTION = BACKWARD["project_backward_aggregated"]
SMALL = Case(2, 64, torch.bfloat16, 0)
# A CPU's tile has 48 tokens; up to 528 share one partial g_phi, and 4300 tokens reach the limit of eight.
TOKENS = (47, 48, 49, 95, 96, 97, 527, 528, 529, 530, 1055, 1056, 1057, 1100, 4300)
GPU_CASES = every_n_and_dtype(63, "gpu-plan")
GPU_CASES += [named("gpu-plan", Case(4, size, dtype, 65)) for size, dtype in zip((1, 7, 333), DTYPES, strict=True)]


def plan_of(case, target):
    rows = case.spec.num_coefficients
    return projection_plans.projection_backward_plan(rows, case.hidden_size, dtype_name(case.dtype), target)


@pytest.fixture
def gpu_plan(monkeypatch):
    """The GPU's plan; the kernels still run on the CPU."""
    plan = projection_plans.projection_backward_plan
    monkeypatch.setattr(projection_plans, "projection_backward_plan", lambda *sizes: plan(*sizes[:3], "cuda"))


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_every_boundary_of_tokens(num_tokens):
    """The tile's, the range's, and more ranges than one."""
    assert_matches_float64("project_backward_aggregated", replace(SMALL, num_tokens=num_tokens))


@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.usefixtures("gpu_plan")
def test_gpu_plan_matches_float64(case):
    """Halves, masks and padding rows of the GPU's plan. The bound is that of the plan, splitting included."""
    assert_matches_float64("project_backward_aggregated", case)


@pytest.mark.parametrize("num_tokens", [64, 512, 513, 1100])
@pytest.mark.usefixtures("gpu_plan")
def test_gpu_ranges_match_float64(num_tokens):
    assert_matches_float64("project_backward_aggregated", replace(SMALL, num_tokens=num_tokens))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("gpu_plan")
def test_gpu_plan_with_small_operands(dtype):
    """phi ~ 1e-4, as trained ones are. Catches halves in float16, whose low half would be subnormal."""
    case = Case(4, 192, dtype, 63)
    inputs = Inputs.of(case, CPU)
    assert_matches_float64(
        "project_backward_aggregated", case, replace(inputs, phi=inputs.phi * (1e-4 / inputs.phi.std()))
    )


@settings(deadline=None)
@given(
    num_tokens=st.integers(1, 2**22),
    rows=st.sampled_from([2, 4, 8, 24, 80]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    target=st.sampled_from(["cpu", "cuda"]),
)
def test_ranges_of_tokens(num_tokens, rows, dtype, target):
    """Whole tiles, 512 tokens or more, eight ranges at most, none of them empty."""
    plan = projection_plans.projection_backward_plan(rows, 1280, dtype, target)
    tokens = projection_plans.tokens_per_split(num_tokens, plan)
    splits = -(-num_tokens // tokens)
    assert tokens % plan.tokens == 0
    assert tokens >= projection_plans.TOKENS_PER_PARTIAL
    assert 1 <= splits <= projection_plans.MAX_PARTIALS
    assert (splits - 1) * tokens < num_tokens <= splits * tokens


def test_the_ranges_are_as_the_cases_above_say():
    """One range up to 528 tokens, three at 1100, eight at 4300."""
    plan = plan_of(SMALL, "cpu")
    assert plan.tokens == 48
    splits = {t: -(-t // projection_plans.tokens_per_split(t, plan)) for t in TOKENS}
    assert [splits[t] for t in (47, 528, 529, 1056, 1057, 1100, 4300)] == [1, 1, 2, 2, 3, 3, 8]


def test_each_token_and_channel_counts_once():
    """Zeros and ones: g_phi counts tokens, g_x counts rows of phi, exact in every dtype and any order."""
    arguments = FUNCTION.arguments(Case(4, 333, torch.bfloat16, 1100))
    arguments = {name: (tensor > 0).to(tensor.dtype) for name, tensor in arguments.items()}
    for name, got in FUNCTION(arguments).items():
        np.testing.assert_array_equal(numpy64(got), FUNCTION.float64(arguments)[name])


@pytest.mark.parametrize("num_tokens", [63, 1100])
def test_each_gradient_alone(num_tokens):
    """The bits of both together, None for the other; what only the other needs is NaN here, so a read shows."""
    arguments = FUNCTION.arguments(replace(CASE, num_tokens=num_tokens))
    full = FUNCTION(arguments)
    only_x = FUNCTION(arguments, needs_g_phi=False)
    nowhere = {name: torch.full_like(arguments[name], torch.nan) for name in ("phi", "h_pre", "g_layer_input")}
    only_phi = FUNCTION({**arguments, **nowhere}, needs_g_x=False)
    assert only_x["g_phi"] is None
    assert only_phi["g_x"] is None
    assert_same_bits([only_x["g_x"], only_phi["g_phi"]], full.values())
    assert set(FUNCTION(arguments, needs_g_x=False, needs_g_phi=False).values()) == {None}


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_aggregation(dtype):
    """Absent weights give the bits of zero weights: one more fma, of zero."""
    arguments = FUNCTION.arguments(replace(CASE, dtype=dtype))
    zero = FUNCTION({**arguments, "h_pre": torch.zeros_like(arguments["h_pre"])})
    without = FUNCTION({name: arguments[name] for name in ("g_projected", "x", "phi")})
    assert_same_bits(without.values(), zero.values())


def test_no_token_gives_a_zero_g_phi():
    """Not the memory that was allocated for it; `poisoned` fills that with NaN."""
    got = FUNCTION(FUNCTION.arguments(SMALL))
    assert got["g_x"].shape == (0, 2, 64)
    assert not got["g_phi"].any()
    assert FUNCTION(FUNCTION.arguments(SMALL), needs_g_phi=False)["g_phi"] is None


@pytest.mark.parametrize("field", ["g_projected", "x"])
@pytest.mark.usefixtures("gpu_plan")
def test_special_values_in_the_gpu_plan(field):
    """Rows of padding and halves: zero times NaN must not reach another row."""
    for value in (float("nan"), float("inf")):
        assert_special_values_stay(FUNCTION, CASE, field, value)


@pytest.mark.usefixtures("gpu_plan")
def test_gpu_plan_reads_nothing_else():
    assert_reads_nothing_else(FUNCTION, replace(CASE, num_tokens=3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("gpu_plan")
def test_the_split_matters(dtype, monkeypatch):
    """Tests the tests above: with operands as the tensor core holds them, the bound of the GPU's plan is broken."""
    case = Case(4, 192, dtype, 63)
    narrow = torch.bfloat16 if plan_of(case, "cuda").operand_dtype == "bfloat16" else None
    full = launch.project_backward

    def high_only(g_projected, x, phi, **others):
        high = [
            t.to(narrow).float() if narrow else (t.view(torch.int32) & ~0x1FFF).view(torch.float32)
            for t in (g_projected, phi)
        ]
        high[0][-1] = g_projected[-1]
        return full(high[0], x, high[1], **others)

    replace_launch(monkeypatch, "project_backward", high_only)
    (_, g_x), (_, g_phi) = verdicts("project_backward_aggregated", case)
    assert not g_phi.passed
    if dtype == torch.float32:  # rounding to 16 bits hides what is lost in g_x
        assert not g_x.passed


def test_rows_of_the_head():
    """phi of n rows, which leaves most of a GPU's padded tile empty."""
    case = Case(4, 192, torch.bfloat16, 63)
    inputs, gradients = Inputs.of(case, CPU), Gradients.of(case, CPU)
    rows = {"phi": inputs.phi[:4].contiguous(), "g_projected": gradients.g_projected[:5].contiguous()}
    arguments = {**FUNCTION.arguments(case), **rows}
    got, expected = FUNCTION(arguments), FUNCTION.float64(arguments)
    np.testing.assert_allclose(numpy64(got["g_x"]), expected["g_x"], rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(numpy64(got["g_phi"]), expected["g_phi"], rtol=0, atol=1e-4)
