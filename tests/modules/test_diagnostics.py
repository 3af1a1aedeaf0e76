"""Numbers of mappings, logits and streams, against numpy.

Would catch: forward and backward gains swapped, a product over depth in the wrong order, logits of other rows.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from models import normal, randomize

import mhc_tilelang as mhc
from mhc_tilelang import diagnostics, reference
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.diagnostics import Thresholds

SPEC = mhc.MHCSpec.deepseek_v4(hidden_size=24)


def test_gains_are_not_swapped():
    """Computed by hand: rows sum to 3 and −7, columns to −2 and −2; then a matrix whose signs cancel."""
    gain = diagnostics.amax_gain(torch.tensor([[[1.0, 2.0], [-3.0, -4.0]], [[1.0, -1.0], [0.0, 0.5]]]))
    assert gain.forward.tolist() == [7.0, 0.5]
    assert gain.backward.tolist() == [2.0, 1.0]


def test_composite_is_in_the_order_of_depth():
    """Against numpy, and against the streams themselves: H_2 H_1 H_0 x."""
    h_res, x = normal(3, 5, 4, 4).double(), normal(5, 4, 6, seed=2).double()
    expected = h_res[2].numpy() @ h_res[1].numpy() @ h_res[0].numpy()
    product = diagnostics.composite(h_res)
    np.testing.assert_allclose(product.numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(product @ x, h_res[2] @ (h_res[1] @ (h_res[0] @ x)))
    reversed_order = diagnostics.composite(h_res.flip(0)).numpy()
    assert np.abs(reversed_order - expected).max() > 0.1


def test_composite_gains():
    """Forward counts from the embedding, backward from the last sublayer."""
    h_res = normal(4, 5, 2, 2).double()
    matrices = h_res.numpy()
    gain = diagnostics.composite_gains(h_res)
    assert gain.forward.shape == gain.backward.shape == (4, 5)
    for depth in range(4):
        first, last = np.eye(2), np.eye(2)
        for k in range(depth + 1):
            first = matrices[k] @ first
        for k in range(depth, 4):
            last = matrices[k] @ last
        np.testing.assert_allclose(gain.forward[depth], np.abs(first.sum(-1)).max(-1), rtol=1e-12)
        np.testing.assert_allclose(gain.backward[depth], np.abs(last.sum(-2)).max(-1), rtol=1e-12)


def test_other_numbers_match_numpy():
    h_res, x = torch.rand(7, 4, 4, generator=torch.Generator().manual_seed(3)).double(), normal(7, 4, 24)
    matrices = h_res.numpy()
    rows, columns = diagnostics.sum_deviation(h_res)
    np.testing.assert_allclose(rows, np.abs(matrices.sum(2) - 1).max(1), rtol=1e-12)
    np.testing.assert_allclose(columns, np.abs(matrices.sum(1) - 1).max(1), rtol=1e-12)
    np.testing.assert_allclose(diagnostics.spectral_norm(h_res), np.linalg.norm(matrices, 2, axis=(1, 2)), rtol=1e-12)
    shares = matrices / matrices.sum(2, keepdims=True)
    np.testing.assert_allclose(diagnostics.row_entropy(h_res), -(shares * np.log(shares)).sum(2).mean(1), rtol=1e-12)
    np.testing.assert_allclose(
        diagnostics.stream_rms(x), np.sqrt((numpy64(x) ** 2).mean(2)), rtol=1e-6
    )  # float32, sums of 24
    logits = 20 * normal(7, 4, 4)
    np.testing.assert_allclose(
        diagnostics.logit_saturation(logits, 15.0), (np.abs(logits.numpy()) > 15).mean((1, 2)), rtol=1e-6
    )


def test_numbers_at_the_ends():
    """The identity, the mean, a zero row, negative entries, bfloat16."""
    identity, mean = torch.eye(4), torch.full((4, 4), 0.25)
    assert diagnostics.row_entropy(identity) == 0
    assert diagnostics.row_entropy(mean) == pytest.approx(math.log(4))
    assert diagnostics.row_entropy(torch.zeros(4, 4)) == 0
    assert diagnostics.row_entropy(-mean) == pytest.approx(math.log(4))
    assert diagnostics.entry_saturation(identity) == 1
    assert diagnostics.entry_saturation(-identity) == 0.75
    assert diagnostics.entry_saturation(mean.bfloat16()) == 0
    assert diagnostics.spectral_norm(mean) == pytest.approx(1)


def test_res_logits_are_those_of_the_operator():
    """Against float64, and Sinkhorn of them against the operator's h_res. Catches pre or post rows, a scaled bias."""
    connection = randomize(mhc.HyperConnection(SPEC))
    parameters = connection.phi.detach(), connection.alpha.detach(), connection.bias.detach()
    x = normal(5, 4, 24)
    logits = diagnostics.res_logits(x, *parameters, SPEC)
    h_res = mhc.coefficients(x, *parameters, SPEC)[2]
    expected = reference.sinkhorn(numpy64(logits))
    np.testing.assert_allclose(h_res.numpy(), expected, atol=1e-5)  # float32 logits of about 3: 2e-7 each


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diagnostics.amax_gain(torch.ones(3, 4)), ValueError, "amax_gain: h_res: expected square"),
        (lambda: diagnostics.amax_gain(torch.eye(3).int()), TypeError, "amax_gain: h_res: expected a float tensor"),
        (lambda: diagnostics.composite(torch.eye(3)), ValueError, "composite: h_res: expected shape"),
        (lambda: diagnostics.composite_gains(torch.ones(0, 2, 2)), ValueError, "L ≥ 1"),
        (lambda: diagnostics.logit_saturation(torch.eye(3), 0.0), ValueError, "limit: expected a positive"),
        (lambda: diagnostics.entry_saturation(torch.eye(3), float("nan")), ValueError, "margin: expected a positive"),
        (lambda: diagnostics.stream_rms(torch.ones(3)), ValueError, "stream_rms: x: expected shape"),
        (lambda: Thresholds(composite_gain=0), ValueError, "Thresholds: composite_gain: expected a positive"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_res_logits_of_small_streams():
    """Scale 1e-3 has a mean square of rms_eps: logits without it give another h_res than the operator's."""
    connection, x = randomize(mhc.HyperConnection(SPEC)), 1e-3 * normal(5, 4, 24)
    parameters = connection.phi.detach(), connection.alpha.detach(), connection.bias.detach()
    h_res = mhc.coefficients(x, *parameters, SPEC)[2]
    expected = reference.sinkhorn(numpy64(diagnostics.res_logits(x, *parameters, SPEC)))
    np.testing.assert_allclose(h_res.numpy(), expected, atol=1e-5)
