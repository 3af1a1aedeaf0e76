"""A tiny DeepSeek-V4 of transformers for the tests of `mhc.integrations.transformers`, and what they hold it to."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="no transformers, or one without deepseek_v4"
)
pytest.importorskip("transformers.models.deepseek_v4")

# As many float32 roundings as a token meets in two layers, each 6e-8 of what it touches: found 3e-7 of the norm, and
# 4e-2 with rows that are not permuted. Gradients are sums over tokens that cancel: 4e-6, and 2e-5 at another seed for
# the head's scale, a single number.
LOGITS, GRADIENTS = 2e-6, 1e-4


def tiny(seed=0, **changes):
    """Build two layers of every part that a layer can have, 192 channels, and connections that do something."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 64, "hidden_size": 192, "moe_intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 2, "q_lora_rank": 16, "num_experts_per_tok": 2, "n_routed_experts": 4, "o_groups": 2,
        "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "sliding_window": 8,
        "max_position_embeddings": 64, "pad_token_id": 0, "mlp_layer_types": ["hash_moe", "moe"],
        "layer_types": ["sliding_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    }  # fmt: skip
    model = transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**{**sizes, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("fn"):
                parameter.normal_(std=2 / parameter.shape[1] ** 0.5)
            elif name.endswith("base"):
                parameter.normal_()
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # two experts of four by token: zeros would be one of them twice
                buffer.copy_((torch.arange(len(buffer)).unsqueeze(1) + torch.arange(buffer.shape[1])) % 4)
    return model


def tokens(*shape):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(5))


def relative(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


class Counting(TorchDispatchMode):
    """Counts the operators of this package that run, by name."""

    def __init__(self):
        super().__init__()
        self.ran = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.ran.update(ours(operator))
        return operator(*args, **(kwargs or {}))

    def compiler(self, graph, _inputs):
        """A backend for torch.compile, which takes no graph under a mode: counts what is in a graph, and runs it."""
        for module in graph.modules():
            self.ran.update(name for node in module.graph.nodes for name in ours(node.target))
        return graph


def ours(operator):
    namespace, _, name = str(operator).partition(".")
    return [name.partition(".")[0]] if namespace == "mhc_tilelang" else []
