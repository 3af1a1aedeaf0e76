"""The tests of the kernels must be able to fail: each kernel's generated source is damaged, and the damage is caught.

Damaged is the CUDA source, after tilelang: a barrier or a wait is dropped, rows of h_res change places, a mask lets one
more element through. Caught means that the executor reports it or that the result leaves its bounds.
"""

from __future__ import annotations

import re

import pytest
import torch
from damaged import Mutation, damaged

from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.checking.run import check_case
from mhc_tilelang.compiler.simt import SimtError, executing, target
from mhc_tilelang.kernels import FAMILIES

MAIN = Case(4, 144, torch.bfloat16, 37)
LONG = Case(4, 144, torch.bfloat16, 130)  # several tiles of tokens a block
CHECKED_BY = {
    "split_phi": "project",
    "head_coefficients": "head",
    "sum_partials": "coefficients_backward",
    "expand_project": "expand_pre",
    "post_project": "post_pre",
    "coefficients_aggregate": "post_pre",
    "coefficients_aggregate_backward": "post_pre_backward",
    "boundary_backward": "post_pre_backward",
    "boundary_sums": "post_pre_backward",
}


# All but the one whose blocks hand over to each other: its faults are planted in test_post_pre_at_once.
DAMAGED = [family for family in FAMILIES if family != "post_pre"]


def outcome(family: str, mutate: Mutation, case: Case = MAIN, parallel_blocks: int = 8) -> str:
    """Return what a kernel's check says of its damaged source: "passed", "wrong", or the executor's findings."""
    try:
        with damaged(family, mutate), executing(parallel_blocks=parallel_blocks):
            row = check_case(CHECKED_BY.get(family, family), case, Inputs.of(case, torch.device("cpu")))
    except SimtError as error:
        return ", ".join(sorted(error.kinds))
    return "passed" if row.passed else "wrong"


def source_of(family: str) -> str:
    """The source of a family as its check launches it first."""
    with executing() as launches:
        check_case(CHECKED_BY.get(family, family), MAIN, Inputs.of(MAIN, torch.device("cpu")))
    parameters = next(launched.parameters for launched in launches if launched.family == family)
    return target.load_or_generate(family, parameters, "sm_80")[0].code


# What makes a mask let one more element through: of channels, 18 vectors of 8, unless said here of tokens or others.
TOKENS = (r" < num_tokens\)", " <= num_tokens)")
CHANNELS = (r"threadIdx\.x\) < 18\)", "threadIdx.x) < 19)")
MASKS = {
    "split_phi": (r" < 9\)", " < 10)"),
    "project": TOKENS,
    "coefficients": TOKENS,
    "coefficients_aggregate": TOKENS,
    "head_coefficients": TOKENS,
    "sinkhorn": TOKENS,
    "aggregate_mappings": TOKENS,
    "project_backward": TOKENS,
    "coefficients_backward": TOKENS,
    "gates": TOKENS,
    "gates_backward": TOKENS,
    "coefficients_aggregate_backward": TOKENS,
    "head_coefficients_backward": TOKENS,
    "sum_partials": (r" < num_elements\)", " <= num_elements)"),
    "sinkhorn_backward": TOKENS,
    "expand_project": TOKENS,
    "post_project": TOKENS,
    "boundary_backward": TOKENS,
    "boundary_sums": TOKENS,
}


@pytest.mark.parametrize("family", DAMAGED)
def test_a_wrong_mask_is_caught(family: str) -> None:
    """One token or vector too many leaves the tensor, or a row of it."""
    pattern, replacement = MASKS.get(family, CHANNELS)
    assert re.search(pattern, source_of(family))
    assert outcome(family, lambda code: re.sub(pattern, replacement, code)) != "passed"


MIXING = ("coefficients", "coefficients_aggregate", "sinkhorn", "aggregate_mappings", "post", "replay", "post_project")
MIXING += ("coefficients_backward", "sinkhorn_backward", "post_backward")


@pytest.mark.parametrize("family", MIXING)
def test_swapped_rows_of_h_res_are_caught(family: str) -> None:
    """Wherever a kernel takes a row of H_res, of its logits or their gradients, it takes another one."""
    row = r"(\b(?:g_)?(?:h_res(?:_\d)?|logits)(?: \+|\[).*?)\(\(int64_t\)(\w+)\) \* \(int64_t\)4\)"

    def swapped(code: str) -> str:  # once: all of a matrix's rows in another order are another matrix, treated right
        return re.sub(row, r"\1((int64_t)(3 - \2)) * (int64_t)4)", code, count=1)

    assert swapped(source_of(family)) != source_of(family)
    assert outcome(family, swapped) == "wrong"


# Barriers that tilelang sets and nothing needs: what follows begins with one, or touches what the same thread touched.
REDUNDANT = {"post_backward": 1}
SYNCHRONIZED = {"project": 2, "project_backward": 2, "post_project": 2, "boundary_backward": 3}
SYNCHRONIZED |= {"coefficients_backward": 1, "coefficients_aggregate_backward": 2}
SYNCHRONIZED |= {"aggregate_norm_backward": 1, "expand_project": 2, "post_backward": 2}
"""How many barriers and waits there are, besides those of reductions."""


@pytest.mark.parametrize("family", DAMAGED)
def test_dropped_synchronization_is_caught(family: str) -> None:
    """Every barrier and every wait, one after the other; a block takes several tiles here."""
    pattern = r"__syncthreads\(\);|tl::cp_async_wait<\d+>\(\);"
    found = list(re.finditer(pattern, source_of(family)))
    assert len(found) == SYNCHRONIZED.get(family, 0)

    def without(k: int) -> Mutation:
        def drop(code: str) -> str:
            start, end = list(re.finditer(pattern, code))[k].span()
            return code[:start] + code[end:]

        return drop

    outcomes = [outcome(family, without(k), LONG, parallel_blocks=1) for k in range(len(found))]
    assert outcomes.count("passed") == REDUNDANT.get(family, 0), outcomes
