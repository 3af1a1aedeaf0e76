"""post_project and the boundary it belongs to: fused, to the bit what the separate kernels give.

Would catch: a tile that is projected before it is rounded, streams or chunks summed in another order, a tail that
reads its neighbour, a token's bits that depend on its batch, its place in it, or on how work is shared out.
"""

from dataclasses import replace

import pytest
import torch
from helpers import CPU, MIXED_DTYPES, STREAMS, assert_same_bits, every_n_and_dtype, map_tokens, named
from helpers_backward import in_nan

from mhc_tilelang import launch
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.compiler.kernel import dtype_name
from mhc_tilelang.kernels import boundary_plans

pytestmark = pytest.mark.usefixtures("poisoned")
# A GPU's chunks have 128 channels for bfloat16, 64 and 32 for float16 and float32 at n = 4; its tiles 64 tokens.
WIDTHS = {1: "one-channel", 7: "below-a-vector", 333: "chunk-and-odd-tail", 1280: "many-chunks"}
CASES = every_n_and_dtype(65)
CASES += [named(path, Case(4, size, torch.bfloat16, 65)) for size, path in WIDTHS.items()]
TOKENS = [named("tokens", Case(4, 192, torch.bfloat16, tokens)) for tokens in (0, 1, 3, 32, 33, 1000)]
HEADS = [named("head", Case(n, 192, torch.bfloat16, 65)) for n in STREAMS]
SMALL = Case(4, 333, torch.bfloat16, 70)


def mixed(inputs):
    return inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res


def separate(inputs, spec):
    """x_next, layer_input, h_post, h_res, h_pre and projected by one kernel each."""
    x_next = launch.post(*mixed(inputs))
    plan = launch.projection_plan(x_next, spec.num_coefficients)
    partial = launch.project(x_next, inputs.phi, plan)
    h_pre, h_post, h_res, projected = launch.coefficients(partial, inputs.alpha, inputs.bias, spec, plan)
    return x_next, launch.aggregate(x_next, h_pre), h_post, h_res, h_pre, projected


def fused(inputs, spec, **options):
    return launch.post_pre(*mixed(inputs), inputs.phi, inputs.alpha, inputs.bias, spec, **options)


def gpu_plan(case, rows, aggregated=False):
    sizes = case.num_streams, case.hidden_size, dtype_name(case.dtype)
    return boundary_plans.tile_post_project_plan(rows, *sizes, "cuda", aggregated)


@pytest.mark.parametrize("case", CASES + TOKENS)
def test_fused_equals_separate(case):
    inputs = Inputs.of(case, CPU)
    assert_same_bits(fused(inputs, case.spec), separate(inputs, case.spec))


@pytest.mark.parametrize("case", CASES)
def test_gpu_plan_equals_separate(case):
    """The GPU's plan, run on the CPU: halves of phi made where it is loaded, one stream at a time."""
    assert_gpu_plan_equals_separate(case, case.spec.num_coefficients)


@pytest.mark.parametrize("case", HEADS)
def test_gpu_plan_of_a_head_equals_separate(case):
    """The n rows of a head. Catches rows of padding that are not zero."""
    assert_gpu_plan_equals_separate(case, case.num_streams)


def assert_gpu_plan_equals_separate(case, rows):
    inputs = Inputs.of(case, CPU)
    phi, plan = inputs.phi[:rows].contiguous(), gpu_plan(case, rows)
    x_next, partial, layer_input = launch.post_project(*mixed(inputs), phi, plan)
    expected = launch.post(*mixed(inputs))
    chunks = plan.projection.num_chunks(case.hidden_size)
    projected = [launch.project(expected, phi, plan.projection, split) for split in (chunks, 1)]
    match = [p for p in projected if p.shape == partial.shape]
    assert_same_bits([x_next, partial], [expected, match[0]])
    assert layer_input is None


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("case", [SMALL, *(case for case in every_n_and_dtype(3) if case.values[0].num_streams != 4)])
def test_delayed_form_aggregates_with_what_it_is_given(case, target):
    """The kernel's own aggregation is that of `pre`, and x_next and the sums are those without it."""
    inputs = Inputs.of(case, CPU)
    plan = gpu_plan(case, case.spec.num_coefficients, True) if target == "cuda" else None
    got = launch.post_project(*mixed(inputs), inputs.phi, plan, h_pre=inputs.h_pre)
    plain = launch.post_project(*mixed(inputs), inputs.phi, plan)
    assert_same_bits(got, [*plain[:2], launch.aggregate(plain[0], inputs.h_pre)])


def test_delayed_boundary():
    """layer_input by the given h_pre, everything else as without it: h_pre of the next sublayer is returned."""
    inputs = Inputs.of(SMALL, CPU)
    delayed, plain = fused(inputs, SMALL.spec, h_pre=inputs.h_pre), fused(inputs, SMALL.spec)
    assert_same_bits(delayed, plain._replace(layer_input=launch.aggregate(plain.x_next, inputs.h_pre)))
    assert not torch.equal(delayed.layer_input, plain.layer_input)


