"""Thread-level kernels of the projection and the boundary, executed as CUDA: bits, bounds, and faults planted in them.

Would catch: a vector stored or multiplied as another channel's, a tail that is read or written, sums that depend on the
split, the batch or a neighbour's NaN, a copy that is read before its wait, a stage overwritten while it is read.
"""

import re
from dataclasses import replace

import pytest
import torch
from damaged import damaged
from helpers import CPU, assert_same_bits, map_tokens

from mhc_tilelang import launch
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.compiler.simt import SimtError, executing
from mhc_tilelang.compiler.simt.target import load_or_generate
from mhc_tilelang.kernels import boundary_plans, projection_plans

# Below a chunk, a chunk and a tail of one vector, a group and a part of one, several groups.
WIDTHS = (40, 72, 200, 640)
DTYPES = (torch.bfloat16, torch.float16, torch.float16, torch.bfloat16)
EACH_WIDTH = [
    pytest.param(Case(4, width, dtype, 37), id=f"C={width}, {dtype}")
    for width, dtype in zip(WIDTHS, DTYPES, strict=True)
]
MAIN, FP16 = Case(4, 640, torch.bfloat16, 70), Case(4, 200, torch.float16, 37)
FEWEST, SOME, MOST = 1, 8, 1000  # blocks that the device runs at a time


def post_project(inputs, blocks=SOME, rows=24, **options):
    with executing(parallel_blocks=blocks):
        arguments = (inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res)
        return launch.post_project(*arguments, inputs.phi[:rows].contiguous(), **options)


def separate(inputs, blocks=SOME, rows=24):
    with executing(parallel_blocks=blocks):
        x_next = launch.post(inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res)
        return x_next, launch.project(x_next, inputs.phi[:rows].contiguous())


@pytest.mark.parametrize("case", EACH_WIDTH)
def test_fused_equals_separate(case):
    inputs = Inputs.of(case, CPU)
    x_next, partial, layer_input = post_project(inputs)
    assert layer_input is None
    assert_same_bits([x_next, partial], separate(inputs))


@pytest.mark.parametrize("width", [72, pytest.param(2560, marks=pytest.mark.full)])
def test_eight_streams(width):
    """Of sm_90a: the bits of separate kernels, of a token alone, and sums as near to float64."""
    case = Case(8, width, torch.bfloat16, 19)
    inputs = Inputs.of(case, CPU)
    mixed = (inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res)
    with executing("sm_90a", parallel_blocks=SOME) as launches:
        x_next, partial, layer_input = launch.post_project(*mixed, inputs.phi, h_pre=inputs.h_pre)
        assert launches[-1].parameters["plan"].projection.channels == 32
        assert_same_bits([x_next], [launch.post(*mixed)])
        assert_same_bits([partial], [launch.project(x_next, inputs.phi)])
        assert_same_bits([layer_input], [launch.aggregate(x_next, inputs.h_pre)])
        alone = launch.post_project(*(each[7:8] for each in mixed), inputs.phi, h_pre=inputs.h_pre[7:8])
    assert_same_bits(alone, [x_next[7:8], partial[..., 7:8], layer_input[7:8]])
    check_sums(partial, replace(inputs, x=x_next))


@pytest.mark.parametrize(("case", "layer_dtype"), [(MAIN, torch.float32), (FP16, torch.float16)])
def test_delayed_form(case, layer_dtype):
    """layer_input is the aggregation's, with a layer of either dtype; everything else is as without it."""
    inputs = Inputs.of(case, CPU)
    inputs = replace(inputs, layer_output=inputs.layer_output.to(layer_dtype))
    got = post_project(inputs, h_pre=inputs.h_pre)
    with executing():
        aggregated = launch.aggregate(got[0], inputs.h_pre)
    assert_same_bits(got, [*separate(inputs), aggregated])


def test_head():
    """Four rows: a tile of which half is padding."""
    inputs = Inputs.of(MAIN, CPU)
    assert_same_bits(post_project(inputs, rows=4)[:2], separate(inputs, rows=4))


