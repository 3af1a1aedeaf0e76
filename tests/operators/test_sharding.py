"""Streams as DTensors: sharded over tokens, every function gives what one process gives; nothing else is accepted.

Would catch: a gradient that stays a rank's own, one that is counted once per rank, saved tensors in another order than
their stream, tensors that are sent where nothing should be.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import mhc_tilelang as mhc
from mhc_tilelang.operators import sharding

SPEC, DELAYED = mhc.MHCSpec.deepseek_v4(64), mhc.MHCSpec.deepseek_v4_1(64)
BATCH, SEQUENCE = 3, 5  # which two ranks cannot share equally
# Parameters' gradients are sums over 15 tokens in another order: 15 · 6e-8 of the terms' sizes. Measured: 2e-7, and
# 2e-6 for the head's alpha, whose terms cancel to a tenth. A gradient of one rank's tokens alone would be off by 1.
TOLERANCE = 1e-5


def inputs(batch: int = BATCH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "h": (batch, SEQUENCE, 64),
        "layer_output": (batch, SEQUENCE, 64),
        "g": (batch, SEQUENCE, 64),
        "logits": (batch, SEQUENCE, 4, 4),
        "phi": (24, 256),
        "bias": (24,),
        "rms_norm_weight": (64,),
        "head_phi": (4, 256),
        "head_bias": (4,),
    }
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    tensors["phi"] /= 8
    tensors["head_phi"] /= 8
    return {**tensors, "alpha": torch.tensor([0.9, 1.0, 1.1]), "head_alpha": torch.tensor([1.2])}


TOKENS = ("h", "layer_output", "g", "logits")


def every_function(t: dict[str, torch.Tensor]) -> torch.Tensor:
    """An output [..., C] that goes through every public function."""
    parameters, delayed = ((t["phi"], t["alpha"], t["bias"], spec) for spec in (SPEC, DELAYED))
    x, first_input, _, _ = mhc.expand_pre(t["h"], *parameters)
    x = x + mhc.expand(first_input, 4)
    h_pre, h_post, _ = mhc.coefficients(x, *parameters)
    layer_input, _, h_res = mhc.pre(x, *parameters)
    x = mhc.post(x, layer_input * t["layer_output"], h_post, h_res * mhc.sinkhorn(t["logits"]))
    x, layer_input, h_post, h_res = mhc.post_pre(x, t["layer_output"], h_pre, h_res, *parameters)
    norm = {"rms_norm_weight": t["rms_norm_weight"]}
    quantized, _, _, h_pre = mhc.pre_quantized(
        x, *delayed, h_pre=mhc.first_pre(x) + h_post, keeps_layer_input=True, **norm
    )
    layer_input = quantized.layer_input
    x, layer_input, h_post, h_res, _ = mhc.post_pre(x, layer_input, h_post, h_res, *delayed, h_pre=h_pre, **norm)
    x = mhc.post(x, layer_input * t["layer_output"], h_post, h_res)
    head = (t["head_phi"], t["head_alpha"], t["head_bias"], SPEC)
    x, out = mhc.post_head(x, layer_input, h_post, h_res, *head)
    return out + mhc.head(x, *head) + mhc.collapse(x)


def gradients(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    leaves = {name: tensor.requires_grad_() for name, tensor in t.items()}
    loss = (every_function(leaves) * leaves["g"]).sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def shard(mesh: dist.DeviceMesh, *placements: Shard, batch: int = BATCH) -> dict[str, torch.Tensor]:
    whole = [Replicate()] * mesh.ndim
    given = inputs(batch).items()
    return {name: distribute_tensor(t, mesh, placements if name in TOKENS else whole) for name, t in given}


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    got = got.full_tensor() if isinstance(got, DTensor) else got
    return bool((got - expected).norm() <= TOLERANCE * expected.norm())


class Model(nn.Module):
    """Two sublayers with MLPs, read and written through a ResidualStream."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.connections = nn.ModuleList(mhc.HyperConnection(DELAYED, k) for k in range(2))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)) for _ in range(2))
        self.head = mhc.HyperHead(SPEC)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) / 8)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        stream = mhc.ResidualStream(h)
        for connection, layer in zip(self.connections, self.layers, strict=True):
            stream.write(layer(stream.read(connection)))
        return stream.reduce(self.head)


