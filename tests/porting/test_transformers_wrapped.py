"""`replace` on models that something else has wrapped, or wraps afterwards: accelerate, FSDP2, PEFT, torch itself.

Every way x {replaced after it, before it} x {values, gradients and operators; hooks; restored; taken off again}.

Would catch: modules that are listed and run transformers' own, a layer that runs ours with a connection that does not,
hooks that see other arguments or results than transformers', checkpointing that is lost, parameters that are read while
they are elsewhere, a `restore` that leaves something of ours, a swap that only works in one order.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from helpers_transformers import GRADIENTS, LOGITS, Counting, relative, tiny, tokens, transformers
from processes import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

import mhc_tilelang as mhc

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("error:FSDP2-wrapped module:UserWarning")  # returns a view
replace, restore = mhc.integrations.transformers.replace, mhc.integrations.transformers.restore
UPSTREAM = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(2))
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "model.hc_head")
RESIDENT = dict.fromkeys([*PARTS, "lm_head"], "cpu")
OFFLOADED = RESIDENT | {"model.layers.1": "disk"}


@dataclass(frozen=True)
class Way:
    """One way to wrap a model: put on, in place or around it, and taken off, where that can be done."""

    put: Callable[[nn.Module, str], nn.Module]
    off: Callable[[nn.Module], object] | None = None
    fused: int = 2  # layers whose boundary is one operator
    trains: bool = True
    orders: tuple[str, ...] = ("after", "before")


def in_place(wrap):
    def put(model, folder):
        wrap(model)
        return model

    return put


def connections(model):
    return [module for module in model.modules() if isinstance(module, theirs.DeepseekV4HyperConnection)]


def loaded(model, folder):
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=OFFLOADED, offload_folder=folder)


def dispatched(model, folder, device_map=OFFLOADED):
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


def sharded(*names):
    @in_place
    def put(model):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            for name in names:
                fully_shard(layer.get_submodule(name), mesh=mesh)
        fully_shard(model, mesh=mesh)

    return put


class Doubled(nn.Module):
    def forward(self, parameter):
        return 2 * parameter


@in_place
def parametrized(model):
    for layer in model.model.layers:
        parametrize.register_parametrization(layer.ffn_hc, "fn", Doubled())


def without_parametrization(model):
    for layer in model.model.layers:
        parametrize.remove_parametrizations(layer.ffn_hc, "fn", leave_parametrized=True)


class Connection(theirs.DeepseekV4HyperConnection):
    pass


class Layer(theirs.DeepseekV4DecoderLayer):
    pass


@in_place
def subclassed(model):
    model.model.layers[0].ffn_hc.__class__ = Connection
    model.model.layers[1].__class__ = Layer


def adapted(**options):
    def put(model, folder):
        torch.manual_seed(3)
        settings = {"target_modules": ["q_a_proj", "down_proj"], "init_lora_weights": False, "r": 2, **options}
        return peft.get_peft_model(model, peft.LoraConfig(**settings))

    return put


@in_place
def unhooked(model):
    dispatched(model, None, RESIDENT)
    accelerate.hooks.remove_hook_from_submodules(model)


def checkpointed(reentrant):
    @in_place
    def put(model):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        if reentrant:  # its inputs must require gradients
            model.enable_input_require_grads()

    return put


UNHOOK = accelerate.hooks.remove_hook_from_submodules
WAYS = {
    "nothing": Way(in_place(nn.Module.eval)),
    "device_map": Way(loaded, fused=1, trains=False, orders=("after",)),
    "cpu_offload": Way(in_place(accelerate.cpu_offload), UNHOOK, fused=0, trains=False),
    "dispatch_model": Way(dispatched, UNHOOK, fused=1, trains=False),
    "dispatch_model, resident": Way(functools.partial(dispatched, device_map=RESIDENT), UNHOOK),
    "hooks come and gone": Way(unhooked),
    "fully_shard layers": Way(sharded("")),
    "fully_shard connections": Way(sharded("attn_hc", "ffn_hc"), fused=0),
    "fully_shard both": Way(sharded("ffn_hc", ""), fused=0),
    "parametrize": Way(parametrized, without_parametrization),
    "subclass": Way(subclassed),
    "LoRA": Way(adapted(), lambda model: model.unload()),
    "LoRA, connections saved": Way(adapted(modules_to_save=["ffn_hc", "hc_head"]), fused=0),
    "LoRA of a connection": Way(adapted(target_parameters=["ffn_hc.fn"]), fused=0),
    "checkpointing": Way(checkpointed(False)),
    "reentrant checkpointing": Way(checkpointed(True)),
}
CELLS = [(name, order) for name, way in WAYS.items() for order in way.orders]
cells = pytest.mark.parametrize(("name", "order"), CELLS)


@pytest.fixture(scope="module", autouse=True)
def _alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made(name, order, folder):
    """A model that is wrapped and replaced in this order ("eager": never), and the names that replace gave."""
    model = tiny().eval()
    if order == "before":
        names = replace(model)
    model = WAYS[name].put(model, str(folder))
    if order == "after":
        names = replace(model)
    return model, names if order != "eager" else ()


def logits(model):
    return model(input_ids=tokens(2, 12), use_cache=False).logits


def backward(output):
    output.backward(UPSTREAM)


def gradients(model):
    held = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {
        name: gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        for name, gradient in held.items()
    }


def watched(model, record):
    """Hooks on what a layer calls: what they are given, by class, in the order of the calls."""

    def seen(kind, module, args, output):
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [value.detach().clone() for value in (*args, *outputs) if torch.is_tensor(value)]
        record.append((kind, len(args), len(outputs), tensors))

    kinds = (theirs.DeepseekV4HyperConnection, theirs.DeepseekV4HyperHead, theirs.DeepseekV4DecoderLayer)
    for module in model.modules():
        for kind in (*kinds, theirs.DeepseekV4SparseMoeBlock):
            if isinstance(module, kind):
                module.register_forward_hook(functools.partial(seen, kind.__name__))


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """Return a function of a way: transformers' own logits, gradients and what hooks see, never replaced."""

    @functools.cache
    def measured(name):
        trains, record = WAYS[name].trains, []
        model, _ = made(name, "eager", tmp_path_factory.mktemp("eager"))
        with torch.set_grad_enabled(trains):
            output = logits(model)
            if trains:
                backward(output)
        gradient = gradients(model)
        watched(model, record)
        with torch.no_grad():
            assert torch.equal(logits(model), output)
        return output.detach(), gradient, record

    return measured


