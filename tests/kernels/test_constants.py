"""iters, every eps and post_scale are run-time values: one kernel serves all of them, each in its own place.

Would catch: a constant that is compiled in, so that a schedule would compile at every step; one that is ignored, taken
for another, or named as another by TileLang, which names scalars after the macros that they are passed to.
"""

from dataclasses import dataclass, replace
from itertools import combinations

import pytest
import torch
from helpers import CPU, assert_matches_float64, verdicts

from mhc_tilelang import compiler, launch
from mhc_tilelang.checking.comparison import compare
from mhc_tilelang.checking.families.aggregate_norm import rms_norm_weight
from mhc_tilelang.checking.inputs import Case, Gradients, Inputs
from mhc_tilelang.checking.run import CHECKS
from mhc_tilelang.compiler import simt
from mhc_tilelang.kernels import plans

pytestmark = pytest.mark.usefixtures("poisoned")
DISTINCT = {"sinkhorn_iters": 3, "sinkhorn_eps": 0.01, "pre_eps": 0.25, "rms_eps": 0.5, "post_scale": 3.0}
# What each check's kernels take.
TAKEN = {
    "sinkhorn": ("sinkhorn_iters", "sinkhorn_eps"),
    "sinkhorn_backward": ("sinkhorn_iters", "sinkhorn_eps"),
    "coefficients": tuple(DISTINCT),
    "coefficients_backward": ("sinkhorn_iters", "sinkhorn_eps", "post_scale"),
    "aggregate_mappings": tuple(DISTINCT),
    "head": ("pre_eps", "rms_eps"),
}
SIZES = (4, 192, torch.bfloat16, 127)
EXECUTED = (4, 144, torch.bfloat16, 37)  # as in test_simt_kernels


@dataclass(frozen=True)
class Changed(Case):
    """A case with other constants than DeepSeek's."""

    constants: tuple = tuple(DISTINCT.items())

    @property
    def spec(self):
        return replace(super().spec, **dict(self.constants))


@pytest.fixture
def loads(monkeypatch):
    """The families of the kernels that are loaded from now on."""
    found = []
    load = compiler._load
    monkeypatch.setattr(compiler, "_load", lambda family, *rest: found.append(family) or load(family, *rest))
    return found


@pytest.mark.parametrize("kernel", TAKEN)
def test_other_constants_are_no_other_kernel(kernel, loads):
    """All at once, then eps 0: within the bounds of float64, with what the default's call has loaded."""
    CHECKS[kernel](Case(*SIZES), Inputs.of(Case(*SIZES), CPU))
    loads.clear()
    assert_matches_float64(kernel, Changed(*SIZES))
    assert_matches_float64(kernel, Changed(*SIZES, constants=(("sinkhorn_eps", 0.0), ("pre_eps", 0.0))))
    assert loads == []


@pytest.mark.parametrize("kernel", TAKEN)
def test_each_in_its_own_place(kernel):
    """A default in place of any of them, and any two that have changed places, are rejected."""
    case = Changed(*SIZES)
    right = [comparison for comparison, _ in verdicts(kernel, case)]
    swapped = [
        {one: DISTINCT[other], other: DISTINCT[one]}
        for one, other in combinations(TAKEN[kernel], 2)
        if "sinkhorn_iters" not in (one, other)
    ]
    ignored = [{name: getattr(Case(*SIZES).spec, name)} for name in TAKEN[kernel]]
    for wrong in (*swapped, *ignored):
        other = Changed(*SIZES, constants=tuple({**DISTINCT, **wrong}.items()))
        got = CHECKS[kernel](other, Inputs.of(other, CPU))
        passed = [compare(replace(r, got=g.got)).passed for r, g in zip(right, got, strict=True)]
        assert not all(passed), wrong


def test_eps_of_a_norm(loads):
    """Forward and backward; the checks have the value right."""
    case = Case(*SIZES)
    inputs, g, weight = Inputs.of(case, CPU), Gradients.of(case, CPU).g_h, rms_norm_weight(case, CPU)

    def results(eps):
        forward = launch.aggregate_norm(inputs.x, inputs.h_pre, weight, eps)
        return forward, *launch.aggregate_norm_backward(g, inputs.x, inputs.h_pre, weight, eps)

    before = results(1e-6)
    loads.clear()
    assert all(not torch.equal(got, other) for got, other in zip(results(0.5), before, strict=True))
    assert_matches_float64("aggregate_norm", case)
    assert_matches_float64("aggregate_norm_backward", case)
    assert loads == []


def test_iterations_up_to_the_capacity_are_one_kernel(loads):
    """The next one loads the kernel with more room, which has the same bits where both have enough."""
    case = Case(4, 1, torch.float32, 65)
    logits, g_h_res = Inputs.of(case, CPU).logits, Gradients.of(case, CPU).g_h_res
    small, large = list(plans.sinkhorn_backward_blocks(4, "cpu"))[:2]
    launch.sinkhorn(logits, 20, 1e-6)
    launch.sinkhorn_backward(g_h_res, logits, 20, 1e-6)
    loads.clear()
    for iters in (1, 2, small):
        launch.sinkhorn(logits, iters, 1e-6)
        launch.sinkhorn_backward(g_h_res, logits, iters, 1e-6)
    launch.sinkhorn(logits, large, 1e-6)
    assert loads == []
    launch.sinkhorn_backward(g_h_res, logits, small + 1, 1e-6)
    assert loads in ([], ["sinkhorn_backward"])  # none where another test has loaded it


@pytest.mark.parametrize(
    "kernel",
    [
        "sinkhorn",
        "sinkhorn_backward",
        "coefficients",
        pytest.param("aggregate_mappings", marks=pytest.mark.full),
        pytest.param("coefficients_backward", marks=pytest.mark.full),
    ],
)
def test_generated_cuda_code(kernel):
    """Generated CUDA gets a float where a float is declared, as a GPU would."""
    with simt.executing() as launches:
        assert_matches_float64(kernel, Changed(*EXECUTED))
    assert any("sinkhorn_eps" in launched.numbers for launched in launches)
