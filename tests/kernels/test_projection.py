"""projection: x·phi and Σx² in fixed chunks, by the CPU's plan and, run on the CPU, by the GPU's with phi split.

Would catch: a chunk left out or added twice, a tail that reads its neighbour, bits that depend on the split,
phi rounded to the tensor core's operands.
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

from mhc_tilelang import launch
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.compiler.kernel import dtype_name
from mhc_tilelang.kernels import plans, projection_plans

pytestmark = pytest.mark.usefixtures("poisoned")
TARGETS = ("cpu", "cuda")
# The GPU's chunks have 128 channels for bfloat16, 64 and 32 for float16 and float32 at n = 4.
GPU_CASES = every_n_and_dtype(63)
GPU_CASES += [named("width", Case(4, size, dtype, 65)) for size, dtype in zip((1, 7, 333), DTYPES, strict=True)]
READERS = [Case(4, 333, torch.bfloat16, 65), Case(2, 192, torch.float16, 63), Case(8, 192, torch.float32, 63)]


def plan_of(case, target, rows=None):
    rows = rows or case.spec.num_coefficients
    return projection_plans.tile_projection_plan(rows, case.hidden_size, dtype_name(case.dtype), target)


def label(case):
    return f"n{case.num_streams}-C{case.hidden_size}-{dtype_name(case.dtype)}-T{case.num_tokens}"


@pytest.fixture
def gpu_plan(monkeypatch):
    """Everything that projects takes the GPU's plan; the kernels still run on the CPU."""

    def plan(x, rows):
        return projection_plans.tile_projection_plan(rows, x.shape[-1], dtype_name(x.dtype), "cuda")

    replace_launch(monkeypatch, "projection_plan", plan)


@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.usefixtures("gpu_plan")
def test_gpu_plan_matches_float64(case):
    """Halves, masks and padding columns of the GPU's plan. The bound is that of the plan, splitting included."""
    assert_matches_float64("project", case)


@pytest.mark.parametrize("kernel", ["coefficients", "head"])
@pytest.mark.parametrize("case", READERS, ids=label)
@pytest.mark.usefixtures("gpu_plan")
def test_readers_of_the_gpu_plan_match_float64(case, kernel):
    """Catches halves that are not added, and rows counted from the wrong half."""
    assert_matches_float64(kernel, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("gpu_plan")
def test_gpu_plan_with_small_phi(dtype):
    """phi ~ 1e-4. Catches halves in float16, whose low half would be subnormal."""
    case = Case(4, 192, dtype, 127)
    inputs = Inputs.of(case, CPU)
    assert_matches_float64("project", case, replace(inputs, phi=inputs.phi * (1e-4 / inputs.phi.std())))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("gpu_plan")
def test_the_split_matters(dtype, monkeypatch):
    """Tests the tests above: without low halves, as by one product of bfloat16 or TF32 phi, the bound is broken."""
    split_phi = launch.split_phi

    def high_only(phi, plan):
        halves = split_phi(phi, plan)
        halves[plan.rows :] = 0
        return halves

    replace_launch(monkeypatch, "split_phi", high_only)
    case = Case(4, 192, dtype, 63)
    (_, dots), (_, squares) = verdicts("project", case)
    assert not dots.passed
    assert squares.passed
    for kernel in ("coefficients", "head"):
        assert not any(verdict.passed for _, verdict in verdicts(kernel, case))


@pytest.mark.parametrize("head", [False, True], ids=["coefficients", "head"])
@pytest.mark.parametrize("case", READERS, ids=label)
def test_halves_of_phi(case, head):
    """high is phi as the operand type holds it, low what is left to its own rounding, padding is zero.

    Only the head's few rows need padding to the 16 columns of a tensor core's tile.
    """
    plan = plan_of(case, "cuda", rows=case.num_streams if head else None)
    assert (plan.padded_rows > 2 * plan.rows) == (head and case.num_streams < 8)
    phi = Inputs.of(case, CPU).phi[: plan.rows].view(plan.rows, case.num_streams, case.hidden_size)
    halves = launch.split_phi(phi, plan)
    high, low, padding = halves.split([plan.rows, plan.rows, plan.padded_rows - 2 * plan.rows])
    if plan.operand_dtype == "bfloat16":
        assert_same_bits([high, low], [phi.bfloat16(), (phi - phi.bfloat16().float()).bfloat16()])
    else:
        tf32 = (phi.view(torch.int32) & ~0x1FFF).view(torch.float32)
        assert_same_bits([high, low], [tf32, phi - tf32])
    assert not padding.any()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [Case(4, 1000, torch.bfloat16, 65), Case(4, 333, torch.float32, 3)], ids=label)
