"""On a GPU: the checks, views that start anywhere, and bits that do not depend on the batch."""

from __future__ import annotations

import pytest
import torch

import mhc_tilelang as mhc
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.checking.run import CHECKS, cases, check_case

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_kernel_agrees_with_float64(case: Case) -> None:
    inputs = Inputs.of(case, CUDA)
    rows = [check_case(kernel, case, inputs) for kernel in CHECKS]
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, but starting one element into its storage."""
    storage = tensor.new_empty(tensor.numel() + 1)
    storage[1:] = tensor.flatten()
    return storage[1:].view(tensor.shape)


def test_views_that_start_anywhere_give_the_same_bits() -> None:
    """A 16-byte access to a misaligned address would fault; a narrower kernel may not change a bit."""
    case = Case(4, 192, torch.bfloat16, 33)
    inputs = Inputs.of(case, CUDA)
    moved = Inputs(**{name: shifted(tensor) for name, tensor in vars(inputs).items()})
    results = []
    for given in (inputs, moved):
        with torch.no_grad():
            layer_input, h_post, h_res = mhc.pre(given.x, given.phi, given.alpha, given.bias, case.spec)
            x_next = mhc.post(given.x, given.layer_output, given.h_post, given.h_res)
            results.append((layer_input, h_post, h_res, x_next, mhc.sinkhorn(given.logits)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_token_does_not_depend_on_its_batch() -> None:
    """Across the split counts that small and large batches take."""
    case = Case(4, 1280, torch.bfloat16, 4097)
    inputs = Inputs.of(case, CUDA)

    def pre(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return mhc.pre(x, inputs.phi, inputs.alpha, inputs.bias, case.spec)

    whole = pre(inputs.x)
    for first, last in ((0, 1), (7, 8), (0, 63), (1000, 1129), (4096, 4097)):
        part = pre(inputs.x[first:last].clone())
        assert all(torch.equal(a[first:last], b) for a, b in zip(whole, part, strict=True))