@pytest.mark.parametrize(("case", "scale"), [*((one.values[0], 1) for one in EACH_WIDTH), (FP16, 1e-3)])
def test_sums_against_float64(case, scale):
    """x · (phi − halves) is up to 2^-17 of an element, of random sign; the sums of a chunk are float32.

    √K of errors 2^-18 · |x·phi| each, six standard deviations, and 64 · n additions of a chunk rounded to 2^-24 of the
    largest sum, which for squares is the sum. float16 halves leave 2^-23, also of phi ~ 1e-4, where low halves that
    are not scaled were subnormal and left 2^-12.
    """
    inputs = Inputs.of(case, CPU)
    inputs = replace(inputs, phi=inputs.phi * scale)
    with executing():
        check_sums(launch.project(inputs.x, inputs.phi), inputs)


def check_sums(partial, inputs):
    """Hold partial sums of inputs.x to what it says above: a chunk has 256 elements."""
    sums, x, phi = partial.double().sum(0), inputs.x.double().flatten(1), inputs.phi.double()
    products = (x[:, None] * phi).square().sum(2).sqrt()
    left = 2**-18 if inputs.x.dtype == torch.bfloat16 else 2**-23
    assert ((sums[:-1].T - x @ phi.T).abs() <= 6 * left * products + 64 * 4 * 2**-24 * products).all()
    assert ((sums[-1] / x.square().sum(1) - 1).abs() <= 64 * 4 * 2**-24).all()


def test_phi_beyond_float16_says_so():
    """65504 is float16's largest: from 65520 on a row of phi is NaN for every token, other rows are as they were."""
    inputs = Inputs.of(FP16, CPU)
    with executing():
        expected = launch.project(inputs.x, inputs.phi)
        inputs.phi[3, 5], inputs.phi[17, 90] = 65520.0, 65504.0
        got = launch.project(inputs.x, inputs.phi)
    others = [row for row in range(25) if row not in (3, 17)]
    assert got[:, 3].sum(0).isnan().all()
    assert got[:, 17].isfinite().all()
    assert_same_bits([got[:, others]], [expected[:, others]])


def test_no_split_moves_a_bit():
    """A slab a chunk and a slab a group, any number of chunks a block. Catches a group that ends with its block."""
    inputs = Inputs.of(MAIN, CPU)
    plan = boundary_plans.post_project_plan(24, 4, 640, "bfloat16", "cuda")
    assert plan.projection.num_chunks(640) == 2 * plan.projection.chunks_per_group

    def results(per_split):
        schedule = boundary_plans.boundary_schedule(70, 640, plan, 2, per_split)
        x_next, partial, _ = post_project(inputs, plan=plan, schedule=schedule)
        assert len(partial) == schedule.slabs
        with executing():
            return x_next, *launch.coefficients(partial, inputs.alpha, inputs.bias, MAIN.spec, plan.projection)

    whole = results(10)
    for per_split in (1, 2, 3, 5, 7, 11):
        assert_same_bits(results(per_split), whole)


def test_a_token_keeps_its_bits_in_any_batch():
    """Alone, at each place of a warp's tokens, beyond a tile."""
    inputs = Inputs.of(MAIN, CPU)
    x_next, partial, _ = post_project(inputs)
    for first, size in ((0, 1), (7, 1), (8, 2), (15, 17), (63, 7)):
        batch = map_tokens(inputs, lambda t, first=first, size=size: t[first : first + size])
        got = post_project(batch)
        assert_same_bits([got[0]], [x_next[first : first + size]])
        assert_same_bits([got[1]], [partial[:, :, first : first + size]])


@pytest.mark.parametrize(("case", "value"), [(MAIN, float("nan")), (FP16, float("inf")), (FP16, 65504.0)])
def test_what_is_not_finite_stays_with_its_token(case, value):
    """An element, or x_next: twice float16's largest is infinite once it is rounded."""
    inputs = Inputs.of(case, CPU)
    x_next, partial, _ = post_project(inputs)
    inputs.x[21, 2, 130] = value
    if value == 65504.0:
        inputs.h_res[21, :, 2] = 2.0
    got_next, got_partial, _ = post_project(inputs)
    others = [token for token in range(case.num_tokens) if token != 21]
    assert_same_bits([got_next[others], got_partial[..., others]], [x_next[others], partial[..., others]])
    assert not torch.isfinite(got_partial[..., 21]).all(0).all()


def nothing_waited_for(code):
    """The first wait for copies taken away."""
    return re.sub(r"tl::cp_async_wait<0>\(\);", "", code, count=1)


def no_barrier(code):
    return code.replace("__syncthreads();", "", 1)


def one_stage(code):
    """The next chunk of phi copied over the one that is read."""
    damaged_code, found = re.subn(r"\+ \(int64_t\)\d+\) - \(\(\(int64_t\)stage\)", ") + (((int64_t)stage)", code)
    assert found
    return damaged_code


