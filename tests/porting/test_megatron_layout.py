"""Megatron's packed, sequence-first streams: views, and two pipeline stages with one tensor between them.

Would catch: a copy where a view is promised, streams and channels that change places, a stage that loses a gradient.
"""

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import mhc_tilelang as mhc
from mhc_tilelang.convert.megatron import pack_streams, unpack_streams

S, B, N, C = 5, 3, 4, 64


def test_views():
    packed = torch.randn(S, B, N * C)
    x = unpack_streams(packed, N)
    assert (x.shape, x.data_ptr()) == ((S, B, N, C), packed.data_ptr())
    assert torch.equal(x[2, 1, 3], packed[2, 1, 3 * C :])
    assert (pack_streams(x).shape, pack_streams(x).data_ptr()) == (packed.shape, packed.data_ptr())


def run(connections, h, cut):
    """Return the mean of the streams after all layers; with a `cut`, in two stages, also what was sent at both ends."""
    stream, ends = mhc.ResidualStream(h, N), []
    for k, connection in enumerate(connections):
        if k == cut:
            sent = pack_streams(stream.hand_over())
            received = sent.detach().clone().requires_grad_()
            stream, ends = mhc.ResidualStream.from_streams(unpack_streams(received, N)), [sent, received]
        stream.write(torch.tanh(stream.read(connection)))
    return stream.reduce("mean"), ends


def test_two_stages_are_one_model():
    """Sequence first, in two stages, against batch first in one: values and the gradient of h to the bit, but for the
    cut, where autograd adds what a fused boundary keeps in float32; those of parameters to rounding, in another order.
    """
    torch.manual_seed(0)
    spec = mhc.MHCSpec.deepseek_v4(C)
    connections = nn.ModuleList(mhc.HyperConnection(spec, sublayer) for sublayer in range(4))
    for parameter in connections.parameters():
        nn.init.normal_(parameter, std=0.2)
    h, g = torch.randn(S, B, C), torch.randn(S, B, C)
    found = []
    for first, cut in ((False, None), (True, None), (True, 2)):
        start = (h.clone() if first else h.transpose(0, 1).contiguous()).requires_grad_()
        out, ends = run(connections, start, cut)
        connections.zero_grad()
        out.backward(g if first else g.transpose(0, 1))
        if ends:
            sent, received = ends
            sent.backward(received.grad)
        gradients = [parameter.grad.clone() for parameter in connections.parameters()]
        found.append(
            [out if first else out.transpose(0, 1), start.grad if first else start.grad.transpose(0, 1), gradients]
        )
    (out, g_h, gradients), sequence_first, in_stages = found
    assert_same_bits([part.contiguous() for part in (out, g_h)], sequence_first[:2])
    assert_same_bits([in_stages[0]], [sequence_first[0]])
    for got in (sequence_first, in_stages):
        for one, expected in zip([got[1], *got[2]], [g_h, *gradients], strict=True):
            assert (one - expected).norm() <= 1e-5 * expected.norm()


def test_what_would_need_a_copy_is_refused():
    packed = torch.randn(S, B, N * C)
    for function in (lambda t: unpack_streams(t, N), pack_streams):
        with pytest.raises(
            ValueError, match=r"megatron.\w+_streams: \w+: expected a contiguous tensor, .* got strides"
        ):
            function(packed.transpose(0, 1))
    with pytest.raises(ValueError, match=r"unpack_streams: hidden_states: expected \[..., 4·C\], got \[5, 3, 255\]"):
        unpack_streams(packed[..., :-1].contiguous(), N)
    spec, parameters = mhc.MHCSpec(C, num_streams=1), (torch.zeros(3, C), torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"pre: x: expected shape \[..., 1, 64\], got \[5, 3, 64\] \(packed\?"):
        mhc.pre(packed[..., :C].contiguous(), *parameters, spec)
