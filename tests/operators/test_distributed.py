"""Several processes: DDP and FSDP2 train as one process does.

Would catch: gradients that the wrappers' hooks do not see, parameters that a wrapper swaps while a backward still needs
them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_ranks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mhc_tilelang as mhc

ROOT = Path(__file__).resolve().parents[2]
SPEC = mhc.MHCSpec.deepseek_v4(64)
STEPS, TOKENS = 2, 12


class Sublayer(torch.nn.Module):
    """A connection around a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=generator))

        self.phi, self.bias = normal(24, 256), normal(24)
        self.alpha = torch.nn.Parameter(torch.tensor([0.9, 1.0, 1.1]))
        self.layer = torch.nn.Linear(64, 64)
        with torch.no_grad():
            self.phi *= 2 / 16
            self.layer.weight.copy_(normal(64, 64) / 8)
            self.layer.bias.copy_(normal(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer_input, h_post, h_res = mhc.pre(x, self.phi, self.alpha, self.bias, SPEC)
        return mhc.post(x, self.layer(layer_input), h_post, h_res)


def model() -> torch.nn.Sequential:
    return torch.nn.Sequential(Sublayer(), Sublayer())


def train(module: torch.nn.Module, rank: int = 0, ranks: int = 1) -> None:
    """A rank takes its share of every batch; the loss is a mean over tokens, as the wrappers' averages expect."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        x, g = (torch.randn(TOKENS, 4, 64, generator=generator).chunk(ranks)[rank] for _ in range(2))
        optimizer.zero_grad()
        (module(x) * g).mean().backward()
        optimizer.step()


def parameters_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in module.parameters()]


def train_wrapped(rank: int, ranks: int, wrapper: str) -> None:
    """One rank of the test below."""
    alone, together = model(), model()
    train(alone)
    if wrapper == "ddp":
        together = DistributedDataParallel(together)
    else:
        mesh = torch.distributed.init_device_mesh("cpu", (ranks,))
        for sublayer in together:
            fully_shard(sublayer, mesh=mesh)
        fully_shard(together, mesh=mesh)
    train(together, rank, ranks)
    for start, got, expected in zip(parameters_of(model()), parameters_of(together), parameters_of(alone), strict=True):
        # A batch's gradient is the sum of its parts, in another order than alone. Training moves a parameter by 4e-4
        # of itself or more, of which float32's 6e-8 is 1.5e-4; measured: 6e-6. A missing average would be 1.
        moved = (expected - start).norm()
        assert moved > 0
        assert (got - expected).norm() <= 1.5e-4 * moved


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_ranks_train_as_one(wrapper: str, ranks: int, tmp_path: Path) -> None:
    train(model())  # compiles the kernels once
    run_ranks(train_wrapped, ranks, tmp_path, wrapper)
