"""Every kernel as generated CUDA at hidden sizes of real models, executed with few tokens and compared with float64.

What smaller widths cannot show: several groups of chunks, the slabs that they are written to, the last group, which is
a part of one, and several ranges of tokens. Partial sums are shared out between the blocks in every way there is.

Would catch: slabs in another order, skipped, or one off; groups that are added in another order by the kernel that
reads them than by the one that holds them in registers; a sum that is not cleared between groups; a last group that is
cut off; a range of tokens that is written as another; a kernel that no check executes at a real width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from damaged import Mutation, damaged

from mhc_tilelang import compiler
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.checking.run import CHECKS, check_case
from mhc_tilelang.compiler.kernel import dtype_name
from mhc_tilelang.compiler.recording import Recorded, record_launches
from mhc_tilelang.compiler.simt import SimtError, executing
from mhc_tilelang.kernels import FAMILIES, boundary_plans, projection_plans

CPU = torch.device("cpu")
TOKENS = 67  # of one tile and a tail: two tiles of tokens in every kernel that has tiles
WIDTHS = (1280, 2560, 4096, 7168)
# What is quickest to generate that has close_chunk in both projections, the reader of its slabs, and a backward.
QUICK = (("project", 2560), ("identity_post_pre", 4096), ("project_backward", 2560))


def group_count(hidden_size: int) -> int:
    """Groups of chunks, of a bfloat16 stream."""
    plan = projection_plans.projection_plan(24, 4, hidden_size, "bfloat16", "cuda")
    return -(-plan.num_chunks(hidden_size) // plan.chunks_per_group)


def shares(hidden_size: int) -> dict[str, int]:
    """Return how many blocks run at a time, by regime other than one slab; two tiles of tokens share them."""
    return {
        "a slab a group, two splits": 2 * 2,
        "a slab a chunk, several a split": 2 * (2 * group_count(hidden_size) + 2),
        "a slab a chunk, one a split": 2 * hidden_size,
    }


@contextmanager
def a_range_for_each_tile() -> Iterator[None]:
    """Patch plans to a range of tokens, with partial sums, for each tile: otherwise hundreds of tokens share one, and
    how many follows from the device; as does whether the forward that comes before a backward is one launch.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection_plans, "TOKENS_PER_PARTIAL", 1)
        patch.setattr(projection_plans, "MAX_PARTIALS", TOKENS)
        patch.setattr(projection_plans, "tiles_in_waves", lambda *_, **__: 1)
        patch.setattr(boundary_plans, "tiles_per_range", lambda *_: 1)
        patch.setattr(boundary_plans, "ends_at_once", lambda *_: False)
        patch.setattr(boundary_plans, "joined_tokens", lambda _, plan, __: plan.summing_warps)
        yield


def execute(kernel: str, case: Case, inputs: Inputs, parallel_blocks: int) -> list[Recorded]:
    """Check a kernel, whose bounds hold on every device; returns what it launched. A finding of the executor raises."""
    rows = []
    with executing(parallel_blocks=parallel_blocks):
        launches = record_launches(lambda: rows.append(check_case(kernel, case, inputs)))
    assert rows[0].passed, f"{rows[0].error:.1e} exceeds {rows[0].tolerance:.1e}"
    return launches


def projection_of(one: Recorded) -> projection_plans.ProjectionPlan | None:
    """The plan of the slabs that a launch writes or reads as `partial`; None if it has none."""
    plan = one.parameters.get("plan")
    plan = getattr(plan, "projection", plan)
    has_slabs = "partial" in one.arguments and one.family != "post_pre"  # whose blocks keep them to themselves
    return plan if isinstance(plan, projection_plans.ProjectionPlan) and has_slabs else None


def slab_counts_of(launches: list[Recorded]) -> set[int]:
    """Return the numbers of slabs of all projections."""
    return {len(one.arguments["partial"]) for one in launches if projection_of(one)}


def added_up(slabs: torch.Tensor) -> torch.Tensor:
    """Ascending, from zero."""
    total = torch.zeros_like(slabs[0])
    for slab in slabs:
        total = total + slab
    return total


