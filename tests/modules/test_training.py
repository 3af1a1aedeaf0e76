"""Training with the kernels and with plain torch in their place: the same losses, step by step.

The model is that of `examples/gpt.py`. Its connections start at random instead of near the identity, and learn at a
high rate, so that each mapping and its gradient matter within the twenty steps.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from models import randomize

from mhc_tilelang import ops
from mhc_tilelang.checking import plain_torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "gpt.py"
STEPS, BATCH, CONTEXT, WIDTH = 20, 4, 32, 32
# Losses of 3 to 6 have a unit in the last place of 2e-7 to 5e-7. The curves differ by one or two of these: errors of
# 1e-7 in the gradients turn AdamW's steps by as little, and twenty steps do not amplify them much. Forty allow for
# other compilers and devices. The errors planted below move a loss by 7e-4 or more.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def gpt():
    specification = importlib.util.spec_from_file_location("gpt", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def train(gpt, kind="mhc"):
    """The losses of 20 AdamW steps on the bytes of the example's own source; the same bytes and start every time."""
    torch.manual_seed(0)
    model = gpt.GPT(kind, WIDTH, depth=2, heads=2, context=CONTEXT, dtype=torch.float32)
    for i, connection in enumerate(model.connections):
        randomize(connection, seed=i)
    with torch.no_grad():  # small embeddings: streams that are nearly equal hide h_res, whose rows sum to 1
        model.token.weight *= 0.1
        model.position.weight *= 0.1
    optimizer = gpt.optimizer_of(model, rate=1e-2)
    data = gpt.read_bytes(EXAMPLE)
    losses = []
    for _ in range(STEPS):
        starts = torch.randint(len(data) - CONTEXT, (BATCH, 1))
        window = data[starts + torch.arange(CONTEXT + 1)].long()
        logits = model(window[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def use_plain_torch(monkeypatch):
    """Let a model on "mhc" call plain torch, which takes flat tensors and is differentiated by autograd."""

    def pre(x, phi, alpha, bias, spec, *, h_pre=None):
        assert h_pre is None
        outputs = plain_torch.pre(x.flatten(0, -3), phi, alpha, bias, spec)
        return tuple(output.unflatten(0, x.shape[:-2]) for output in outputs)

    def post(x, *others):
        flat = [tensor.flatten(0, x.ndim - 3) for tensor in (x, *others)]
        return plain_torch.post(*flat).unflatten(0, x.shape[:-2])

    def post_pre(x, layer_output, h_post, h_res, *parameters, h_pre=None):  # by `ops`: an error may be planted there
        assert h_pre is None
        x_next = ops.post(x, layer_output, h_post, h_res)
        return x_next, *ops.pre(x_next, *parameters)

    def expand_pre(h, *parameters):
        x = plain_torch.expand(h.flatten(0, -2), parameters[-1].num_streams).unflatten(0, h.shape[:-1])
        return x, *ops.pre(x, *parameters)

    monkeypatch.setattr(ops, "expand_pre", expand_pre)
    monkeypatch.setattr(ops, "pre", pre)
    monkeypatch.setattr(ops, "post", post)
    monkeypatch.setattr(ops, "post_pre", post_pre)
    monkeypatch.setattr(ops, "collapse", lambda x, **_: x.float().mean(-2).to(x.dtype))


@pytest.fixture(scope="module")
def plain_losses(gpt):
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_plain_torch(monkeypatch)
        return train(gpt)


def test_losses_agree_with_plain_torch(gpt, plain_losses):
    """Losses agree at every step, while they fall. Catches a gradient that is wrong where a model needs it."""
    losses = train(gpt)
    assert losses[-5:].mean() < losses[0] - 1.5
    assert (losses - plain_losses).abs().max() < TOLERANCE


def with_gradient(tensor, change):
    """The tensor, whose gradient is changed on the way back."""
    out = tensor.clone()
    out.register_hook(change)
    return out


ERRORS = {
    "h_res-transposed": ("post", 3, lambda g: g.mT.contiguous()),
    "h_res-dropped": ("post", 3, torch.zeros_like),
    "h_post-dropped": ("post", 2, torch.zeros_like),
    "layer_output-one-percent": ("post", 1, lambda g: 1.01 * g),
    "x-of-post-reversed": ("post", 0, lambda g: g.flip(-2)),
    "x-of-pre-dropped": ("pre", 0, torch.zeros_like),
    "phi-dropped": ("pre", 1, torch.zeros_like),
    "phi-res-rows-as-in-out": ("pre", 1, lambda g: torch.cat([g[:8], g[8:].view(4, 4, -1).mT.reshape(16, -1)])),
    "alpha-dropped": ("pre", 2, torch.zeros_like),
    "bias-dropped": ("pre", 3, torch.zeros_like),
}


@pytest.mark.parametrize("error", ERRORS)
def test_a_wrong_gradient_is_noticed(gpt, plain_losses, monkeypatch, error):
    """Tests the test above: a planted error moves some loss by more than ten times what is allowed."""
    function, argument, change = ERRORS[error]
    use_plain_torch(monkeypatch)
    original = getattr(ops, function)

    def planted(*arguments, **form):
        changed = list(arguments)
        changed[argument] = with_gradient(changed[argument], change)
        return original(*changed, **form)

    monkeypatch.setattr(ops, function, planted)
    assert (train(gpt) - plain_losses).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("kind", ["residual", "hc"])
def test_every_kind_learns(gpt, kind):
    losses = train(gpt, kind)
    assert losses[-5:].mean() < losses[0] - 1.5
