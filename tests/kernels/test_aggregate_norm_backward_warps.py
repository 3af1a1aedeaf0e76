"""The thread-level form of `aggregate_norm_backward`, executed as CUDA, against float64.

Would catch: lanes or warps that are left out of a sum, or added to another; a step that hangs over and is not cut off;
a token whose g or h_pre is the one before's; sums for the weight that lose or repeat a token; a place in shared memory
that is written while another warp still reads it.
"""

from __future__ import annotations

import pytest
import torch
from helpers import CPU, assert_same_bits
from helpers_backward import BACKWARD

from mhc_tilelang import launch
from mhc_tilelang.checking.families.aggregate_norm import EPS, rms_norm_weight
from mhc_tilelang.checking.inputs import Case, Gradients, Inputs
from mhc_tilelang.checking.run import check_case
from mhc_tilelang.compiler.simt import executing
from mhc_tilelang.kernels import plans

pytestmark = pytest.mark.usefixtures("poisoned")
BF16, FP16 = torch.bfloat16, torch.float16
CASES = {
    "two steps": Case(4, 1000, BF16, 37),
    "one step": Case(4, 200, FP16, 18),
    "two streams": Case(2, 520, BF16, 37),
    "eight streams": Case(8, 520, BF16, 37),
    "one token": Case(4, 520, BF16, 1),
    "real width": Case(4, 2560, BF16, 35),
    "three steps": Case(4, 5120, BF16, 5),
    "four steps": Case(4, 7168, FP16, 5),
    "eight streams, three steps": Case(8, 5120, BF16, 5),
}
QUICK = ("two steps", "one step", "two streams", "eight streams")


def backward(case: Case, weight: torch.Tensor, **options: bool) -> tuple[torch.Tensor, ...]:
    """The launch on a check's inputs."""
    inputs, g = Inputs.of(case, CPU), Gradients.of(case, CPU).g_h
    return launch.aggregate_norm_backward(g, inputs.x, inputs.h_pre, weight, EPS, **options)


@pytest.mark.parametrize("name", [pytest.param(c, marks=[pytest.mark.full] * (c not in QUICK)) for c in CASES])
@pytest.mark.parametrize("parallel_blocks", [1, 264])
def test_matches_float64(name, parallel_blocks):
    """A block has up to 16 tokens, or two; within the bounds of the check."""
    case = CASES[name]
    with executing("sm_90a", parallel_blocks=parallel_blocks) as launches:
        row = check_case("aggregate_norm_backward", case, Inputs.of(case, CPU))
    assert isinstance(launches[0].parameters["tile"], plans.NormWarpsTile)
    assert row.passed, f"{row.error:.1e} exceeds {row.tolerance:.1e}"


def test_forms_have_the_same_bits():
    """Of g_u and g_h_pre: without the weight's gradient, and however tokens share blocks."""
    case = CASES["two steps"]
    weight = rms_norm_weight(case, CPU)
    with executing("sm_90a", parallel_blocks=1):
        g_u, g_h_pre, _ = backward(case, weight)
        bare = backward(case, weight, needs_g_weight=False)
    with executing("sm_90a", parallel_blocks=264):
        others = backward(case, weight)
    assert bare[2] is None
    assert_same_bits([g_u, g_h_pre], bare[:2])
    assert_same_bits([g_u, g_h_pre], others[:2])


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_weight_in_16_bits(dtype):
    """It is widened, exactly: the gradients of the same weight in float32; its own is rounded once."""
    case = CASES["two streams"]
    weight = rms_norm_weight(case, CPU).to(dtype)
    with executing("sm_90a", parallel_blocks=1):
        got, expected = backward(case, weight), backward(case, weight.float())
    assert_same_bits(got[:2], expected[:2])
    assert_same_bits([got[2]], [expected[2].to(dtype)])


def test_a_nan_stays_in_its_token():
    """Of g_u and g_h_pre; the weight's gradient has it in every channel, since r has it."""
    case = CASES["two steps"]
    function = BACKWARD["aggregate_norm_backward"]
    arguments = function.arguments(case)
    arguments["x"][20, 2, 999] = float("nan")
    with executing("sm_90a", parallel_blocks=1):
        got = function(arguments)
    for name in ("g_u", "g_h_pre"):
        bad = got[name].isnan().flatten(1)
        assert bad[20].all()
        assert not bad[torch.arange(len(bad)) != 20].any()
    assert got["g_weight"].isnan().all()


@pytest.mark.parametrize("tokens", [1, 16, 4096, 16384, 100_000])
@pytest.mark.parametrize("hidden_size", [1280, 2560, 4096, 7168])
@pytest.mark.parametrize("parallel_blocks", [2 * 132, 2 * 148])
def test_blocks_fill_the_device(tokens, hidden_size, parallel_blocks):
    """Whole waves, but for what a token more would give up, and never more than 512 rows of sums beside one wave's."""
    tile = plans.norm_backward_tile(4, hidden_size, 2, "cuda")
    shared = plans.norm_tokens(tokens, tile, "cuda", parallel_blocks)
    blocks, at_once = -(-tokens // shared), parallel_blocks // 2 * tile.blocks_per_sm
    waves = -(-blocks // at_once)
    assert shared == max(2, -(-tokens // (waves * at_once)))
    assert blocks <= max(512, at_once)
