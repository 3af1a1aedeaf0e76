"""Numbers of streams other than 2, 4 and 8: on the CPU target and as generated CUDA, against float64.

CI takes of each n what depends on it; `full` every check in every dtype.

Would catch: tiles whose rows do not divide a block's tokens, streams that do not divide a warp's lanes, sums
or rows of phi that a block's threads do not share out evenly, a plan that takes three rows for a head's.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CPU, DTYPES, assert_same_bits

import mhc_tilelang as mhc
from mhc_tilelang import launch, ops, reference
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.checking.run import CHECKS, check_case
from mhc_tilelang.compiler.simt import executing
from mhc_tilelang.kernels import boundary_plans, projection_plans
from mhc_tilelang.kernels.projection_plans import WarpProjectionPlan, WarpsPlan

BF16 = torch.bfloat16
STREAMS = (1, 3, 5, 6, 7)
# What CI checks: on the CPU target, and as CUDA.
ON_CPU = {
    (3, "post_pre", BF16),
    (1, "post_pre_backward", BF16),
    (5, "post_head", BF16),
    (6, "sinkhorn_backward", BF16),
    (7, "post_backward", BF16),
}
AS_CUDA = {
    (1, "aggregate_norm_backward", BF16),  # its two sums have a fragment each
    (1, "post_pre_backward", torch.float32),  # all streams are the one whose halves are in shared memory
    (3, "project_backward", BF16),  # by warps, a stream a block
    (5, "sinkhorn_backward", BF16),
    (3, "post_backward", BF16),  # 9 sums of 64 threads; of 49, at n = 7, the CPU has them
}


def runs(in_ci: set[tuple[int, str, torch.dtype]]) -> list:
    """Every check at every n and dtype; `in_ci` without the mark."""
    return [
        pytest.param(
            Case(n, 72, dtype, 37),
            kernel,
            id=f"{kernel}-n{n}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.full] * ((n, kernel, dtype) not in in_ci),
        )
        for n in STREAMS
        for kernel in CHECKS
        for dtype in DTYPES
    ]


@pytest.mark.parametrize(("case", "kernel"), runs(ON_CPU))
def test_on_the_cpu(case: Case, kernel: str, poisoned: None) -> None:
    row = check_case(kernel, case, Inputs.of(case, CPU))
    assert row.passed, f"{row.error:.1e} exceeds {row.tolerance:.1e}"


@pytest.mark.parametrize(("case", "kernel"), runs(AS_CUDA))
def test_as_cuda(case: Case, kernel: str, poisoned: None) -> None:
    """A finding of the executor raises."""
    with executing() as launches:
        row = check_case(kernel, case, Inputs.of(case, CPU))
    assert launches
    assert row.passed, f"{row.error:.1e} exceeds {row.tolerance:.1e}"


def test_rows_of_phi_that_threads_do_not_share_out_evenly() -> None:
    """Fifteen rows of three streams, in the kernels that split phi themselves: partial sums are those of `project`."""
    case = Case(3, 64, BF16, 5)
    inputs = Inputs.of(case, CPU)
    with executing():
        x, partial = launch.expand_project(inputs.h, inputs.phi)
    assert torch.equal(x, launch.expand(inputs.h, 3))
    dots = numpy64(partial.sum(0)[:30]).reshape(2, 15, 5).sum(0).T
    expected, _ = reference.project(numpy64(x), numpy64(inputs.phi))
    np.testing.assert_allclose(dots, expected, atol=2**-15)  # halves keep 2^-18 of an element, and there are 192


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.full), 3])
def test_bits_and_batches(n: int) -> None:
    """The same call twice, and a token alone, have the same bits, forward and backward."""
    case = Case(n, 72, BF16, 9)
    i = Inputs.of(case, CPU)
    h_post, h_res = i.h_post, i.h_res

    def call(tokens: slice) -> list[torch.Tensor]:
        wide = [t[tokens].clone().requires_grad_() for t in (i.x, i.layer_output)]
        results = ops.post_pre(*wide, h_post[tokens], h_res[tokens], i.phi, i.alpha, i.bias, case.spec)
        return [*results, *torch.autograd.grad(results, wide, [torch.ones_like(one) for one in results])]

    whole = call(slice(0, 9))
    assert_same_bits(call(slice(0, 9)), whole)
    assert_same_bits(call(slice(4, 5)), [one[4:5] for one in whole])


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_one_streams_matrix_is_a_constant(eps: float) -> None:
    """One for eps = 0, one less eps to first order otherwise, whatever the logit; its gradient is zero."""
    logits = torch.tensor([-90.0, 0.0, 3.0, 1e30]).view(4, 1, 1).requires_grad_()
    h_res = ops.sinkhorn(logits, iters=20, eps=eps)
    assert (h_res - (1 - eps)).abs().max() <= 2 * 2.0**-24
    np.testing.assert_allclose(numpy64(h_res), reference.sinkhorn(numpy64(logits), 20, eps), atol=2 * 2.0**-24)
    (gradient,) = torch.autograd.grad(h_res, logits, torch.full_like(h_res, 3.0))
    assert gradient.abs().max() <= 3 * 2.0**-23


def test_plans_of_odd_numbers_are_by_tiles() -> None:
    """Warps own lanes by halves: what they share out is 2 or 4 streams, or one at a time."""
    for n in STREAMS:
        for rows in (n, 2 * n, n * n + 2 * n):
            plan = projection_plans.projection_plan(rows, n, 2560, "bfloat16", "cuda")
            assert not isinstance(plan, WarpProjectionPlan)
            backward = projection_plans.projection_backward_plan(rows, 2560, "bfloat16", "cuda", n)
            assert isinstance(backward, WarpsPlan)
            assert n % backward.streams == 0
            assert backward.streams in (1, 2, 4)
            if boundary_plans.backward_is_fused(n, "cuda"):
                boundary = boundary_plans.boundary_backward_plan(rows, n, 2560, "bfloat16", "cuda", "bfloat16")
                assert not isinstance(boundary, WarpsPlan)


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.full), 3])
def test_a_stream_of_modules(n: int) -> None:
    """Two sublayers against the float64 functions."""
    spec = mhc.MHCSpec.deepseek_v4(24, num_streams=n)
    torch.manual_seed(n)
    connections = [mhc.HyperConnection(spec, k) for k in range(2)]
    for connection in connections:
        for parameter in connection.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    h = torch.randn(5, 24)
    stream = mhc.ResidualStream(h, num_streams=n)
    x64 = np.repeat(numpy64(h)[:, None], n, 1)
    for connection in connections:
        u = stream.read(connection)
        stream.write(u.sin())
        parameters = [numpy64(p) for p in (connection.phi, connection.alpha, connection.bias)]
        u64, *mappings = reference.pre(x64, *parameters, spec)
        np.testing.assert_allclose(numpy64(u), u64, atol=1e-4)
        x64 = reference.post(x64, np.sin(u64), *mappings)
    np.testing.assert_allclose(numpy64(stream.reduce("sum")), x64.sum(1), atol=1e-4)


def test_nine_streams_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_streams: expected one of \(1, 2, .*, 8\), got 9"):
        replace(mhc.MHCSpec.deepseek_v4(24), num_streams=9)