def tensor_parallel(model: Model, mesh: dist.DeviceMesh, output: Shard | Partial) -> Model:
    """MLPs split over channels inside, a stream sharded over the sequence outside."""
    for layer in model.layers:
        plan = {
            "0": ColwiseParallel(input_layouts=Shard(1)),
            "2": RowwiseParallel(output_layouts=output, use_local_output=False),
        }
        parallelize_module(layer, mesh, plan)
    distribute_module(model.head, mesh)
    for connection in model.connections:
        distribute_module(connection, mesh)
    return model


def train(model: nn.Module, h: torch.Tensor, g: torch.Tensor) -> None:
    # AdamW divides a gradient by its size. Between equal streams, as the first sublayer has them, those of h_res are
    # zero but for rounding, 1e-6 and below: a larger eps keeps that from moving weights.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        (model(h) * g).sum().backward()
        optimizer.step()


def assert_trained_alike(model: nn.Module, alone: nn.Module, start: nn.Module) -> None:
    # Gradients differ by 1e-6 at most of what AdamW divides them by; measured: 2e-6 of the way in two steps. A gradient
    # that was not summed over ranks would be off by about 1.
    for got, expected, first in zip(model.parameters(), alone.parameters(), start.parameters(), strict=True):
        moved = (expected - first).norm()
        assert moved > 0
        assert (got.full_tensor() - expected).norm() <= 1e-4 * moved


def check_two(rank: int, ranks: int) -> None:
    mesh = dist.init_device_mesh("cpu", (ranks,))
    expected = gradients(inputs())
    for placement in (Shard(0), Shard(1)):
        sharded = shard(mesh, placement)
        with CommDebugMode() as communication:
            got = gradients(sharded)
        assert communication.get_total_counts() == 0  # sums stay partial, tokens stay where they are
        for name, gradient in got.items():
            assert gradient.placements == ((placement,) if name in TOKENS else (Partial(),)), name
            assert close(gradient, expected[name]), name
    with torch.inference_mode():
        assert close(every_function(shard(mesh, Shard(1))), every_function(inputs()))
    check_other_placements(mesh, expected)
    check_a_rank_without_tokens(mesh)

    h, g = inputs()["h"], inputs()["g"]
    start = Model()
    train(alone := copy.deepcopy(start), h, g)
    for output in (Shard(1), Partial()):
        model = tensor_parallel(copy.deepcopy(start), mesh, output)
        train(model, *(distribute_tensor(t, mesh, [Shard(1)]) for t in (h, g)))
        assert_trained_alike(model, alone, start)


def check_a_rank_without_tokens(mesh: dist.DeviceMesh) -> None:
    """Check that its part of a parameter's gradient is zero, not uninitialised memory."""
    expected = gradients(inputs(batch=1))
    for name, gradient in gradients(shard(mesh, Shard(0), batch=1)).items():
        assert close(gradient, expected[name]), name


def check_other_placements(mesh: dist.DeviceMesh, expected: dict[str, torch.Tensor]) -> None:
    """Check that other placements are redistributed: parameters, upstream gradients, an embedding that is a sum."""
    given = shard(mesh, Shard(1))
    given["phi"] = given["phi"].redistribute(placements=[Shard(0)])
    upstream = given["g"]
    for placement in (Replicate(), Shard(0)):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items() if name != "g"}
        out = every_function(leaves)
        g = upstream.redistribute(placements=[placement])
        for name, gradient in zip(leaves, torch.autograd.grad(out, list(leaves.values()), g), strict=True):
            assert close(gradient, expected[name]), (placement, name)
    h = inputs()["h"] / mesh.size()
    x = mhc.expand(DTensor.from_local(h, mesh, [Partial()]), 4)
    assert x.placements == (Replicate(),)
    assert close(mhc.collapse(x), 4 * inputs()["h"])


