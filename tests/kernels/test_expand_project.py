"""expand_project and the boundary before the first sublayer: expand and pre of streams that are all equal.

Would catch: a stream that is not h, phi summed over too few streams or after it was rounded, squares of one stream
where those of all are meant, a tail that reads its neighbour, a token's bits that depend on how work is shared out.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers import CPU, assert_matches_float64, assert_same_bits, every_n_and_dtype, named
from helpers_backward import in_nan

from mhc_tilelang import launch
from mhc_tilelang.checking.inputs import Case, Gradients, Inputs
from mhc_tilelang.compiler.kernel import dtype_name
from mhc_tilelang.compiler.simt import executing
from mhc_tilelang.kernels import boundary_plans
from mhc_tilelang.kernels.projection_plans import LANES

pytestmark = pytest.mark.usefixtures("poisoned")
# A GPU's chunks have 128 channels for bfloat16, 64 and 32 for float16 and float32 at n = 4; its tiles 64 tokens.
CASES = every_n_and_dtype(65)
CASES += [named("chunk-and-odd-tail", Case(4, 333, torch.bfloat16, 65))]
WIDTHS = {1: "one-channel", 7: "below-a-vector", 1280: "many-chunks"}
CASES += [named(path, Case(4, size, torch.bfloat16, 65), pytest.mark.full) for size, path in WIDTHS.items()]
TOKENS = [named("tokens", Case(4, 192, torch.bfloat16, tokens)) for tokens in (0, 1, 33, 770)]
SMALL = Case(4, 333, torch.bfloat16, 70)


def plan_of(case, target):
    """By tiles."""
    return boundary_plans.tile_expand_project_plan(case.spec.num_coefficients, *plan_sizes(case), target)


def plan_sizes(case):
    return case.num_streams, case.hidden_size, dtype_name(case.dtype)


def total_phi(inputs, case):
    return launch.expand_backward(inputs.phi.view(-1, case.num_streams, case.hidden_size))


@pytest.mark.parametrize("case", CASES + TOKENS)
def test_matches_float64(case):
    """The whole boundary, forward and backward."""
    assert_matches_float64("expand_pre", case)
    assert_matches_float64("expand_pre_backward", case)


def plans():
    """Every case by the CPU's plan, those of four streams by the GPU's too; the rest is `full`."""
    for target, case in product(("cpu", "cuda"), CASES):
        marks = [pytest.mark.full] if target == "cuda" and case.values[0].num_streams != 4 else []
        yield pytest.param(*case.values, target, id=f"{case.id}-{target}", marks=[*case.marks, *marks])


@pytest.mark.parametrize(("case", "target"), [*plans()])
def test_is_the_projection_of_one_stream(case, target):
    """Equal bits to a projection by phi summed over streams, squares n times: by the CPU's plan and the GPU's."""
    inputs, plan = Inputs.of(case, CPU), plan_of(case, target)
    x, partial = launch.expand_project(inputs.h, inputs.phi, plan)
    assert_same_bits([x], [launch.expand(inputs.h, case.num_streams)])
    chunks = plan.projection.num_chunks(case.hidden_size)
    projected = [
        launch.project(inputs.h.unsqueeze(1), total_phi(inputs, case), plan.projection, s) for s in (chunks, 1)
    ]
    [expected] = [each for each in projected if each.shape == partial.shape][:1]
    expected[:, -LANES:] *= case.num_streams
    assert_same_bits([partial], [expected])


@pytest.mark.parametrize(
    "case",
    [Case(4, 200, torch.bfloat16, 70), pytest.param(Case(2, 264, torch.float16, 37), marks=pytest.mark.full)],
)
def test_by_warps(case):
    """Executed as CUDA: bits of the projection of one stream by warps, in chunks as long, however they are shared out,
    and of a token alone. 200 and 264 channels are a chunk or two of 128 and a part.
    """
    inputs = Inputs.of(case, CPU)
    with executing():
        plan = boundary_plans.expand_project_plan(len(inputs.phi), *plan_sizes(case), "cuda")
        chunks = plan.projection.num_chunks(case.hidden_size)
        for per_split in range(1, chunks + 1):
            schedule = boundary_plans.boundary_schedule(case.num_tokens, case.hidden_size, plan, 2, per_split)
            x, partial = launch.expand_project(inputs.h, inputs.phi, schedule=schedule)
            assert_same_bits([x], [launch.expand(inputs.h, case.num_streams)])
            expected = launch.project(inputs.h.unsqueeze(1), total_phi(inputs, case), plan.projection, per_split)
            expected[:, -1] *= case.num_streams
            assert_same_bits([partial], [expected])
        x, partial = launch.expand_project(inputs.h, inputs.phi)
        alone, sums = launch.expand_project(inputs.h[9:10], inputs.phi)
    assert_same_bits([alone, sums.sum(0)], [x[9:10], partial[..., 9:10].sum(0)])


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_no_schedule_moves_a_bit(target):
    """One chunk a block up to all in one."""
    case = Case(4, 1000, torch.bfloat16, 65)
    inputs, plan = Inputs.of(case, CPU), plan_of(case, target)
    chunks = plan.projection.num_chunks(1000)

    def results(per_split):
        schedule = boundary_plans.boundary_schedule(65, 1000, plan, 2, per_split)
        x, partial = launch.expand_project(inputs.h, inputs.phi, plan, schedule=schedule)
        assert len(partial) == schedule.slabs
        return x, *launch.coefficients(partial, inputs.alpha, inputs.bias, case.spec, plan.projection)

    whole = results(chunks)
    for per_split in range(1, chunks):
        assert_same_bits(results(per_split), whole)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_streams_of_phi_that_cancel(target):
    """phi of stream 1 is minus that of stream 0, and the others are zero: every dot is 0. Catches halves that are made
    before the sum."""
    inputs = Inputs.of(SMALL, CPU)
    phi = inputs.phi.view(-1, 4, SMALL.hidden_size).clone()
    phi[:, 1], phi[:, 2:] = -phi[:, 0], 0
    _, partial = launch.expand_project(inputs.h, phi.view(inputs.phi.shape), plan_of(SMALL, target))
    assert not partial[:, :-LANES].any()
    assert partial[:, -LANES:].all()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_reads_nothing_else(target):
    """Both tensors inside a buffer of NaN, aligned and not. Catches a tail multiplied by zero."""
    inputs, plan = Inputs.of(SMALL, CPU), plan_of(SMALL, target)
    expected = launch.expand_project(inputs.h, inputs.phi, plan)
    for offset in (0, 1):
        inside = (in_nan(inputs.h, offset), in_nan(inputs.phi, offset))
        assert_same_bits(launch.expand_project(*inside, plan), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_stay_in_their_token(value):
    """A special value in one token is in that token's outputs, and no bit of another token changes."""
    inputs = Inputs.of(SMALL, CPU)
    parameters = (inputs.phi, inputs.alpha, inputs.bias, SMALL.spec)
    spoilt = inputs.h.clone()
    spoilt[-1, 5] = value
    clean, got = (launch.expand_pre(h, *parameters) for h in (inputs.h, spoilt))
    assert not torch.isfinite(got.h_post[-1]).all()
    assert_same_bits([output[:-1] for output in got[:5]], [output[:-1] for output in clean[:5]])
    assert_same_bits([got.projected[:, :-1]], [clean.projected[:, :-1]])


