"""Refusals of `replace` and `restore`, by the module's name and with nothing changed; copies; what hooks may do.

Would catch: a forward of the user's that is dropped without a word, one that `restore` leaves over ours or loses, a
hook that is never called, a half-replaced model, copies that run the original's parameters.
"""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch
from helpers_transformers import GRADIENTS, LOGITS, Counting, relative, tiny, tokens
from torch import nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

import mhc_tilelang as mhc
from mhc_tilelang.errors import ConversionError

replace, restore = mhc.integrations.transformers.replace, mhc.integrations.transformers.restore


@pytest.fixture(scope="module")
def eager():
    return tiny().eval()


@pytest.fixture
def model(eager):
    return copy.deepcopy(eager)


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(2, 12), use_cache=False).logits


class Connection(theirs.DeepseekV4HyperConnection):
    def forward(self, hidden_streams):
        post, comb, collapsed = super().forward(hidden_streams)
        return 2 * post, comb, collapsed


class Layer(theirs.DeepseekV4DecoderLayer):
    def forward(self, hidden_states, input_ids=None, **kwargs):
        return 2 * super().forward(hidden_states, input_ids, **kwargs)


class Head(theirs.DeepseekV4HyperHead):
    def forward(self, x):
        return 2 * super().forward(x)


class Norm(theirs.DeepseekV4UnweightedRMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def of_class(kind):
    return lambda module: setattr(module, "__class__", kind)


def forward_on(module):
    forward = module.forward
    module.forward = lambda *arguments, **keywords: forward(*arguments, **keywords)


def hooked_over(module):
    accelerate = pytest.importorskip("accelerate")
    forward_on(module)
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())


def forward_over_hook(module):
    accelerate = pytest.importorskip("accelerate")
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    forward_on(module)


def another_site(module):
    module.attn_hc = nn.Identity()


def flattened(module):
    module.fn = nn.Parameter(module.fn.detach().flatten())


def hook(method, module):
    getattr(module, method)(lambda *_: None)


HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
LAYER, CONNECTION, HEAD = "model.layers.1", "model.layers.1.ffn_hc", "model.hc_head"
NORM = f"{CONNECTION}.input_norm"
REFUSED = [
    (LAYER, of_class(Layer), "forward: expected transformers' DeepseekV4DecoderLayer.forward, got .*Layer.forward"),
    (CONNECTION, of_class(Connection), "forward: expected transformers' .*, got test_transformers_refused.Connection"),
    (HEAD, of_class(Head), "forward: expected transformers' DeepseekV4HyperHead.forward, got"),
    *((name, forward_on, "forward: expected that of its class, .* got another") for name in (LAYER, CONNECTION, HEAD)),
    (CONNECTION, hooked_over, "forward: expected that of its class, .* got another on the instance"),
    (CONNECTION, forward_over_hook, "forward: expected that of its class, .* got another on the instance"),
    (LAYER, another_site, "attn_hc: expected a DeepseekV4HyperConnection or what wraps one, got Identity"),
    (CONNECTION, flattened, r"fn: expected \[M, n·C\], got \[18432\]"),
    *((NORM, partial(hook, method), "expected .* without hooks, .* got DeepseekV4.* with hooks") for method in HOOKS),
    (NORM, forward_on, "expected .* without hooks, .* got DeepseekV4UnweightedRMSNorm with forward"),
    (NORM, of_class(Norm), "forward: expected transformers' DeepseekV4UnweightedRMSNorm.forward, got"),
    (NORM, of_class(nn.Identity), "expected a DeepseekV4UnweightedRMSNorm without hooks, .* got Identity"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_refused_by_name(model, name, change, message):
    """Nothing is replaced, and the model runs what it ran."""
    change(model.get_submodule(name))
    held = [dict(vars(module)) for module in model.modules()]
    path = name.replace(".input_norm", ": input_norm").replace(".", r"\.")
    with pytest.raises(ConversionError, match=f"replace: {path}: {message}"):
        replace(model)
    assert [vars(module) for module in model.modules()] == held


def test_a_patched_class_is_refused(model, monkeypatch):
    """Others patch transformers' classes: then its forward is not the one that ours is equal to."""
    monkeypatch.setattr(theirs.DeepseekV4HyperConnection, "forward", Connection.forward)
    with pytest.raises(ConversionError, match=r"replace: model\.layers\.0\.attn_hc: forward: expected transformers'"):
        replace(model)


@pytest.mark.parametrize("name", [LAYER, CONNECTION, HEAD])
def test_a_forward_over_ours(model, eager, name):
    """It runs, with ours beneath; neither `restore` nor `replace` takes it away or overlooks it."""
    replace(model)
    ours = model.get_submodule(name).forward
    forward_on(model.get_submodule(name))
    with Counting() as counting:
        assert relative(logits(model), logits(eager)) < LOGITS
    assert counting.ran["head"] == 1
    for function in (replace, restore):
        with pytest.raises(ConversionError, match=rf"{function.__name__}: {name}: forward: .* another on the instance"):
            function(model)
    model.get_submodule(name).forward = ours
    restore(model)
    assert torch.equal(logits(model), logits(eager))


@pytest.mark.parametrize("method", HOOKS)
@pytest.mark.parametrize("name", [NORM, "model.layers.0.attn_hc.input_norm", "model.hc_head.input_norm"])
def test_a_later_hook_on_a_norm_is_refused(model, name, method):
    """The call refuses it, for it would never run."""
    replace(model)
    hook(method, model.get_submodule(name))
    with pytest.raises(ConversionError, match=f"{name}: expected a DeepseekV4UnweightedRMSNorm without hooks"):
        logits(model)


def test_hooks_may_change_what_they_see(model, eager):
    """A layer goes on with their changes, in place or returned, on both sites, as in transformers."""

    def halved(_module, _args, output):
        output[1].mul_(0.5)
        return 2 * output[0], output[1], output[2]

    results = []
    upstream = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(2))
    for each, change in ((copy.deepcopy(eager), None), (model, replace)):
        if change:
            change(each)
        for name in ("model.layers.0.attn_hc", CONNECTION):
            each.get_submodule(name).register_forward_hook(halved)
        output = each(input_ids=tokens(2, 12), use_cache=False).logits
        output.backward(upstream)
        results.append([output, *(p.grad for p in each.parameters() if p.grad is not None)])
    assert relative(results[0][0], logits(eager)) > 0.01
    assert relative(results[1][0], results[0][0]) < LOGITS
    assert max(map(relative, *results)) < GRADIENTS


def test_a_hook_of_accelerates_is_called(model, eager):
    """One of the user's: by the layer that would fuse, with what transformers gives."""
    hooks, seen = pytest.importorskip("accelerate").hooks, []

    class Hook(hooks.ModelHook):
        def pre_forward(self, _module, *arguments, **keywords):
            seen.append([tuple(argument.shape) for argument in arguments])
            return arguments, keywords

        def post_forward(self, _module, output):
            seen.append([tuple(tensor.shape) for tensor in output])
            return output

    hooks.add_hook_to_module(model.get_submodule(CONNECTION), Hook())
    replace(model)
    assert relative(logits(model), logits(eager)) < LOGITS
    assert seen == [[(2, 12, 4, 192)], [(2, 12, 4), (2, 12, 4, 4), (2, 12, 192)]]


def test_global_hooks_see_every_connection(model, eager):
    """They see what transformers' do, but for the norms within, which are part of the kernels."""
    replace(model)
    seen = [[], []]
    for each, calls in zip((eager, model), seen, strict=True):
        see = partial(lambda calls, module, args, _output: calls.append((type(module), len(args))), calls)
        handle = nn.modules.module.register_module_forward_hook(see)
        try:
            logits(each)
        finally:
            handle.remove()
    inside = [id(module.input_norm) for module in eager.modules() if hasattr(module, "input_norm")]
    assert len(inside) == 5
    unweighted = theirs.DeepseekV4UnweightedRMSNorm
    named = [[call for call in calls if call[0] is not unweighted] for calls in seen]
    assert named[0] == named[1]
    assert sum(kind is theirs.DeepseekV4HyperConnection for kind, _ in named[1]) == 4
    assert len(seen[0]) - len(seen[1]) == len(inside)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_run_their_own_parameters(model, eager, copied):
    """Copies run by our operators, and can be restored on their own."""
    replace(model)
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with Counting() as counting:
        assert relative(logits(other), logits(eager)) < LOGITS
    assert counting.ran == {"pre": 2, "post_pre": 2, "post": 2, "head": 1}
    restore(other)
    assert torch.equal(logits(other), logits(eager))
    with Counting() as counting:
        logits(model)
    assert counting.ran["pre"] == 2


@pytest.mark.parametrize("part", [LAYER, CONNECTION])
def test_parts(model, eager, part):
    """A layer or a connection alone, replaced in an eager model and restored in one that is replaced."""
    assert part in [f"{part}{name and '.'}{name}" for name in replace(model.get_submodule(part))]
    assert relative(logits(model), logits(eager)) < LOGITS
    assert set(replace(model)) >= {part, LAYER, CONNECTION, HEAD}
    restore(model.get_submodule(part))
    with Counting() as counting:
        assert relative(logits(model), logits(eager)) < LOGITS
    assert counting.ran["pre"] == (1 if part == LAYER else 2)


def test_checkpointing_drops_the_cache(model, eager):
    """transformers drops it too: a layer that ran again would write its cache again."""
    results = []
    upstream = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(2))
    replace(model)
    for use_cache in (True, False):
        model.zero_grad()
        model.train().activation_checkpointing_enable()
        model(input_ids=tokens(2, 12), use_cache=use_cache).logits.backward(upstream)
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *results))
