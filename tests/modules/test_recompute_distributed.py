"""Two processes: a model that FSDP2 shards trains the same with recomputation as without.

Would catch: saved tensors that are not found behind FSDP's own nodes, a replay that is lost or wrong where parameters
are freed after the forward and gathered again for the backward.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import normal
from processes import run_ranks
from recomputed import DEPTH, TOKENS, C, Model
from torch.distributed.fsdp import fully_shard

import mhc_tilelang as mhc


def train_sharded(rank: int, ranks: int, eps: float | None) -> None:
    """One rank of the test below."""
    mesh = torch.distributed.init_device_mesh("cpu", (ranks,))
    model = Model(eps=eps)
    for module in (*model.connections, *model.layers, model):
        fully_shard(module, mesh=mesh)
    h, found = normal(*TOKENS, C, seed=rank).requires_grad_(), {}
    for length in (None, 3):
        model.recompute, h.grad = length, None
        model.zero_grad()
        out = model(h)
        kept = mhc.saved_bytes(out)
        out.backward(normal(*out.shape, seed=rank + 7))
        found[length] = [h.grad, *(p.grad.to_local() for p in model.parameters())]
        found[length, "kept"] = kept
    assert all(map(torch.equal, found[None], found[3]))
    assert [layer.calls for layer in model.layers] == [2] * DEPTH
    fewer = 4 * (DEPTH - 3) + (DEPTH if eps is None else 0)  # streams, and layers' inputs unless normalised
    assert found[None, "kept"] - found[3, "kept"] == 4 * C * 10 * fewer


@pytest.mark.parametrize("eps", [None, pytest.param(1e-5, marks=pytest.mark.full)])
def test_sharded_models_train_the_same(eps: float | None, tmp_path: Path) -> None:
    """Norms of connections keep their inputs: their weights are not there when a layer asks for its input."""
    Model(eps=eps)(normal(*TOKENS, C)).sum().backward()  # compiles the kernels once
    run_ranks(train_sharded, 2, tmp_path, eps)
