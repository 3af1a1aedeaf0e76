"""torch.compile: one graph, whatever the number of tokens, and the bits of eager.

Would catch: a check that breaks the graph or fixes a size, a fake of other strides, a backward that cannot be traced, a
write into a buffer that the compiler does not see.
"""

from __future__ import annotations

import pytest
import torch
from differentiable import FORMS, FUNCTIONS, upstream
from helpers import CPU, assert_same_bits
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.utils import counters

import mhc_tilelang as mhc
from mhc_tilelang.checking.inputs import Case, Inputs

SPEC = mhc.MHCSpec.deepseek_v4(64)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


def graphs():
    """Return the number of graphs compiled since the test began."""
    return counters["stats"]["unique_graphs"]


def every_function(h, layer_output, phi, alpha, bias, norm_weight):
    """All of them in a row."""
    x = mhc.expand(h, 4)
    layer_input, h_post, h_res = mhc.pre(x, phi, alpha, bias, SPEC, norm_weight=norm_weight)
    x = mhc.post(x, layer_input + layer_output, h_post, h_res)
    h_pre, h_post, h_res = mhc.coefficients(x, phi, alpha, bias, SPEC)
    head = (phi[:4], alpha[:1], bias[:4], SPEC)
    ends = (*mhc.expand_pre(h, phi, alpha, bias, SPEC), *mhc.post_head(x, layer_output, h_post, h_res, *head))
    return x, h_pre, h_post, mhc.sinkhorn(h_res), mhc.head(x, *head), *ends


def arguments(*leading):
    i = Inputs.of(Case(4, 64, torch.bfloat16, torch.Size(leading).numel()), CPU)
    drawn = [i.h.view(*leading, 64), i.layer_output.view(*leading, 64), i.phi, i.alpha, i.bias, 0.5 + torch.rand(256)]
    return [tensor.requires_grad_() for tensor in drawn]


def results(function, given):
    """Outputs, then the gradients of all arguments."""
    outputs = function(*given)
    return [*outputs, *torch.autograd.grad(outputs, given, upstream(outputs))]


def assert_same_as_eager(compiled, given):
    assert_same_bits(results(compiled, given), results(every_function, given))


@pytest.mark.parametrize("leading", [(), (3,)], ids=["tokens", "batch-and-tokens"])
def test_one_graph_for_all_token_counts(leading):
    """Dynamic sizes: forward and backward, then one more graph each for 0 and 1, which PyTorch tells apart."""
    compiled = torch.compile(every_function, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (2, 3, 17, 64, 65):
        assert_same_as_eager(compiled, arguments(*leading, num_tokens))
        assert graphs() == 1
    for count, num_tokens in enumerate((1, 0), start=2):
        assert_same_as_eager(compiled, arguments(*leading, num_tokens))
        assert graphs() <= count


def test_one_graph_in_all():
    """Sizes that are marked unbacked may not be asked about at all: 0 and 1 need no graph of their own."""
    compiled = torch.compile(every_function, fullgraph=True, backend="aot_eager")
    for num_tokens in (2, 3, 64, 1, 0):
        given = arguments(num_tokens)
        for tensor in given[:2]:
            mark_unbacked(tensor, 0)
        assert_same_as_eager(compiled, given)
        assert graphs() == 1


def test_inductor():
    """The default backend, whose buffers may have other strides and places than eager's.

    On a function without arithmetic of PyTorch's own, which inductor rounds elsewhere.
    """

    def sublayer(h, layer_output, phi, alpha, bias):
        x = mhc.expand(h, 4)
        layer_input, h_post, h_res = mhc.pre(x, phi, alpha, bias, SPEC)
        return layer_input, mhc.post(x, layer_output, h_post, h_res)

    compiled = torch.compile(sublayer, fullgraph=True, dynamic=True)
    for num_tokens in (17, 64):
        given = arguments(num_tokens)[:-1]
        assert_same_bits(results(compiled, given), results(sublayer, given))
        assert graphs() == 1


def test_inference():
    """Compiled functions have the bits of eager ones without gradients, and under inference mode."""
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            given = [tensor.detach() for tensor in arguments(17)]
            compiled = torch.compile(every_function, fullgraph=True, dynamic=True, backend="aot_eager")
            assert_same_bits(compiled(*given), every_function(*given))


@pytest.mark.parametrize("name", FORMS)
def test_given_buffers(name):
    """A graph that writes into buffers of its caller, and one that makes them itself."""
    function, case = FORMS[name], Case(4, 64, torch.bfloat16, 6)
    tensors = function.tensors(case)
    expected = function.call(tensors, SPEC)
    kinds = [(output.shape, output.dtype) for output in expected]

    def write(tensors, out):
        return [output + 1 for output in function.call(tensors, SPEC, out=out if len(kinds) > 1 else out[0])]

    def make(tensors):
        return write(tensors, tuple(torch.empty(shape, dtype=dtype) for shape, dtype in kinds))

    buffers = tuple(torch.zeros_like(output) for output in expected)
    plus_one = [output + 1 for output in expected]
    assert_same_bits(torch.compile(write, fullgraph=True, backend="aot_eager")(tensors, buffers), plus_one)
    assert_same_bits(buffers, expected)
    assert_same_bits(torch.compile(make, fullgraph=True, backend="aot_eager")(tensors), plus_one)


def test_strided_arguments():
    """Eager refuses them; in a graph they may be the compiler's own doing, and the operators copy."""
    case = Case(4, 64, torch.bfloat16, 6)
    tensors = FUNCTIONS["post"].tensors(case)

    def strided(x, layer_output, h_post, h_res):
        return mhc.post(x.transpose(0, 1).contiguous().transpose(0, 1), layer_output, h_post, h_res.mT.contiguous().mT)

    compiled = torch.compile(strided, fullgraph=True, backend="aot_eager")
    assert_same_bits([compiled(**tensors)], FUNCTIONS["post"].call(tensors, SPEC))


def test_strided_buffers_are_refused():
    """A copy of the buffer would be written, and lost. Dynamo refuses what is called `out`, the operator the others."""
    function, case = FUNCTIONS["coefficients"], Case(4, 64, torch.bfloat16, 6)
    tensors = function.tensors(case)
    h_pre, h_post, h_res = function.call(tensors, SPEC)
    compiled = torch.compile(lambda t, out: function.call(t, SPEC, out=out), fullgraph=True, backend="aot_eager")
    with pytest.raises(
        ValueError, match=r"coefficients: out\[2\] \(h_res\): expected a contiguous tensor, got strides"
    ):
        compiled(tensors, (h_pre, h_post, h_res.mT))
    compiled = torch.compile(lambda h, out: mhc.expand(h, 4, out=out), fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="non-contiguous `out=`"):
        compiled(torch.randn(6, 64), torch.zeros(4, 6, 64).transpose(0, 1))


def test_token_counts_that_disagree():
    """Compiled code refuses them too, if not by name."""
    tensors = FUNCTIONS["post"].tensors(Case(4, 64, torch.bfloat16, 6))
    tensors["h_post"] = tensors["h_post"][:5]
    compiled = torch.compile(lambda **t: mhc.post(**t), fullgraph=True, dynamic=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="expected the same leading dimensions"):
        compiled(**tensors)
