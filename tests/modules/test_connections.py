"""The connections as modules: how they start, what they compute, that their parameters stay float32."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from models import normal, randomize
from torch.distributed.fsdp import fully_shard

import mhc_tilelang as mhc
from mhc_tilelang import ops, reference
from mhc_tilelang.checking.comparison import numpy64

SPEC = mhc.MHCSpec.deepseek_v4(hidden_size=64)
TOKENS = (2, 5)
STREAMS = (2, 3, 4, 8)
MODULES = {
    "mhc": lambda **kwargs: mhc.HyperConnection(SPEC, sublayer=6, **kwargs),
    "hc": lambda **kwargs: mhc.UnconstrainedHyperConnection(SPEC, sublayer=6, **kwargs),
    "head": lambda **kwargs: mhc.HyperHead(SPEC, **kwargs),
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
HC_PARAMETERS = ("theta", "alpha", "bias")


def parameters_of(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], expected[name]), name


# How they start


@pytest.mark.parametrize("n", STREAMS)
@pytest.mark.parametrize("sublayer", [0, 3, 9])
def test_hyper_connection_starts_as_documented(n, sublayer):
    """Catches another order of the bias's groups, and a sublayer's stream taken without the modulo."""
    module = mhc.HyperConnection(mhc.MHCSpec.deepseek_v4(7, num_streams=n), sublayer)
    pre, post, res = module.bias.detach().split([n, n, n * n])
    assert module.phi.shape == (n * n + 2 * n, 7 * n)
    assert not module.phi.any()
    assert module.alpha.tolist() == pytest.approx([0.01] * 3)
    assert pre.tolist() == [3.0 if i == sublayer % n else -3.0 for i in range(n)]
    assert not post.any()
    assert torch.equal(res.view(n, n), 6 * torch.eye(n) - 3)


@pytest.mark.parametrize("n", STREAMS)
@pytest.mark.parametrize("sublayer", [0, 3, 9])
def test_unconstrained_starts_as_the_plain_residual(n, sublayer):
    """Initially the layer reads stream `sublayer % n`, and every stream becomes x + layer_output, to the bit."""
    module = mhc.UnconstrainedHyperConnection(mhc.MHCSpec.deepseek_v4(7, num_streams=n), sublayer)
    assert module.theta.shape == (n + 2, 7)
    x, layer_output = normal(3, n, 7), normal(3, 7, seed=2)
    layer_input, *mappings = module(x)
    assert torch.equal(layer_input, x[:, sublayer % n])
    assert torch.equal(module.merge(x, layer_output, *mappings), x + layer_output.unsqueeze(1))


@pytest.mark.parametrize("n", STREAMS)
def test_head_starts_as_the_mean(n):
    """Catches a bias whose sigmoid is 1/2 whatever n is. pre_eps adds n·1e-6 of a mean absolute value."""
    head = mhc.HyperHead(mhc.MHCSpec.deepseek_v4(64, num_streams=n))
    x = normal(5, n, 64)
    torch.testing.assert_close(head(x).detach(), x.mean(1), rtol=0, atol=3e-5)


# What they compute


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_are_the_functions(dtype):
    """Modules have the bits of the functions. Catches parameters handed over in another order."""
    connection, head = randomize(MODULES["mhc"]()), randomize(MODULES["head"]())
    x, layer_output = normal(*TOKENS, 4, 64, dtype=dtype), normal(*TOKENS, 64, dtype=dtype, seed=2)
    got = connection(x)
    expected = ops.pre(x, connection.phi, connection.alpha, connection.bias, SPEC)
    assert all(map(torch.equal, got, expected))
    assert torch.equal(connection.merge(x, layer_output, *got[1:]), ops.post(x, layer_output, *expected[1:]))
    assert torch.equal(head(x), ops.head(x, head.phi, head.alpha, head.bias, SPEC))


def relative(got, expected):
    return np.linalg.norm(numpy64(got.detach()) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("n", STREAMS)
def test_unconstrained_matches_float64(n):
    """Forward and backward against the reference; catches H^res transposed, and mHC's norm over all streams.

    float32 with sums of 64 to 512 terms: a few roundings of 6e-8 each, whose norm was 3e-7 at most. A transposed
    h_res is off by more than 1.
    """
    spec = mhc.MHCSpec.deepseek_v4(64, num_streams=n)
    module = randomize(mhc.UnconstrainedHyperConnection(spec))
    x, layer_output = normal(*TOKENS, n, 64).requires_grad_(), normal(*TOKENS, 64, seed=2).requires_grad_()
    parameters = [numpy64(getattr(module, name).detach()) for name in HC_PARAMETERS]
    x64, output64 = numpy64(x.detach()), numpy64(layer_output.detach())

    layer_input, h_post, h_res = module(x)
    expected = reference.hc_pre(x64, *parameters, spec)
    for got, exact in zip((layer_input, h_post, h_res), expected, strict=True):
        assert relative(got, exact) < 2e-6
    x_next = module.merge(x, layer_output, h_post, h_res)
    assert relative(x_next, reference.hc_post(x64, output64, *expected[1:])) < 2e-6

    g_x_next, g_layer_input = normal(*TOKENS, n, 64, seed=3), normal(*TOKENS, 64, seed=4)
    torch.autograd.backward([x_next, layer_input], [g_x_next, g_layer_input])
    g_x_post, g_output, g_h_post, g_h_res = reference.hc_post_backward(numpy64(g_x_next), x64, output64, *expected[1:])
    g_x, *g_parameters, _ = reference.hc_pre_backward(numpy64(g_layer_input), g_h_post, g_h_res, x64, *parameters, spec)
    assert relative(x.grad, g_x + g_x_post) < 2e-6
    assert relative(layer_output.grad, g_output) < 2e-6
    for name, exact in zip(HC_PARAMETERS, g_parameters, strict=True):
        assert relative(getattr(module, name).grad, exact) < 2e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unconstrained_rounds_once(dtype):
    """Results are float32's, rounded, to the bit. Catches mappings or sums in 16 bits, under autocast too."""
    module = randomize(MODULES["hc"]())
    x, layer_output = normal(*TOKENS, 4, 64, dtype=dtype), normal(*TOKENS, 64, dtype=dtype, seed=2)
    wide = module(x.float())
    expected = wide[0].to(dtype), *wide[1:], module.merge(x.float(), layer_output.float(), *wide[1:]).to(dtype)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer_input, *mappings = module(x)
            x_next = module.merge(x, layer_output, *mappings)
        assert all(map(torch.equal, (layer_input, *mappings, x_next), expected))