def forward_operators(fused):
    """Count the operators of a model of two layers: the boundary of one that is not fused is post and pre."""
    apart = 2 - fused
    return +Counter(pre=2 + apart, post_pre=fused, post=2 + apart, head=1)


def runs_ours(model, name, expected, fused=None):
    with Counting() as counting, torch.no_grad():
        assert relative(logits(model), expected) < LOGITS
    assert counting.ran == forward_operators(WAYS[name].fused if fused is None else fused)


@cells
def test_values_gradients_and_operators(name, order, tmp_path, eager):
    """They are eager transformers', by our operators alone; the same again after a second `replace`."""
    way, (expected, expected_gradients, _) = WAYS[name], eager(name)
    model, names = made(name, order, tmp_path)
    assert len(names) == len(set(names)) >= 7
    with Counting() as counting, torch.set_grad_enabled(way.trains):
        output = logits(model)
    assert relative(output, expected) < LOGITS
    assert counting.ran == forward_operators(way.fused)
    if way.trains:
        with Counting() as counting:
            backward(output)
        got = gradients(model)
        assert got.keys() == expected_gradients.keys()
        assert got
        for parameter, gradient in expected_gradients.items():
            assert relative(got[parameter], gradient) < GRADIENTS, parameter
        again = "checkpointing" in name  # layers run a second time in the backward
        assert counting.ran["post"] == (2 if again else 0)
        assert counting.ran["post_pre_backward"] == way.fused
    again = replace(model)
    assert len(again) >= len(names)
    runs_ours(model, name, expected)


@cells
def test_hooks_see_what_they_saw(name, order, tmp_path, eager):
    """Each hook is called as often and in the same order, with the same arguments and results, to rounding."""
    expected, _, expected_record = eager(name)
    record = []
    model, _ = made(name, order, tmp_path)
    watched(model, record)
    runs_ours(model, name, expected, fused=0)
    assert [seen[:3] for seen in record] == [seen[:3] for seen in expected_record]
    assert {kind for kind, *_ in record} >= {"DeepseekV4HyperConnection", "DeepseekV4DecoderLayer"}
    for (kind, *_, tensors), (*_, expected_tensors) in zip(record, expected_record, strict=True):
        for got, wanted in zip(tensors, expected_tensors, strict=True):
            assert got.dtype == wanted.dtype
            assert relative(got, wanted) < 1e-5, kind


@cells
def test_restored(name, order, tmp_path, eager):
    """transformers' bits and nothing of ours; replaced again, ours."""
    expected, *_ = eager(name)
    model, _ = made(name, order, tmp_path)
    assert restore(model)
    with Counting() as counting, torch.no_grad():
        assert torch.equal(logits(model), expected)
    assert not counting.ran
    with pytest.raises(ValueError, match="restore: model: expected a module that replace has met"):
        restore(model)
    replace(model)
    runs_ours(model, name, expected)


@pytest.mark.parametrize(("name", "order"), [cell for cell in CELLS if WAYS[cell[0]].off])
@pytest.mark.parametrize("first", ["restored", "taken off"])
def test_taken_off(name, order, first, tmp_path, eager):
    """The wrapping comes off again, before `restore` or after it."""
    expected, *_ = eager(name)
    if name == "LoRA":
        expected, *_ = eager("nothing")
    model, _ = made(name, order, tmp_path)
    if first == "restored":
        restore(model)
    taken = WAYS[name].off(model)
    model = taken if name == "LoRA" else model
    if first == "taken off":
        with Counting() as counting, torch.no_grad():
            assert relative(logits(model), expected) < LOGITS
        assert counting.ran == forward_operators(2)
        restore(model)
    with Counting() as counting, torch.no_grad():
        assert torch.equal(logits(model), expected)
    assert not counting.ran


def test_a_hook_that_moves_streams_is_not_skipped():
    """accelerate's hook on weights of another device than the streams': then the connection is called as a module."""
    model, _ = made("dispatch_model, resident", "before", None)
    connection = model.model.layers[0].ffn_hc
    alone = mhc.integrations.transformers._runs_ours_alone
    assert alone(connection, torch.device("cpu"))
    assert not alone(connection, torch.device("cuda", 1))


def of_rank(rank, ranks, name, order, expected, expected_gradients):
    model, _ = made(name, order, None)
    with Counting() as counting:
        output = logits(model)
    assert relative(output, expected) < LOGITS
    assert counting.ran == forward_operators(WAYS[name].fused)
    backward(output)
    got = gradients(model)
    assert got.keys() == expected_gradients.keys()
    assert all(relative(got[key], gradient) < GRADIENTS for key, gradient in expected_gradients.items())


@pytest.mark.full
@pytest.mark.parametrize(("name", "order"), [("fully_shard layers", "before"), ("fully_shard both", "after")])
def test_two_ranks(name, order, tmp_path, eager):
    """Parameters that are really elsewhere: each rank holds half of them, and both see the same tokens."""
    run_ranks(of_rank, 2, tmp_path, name, order, *eager(name)[:2])