def check_four(rank: int, ranks: int) -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    expected = gradients(inputs())
    for placements in ((Shard(0), Shard(1)), (Shard(1), Replicate()), (Shard(1), Shard(1))):
        for name, gradient in gradients(shard(mesh, *placements)).items():
            assert close(gradient, expected[name]), (placements, name)

    # FSDP2 over two halves of a batch; in each of them tensor and sequence parallelism.
    generator = torch.Generator().manual_seed(3)
    h, g = (torch.randn(4, SEQUENCE, 64, generator=generator) for _ in range(2))
    start = Model()
    train(alone := copy.deepcopy(start), h, g / 2)  # FSDP2 averages over its ranks
    model = tensor_parallel(copy.deepcopy(start), mesh["model"], Shard(1))
    for module in (*model.connections, model.head, *model.layers, model):
        fully_shard(module, mesh=mesh["data"])
    part = mesh["data"].get_local_rank()
    train(model, *(distribute_tensor(t.chunk(2)[part].contiguous(), mesh["model"], [Shard(1)]) for t in (h, g)))
    assert_trained_alike(model, alone, start)


@pytest.mark.parametrize(("check", "ranks"), [(check_two, 2), pytest.param(check_four, 4, marks=pytest.mark.full)])
def test_ranks_give_what_one_process_gives(check, ranks: int, tmp_path: Path) -> None:
    """Functions and their gradients; training with tensor and sequence parallelism."""
    gradients(inputs())  # compiles the kernels once
    Model()(inputs()["h"]).mean().backward()
    run_ranks(check, ranks, tmp_path)


@pytest.fixture(scope="module")
def mesh() -> Iterator[dist.DeviceMesh]:
    """A mesh of one rank, this process: placements are checked there as on any other."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("dim", [2, 3])
def test_a_stream_sharded_otherwise_is_refused(mesh: dist.DeviceMesh, dim: int) -> None:
    """Functions and the operators beneath them refuse shards of streams, then of channels."""
    x = distribute_tensor(torch.randn(2, 3, 4, 64), mesh, [Shard(dim)])
    with pytest.raises(ValueError, match=r"collapse: x: expected a DTensor sharded over tokens \(Shard of .* 0 to 1\)"):
        mhc.collapse(x)
    with pytest.raises(RuntimeError, match="collapse: x: expected a DTensor sharded over tokens"):
        torch.ops.mhc_tilelang.collapse(x)


def test_plain_tensors_beside_dtensors_are_refused(mesh: dist.DeviceMesh) -> None:
    """Would catch one of a single element, which PyTorch takes for replicated: its gradient would be a rank's own."""
    t = shard(mesh, Shard(0))
    x = mhc.expand(t["h"], 4)
    with pytest.raises(TypeError, match="head: alpha: expected a DTensor, like those before it, got a plain tensor"):
        mhc.head(x, t["head_phi"], torch.ones(1), t["head_bias"], SPEC)
    with pytest.raises(TypeError, match="head: phi: expected a plain tensor, like those before it, got a DTensor"):
        mhc.head(x.to_local(), t["head_phi"], t["head_alpha"], t["head_bias"], SPEC)
    with torch.no_grad(), pytest.raises(TypeError, match="expand: out: expected no buffers for DTensors"):
        mhc.expand(t["h"], 4, out=torch.empty_like(x))