def test_residual_connection():
    """A float32 stream stays float32 under a layer's bfloat16 output."""
    module = mhc.ResidualConnection()
    x, layer_output = normal(*TOKENS, 64), normal(*TOKENS, 64, dtype=torch.bfloat16, seed=2)
    (layer_input,) = module(x)
    assert layer_input is x
    assert not list(module.parameters())
    assert torch.equal(module.merge(x, layer_output), x + layer_output.float())


@every_module
def test_gradients_reach_every_parameter(make):
    """Every element of every one; catches a detached mapping."""
    module = randomize(make())
    outputs = module(normal(*TOKENS, 4, 64))
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    torch.autograd.backward(outputs, [normal(*o.shape, seed=3 + i) for i, o in enumerate(outputs)])
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.all(), name


# Parameters stay float32, and behave as a module's otherwise


CONVERSIONS = {
    "to-bfloat16": lambda module: module.to(torch.bfloat16),
    "to-device-and-dtype": lambda module: module.to("cpu", torch.float16),
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "type": lambda module: module.type(torch.bfloat16),
}


@every_module
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_conversions_leave_parameters_alone(make, convert):
    """Inside a model whose layers are converted. Catches values rounded on the way, and gradients converted."""
    module = randomize(make())
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    parameters, gradients = parameters_of(module), [p.grad.clone() for p in module.parameters()]
    model = convert(torch.nn.Sequential(torch.nn.Linear(3, 3), module))
    assert model[0].weight.dtype != torch.float32
    assert_same(parameters_of(module), parameters)
    assert all(map(torch.equal, (p.grad for p in module.parameters()), gradients))


