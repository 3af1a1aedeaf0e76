"""The replay of a block of sublayers: the bits of post and pre, one after the other.

Would catch: a stream that is mixed or aggregated before it is rounded, coefficients of another sublayer, a launch of a
chain that begins at the wrong stream.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import CPU, assert_same_bits, every_n_and_dtype, named, replace_launch

from mhc_tilelang import launch
from mhc_tilelang.checking.comparison import compare
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.checking.run import CHECKS
from mhc_tilelang.launch import Written

pytestmark = pytest.mark.usefixtures("poisoned")
CASES = every_n_and_dtype(63)
CASES += [
    named("odd-channels", Case(4, 333, torch.bfloat16, 3)),
    named("one-channel", Case(4, 1, torch.bfloat16, 130), pytest.mark.full),
    named("wide", Case(4, 2560, torch.bfloat16, 65), pytest.mark.full),
    named("no-token", Case(4, 192, torch.bfloat16, 0)),
]


def block(case: Case, sublayers: int) -> tuple[torch.Tensor, list[Written], dict[int, torch.Tensor]]:
    """A start, what is written to it, and every h_pre."""
    inputs = [Inputs.of(replace(case, seed=k), CPU) for k in range(sublayers + 1)]
    written = [Written(i.layer_output, i.h_post, i.h_res) for i in inputs[:-1]]
    return inputs[0].x, written, {k: i.h_pre for k, i in enumerate(inputs)}


def one_by_one(x, written, h_pre):
    """Return the streams and layer inputs by the kernels of the forward."""
    streams = [x]
    for one in written:
        streams.append(launch.post(streams[-1], *one))
    return [*streams[1:], *(launch.aggregate(streams[k], h_pre[k]) for k in sorted(h_pre))]


def assert_replayed(x, written, h_pre):
    streams, layer_inputs = launch.replay(x, written, h_pre)
    assert sorted(layer_inputs) == sorted(h_pre)
    got = [*streams, *(layer_inputs[k] for k in sorted(layer_inputs))]
    assert_same_bits(got, one_by_one(x, written, h_pre))


@pytest.mark.parametrize("case", CASES)
def test_has_the_bits_of_the_forward(case):
    assert_replayed(*block(case, 2))


@pytest.mark.parametrize("sublayers", [0, 1, 10])
def test_blocks_of_any_length(sublayers):
    """None: the first layer's input alone. Ten: two launches, of which the second starts where the first ended."""
    assert_replayed(*block(Case(4, 64, torch.bfloat16, 5), sublayers))


def test_some_layer_inputs():
    """Layer inputs that are not needed are not written; the last of one launch is none of the next one's."""
    x, written, h_pre = block(Case(4, 64, torch.bfloat16, 5), 10)
    assert_replayed(x, written, {k: h_pre[k] for k in (1, 8)})
    assert_replayed(x, written, {})


@pytest.mark.parametrize(("dtype", "layer_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_layers_of_several_dtypes(dtype, layer_dtype):
    """Layers under autocast have several dtypes: a launch for each run of the same."""
    x, written, h_pre = block(Case(4, 64, dtype, 5), 3)
    written[1] = written[1]._replace(layer_output=written[1].layer_output.to(layer_dtype))
    assert [(first, len(part)) for first, part in launch.replay_parts(written)] == [(0, 1), (1, 1), (2, 1)]
    assert_replayed(x, written, h_pre)


def test_tensors_that_start_anywhere():
    """Views of odd offsets; on a GPU these take narrower accesses."""

    def moved(tensor):
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    x, written, h_pre = block(Case(4, 64, torch.bfloat16, 5), 2)
    written = [Written(*map(moved, one)) for one in written]
    assert_replayed(moved(x), written, {k: moved(one) for k, one in h_pre.items()})


@pytest.mark.parametrize("output", range(5))
def test_its_check_can_fail(output, monkeypatch):
    """Each output one unit off in one row is rejected."""
    replay, inputs = launch.replay, Inputs.of(CASE := Case(4, 192, torch.bfloat16, 63), CPU)

    def damaged(*arguments):
        streams, layer_inputs = replay(*arguments)
        [*streams, *layer_inputs.values()][output][17] += 1
        return streams, layer_inputs

    assert all(compare(one).passed for one in CHECKS["replay"](CASE, inputs))
    replace_launch(monkeypatch, "replay", damaged)
    assert not all(compare(one).passed for one in CHECKS["replay"](CASE, inputs))