def test_split_count_moves_no_bit(case, target):
    """One chunk a block up to all in one. Catches totals written instead of chunk sums, chunks out of order.

    On a GPU's plan also whole groups a block, which write a slab a group. Catches groups that the reader adds up
    differently.
    """
    plan, inputs = plan_of(case, target), Inputs.of(case, CPU)
    num_chunks = plan.num_chunks(case.hidden_size)
    assert num_chunks >= 2

    def results(chunks_per_split):
        partial = launch.project(inputs.x, inputs.phi, plan, chunks_per_split)
        if chunks_per_split is not None:
            per_slab = plan.chunks_per_group if chunks_per_split % plan.chunks_per_group == 0 else 1
            slabs = 1 if chunks_per_split >= num_chunks else -(-num_chunks // per_slab)
            assert partial.shape == (slabs, plan.slab_rows, case.num_tokens)
        return launch.coefficients(partial, inputs.alpha, inputs.bias, case.spec, plan)

    picked = results(None)
    for chunks_per_split in range(1, num_chunks + 2):
        assert_same_bits(results(chunks_per_split), picked)


@pytest.mark.parametrize("parallel_blocks", [1, 8, 132, 264])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_slabs_that_a_gpu_writes(dtype, parallel_blocks):
    """One where the tokens fill the device, a slab a group where they come near it, chunks below that; no block ends
    later than with any other number of groups a block.
    """
    plan = projection_plans.tile_projection_plan(24, 2560, dtype, "cuda")
    num_chunks = plan.num_chunks(2560)
    for num_tokens in (1, 63, 512, 1024, 2048, 4096, 16384, 65536):
        per_split = projection_plans.chunks_per_split(num_tokens, num_chunks, plan, parallel_blocks)
        slabs = projection_plans.num_slabs(per_split, num_chunks, plan)
        blocks = -(-num_tokens // plan.tokens)
        splits = -(-num_chunks // per_split)
        groups = num_chunks // plan.chunks_per_group
        assert groups * plan.chunks_per_group == num_chunks
        assert slabs in (1, groups, num_chunks)
        assert slabs < num_chunks or blocks * 2 * groups <= parallel_blocks
        longest = -(-blocks * splits // parallel_blocks) * per_split
        most_equal = min(-(-blocks * k // parallel_blocks) * num_chunks // k for k in (1, 2, groups))
        assert longest <= 1.1 * most_equal


@pytest.mark.parametrize("hidden_size", [1280, 2048, 2560, 4096, 5120, 7168, 8192])
def test_groups_are_equal(hidden_size):
    """Every shipped width has an even number of equal groups. Catches a last group that is partial: 8, 8, 4 chunks."""
    found = [projection_plans.tile_projection_plan(24, hidden_size, dtype, "cuda") for dtype in plans.BYTES]
    for plan in (projection_plans.projection_plan(24, 4, hidden_size, "bfloat16", "cuda"), *found):
        num_chunks = plan.num_chunks(hidden_size)
        assert num_chunks % plan.chunks_per_group == 0
        assert num_chunks // plan.chunks_per_group % 2 == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("field", ["x", "phi"])
def test_each_channel_counts_once(field, target):
    """x and phi are 0 and 1: counts of channels, exact in every dtype. Catches a channel missed or taken twice."""
    case = Case(4, 333, torch.bfloat16, 65)
    inputs, plan = Inputs.of(case, CPU), plan_of(case, target)
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(2, inputs.x.shape, generator=generator).to(case.dtype)
    phi = torch.randint(2, inputs.phi.shape, generator=generator).float()
    x, phi = (torch.ones_like(x), phi) if field == "phi" else (x, torch.ones_like(phi))
    total = launch.project(x, phi, plan).sum(0)
    dots = total[: plan.halves * plan.rows].view(plan.halves, plan.rows, -1).sum(0).T
    squares = total[plan.halves * plan.rows :]
    np.testing.assert_array_equal(numpy64(dots), numpy64(x.flatten(1)) @ numpy64(phi).T)
    lanes = (
        torch.nn.functional.pad(x, (0, -333 % projection_plans.LANES))
        .unflatten(-1, (-1, projection_plans.LANES))
        .float()
    )
    np.testing.assert_array_equal(numpy64(squares.T), numpy64(lanes.sum((1, 2))))
