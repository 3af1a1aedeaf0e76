"""Meta and fake tensors: shapes, dtypes and graphs without a kernel, for models that are planned before they are made.

Would catch: a function that refuses them, asks for data, or says another shape than the kernels give; a module that
cannot be made under torch.device("meta"); meta and CPU tensors mixed without a word.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from differentiable import FORMS, requiring
from torch._subclasses.fake_tensor import FakeTensorMode

import mhc_tilelang as mhc
from mhc_tilelang import compiler, ops
from mhc_tilelang.checking.inputs import Case

CASE = Case(4, 64, torch.float32, 6)
SPEC = CASE.spec
every_form = pytest.mark.parametrize("name", FORMS)
KINDS = ("mhc", "delayed", "hc", "residual")


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that gets as far as a kernel fails the test."""
    monkeypatch.setattr(compiler, "kernel", lambda family, *_, **__: pytest.fail(f"{family} was asked for"))


def expected_of(name: str, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """The shapes and dtypes that the docstrings say, for [2, 3] tokens."""
    f32, n, C = torch.float32, 4, 64
    x, u, post, res = ((2, 3, n, C), dtype), ((2, 3, C), dtype), ((2, 3, n), f32), ((2, 3, n, n), f32)
    function, *form = name.split("-")
    results = {
        "expand": [x],
        "collapse": [u],
        "aggregate": [u],
        "sinkhorn": [res],
        "coefficients": [post, post, res],
        "pre": [u, post, res],
        "head": [u],
        "post": [x],
        "post_pre": [x, u, post, res],
        "expand_pre": [x, u, post, res],
        "post_head": [x, u],
    }[function]
    return results + [post] * ("delayed" in form)


def tensors_of(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Arguments for [2, 3] tokens whose streams have this dtype, which a layer's output has too."""
    tensors = FORMS[name].tensors(CASE, leading=(2, 3))
    return {key: value.to(dtype) if key in ("h", "x", "layer_output") else value for key, value in tensors.items()}


def assert_works(name: str, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Outputs as `expected_of` says; gradients like what they belong to; and all of it into buffers."""
    given = requiring(tensors)
    outputs = FORMS[name].call(given, SPEC)
    assert [(tuple(output.shape), output.dtype) for output in outputs] == expected_of(name, dtype)
    found = torch.autograd.grad(outputs, list(given.values()), [torch.empty_like(output) for output in outputs])
    for gradient, tensor in zip(found, given.values(), strict=True):
        assert (gradient.shape, gradient.dtype, gradient.device) == (tensor.shape, tensor.dtype, tensor.device)
    buffers = tuple(torch.empty_like(output) for output in outputs)
    got = FORMS[name].call(tensors, SPEC, out=buffers[0] if len(buffers) == 1 else buffers)
    assert all(one is buffer for one, buffer in zip(got, buffers, strict=True))


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_functions_on_meta(name, dtype):
    assert_works(name, {key: value.to("meta") for key, value in tensors_of(name, dtype).items()}, dtype)


@every_form
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_functions_of_fake_tensors(name, device):
    """Fake tensors are those of compilers."""
    real = tensors_of(name, torch.bfloat16)
    with FakeTensorMode():
        fake = {key: torch.empty(value.shape, dtype=value.dtype, device=device) for key, value in real.items()}
        assert_works(name, fake, torch.bfloat16)


@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_first_pre(mode):
    with FakeTensorMode() if mode == "fake" else torch.device("meta"):
        h_pre = mhc.first_pre(torch.empty(2, 3, 4, 64, dtype=torch.bfloat16))
    assert (h_pre.shape, h_pre.dtype) == ((2, 3, 4), torch.float32)


class Model(torch.nn.Module):
    """Two sublayers and a reduction."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        spec = replace(SPEC, delayed_pre=kind == "delayed")
        self.kind = "mhc" if kind == "delayed" else kind
        self.connections = torch.nn.ModuleList(mhc.connection(self.kind, spec, k) for k in range(2))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(2))
        self.reduction = mhc.HyperHead(spec) if self.kind == "mhc" else "mean"

    def forward(self, h: torch.Tensor, recompute: int | None = None) -> torch.Tensor:
        stream = mhc.ResidualStream(h, connection=self.kind, recompute=recompute)
        for connection, layer in zip(self.connections, self.layers, strict=True):
            stream.write(layer(stream.read(connection)))
        return stream.reduce(self.reduction)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_models(kind, mode):
    """Made and run, forward and backward."""
    with FakeTensorMode() if mode == "fake" else torch.device("meta"):
        model, h = Model(kind), torch.empty(2, 3, 64, requires_grad=True)
        output = model(h)
        output.backward(torch.empty_like(output))
    assert (output.shape, output.dtype) == (h.shape, torch.float32)
    assert h.grad is not None
    for parameter in model.parameters():
        if parameter.grad is not None:
            assert parameter.grad.shape == parameter.shape
    assert all(layer.weight.grad is not None for layer in model.layers)


def test_recompute_on_meta_makes_nothing_again():
    """There is no memory to save and nothing to make it from; fake tensors are refused by name, as any subclass is."""
    with torch.device("meta"):
        model, h = Model("mhc"), torch.empty(2, 3, 64, requires_grad=True)
        model(h, recompute=2).backward(torch.empty(2, 3, 64))
    assert h.grad.is_meta
    with FakeTensorMode(), pytest.raises(TypeError, match=r"ResidualStream: h: expected a plain torch.Tensor"):
        mhc.ResidualStream(torch.empty(2, 3, 64), recompute=2)


def test_saved_bytes_on_meta():
    """Saved bytes follow from shapes alone. Catches tensors told apart by data addresses, all 0 here."""
    kept = []
    for device in ("meta", "cpu"):
        x = torch.randn(2, 3, device=device, requires_grad=True)
        y = torch.randn(2, 3, device=device, requires_grad=True)
        kept.append(mhc.saved_bytes((x * y).square()))
    assert kept == [3 * 24] * 2


@pytest.mark.parametrize("kind", ["mhc", "hc"])
def test_modules_and_streams_on_different_devices(kind):
    connection, x = mhc.connection(kind, SPEC), torch.zeros(2, 3, 4, 64)
    with pytest.raises(ValueError, match=r": (phi: expected device meta, got cpu|x: expected device cpu, got meta)$"):
        connection(x.to("meta"))
    with pytest.raises(ValueError, match=r": (phi: expected device cpu, got meta|x: expected device meta, got cpu)$"):
        connection.to("meta")(x)
    layer_output, *mappings = torch.zeros(2, 3, 64), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r": layer_output: expected device meta, got cpu$"):
        connection.merge(x.to("meta"), layer_output, *mappings)
    stream = mhc.ResidualStream(layer_output.to("meta"), connection=kind)
    stream.read(connection)
    with pytest.raises(ValueError, match=r"write: layer_output: expected device meta, got cpu"):
        stream.write(layer_output)


@pytest.mark.parametrize("kind", ["mhc", "hc"])
def test_modules_name_what_is_not_dense(kind):
    """A connection, its merge, a head, a stream."""
    connection, part = mhc.connection(kind, SPEC), torch.zeros(2, 4, 64)
    nested = torch.nested.nested_tensor([part, part], layout=torch.jagged)
    for bad in (nested, torch.nested.nested_tensor([part, part]), part.to_sparse()):
        calls = [
            lambda bad=bad: connection(bad),
            lambda bad=bad: connection.merge(bad, part[:, 0], part[..., 0], torch.zeros(2, 4, 4)),
            lambda bad=bad: mhc.HyperHead(SPEC)(bad),
            lambda bad=bad: mhc.ResidualStream(bad, connection=kind),
            lambda bad=bad: mhc.ResidualStream.from_streams(bad, connection=kind),
            lambda bad=bad: ops.first_pre(bad),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=": expected a dense tensor, got "):
                call()