def test_another_mesh_is_refused(mesh: dist.DeviceMesh) -> None:
    """Would catch a gradient that is summed over the ranks of the wrong one."""
    t, named = shard(mesh, Shard(0)), dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "model"))["model"]
    x = mhc.expand(t["h"], 4)
    t["phi"] = distribute_tensor(inputs()["phi"], named, [Replicate()])
    with pytest.raises(RuntimeError, match="pre: phi: expected the device mesh of x"):
        mhc.pre(x, t["phi"], t["alpha"], t["bias"], SPEC)


def test_what_is_needed_is_part_of_the_key(mesh: dist.DeviceMesh) -> None:
    """The placements found for a call are kept: those of one without a gradient of x are not those of one with it."""
    t = shard(mesh, Shard(0))
    x, h_post, h_res = (distribute_tensor(torch.randn(2, 3, *s), mesh, [Shard(0)]) for s in ((4, 64), (4,), (4, 4)))
    layer_output = distribute_tensor(torch.randn(2, 3, 64), mesh, [Shard(0)])
    for needs in ((layer_output,), (layer_output, x), (x, t["phi"]), (t["phi"],)):
        for leaf in (x, layer_output, t["phi"]):
            leaf.requires_grad_(any(leaf is n for n in needs))
        x_next = mhc.post(x, layer_output, h_post, h_res)
        layer_input, *_ = mhc.pre(x, t["phi"], t["alpha"], t["bias"], SPEC)
        loss = x_next.square().sum() + layer_input.square().sum()
        for leaf, gradient in zip(needs, torch.autograd.grad(loss, needs), strict=True):
            assert gradient.shape == leaf.shape
            assert gradient.to_local().norm() > 0


@pytest.mark.full
def test_compiled_code_takes_dtensors(mesh: dist.DeviceMesh) -> None:
    """Whole, in one graph, with the values and gradients of eager code."""
    model, h = Model(), shard(mesh, Shard(1))["h"].requires_grad_()
    for module in (*model.connections, *model.layers, model.head):
        distribute_module(module, mesh)
    leaves = [h, *model.parameters()]
    expected, got = model(h), torch.compile(model, backend="aot_eager", fullgraph=True)(h)
    g = shard(mesh, Shard(1))["g"]
    assert torch.equal(got.to_local(), expected.to_local())
    for a, b in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        assert torch.equal(a.to_local(), b.to_local())


def test_every_operator_has_a_rule() -> None:
    """One without would fail on the first DTensor that it meets; so would one with a result too few."""
    returns = {
        schema.name.partition("::")[2]: len(schema.returns)
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("mhc_tilelang::")
    }
    expected = {name: count for name, count in returns.items() if not name.endswith("_out")}
    assert {name: len(roles) for name, roles in sharding.RESULTS.items()} == expected


@pytest.mark.parametrize(
    "placements", [(Shard(0), Replicate()), (Replicate(), Shard(1)), (Shard(0), Shard(1))], ids=str
)
def test_two_dimensions_of_a_mesh(mesh: dist.DeviceMesh, placements: tuple[Shard | Replicate, ...]) -> None:
    """Each dimension by its own placement: parameters' gradients are partial where tokens are sharded, and only there.

    Placements of one rank are those of many; values over four ranks are a test of minutes.
    """
    two = dist.init_device_mesh("cpu", (1, 1))
    partial = tuple(Partial() if isinstance(one, Shard) else Replicate() for one in placements)
    for name, gradient in gradients(shard(two, *placements)).items():
        assert gradient.placements == (placements if name in TOKENS else partial), name


def test_first_pre_lies_as_tokens_do(mesh: dist.DeviceMesh) -> None:
    """A stream may be a sum as well: the ones of a first h_pre are not to be added up over ranks."""
    local = torch.randn(2, 3, 4, 64)
    for placement, expected in ((Shard(1), Shard(1)), (Replicate(), Replicate()), (Partial(), Replicate())):
        h_pre = mhc.first_pre(DTensor.from_local(local, mesh, [placement]))
        assert h_pre.placements == (expected,)
        assert h_pre.stride() == h_pre.to_local().stride() == (12, 4, 1)