def total_of(slabs: torch.Tensor, plan: projection_plans.ProjectionPlan, hidden_size: int) -> torch.Tensor:
    """Slabs as one: chunks into their groups, groups into the total."""
    if len(slabs) == plan.num_chunks(hidden_size):
        slabs = torch.stack([added_up(group) for group in slabs.split(plan.chunks_per_group)])
    return added_up(slabs)


def tensors_of(launches: list[Recorded]) -> dict[str, torch.Tensor]:
    """Every tensor of every launch, by launch and name; slabs added up."""
    found = {}
    for k, one in enumerate(launches):
        plan = projection_of(one)
        for name, tensor in one.arguments.items():
            if isinstance(tensor, torch.Tensor) and (plan or name != "partial"):
                added = total_of(tensor, plan, one.parameters["hidden_size"]) if plan and name == "partial" else tensor
                found[f"{name} of {one.family}, launch {k}"] = added.flatten().view(torch.uint8)
    return found


def differing(launches: list[Recorded], others: list[Recorded]) -> list[str]:
    """Tensors that are not the same to the bit."""
    found, expected = tensors_of(launches), tensors_of(others)
    assert list(found) == list(expected)
    return [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]


def runs() -> list:
    """QUICK at n = 2 with four groups of chunks, and every check at n = 4 at every width."""
    quick = [(kernel, Case(2, width, torch.bfloat16, TOKENS), []) for kernel, width in QUICK]
    quick += [("post_pre", Case(4, 2560, torch.float16, 17), [])]  # whose halves are its own
    full = [(k, Case(4, width, torch.bfloat16, TOKENS), [pytest.mark.full]) for width in WIDTHS for k in CHECKS]
    return [
        pytest.param(
            kernel, case, id=f"{kernel}-n{case.num_streams}-C{case.hidden_size}-{dtype_name(case.dtype)}", marks=marks
        )
        for kernel, case, marks in quick + full
    ]


