"""transformers' other models with hyper-connections on these kernels: GLM-5.3 and Hy4, under their multimodal wrappers.

Would catch: a head taken for another, top-k indices that do not reach the next layer, a keyword that a layer drops, a
cache that is written twice under checkpointing, a family whose connection is not found.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers_transformers import GRADIENTS, LOGITS, Counting, relative, tokens, transformers

import mhc_tilelang as mhc

pytest.importorskip("transformers.models.glm5_next", reason="a transformers without glm5_next")
replace, restore = mhc.integrations.transformers.replace, mhc.integrations.transformers.restore


def glm5_next():
    """Two linear attentions, then one that chooses indices and one that takes them over; dense and sparse MLPs."""
    sizes = {
        "vocab_size": 64, "hidden_size": 192, "intermediate_size": 16, "moe_intermediate_size": 16, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 3, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "linear_num_heads": 2, "linear_head_dim": 16, "linear_conv_kernel_dim": 2,
        "v_head_dim": 16, "qk_rope_head_dim": 0, "qk_nope_head_dim": 16, "q_lora_rank": 32, "kv_lora_rank": 16,
        "index_head_dim": 16, "index_n_heads": 2, "index_topk": 6, "index_kpool": 3, "pad_token_id": 0,
        "mlp_layer_types": ["dense", "sparse", "dense"],
        "layer_types": ["linear_attention", "deepseek_sparse_attention", "deepseek_sparse_attention"],
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 48, "num_heads": 2, "out_hidden_size": 192, "intermediate_size": 16}
    config = transformers.Glm5NextConfig(text_config=sizes, vision_config=vision)
    return transformers.Glm5NextForConditionalGeneration(config), "model.language_model"


HY_V4 = {
        "vocab_size": 64, "hidden_size": 192, "intermediate_size": 16, "moe_intermediate_size": 16, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 3, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
        "v_head_dim": 8, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 4, "pad_token_id": 0,
        "mlp_layer_types": ["dense", "sparse", "dense"], "indexer_types": ["full", "full", "shared"],
    }  # fmt: skip


def hy_v4():
    """Identity connections; the last layer takes over indices that the second chose."""
    return transformers.HYV4ForCausalLM(transformers.HYV4Config(**HY_V4)), "model"


def hy_v4_vl():
    """Build Hy4 under its multimodal wrapper."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = HY_V4 | {"qk_rope_head_dim": 8, "head_dim": 12, "rope_parameters": rope}
    vision = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.HYV4VLConfig(text_config=text, vision_config=vision | {"out_hidden_size": 192})
    return transformers.HYV4VLForConditionalGeneration(config), "model.language_model"


FAMILIES = {"glm5_next": glm5_next, "hy_v4": hy_v4, "hy_v4_vl": hy_v4_vl}


@pytest.fixture(scope="module", params=FAMILIES)
def eager(request):
    torch.manual_seed(0)
    model, place = FAMILIES[request.param]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("fn"):
                parameter.normal_(std=2 / parameter.shape[1] ** 0.5)
            elif name.endswith("base"):
                parameter.normal_()
    return model, place


@pytest.fixture
def replaced(eager):
    model = copy.deepcopy(eager[0])
    names = replace(model)
    layers = [f"{eager[1]}.layers.{k}" for k in range(3)]
    sites = [f"{layer}.{site}" for layer in layers for site in ("attn_hc", "ffn_hc")]
    assert set(names) == {*layers, *sites, f"{eager[1]}.hc_head"}
    return model


def test_logits_and_gradients(eager, replaced):
    """Logits, hidden states and every parameter's gradient agree, by our operators; `restore` gives bits back."""
    upstream = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(2))
    results = []
    for model in (eager[0], replaced):
        model.zero_grad()
        with Counting() as counting:
            output = model(input_ids=tokens(2, 12), use_cache=False, output_hidden_states=True)
        output.logits.backward(upstream)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((output.logits.detach(), output.hidden_states, gradients))
    assert sum(counting.ran.values()) == 10  # a pre, a post_pre and a post a layer, and the head
    (logits, hidden, gradients), (our_logits, our_hidden, our_gradients) = results
    assert relative(our_logits, logits) < LOGITS
    assert len(hidden) == len(our_hidden) == 4
    assert max(map(relative, our_hidden, hidden)) < LOGITS
    assert set(gradients) == set(our_gradients)
    assert f"{eager[1]}.layers.1.ffn_hc.base" in gradients
    for name, gradient in gradients.items():
        assert relative(our_gradients[name], gradient) < GRADIENTS, name
    restore(replaced)
    with torch.no_grad():
        assert torch.equal(replaced(input_ids=tokens(2, 12), use_cache=False).logits, logits)


def test_generation_and_checkpointing(eager, replaced):
    """Greedily with a cache; activation checkpointing changes no gradient and drops the cache."""
    prompt = tokens(2, 6)
    results = [model.generate(prompt, max_new_tokens=4, do_sample=False) for model in (eager[0], replaced)]
    assert torch.equal(*results)
    gradients = []
    upstream = torch.randn(2, 6, 64)
    for use_cache in (False, True):
        replaced.zero_grad()
        replaced.train()
        if use_cache:
            replaced.activation_checkpointing_enable()
        replaced(input_ids=prompt, use_cache=use_cache).logits.backward(upstream)
        gradients.append([parameter.grad.clone() for parameter in replaced.parameters() if parameter.grad is not None])
    assert all(map(torch.equal, *gradients))


def test_states_convert(eager):
    """A stream through a connection of ours is that through theirs."""
    model, place = eager
    states = mhc.convert.transformers.import_model(model.state_dict())
    spec = mhc.convert.transformers.spec(model.config.get_text_config())
    ours, theirs = mhc.HyperConnection(spec), model.get_submodule(f"{place}.layers.1.ffn_hc")
    ours.load_state_dict(states[f"{place}.layers.1.ffn_hc"])
    x = torch.randn(2, 3, 4, 192)
    with torch.no_grad():
        layer_input, h_post, *h_res = ours(x)
        post, *comb, collapsed = theirs(x)
    pairs = ((layer_input, collapsed), (h_post, post), *((h.mT, c) for h, c in zip(h_res, comb, strict=True)))
    assert all(relative(got, expected) < 1e-5 for got, expected in pairs)
    exported = mhc.convert.transformers.export_model(states)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in exported.items())
