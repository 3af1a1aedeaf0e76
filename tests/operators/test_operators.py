"""The operators keep PyTorch's rules, and `out=` writes where it should.

Would catch: a schema that hides a write or an alias, a fake of another shape or dtype, an operator without autograd,
a result that is computed elsewhere and copied.
"""

from __future__ import annotations

import math

import pytest
import torch
from differentiable import DELAYED, FORMS, FUNCTIONS, IDENTITY, QUANTIZED, gradients, requiring, upstream
from helpers import assert_same_bits

from mhc_tilelang import operators, ops
from mhc_tilelang.checking.families.aggregate_norm import EPS
from mhc_tilelang.checking.inputs import Case
from mhc_tilelang.operators import library

BF16 = Case(4, 64, torch.bfloat16, 6)
OF_RESULTS = ("test_schema", "test_faketensor")  # opcheck's tests of an operator's results, of all that it has
ADJOINT = ("expand", "collapse")  # each is the other's backward
ALONE = tuple(f"{name}_alone" for name in QUANTIZED)
# Checked so in test_collapse, test_identity and test_quantized.
ELSEWHERE = ("collapse_mean", *IDENTITY, *QUANTIZED, *ALONE)
every_function = pytest.mark.parametrize("function", FORMS.values(), ids=FORMS)


def operator(name):
    return getattr(torch.ops.mhc_tilelang, name).default


def constants_of(function, spec):
    """Return the arguments of a function's operators after its tensors."""
    of_spec = (spec.sinkhorn_iters, spec.sinkhorn_eps, spec.pre_eps, spec.rms_eps, spec.post_scale)
    given = {
        "expand": (spec.num_streams,),
        "sinkhorn": (spec.sinkhorn_iters, spec.sinkhorn_eps),
        "head": (spec.pre_eps, spec.rms_eps),
        "post_head": (spec.pre_eps, spec.rms_eps),
        **dict.fromkeys(DELAYED, (*of_spec, EPS)),
    }
    return given.get(function.name, of_spec if "phi" in function.arguments else ())


