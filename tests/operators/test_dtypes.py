"""Parameters, mappings and logits of 16 bits: read as they are, float32 inside, their gradients in their own dtype.

Would catch: one that is rounded once more, or computed with in 16 bits; a mapping that comes out in 16 bits; a gradient
in float32, none at all, or one of a 16-bit sum; a module that takes parameters which something has rounded.
"""

from __future__ import annotations

import pytest
import torch
from differentiable import FORMS, gradients, requiring, upstream
from helpers import assert_same_bits

import mhc_tilelang as mhc
from mhc_tilelang.checking.inputs import Case

CASE = Case(4, 64, torch.float32, 6)
WIDE = {"h", "x", "layer_output", "rms_norm_weight"}  # in stream dtypes anyway
every_form = pytest.mark.parametrize("name", FORMS)


def narrowed(name: str, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Arguments in 16 bits but for the wide ones, and the same values in float32."""
    tensors = FORMS[name].tensors(CASE)
    narrow = {key: value if key in WIDE else value.to(dtype) for key, value in tensors.items()}
    return narrow, {key: value.float() for key, value in narrow.items()}


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_as_their_float32_values(name, dtype):
    """Outputs have float32's bits, and gradients once these are rounded; tests elsewhere hold those to float64."""
    results = []
    for tensors in narrowed(name, dtype):
        given = requiring(tensors)
        outputs = FORMS[name].call(given, CASE.spec)
        results.append((outputs, gradients(outputs, given, upstream(outputs))))
    (outputs, got), (expected_outputs, expected) = results
    assert {output.dtype for output in outputs} == {torch.float32}
    assert_same_bits(outputs, expected_outputs)
    assert got.keys() == expected.keys()
    for key, gradient in got.items():
        assert gradient.dtype == (torch.float32 if key in WIDE else dtype), key
        assert_same_bits([gradient], [expected[key].to(gradient.dtype)])


@every_form
def test_buffers(name):
    """Results are float32 as ever; one that overlaps a 16-bit argument is written after that was read."""
    narrow, wide = narrowed(name, torch.bfloat16)
    expected = FORMS[name].call(wide, CASE.spec)
    buffers = tuple(torch.full_like(output, torch.nan) for output in expected)
    FORMS[name].call(narrow, CASE.spec, out=buffers[0] if len(buffers) == 1 else buffers)
    assert_same_bits(buffers, expected)


def test_a_norm_weight_is_multiplied_in_float32():
    """phi and norm_weight of 16 bits each; their product has more."""
    narrow, _ = narrowed("coefficients", torch.bfloat16)
    rounded = (narrow["phi"] * narrow["norm_weight"]).float() != narrow["phi"].float() * narrow["norm_weight"].float()
    assert rounded.float().mean() > 0.5  # so the bits of the first test tell


def test_compiled_code():
    narrow, _ = narrowed("pre", torch.bfloat16)
    call = torch.compile(lambda tensors: mhc.pre(**tensors, spec=CASE.spec), backend="aot_eager", fullgraph=True)
    results = []
    for function in (call, lambda tensors: mhc.pre(**tensors, spec=CASE.spec)):
        given = requiring(narrow)
        outputs = function(given)
        results.append([*outputs, *gradients(outputs, given, upstream(outputs)).values()])
    assert_same_bits(*results)


@pytest.mark.parametrize("make", [mhc.HyperConnection, mhc.HyperHead])
@pytest.mark.parametrize("parameter", ["phi", "alpha", "bias"])
def test_modules_keep_float32(make, parameter):
    """Theirs are float32 by promise: 16 bits were rounded on the way by something that should not have."""
    module = make(CASE.spec)
    state = {parameter: getattr(module, parameter).detach().bfloat16()}
    message = rf"{make.__name__}: {parameter}: expected dtype torch.float32, got torch.bfloat16; .*mixed-precision"
    with pytest.raises(TypeError, match=message):
        torch.func.functional_call(module, state, (torch.zeros(6, 4, 64),))


def test_an_h_pre_that_crosses_stages():
    """A pipeline that sends it in 16 bits."""
    tensors = FORMS["pre-delayed"].tensors(CASE)
    connection = mhc.HyperConnection(mhc.MHCSpec.deepseek_v4(64, delayed_pre=True))
    reads = [
        mhc.ResidualStream.from_streams(tensors["x"], h_pre).read(connection)
        for h_pre in (tensors["h_pre"].bfloat16(), tensors["h_pre"].bfloat16().float())
    ]
    assert_same_bits(reads[:1], reads[1:])


@pytest.mark.parametrize("kind", ["mhc", "hc", "residual"])
def test_a_stream_with_float32_layers(kind):
    """A bfloat16 stream merges their output unrounded, by whatever reads next; the layer gets a float32 gradient."""
    torch.manual_seed(0)
    connections = [mhc.connection(kind, CASE.spec, k) for k in range(2)]
    stream = mhc.ResidualStream(torch.randn(6, 64).bfloat16(), connection=kind)
    written = []
    for connection in connections:
        written.append((stream.read(connection).float() / 3).requires_grad_())
        stream.write(written[-1])
        before = stream._x if kind != "mhc" else None
    x = stream.x
    assert x.dtype == torch.bfloat16
    if before is not None and kind == "residual":
        assert torch.equal(x, (before.float() + written[-1]).bfloat16())
    for gradient in torch.autograd.grad(x, written, torch.randn(x.shape).bfloat16()):
        assert gradient.dtype == torch.float32
        assert (gradient.bfloat16().float() != gradient).any() or kind == "residual"


def test_a_recomputed_stream_with_float32_layers():
    """The replay reads what the forward read."""
    results = []
    for recompute in (None, 2):
        torch.manual_seed(0)
        connections = [mhc.HyperConnection(CASE.spec, k) for k in range(3)]
        h = torch.randn(6, 64).bfloat16().requires_grad_()
        stream = mhc.ResidualStream(h, recompute=recompute)
        for connection in connections:
            torch.nn.init.normal_(connection.phi, std=0.1)
            stream.write(torch.sin(stream.read(connection).float()))
        total = stream.reduce()
        results.append(torch.autograd.grad(total, [h, *(c.phi for c in connections)], torch.ones_like(total)))
    assert_same_bits(*results)