FAULTS = [
    (nothing_waited_for, {"missing cp.async wait"}),
    (no_barrier, {"race", "missing cp.async wait"}),
    (one_stage, {"race", "missing cp.async wait"}),
]


@pytest.mark.parametrize("family", ["post_project", "project"])
@pytest.mark.parametrize(("mutate", "kinds"), FAULTS)
def test_planted_faults_in_eight_streams_are_reported(family, mutate, kinds):
    inputs = Inputs.of(Case(8, 72, torch.bfloat16, 19), CPU)
    mixed = (inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res) if family == "post_project" else (inputs.x,)
    with damaged(family, mutate), executing("sm_90a", FEWEST), pytest.raises(SimtError) as caught:
        getattr(launch, family)(*mixed, inputs.phi)
    assert caught.value.kinds & kinds


@pytest.mark.parametrize("family", ["post_project", "project"])
@pytest.mark.parametrize(("mutate", "kinds"), FAULTS)
def test_planted_faults_are_reported(family, mutate, kinds):
    inputs = Inputs.of(MAIN, CPU)
    run = post_project if family == "post_project" else separate
    with damaged(family, mutate), pytest.raises(SimtError) as caught:
        run(inputs, FEWEST)
    assert caught.value.kinds & kinds


def test_widths_that_warps_do_not_take():
    """A lane's eight channels are one access: C is a multiple of 8, of 16 bits each."""
    assert isinstance(
        projection_plans.projection_plan(24, 4, 648, "bfloat16", "cuda"), projection_plans.WarpProjectionPlan
    )
    for rows, n, width, dtype, platform in (
        *((24, 4, 644, "float16", "cuda"), (24, 4, 640, "float32", "cuda")),
        *((24, 4, 640, "bfloat16", "cpu"), (80, 8, 640, "float16", "cuda"), (16, 8, 640, "bfloat16", "cuda")),
    ):
        assert not isinstance(
            projection_plans.projection_plan(rows, n, width, dtype, platform), projection_plans.WarpProjectionPlan
        )


@pytest.mark.parametrize("family", ["post_project", "project"])
def test_streams_are_indexed_in_64_bits(family):
    """A token times its stride. Catches an index that wraps where T · n · C is above 2^31."""
    with executing() as launches:
        inputs = Inputs.of(Case(4, 640, torch.bfloat16, 1), CPU)
        run = post_project if family == "post_project" else separate
        run(inputs)
    parameters = next(launch.parameters for launch in launches if launch.family == family)
    source = load_or_generate(family, parameters, "sm_80")[0].code
    assert "(int64_t)2560)" in source
    assert not re.findall(r"\* 2560\)", source)


@pytest.mark.parametrize("sinkhorn_eps", [1e-6, 0.0])
@pytest.mark.parametrize("blocks", [FEWEST, MOST])
def test_one_launch_has_the_bits_of_two(blocks, sinkhorn_eps):
    """The mappings and the aggregation from partial sums, against the tile kernels; a slab a group and a slab a chunk,
    a warp a token and several. Catches sums added in another order in the two kinds of blocks.
    """
    inputs, spec = Inputs.of(MAIN, CPU), replace(MAIN.spec, sinkhorn_eps=sinkhorn_eps)
    with executing(parallel_blocks=blocks) as launches:
        plan = launch.projection_plan(inputs.x, 24)
        partial = launch.project(inputs.x, inputs.phi, plan, chunks_per_split=1 if blocks == MOST else None)
        empty = [torch.full(shape, torch.nan) for shape in ((70, 4), (70, 4), (70, 4, 4))]
        out = (torch.full((70, 640), torch.nan, dtype=torch.bfloat16), *empty)
        projected = launch.coefficients_and_aggregate(inputs.x, partial, inputs.alpha, inputs.bias, spec, plan, out=out)
        assert launches[-1].family == "coefficients_aggregate"
        h_pre, _, _, kept = launch.coefficients(partial, inputs.alpha, inputs.bias, spec, plan, is_deferred=True)
        parameters = (inputs.x, h_pre, kept, inputs.alpha, inputs.bias, spec)
        layer_input, h_post, h_res = launch.aggregate_mappings(*parameters)
    assert_same_bits([*out, projected], [layer_input, h_pre, h_post, h_res, kept])
