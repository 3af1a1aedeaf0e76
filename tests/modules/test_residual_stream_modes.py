"""A write that waits: what may happen between it and its merge.

Would catch: a gradient lost because the stream was read without grad, one that appears because the merge ran
later than the layer, a layer's output that is merged with values it got afterwards.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import mhc_tilelang as mhc

SPEC = mhc.MHCSpec.deepseek_v4(64, num_streams=2)
KINDS = ("mhc", "hc", "residual")
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, count: int = 3):
    torch.manual_seed(0)
    connections = [mhc.connection(kind, SPEC, sublayer) for sublayer in range(count)]
    return connections, [torch.nn.Linear(64, 64) for _ in range(count)], torch.randn(5, 64)


def run(kind: str, look):
    """Three sublayers; `look(stream)` after each write. The result, and the layers' gradients."""
    connections, layers, h = make(kind)
    stream = mhc.ResidualStream(h, 2, kind)
    for connection, layer in zip(connections, layers, strict=True):
        stream.write(layer(stream.read(connection)))
        look(stream)
    result = stream.reduce()
    result.backward(torch.randn(result.shape, generator=torch.Generator().manual_seed(1)))
    return [result, *(layer.weight.grad for layer in layers)]


def look_without_grad(stream) -> None:
    with torch.no_grad():
        stream.reduce("mean")
        stream.x.norm()


def look_in_inference_mode(stream) -> None:
    with torch.inference_mode():
        stream.x.norm()


@every_kind
@pytest.mark.parametrize("look", [look_without_grad, look_in_inference_mode])
def test_looking_changes_no_gradient(kind: str, look) -> None:
    for got, expected in zip(run(kind, look), run(kind, lambda _: None), strict=True):
        assert torch.equal(got, expected)


@every_kind
def test_a_sublayer_without_grad_stays_without(kind: str) -> None:
    """It behaves as the functions called one after the other: nothing before it has a gradient."""
    connections, layers, h = make(kind, 2)
    h.requires_grad_()
    stream = mhc.ResidualStream(h, 2, kind)
    for connection, layer, mode in zip(connections, layers, (torch.no_grad(), nullcontext()), strict=True):
        with mode:
            stream.write(layer(stream.read(connection)))
    stream.reduce().square().sum().backward()
    assert h.grad is None
    assert layers[0].weight.grad is None
    assert layers[1].weight.grad is not None


@every_kind
def test_a_layer_output_that_changed_meanwhile_is_refused(kind: str) -> None:
    [connection], [layer], h = make(kind, 1)
    stream = mhc.ResidualStream(h, 2, kind)
    layer_output = layer(stream.read(connection))
    stream.write(layer_output)
    with torch.no_grad():
        layer_output.zero_()
    with pytest.raises(RuntimeError, match="layer_output: expected it as it was written, got one that was changed"):
        stream.reduce()


@every_kind
def test_strided_layer_outputs_are_refused_at_once(kind: str) -> None:
    """Every kind refuses them, and the write can be repeated."""
    [connection], [layer], h = make(kind, 1)
    stream = mhc.ResidualStream(h, 2, kind)
    layer_output = layer(stream.read(connection))
    with pytest.raises(ValueError, match=r"ResidualStream.write: layer_output: expected a contiguous tensor"):
        stream.write(layer_output.T.contiguous().T)
    stream.write(layer_output)
    assert stream.reduce().shape == h.shape


def test_what_fails_leaves_the_write_waiting() -> None:
    """A read and a reduction that raise, and then others: the write is still there. Would catch a lost sublayer."""
    [connection], [layer], h = make("mhc", 1)
    stream, undisturbed = mhc.ResidualStream(h, 2), mhc.ResidualStream(h, 2)
    for each in (stream, undisturbed):
        each.write(layer(each.read(connection)))
    with pytest.raises(ValueError, match="post_pre: phi: expected device cpu, got meta"):
        stream.read(mhc.HyperConnection(SPEC, device="meta"))
    with pytest.raises(ValueError, match="post_head: phi: expected device cpu, got meta"):
        stream.reduce(mhc.HyperHead(SPEC, device="meta"))
    assert torch.equal(stream.reduce(), undisturbed.reduce())


def test_buffers_keep_their_dtype() -> None:
    """Parameters stay float32 in a conversion; a counter that the user registered stays a counter."""
    connection = mhc.HyperConnection(SPEC)
    connection.register_buffer("steps", torch.tensor(16_777_217))
    connection.bfloat16().to("cpu")
    assert connection.steps.dtype == torch.int64
    assert int(connection.steps) == 16_777_217
    assert {parameter.dtype for parameter in connection.parameters()} == {torch.float32}


def test_unconstrained_connections_check_their_stream() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[..., 2, 64\], got \[3, 1, 64\]"):
        mhc.UnconstrainedHyperConnection(SPEC)(torch.randn(3, 1, 64))
