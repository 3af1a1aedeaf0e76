"""Shared parts of tests of models: parameters far from their start, inputs, gradients and their comparison."""

from __future__ import annotations

import torch


def randomize(module, seed=0):
    """Logits of standard deviation 1 and a bias that is no multiple of the identity; the module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            normal = torch.randn(parameter.shape, generator=generator)
            parameter.copy_({"alpha": 0.6 + 0.1 * normal, "bias": normal}.get(name, normal / normal.shape[-1] ** 0.5))
    return module


def normal(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(model, run, h):
    """The output, and the gradients of h and of every parameter, under a random upstream gradient."""
    h = h.detach().requires_grad_()
    out = run(h)
    model.zero_grad()
    out.backward(normal(*out.shape, dtype=out.dtype, seed=7))
    return {"out": out.detach(), "h": h.grad} | {name: p.grad for name, p in model.named_parameters()}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        if expected[name] is None:  # nothing was made of it
            assert got[name] is None, name
        else:
            assert torch.equal(got[name], expected[name]), name
