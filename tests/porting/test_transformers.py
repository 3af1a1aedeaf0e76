"""transformers' DeepSeek-V4 on these kernels: a tiny random model before and after `replace`.

Would catch: comb taken for h_res, parameters that are copied, renamed or lost to the optimizer, a gradient that does
not arrive, a decoder layer that drops its keywords, a replacement that stops half way or cannot be undone.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers_transformers import GRADIENTS, LOGITS, Counting, relative, tiny, tokens, transformers

import mhc_tilelang as mhc
from mhc_tilelang.errors import ConversionError


@pytest.fixture(scope="module")
def eager():
    return tiny()


@pytest.fixture
def replaced(eager):
    model = copy.deepcopy(eager)
    mhc.integrations.transformers.replace(model)
    return model


def test_logits_and_gradients(eager, replaced):
    """Logits, hidden states after each layer, and the gradient of every parameter are the same."""
    upstream = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(2))
    results = []
    for model in (eager, replaced):
        model.zero_grad()
        output = model(input_ids=tokens(2, 12), use_cache=False, output_hidden_states=True)
        output.logits.backward(upstream)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((output.logits.detach(), [h.detach() for h in output.hidden_states], gradients))
    (logits, hidden, gradients), (our_logits, our_hidden, our_gradients) = results
    assert relative(our_logits, logits) < LOGITS
    assert len(hidden) == len(our_hidden) == 3
    assert max(map(relative, our_hidden, hidden)) < LOGITS
    assert set(gradients) == set(our_gradients)
    assert {"model.layers.0.attn_hc.fn", "model.layers.1.ffn_hc.base", "model.hc_head.hc_scale"} <= set(gradients)
    for name, gradient in gradients.items():
        assert relative(our_gradients[name], gradient) < GRADIENTS, name


def test_a_transposed_comb_would_show(eager, replaced, monkeypatch):
    """Res rows that are not permuted: the comparison above is not blind to them."""
    monkeypatch.setattr(mhc.integrations.transformers, "swapped_rows", lambda tensor, _: tensor)
    with torch.no_grad():
        logits = [model(input_ids=tokens(2, 12), use_cache=False).logits for model in (eager, replaced)]
    assert relative(logits[1], logits[0]) > 1e3 * LOGITS


def test_every_connection_is_replaced_and_restored():
    """Modules are replaced in place, parameters and buffers the same objects; `restore` gives the bits back."""
    model = tiny()
    with torch.no_grad():
        before = model(input_ids=tokens(1, 5), use_cache=False).logits
    held = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    names = mhc.integrations.transformers.replace(model)
    places = ("model.layers.0", "model.layers.1")
    connections = [f"{place}.{site}" for place in places for site in ("attn_hc", "ffn_hc")]
    assert set(names) == {*places, *connections, "model.hc_head"}
    assert held == {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    assert {type(module) for module in model.modules()} == {type(module) for module in tiny().modules()}
    assert mhc.integrations.transformers.replace(model) == names
    assert mhc.integrations.transformers.restore(model) == names
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens(1, 5), use_cache=False).logits, before)
    with pytest.raises(
        ValueError, match=r"restore: model: expected a module that replace has met, got DeepseekV4ForCausalLM with none"
    ):
        mhc.integrations.transformers.restore(model)


def test_checkpoints_are_transformers_own(eager, replaced, tmp_path):
    """An eager model loads what a replaced one saves, and the other way round."""
    replaced.save_pretrained(tmp_path)
    loaded = transformers.DeepseekV4ForCausalLM.from_pretrained(tmp_path)
    assert {type(module) for module in loaded.modules()} == {type(module) for module in eager.modules()}
    expected = eager.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    other = tiny(seed=1).state_dict()
    replaced.load_state_dict(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in replaced.state_dict().items())


def test_generation(eager, replaced):
    """Greedy generation with the cache, one token at a time, gives the same tokens."""
    prompt = tokens(2, 6)
    results = [model.generate(prompt, max_new_tokens=4, do_sample=False) for model in (eager, replaced)]
    assert torch.equal(*results)
    assert results[0].shape == (2, 10)


def test_bfloat16_rounds_less_than_transformers(eager):
    """Against the same weights in float32. transformers rounds the mappings and each product, we round sums once."""
    model = copy.deepcopy(eager).to(torch.bfloat16)
    ours = copy.deepcopy(model)
    mhc.integrations.transformers.replace(ours)
    with torch.no_grad():
        exact, theirs, got = (
            each(input_ids=tokens(2, 12), use_cache=False, output_hidden_states=True)
            for each in (copy.deepcopy(model).float(), model, ours)
        )
    assert got.logits.dtype == torch.bfloat16
    errors = [relative(output.hidden_states[1], exact.hidden_states[1]) for output in (got, theirs)]
    assert errors[0] < errors[1] < 2**-7  # found: 2.8e-3 and 3.5e-3
    assert relative(got.logits, exact.logits) < 2**-7


def test_one_connection_alone(eager):
    """The module's own interface, in bfloat16: float32 mappings, comb as transformers has it."""
    module = copy.deepcopy(eager.model.layers[0].attn_hc)
    x = torch.randn(2, 3, 4, 192, dtype=torch.bfloat16)
    expected = module(x)
    assert mhc.integrations.transformers.replace(module) == ("",)
    post, comb, collapsed = module(x)
    assert relative(post, expected[0]) < LOGITS
    assert relative(comb, expected[1]) < 1e-5
    assert relative(comb.mT, expected[1]) > 0.1
    assert collapsed.dtype == torch.bfloat16
    torch.testing.assert_close(collapsed, expected[2], rtol=2**-8, atol=1e-6)  # one rounding of the same sum