def test_gradients_are_shared_by_the_streams():
    """g_phi is the same for every stream; what is not asked for is not there, and changes nothing of the rest."""
    inputs, upstream = Inputs.of(SMALL, CPU), Gradients.of(SMALL, CPU)
    parameters = (inputs.phi, inputs.alpha, inputs.bias)
    forward = launch.expand_pre(inputs.h, *parameters, SMALL.spec)

    def backward(**needs):
        given = (upstream.g_x, upstream.g_h, upstream.g_h_post, upstream.g_h_res)
        left = (forward.h_pre, forward.projected, SMALL.spec)
        return launch.expand_pre_backward(*given, inputs.h, *parameters, *left, **needs)

    whole = backward()
    streams = whole.g_phi.view(-1, 4, SMALL.hidden_size).unbind(1)
    assert_same_bits(streams, [streams[0]] * 4)
    for needs_g_h, needs_g_phi in ((True, False), (False, True), (False, False)):
        part = backward(needs_g_h=needs_g_h, needs_g_phi=needs_g_phi)
        assert (part.g_h is not None, part.g_phi is not None) == (needs_g_h, needs_g_phi)
        found = [(p, w) for p, w in zip(part, whole, strict=True) if p is not None]
        assert_same_bits([p for p, _ in found], [w for _, w in found])


def test_no_token():
    inputs = Inputs.of(replace(SMALL, num_tokens=0), CPU)
    got = launch.expand_pre(inputs.h, inputs.phi, inputs.alpha, inputs.bias, SMALL.spec)
    assert [output.shape[0] for output in got[:5]] == [0] * 5