@every_module
def test_conversions_bring_float32_back(make):
    """After a state_dict in bfloat16 was assigned; catches parameters that keep whatever dtype they have."""
    module = randomize(make())
    narrow = {name: parameter.bfloat16() for name, parameter in module.state_dict().items()}
    module.load_state_dict(narrow, assign=True)
    assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())
    assert_same(parameters_of(module.to("cpu")), {name: parameter.float() for name, parameter in narrow.items()})


@every_module
def test_meta_device(make):
    """Made on meta by argument, by context, or moved there; then given memory, reset, and as if made at once."""
    with torch.device("meta"):
        by_context = make()
    for module in (make(device="meta"), by_context, make().to("meta"), make().to("meta", torch.bfloat16)):
        assert all(p.is_meta and p.dtype == torch.float32 for p in module.parameters())
        module.reset_parameters()
        module.to_empty(device="cpu").reset_parameters()
        assert_same(parameters_of(module), parameters_of(make()))


@pytest.fixture
def process_group():
    """One rank, in this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every_module
@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("error")
def test_reset_after_sharding(make):
    """FSDP2's order for a large model: made on meta, sharded, given memory, reset. Catches a plain copy into a
    sharded parameter, and outputs that are views, of which FSDP2 warns."""
    module, expected = make(device="meta"), make()
    fully_shard(module).to_empty(device="cpu")
    module.reset_parameters()
    x = normal(*TOKENS, 4, 64)
    assert all(map(torch.equal, module(x), expected(x)))


@every_module
def test_default_dtype_does_not_matter(make):
    expected = parameters_of(make())
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_same(parameters_of(make()), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@every_module
def test_copies(make):
    """deepcopy, pickle and state_dict carry parameters and what a call needs; a copy shares nothing."""
    module = randomize(make())
    expected, x = parameters_of(module), normal(*TOKENS, 4, 64)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = make()
    loaded.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), torch.load(buffer, weights_only=False), loaded):
        assert_same(parameters_of(other), expected)
        assert all(map(torch.equal, other(x), module(x)))
        with torch.no_grad():
            other.bias.zero_()
    assert_same(parameters_of(module), expected)


# The factory, and errors


def test_one_argument_switches_the_kind():
    kinds = {"mhc": mhc.HyperConnection, "hc": mhc.UnconstrainedHyperConnection, "residual": mhc.ResidualConnection}
    for kind, expected in kinds.items():
        module = mhc.connection(kind, SPEC, 5)
        assert type(module) is expected
        assert module.kind == kind
    assert repr(mhc.connection("mhc", SPEC, 5)) == "HyperConnection(hidden_size=64, num_streams=4, sublayer=5)"
    assert repr(mhc.HyperHead(SPEC)) == "HyperHead(hidden_size=64, num_streams=4)"
    assert mhc.connection("hc", SPEC, device="meta").theta.is_meta


def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match="connection: kind: expected one of 'mhc', 'hc', 'residual', got 'mHC'"):
        mhc.connection("mHC", SPEC)
    for sublayer in (-1, 1.0, True):
        with pytest.raises(ValueError, match=f"HyperConnection: sublayer: expected an int .* got {sublayer}"):
            mhc.HyperConnection(SPEC, sublayer)
    for make in (mhc.HyperConnection, mhc.UnconstrainedHyperConnection, mhc.HyperHead):
        with pytest.raises(TypeError, match=f"{make.__name__}: spec: expected an MHCSpec, got int"):
            make(64)


@pytest.mark.parametrize("factor", [1e-3, 0.0])
def test_unconstrained_at_small_streams(factor):
    """Scale 1e-3 has a mean square as large as rms_eps, and a stream of zeros has no other scale."""
    spec = mhc.MHCSpec.deepseek_v4(64)
    module, x = randomize(mhc.UnconstrainedHyperConnection(spec)), factor * normal(*TOKENS, 4, 64)
    expected = reference.hc_pre(numpy64(x), *(numpy64(getattr(module, name).detach()) for name in HC_PARAMETERS), spec)
    for got, exact in zip(module(x)[1:], expected[1:], strict=True):
        assert relative(got, exact) < 2e-6