def test_convert_to_modules_of_ours(eager):
    """`convert.transformers`: a whole model's connections into modules of this package, and a stream through two."""
    states = mhc.convert.transformers.import_model(eager.state_dict())
    assert len(states) == 5
    spec = mhc.convert.transformers.spec(eager.config)
    x = torch.randn(2, 3, 4, 192)
    ours = mhc.HyperConnection(spec)
    ours.load_state_dict(states["model.layers.1.ffn_hc"])
    layer_input, h_post, h_res = ours(x)
    with torch.no_grad():
        post, comb, collapsed = eager.model.layers[1].ffn_hc(x)
        head = mhc.HyperHead(spec)
        head.load_state_dict(states["model.hc_head"])
        pairs = ((layer_input, collapsed), (h_post, post), (h_res.mT, comb), (head(x), eager.model.hc_head(x)))
        assert all(relative(got, expected) < 1e-5 for got, expected in pairs)
    exported = mhc.convert.transformers.export_model(states)
    assert all(torch.equal(eager.state_dict()[name], tensor) for name, tensor in exported.items())


def test_nothing_is_replaced_by_halves(monkeypatch):
    """Nine streams have no kernels: the error names the module, and the model is as it was."""
    model = tiny(hc_mult=9)
    classes = [type(module) for module in model.modules()]
    message = "replace: model.layers.0.attn_hc: num_streams: expected one of"
    with pytest.raises(ValueError, match=message):
        mhc.integrations.transformers.replace(model)
    assert [type(module) for module in model.modules()] == classes
    with pytest.raises(ValueError, match="got Linear with none"):
        mhc.integrations.transformers.replace(torch.nn.Linear(2, 2))


def test_another_decoder_layer_is_refused(eager, monkeypatch):
    """A transformers whose layer takes other arguments than the one restated here."""
    layer = type(eager.model.layers[0])
    monkeypatch.setattr(layer, "forward", lambda _self, _hidden_states, _position_ids: None)
    with pytest.raises(
        ConversionError, match=r"expected DeepseekV4DecoderLayer.forward with the parameters self, hidden"
    ):
        mhc.integrations.transformers.replace(copy.deepcopy(eager))


def test_checkpointing_and_autocast(replaced):
    """Gradients under activation checkpointing are those without; a bfloat16 layer in a float32 stream is taken."""
    gradients = []
    upstream = torch.randn(1, 6, 64)
    for checkpointing in (False, True):
        replaced.zero_grad()
        replaced.train()
        if checkpointing:
            replaced.activation_checkpointing_enable()
        replaced(input_ids=tokens(1, 6), use_cache=False).logits.backward(upstream)
        gradients.append([parameter.grad.clone() for parameter in replaced.parameters() if parameter.grad is not None])
    assert all(map(torch.equal, *gradients))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert replaced(input_ids=tokens(1, 6), use_cache=False).logits.dtype == torch.bfloat16


def test_spec_of_a_configuration():
    """Every constant where it belongs: all five differ."""
    config = SimpleNamespace(hidden_size=40, hc_mult=2, hc_sinkhorn_iters=7, hc_eps=1e-5, rms_norm_eps=1e-4)
    spec = mhc.convert.transformers.spec(config)
    assert spec == mhc.MHCSpec(40, 2, sinkhorn_iters=7, sinkhorn_eps=1e-5, pre_eps=1e-5, rms_eps=1e-4)


@pytest.mark.parametrize("method", [pytest.param("around", marks=pytest.mark.full), "in place"])
@pytest.mark.parametrize("order", [pytest.param("before", marks=pytest.mark.full), "after"])
def test_compiled(method, order):
    """One graph with our operators; what was compiled and has run before `replace` or `restore` is compiled again."""
    model = tiny(num_hidden_layers=1, layer_types=["sliding_attention"], mlp_layer_types=["moe"])
    counting, fused = Counting(), {"pre": 1, "post_pre": 1, "post": 1, "head": 1}

    def logits():
        with torch.no_grad():
            return compiled(input_ids=tokens(2, 12), use_cache=False).logits

    compiled = model
    expected = logits()
    if order == "before":
        mhc.integrations.transformers.replace(model)
    if method == "around":
        compiled = torch.compile(model, backend=counting.compiler, fullgraph=True)
    else:
        model.compile(backend=counting.compiler, fullgraph=True)
    if order == "after":
        assert relative(logits(), expected) < LOGITS
        assert not counting.ran
        mhc.integrations.transformers.replace(compiled)
    assert relative(logits(), expected) < LOGITS
    assert counting.ran == fused
    if order == "before":
        mhc.integrations.transformers.restore(compiled)
        assert relative(logits(), expected) < LOGITS
        assert counting.ran == fused
