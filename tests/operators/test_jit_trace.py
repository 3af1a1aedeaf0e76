"""torch.jit.trace: a trace holds the operators, and gives the bits and gradients of what was traced.

Would catch: sizes that become tensors and stop the checks, a check that leaves a constant or a warning in the trace, a
number of tokens or of leading dimensions that is baked in, a gradient that a trace does not have.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from differentiable import FORMS, gradients, requiring, upstream
from helpers import assert_same_bits
from test_meta import KINDS, Model

import mhc_tilelang as mhc
from mhc_tilelang.checking.inputs import Case

CASE = Case(4, 64, torch.float32, 6)


def traced(function: Callable[..., Any], arguments: tuple[torch.Tensor, ...]) -> Any:
    """The trace, which PyTorch's own check compares with another one; a TracerWarning is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("error", category=torch.jit.TracerWarning)
        return torch.jit.trace(function, arguments)


@pytest.mark.parametrize("name", FORMS)
def test_functions(name):
    """Traced at [6] tokens, called at [2, 5] of other values."""
    form, names = FORMS[name], FORMS[name].arguments
    trace = traced(
        lambda *given: form.call(dict(zip(names, given, strict=True)), CASE.spec), tuple(form.tensors(CASE).values())
    )
    tensors = form.tensors(replace(CASE, num_tokens=10, seed=1), leading=(2, 5))
    results = []
    for call in (lambda given: trace(*given.values()), lambda given: form.call(given, CASE.spec)):
        given = requiring(tensors)
        outputs = call(given)
        results.append([*outputs, *gradients(outputs, given, upstream(outputs)).values()])
    assert_same_bits(*results)


def test_first_pre():
    trace = traced(mhc.first_pre, (torch.zeros(6, 4, 64),))
    assert_same_bits([trace(torch.zeros(2, 5, 4, 64))], [mhc.first_pre(torch.zeros(2, 5, 4, 64))])


@pytest.mark.parametrize("kind", KINDS)
def test_models(kind):
    """Through a stream, saved and loaded."""
    torch.manual_seed(0)
    model = Model(kind)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    file = io.BytesIO()
    torch.jit.save(traced(model, (torch.randn(6, 64),)), file)
    file.seek(0)
    h = torch.randn(2, 5, 64)
    results = []
    for call in (model, torch.jit.load(file)):
        given = h.clone().requires_grad_()
        output = call(given)
        results.append([output, *torch.autograd.grad(output, given, torch.sin(h))])
    if kind in ("mhc", "delayed"):
        assert_same_bits(*results)
    else:  # TorchScript's fuser has its own last bits in plain torch's arithmetic
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)