def operator_arguments(function, case):
    """Positional arguments of X; leading dimensions [2, T/2] or [0, 3]."""
    tensors = function.tensors(case, (2, case.num_tokens // 2) if case.num_tokens else (0, 3))
    tensors.pop("norm_weight", None)
    form = [tensors.pop("h_pre", None), tensors.pop("rms_norm_weight", None)] if function.name in DELAYED else []
    return [*tensors.values(), *form, *constants_of(function, case.spec)]


def backward_arguments(function, case):
    """Positional arguments of X_backward."""
    return arguments_behind(function.name, operator_arguments(function, case))


def arguments_behind(name, arguments):
    """Convert X's arguments to X_backward's: upstream gradients, X's tensors, what X kept, constants, needs."""
    declared = getattr(operators, name)
    outputs = operator(name)(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = dict(zip((*declared.results, *declared.kept), outputs, strict=True))
    count = len(declared.inputs)
    public = declared.public(arguments[:count])
    g_outputs = upstream([named[name] for name in public])
    g_outputs += [None] * (len(declared.results) - len(public))  # of the h_pre that is not returned
    needs = [tensor is not None for tensor in arguments[:count]]
    return [*g_outputs, *arguments[:count], *(named[name] for name in declared.saved), *arguments[count:], *needs]


def buffers_of(name, outputs, is_delayed):
    """X_out's buffers for these outputs, by name."""
    declared = getattr(operators, name)
    names = ("out",) if len(declared.results) == 1 else declared.results
    if declared.optional and not is_delayed:
        names = names[:-1]
    return {name: torch.zeros_like(output) for name, output in zip(names, outputs, strict=False)}


def tried(num_tokens):
    """Return opcheck's tests: without tokens those of results, which is where sizes matter."""
    return {} if num_tokens else {"test_utils": OF_RESULTS}


def check_operators(name, arguments, is_delayed=False, **which):
    """PyTorch's own checks of X, X_out and, where there is one, X_backward; all of them, or `test_utils`."""
    arguments = [one.detach() if isinstance(one, torch.Tensor) else one for one in arguments]
    outputs = operator(name)(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.library.opcheck(operator(f"{name}_out"), tuple(arguments), buffers_of(name, outputs, is_delayed), **which)
    if hasattr(torch.ops.mhc_tilelang, f"{name}_backward"):
        torch.library.opcheck(operator(f"{name}_backward"), tuple(arguments_behind(name, arguments)), **which)
    requiring = (one.requires_grad_() if isinstance(one, torch.Tensor) else one for one in arguments)
    torch.library.opcheck(operator(name), tuple(requiring), **which)


@pytest.mark.parametrize("num_tokens", [6, 0], ids=["tokens", "no-token"])
@every_function
def test_forward_operators(function, num_tokens):
    """PyTorch's own checks: schema, fake, autograd registration, and both under AOTAutograd with symbolic sizes."""
    arguments = operator_arguments(function, Case(4, 64, torch.bfloat16, num_tokens))
    for k, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            arguments[k] = argument.requires_grad_()
    torch.library.opcheck(operator(function.name), tuple(arguments), **tried(num_tokens))


@pytest.mark.parametrize("num_tokens", [6, 0], ids=["tokens", "no-token"])
@pytest.mark.parametrize("function", [f for f in FORMS.values() if f.name not in ADJOINT], ids=lambda f: f.name)
def test_backward_operators(function, num_tokens):
    """Backward operators too; nothing needed and all of it, no upstream gradient but the last and all of them.

    What is asked for changes the results, and whether the fake has them: AOTAutograd is tried once, with all of it.
    """
    arguments = backward_arguments(function, Case(4, 64, torch.bfloat16, num_tokens))
    check = operator(f"{function.name}_backward")
    torch.library.opcheck(check, tuple(arguments), **tried(num_tokens))
    declared = getattr(operators, function.name)
    results, inputs = len(declared.results), len(declared.inputs)
    last = [None] * (results - 1) + arguments[results - 1 : results]
    if results > 1 and last[-1] is not None:
        torch.library.opcheck(check, (*last, *arguments[results:]), test_utils=OF_RESULTS)
    for needed in range(inputs):
        needs = [k == needed and arguments[-inputs:][k] for k in range(inputs)]
        torch.library.opcheck(check, (*arguments[:-inputs], *needs), test_utils=OF_RESULTS)


@pytest.mark.parametrize("num_tokens", [6, 0], ids=["tokens", "no-token"])
@every_function
def test_out_operators(function, num_tokens):
    """Operators with `out` too. Catches a buffer that the schema does not call written."""
    arguments = operator_arguments(function, Case(4, 64, torch.bfloat16, num_tokens))
    outputs = operator(function.name)(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.library.opcheck(
        operator(f"{function.name}_out"),
        tuple(arguments),
        buffers_of(function.name, outputs, "h_pre" in function.arguments),
        **tried(num_tokens),
    )


def test_every_operator_is_checked():
    """Tests the tests above: an operator that none of them knows."""
    names = (*FUNCTIONS, *ELSEWHERE)
    known = {f"mhc_tilelang::{name}{kind}" for name in names for kind in ("", "_out", "_backward")}
    known -= {f"mhc_tilelang::{name}_backward" for name in (*ADJOINT, "collapse_mean", *ALONE)}
    assert library.LIBRARY._op_defs == known


@every_function
def test_results_have_memory_of_their_own(function):
    """Outputs are no views, which autograd would not let a caller write into, and nothing shares memory."""
    tensors = requiring(function.tensors(BF16, (2, 3)))
    outputs = function.call(tensors, BF16.spec)
    assert not any(output._is_view() for output in outputs)
    results = [*outputs, *gradients(outputs, tensors, upstream(outputs)).values()]
    assert len({result.data_ptr() for result in results}) == len(results)


@pytest.mark.parametrize("leading", [(6,), (2, 3), (0, 3), ()], ids=str)
@every_function
def test_given_buffers(function, leading):
    """`out=` writes the results, to the bit, and returns the buffers; it allocates no stream."""
    tensors = function.tensors(Case(4, 64, torch.bfloat16, math.prod(leading)), leading)
    expected = function.call(tensors, BF16.spec)
    buffers = tuple(torch.full_like(output, math.nan) for output in expected)
    returned = function.call(tensors, BF16.spec, out=buffers if len(buffers) > 1 else buffers[0])
    assert all(r is b for r, b in zip(returned, buffers, strict=True))
    assert_same_bits(buffers, expected)


@pytest.mark.parametrize("name", ["expand", "collapse", "sinkhorn", "post"])
def test_given_buffers_are_all_the_memory(name, monkeypatch):
    """Nothing is allocated. Catches a result that is computed elsewhere and copied."""
    function = FUNCTIONS[name]
    tensors = function.tensors(BF16)
    (buffer,) = map(torch.empty_like, function.call(tensors, BF16.spec))
    for owner, method in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "clone"),
    ):
        monkeypatch.setattr(owner, method, lambda *_, **__: pytest.fail("allocated"))
    function.call(tensors, BF16.spec, out=buffer)


@pytest.mark.parametrize("name", ["pre", "pre-delayed", "post_pre", "post_pre-delayed"])
def test_given_buffers_are_written_by_the_kernels(name, monkeypatch):
    """Workspace is allocated, and nothing as wide as a stream. Catches results that are copied into their buffers."""
    function = FORMS[name]
    tensors = function.tensors(BF16)
    tensors.pop("norm_weight")  # multiplied into phi
    buffers = tuple(map(torch.zeros_like, function.call(tensors, BF16.spec)))
    empty_like = torch.empty_like

    def narrow(tensor, **options):
        assert tensor.dtype == torch.float32
        return empty_like(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", narrow)
    for method in ("clone", "copy_"):
        monkeypatch.setattr(torch.Tensor, method, lambda *_, **__: pytest.fail("copied"))
    function.call(tensors, BF16.spec, out=buffers)


def test_written_buffers_are_known_to_autograd():
    """A buffer that a backward still needs: PyTorch's error for it, as for any write in place."""
    h = torch.randn(6, 64)
    buffer, weight = torch.randn(6, 4, 64), torch.randn(6, 4, 64, requires_grad=True)
    product = buffer * weight
    ops.expand(h, 4, out=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward(torch.randn(6, 4, 64))
