"""Shared parts of the tests of recomputation: a model, its gradients with and without, and what its graph keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from models import normal, randomize

import mhc_tilelang as mhc
from mhc_tilelang.modules.blocks import Handle
from mhc_tilelang.modules.saved import nodes, saved_by

C, DEPTH, TOKENS = 64, 7, (2, 5)


class Model(torch.nn.Module):
    """Random connections around a layer each: by default a norm, which saves its input, and a matrix, which saves a
    view of it.
    """

    def __init__(self, n=4, dtype=torch.float32, make_layer=None, depth=DEPTH, delayed=False, eps=None, identity=False):
        super().__init__()
        torch.manual_seed(0)
        mapping = "identity" if identity else "sinkhorn"
        self.spec = mhc.MHCSpec(C, num_streams=n, delayed_pre=delayed, residual_mapping=mapping)
        self.layers = torch.nn.ModuleList(make_layer() if make_layer else Layer(dtype) for _ in range(depth))
        self.connections = torch.nn.ModuleList(
            randomize(mhc.HyperConnection(self.spec, i, rms_norm_eps=eps), i) for i in range(len(self.layers))
        )
        self.recompute: int | None = None
        self.look: Callable | None = None
        self.reduction = "sum"

    def stream(self, h):
        return mhc.ResidualStream(h, self.spec.num_streams, recompute=self.recompute)

    def forward(self, h):
        stream = self.stream(h)
        for sublayer, (connection, layer) in enumerate(zip(self.connections, self.layers, strict=True)):
            stream.write(layer(stream.read(connection)))
            if self.look is not None:
                self.look(stream, sublayer)
        return stream.reduce(self.reduction)


class Layer(torch.nn.Module):
    """u -> u · tanh(W u): u is saved as it is, and as a matrix of tokens. Counts its calls."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = torch.nn.Linear(C, C, dtype=dtype)
        self.calls = 0

    def forward(self, u):
        self.calls += 1
        return u * torch.tanh(self.linear(u))


def gradients(model, h, recompute, run=None):
    """The output and the gradients of h and of every parameter that has one."""
    model.recompute = recompute
    h = h.detach().requires_grad_()
    out = (run or model)(h)
    model.zero_grad()
    out.backward(normal(*out.shape, dtype=out.dtype, seed=7))
    return {"out": out.detach(), "h": h.grad} | {name: p.grad for name, p in model.named_parameters()}


def assert_same(model, h, length=3, run=None):
    """Assert equal bits with and without recomputation."""
    expected = gradients(model, h, None, run)
    got = gradients(model, h, length, run)
    for name, one in expected.items():
        assert (got[name] is None) == (one is None), name
        assert one is None or torch.equal(got[name], one), name


def saved(model, h, recompute):
    model.recompute = recompute
    return mhc.saved_bytes(model(h))


def kept_by(out):
    """Return the tensors and handles that the graph of a result keeps."""
    return [one.data for node in nodes([out]) for one in saved_by(node)]


def handles_of(out):
    return [kept for kept in kept_by(out) if isinstance(kept, Handle)]