def test_a_token_keeps_its_bits_in_batches_of_1_to_300():
    """Every batch size, across both regimes. Also catches a row beyond the last token that is written."""
    case = replace(SMALL, num_tokens=300)
    inputs = Inputs.of(case, CPU)
    whole = fused(inputs, case.spec)
    regimes = set()
    for size in range(1, 301):
        batch = map_tokens(inputs, lambda t, size=size: t[300 - size :])
        got = fused(batch, case.spec)
        assert_same_bits(got[:5], [output[300 - size :] for output in whole[:5]])
        assert_same_bits([got.projected], [whole.projected[:, 300 - size :]])
        regimes.add(launch.boundary_schedule(batch.x, 24).regime)
    assert regimes == ({"tokens", "channels"} if torch.get_num_threads() > 1 else {"tokens"})


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_no_schedule_moves_a_bit(target):
    """One chunk a block up to all in one; on a GPU's plan also whole groups, which write a slab a group."""
    case = Case(4, 1000, torch.bfloat16, 65)
    inputs, spec = Inputs.of(case, CPU), case.spec
    plan = gpu_plan(case, 24) if target == "cuda" else boundary_plans.post_project_plan(24, 4, 1000, "bfloat16", "cpu")
    chunks = plan.projection.num_chunks(1000)

    def results(per_split):
        schedule = boundary_plans.boundary_schedule(65, 1000, plan, 2, per_split)
        x_next, partial, _ = launch.post_project(*mixed(inputs), inputs.phi, plan, schedule=schedule)
        assert len(partial) == schedule.slabs
        return x_next, *launch.coefficients(partial, inputs.alpha, inputs.bias, spec, plan.projection)

    whole = results(chunks)
    for per_split in range(1, chunks):
        assert_same_bits(results(per_split), whole)


def test_schedules_of_a_gpu():
    """Warps take a group of chunks of a tile, of few tokens too. Tiles share few tokens' chunks over the device."""
    of_float32 = boundary_plans.post_project_plan(24, 4, 2560, "float32", "cuda")
    plan = boundary_plans.post_project_plan(24, 4, 2560, "bfloat16", "cuda")
    for num_tokens in (1, 16, 128):
        schedule = boundary_plans.boundary_schedule(num_tokens, 2560, plan, 264)
        assert (schedule.regime, schedule.chunks_per_split, schedule.splits) == ("channels", 5, 8)
        schedule = boundary_plans.boundary_schedule(num_tokens, 2560, of_float32, 264)
        assert schedule.regime == "channels"
        assert schedule.token_blocks * schedule.splits >= 20
    schedule = boundary_plans.boundary_schedule(16384, 2560, plan, 264)
    assert str(schedule) == (
        "regime channels: 256 x 8 blocks (token tiles x splits), 5 chunks a split, 8 slabs of partial sums"
    )


def test_a_schedule_of_no_chunks_is_refused():
    with pytest.raises(ValueError, match="schedule: chunks_per_split: expected at least 1, got 0"):
        launch.boundary_schedule(Inputs.of(SMALL, CPU).x, 24, 0)


@pytest.mark.parametrize(("dtype", "layer_dtype"), MIXED_DTYPES)
def test_a_layer_of_another_dtype(dtype, layer_dtype):
    """16 bits in a float32 stream, as under autocast, or float32 in a 16-bit one."""
    case = replace(SMALL, dtype=dtype, layer_dtype=layer_dtype)
    inputs = Inputs.of(case, CPU)
    assert inputs.layer_output.dtype == layer_dtype
    assert_same_bits(fused(inputs, case.spec), separate(inputs, case.spec))


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_reads_nothing_else(target):
    """Every tensor inside a buffer of NaN, aligned and not. Catches a tail multiplied by zero."""
    case = Case(4, 333, torch.bfloat16, 67)
    inputs = Inputs.of(case, CPU)
    plan = gpu_plan(case, 24, True) if target == "cuda" else None
    arguments = [*mixed(inputs), inputs.phi]
    expected = launch.post_project(*arguments, plan, h_pre=inputs.h_pre)
    for offset in (0, 1):
        inside = [in_nan(argument, offset) for argument in arguments]
        got = launch.post_project(*inside, plan, h_pre=in_nan(inputs.h_pre, offset))
        assert_same_bits(got, expected)


@pytest.mark.parametrize("field", ["x", "layer_output", "h_post", "h_res"])
def test_special_values_stay_in_their_token(field):
    """NaN in one token: that token's x_next has it, and no bit of another token moves."""
    inputs = Inputs.of(SMALL, CPU)
    clean, spoilt = fused(inputs, SMALL.spec), getattr(inputs, field).clone()
    spoilt[-1].view(-1)[0] = torch.nan  # the last token, whose weights rows beyond it take
    got = fused(replace(inputs, **{field: spoilt}), SMALL.spec)
    assert torch.isnan(got.x_next[-1]).any()
    assert_same_bits([output[:-1] for output in got[:5]], [output[:-1] for output in clean[:5]])
    assert_same_bits([got.projected[:, :-1]], [clean.projected[:, :-1]])


def test_no_token():
    inputs = Inputs.of(replace(SMALL, num_tokens=0), CPU)
    assert [output.shape[0] for output in fused(inputs, SMALL.spec)[:5]] == [0] * 5