def check_shares(kernel: str, case: Case) -> None:
    """Within its bounds however the work is shared out, and every tensor of every launch the same to the bit."""
    inputs = Inputs.of(case, CPU)
    with a_range_for_each_tile():
        first = execute(kernel, case, inputs, parallel_blocks=1)
    arguments = {name for one in first for name in one.arguments}
    if arguments & {"tokens_per_split", "tiles_per_range"}:
        execute(kernel, case, inputs, parallel_blocks=1)  # the one range that so few tokens share
    if "chunks_per_split" not in arguments:
        return
    slab_counts = slab_counts_of(first)
    for share, parallel_blocks in shares(case.hidden_size).items():
        with a_range_for_each_tile():
            launches = execute(kernel, case, inputs, parallel_blocks)
        slab_counts |= slab_counts_of(launches)
        assert differing(launches, first) == [], share
    plan, *others = (plan for one in first if (plan := projection_of(one)))
    assert all((one.channels, one.chunks_per_group) == (plan.channels, plan.chunks_per_group) for one in others)
    num_chunks = plan.num_chunks(case.hidden_size)
    groups = -(-num_chunks // plan.chunks_per_group)
    by_warps = isinstance(plan, projection_plans.WarpProjectionPlan)  # a slab a group, whatever the device
    assert slab_counts == ({groups} if by_warps else {1, groups, num_chunks})


@pytest.mark.parametrize(("kernel", "case"), runs())
def test_at_real_widths(kernel: str, case: Case, poisoned: None) -> None:
    check_shares(kernel, case)


@pytest.mark.parametrize("width", [pytest.param(width, marks=[pytest.mark.full] * (width != 2560)) for width in WIDTHS])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of what nothing computed
def test_every_family_is_executed_at_every_width(width: int) -> None:
    """Catches a kernel that the checks above do not launch at this width."""
    seen: set[str] = set()

    def load(family: str, parameters: dict) -> object:
        return lambda **_: seen.add(family)

    case = Case(4, width, torch.bfloat16, TOKENS)
    inputs = Inputs.of(case, CPU)
    emulator = compiler.Emulator("noted", load, parallel_blocks=8, kernels={})
    with compiler.emulating(emulator), a_range_for_each_tile():
        for check in CHECKS.values():
            check(case, inputs)
    assert seen == set(FAMILIES)


# Of a chunk that is called slab.
GROUP = "((((int64_t)slab) / (int64_t)5) + ((((int64_t)slab) % (int64_t)5) >> (int64_t)63))"
GROUP_32 = "((slab / 5) + ((slab % 5) >> 31))"


def forget_clear(code: str) -> str:
    """Groups of chunks start from the one before."""
    before, walk = code.split("for (int slab = ", 1)
    return before + "for (int slab = " + re.sub(r"\*\(float4\*\)\(group_dots \+ .* = make_float4\(.*\);", "", walk)


SLABS: dict[str, Mutation] = {
    "in reverse order": lambda code: code.replace(GROUP, f"(3 - {GROUP})"),
    "the second as the third": lambda code: code.replace(GROUP, f"({GROUP} + ({GROUP} == 1))"),
    "without the second": lambda code: code.replace(f"({GROUP_32} < num_slabs)", f"({GROUP_32} != 1)"),
    "of which the second holds the first": forget_clear,
    "without the last chunk": lambda code: code.replace(", 20); ++slab)", ", 19); ++slab)"),
}
PLANTED: dict[tuple[str, str, str], Mutation] = {
    **{
        (family, kernel, f"slabs {fault}"): mutate
        for family, kernel in (("project", "project"), ("post_project", "post_head"), ("expand_project", "expand_pre"))
        for fault, mutate in SLABS.items()
    },
    ("head_coefficients", "post_head", "groups in reverse order"): lambda code: code.replace(
        "((int64_t)first_slab)", "(int64_t)(num_slabs == 20 ? first_slab : rdiv - 1 - first_slab)"
    ),
    ("project_backward", "project_backward", "without the second range"): lambda code: code.replace(
        "partial[", "if (((int)blockIdx.z) != 1) partial["
    ),
    ("project_backward", "project_backward", "the second range as the first"): lambda code: re.sub(
        r"(partial\[.*?)\(\(int64_t\)\(\(int\)blockIdx\.z\)\)", r"\g<1>(int64_t)0", code
    ),
    ("project_backward", "project_backward", "the first range twice"): lambda code: code.replace(
        "((int64_t)((int)blockIdx.z)) * ((int64_t)tokens_per_split)", "0"
    ),
    ("boundary_backward", "post_pre_backward", "without the second range"): lambda code: code.replace(
        "partial_phi[", "if (((int)blockIdx.y) != 1) partial_phi["
    ),
    ("boundary_backward", "post_pre_backward", "the second range as the first"): lambda code: re.sub(
        r"(partial_phi\[.*?)\(\(int64_t\)\(\(int\)blockIdx\.y\)\)", r"\g<1>(int64_t)0", code
    ),
    ("boundary_backward", "post_pre_backward", "without the last tile of tokens"): lambda code: code.replace(
        "((num_tokens + 31) >> 5)", "(num_tokens >> 5)"
    ),
    ("boundary_backward", "post_pre_backward", "blocks of channels in one sum"): lambda code: re.sub(
        r"(partial_mixing\[.*)\(\(int64_t\)\(\(int\)blockIdx\.x\)\)", r"\g<1>(int64_t)0", code
    ),
}


@pytest.mark.full
@pytest.mark.parametrize(("family", "kernel", "fault"), PLANTED)
def test_a_planted_fault_is_caught(family: str, kernel: str, fault: str, poisoned: None) -> None:
    """The checks above must be able to fail: four groups of chunks, or two ranges of tokens, in a damaged source."""
    mutate, mutated = PLANTED[family, kernel, fault], []

    def noting(code: str) -> str:
        mutated.append(mutate(code) != code)
        return mutate(code)

    with damaged(family, noting), pytest.raises((AssertionError, SimtError)):
        check_shares(kernel, Case(3, 2560, torch.bfloat16, TOKENS))  # by tiles
    assert all(mutated)
    assert mutated
