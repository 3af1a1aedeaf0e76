"""`convert.orientation`: each convention is recognised, each other one refused by name.

Would catch: two conventions that the probe does not tell apart, a transposed matrix that passes, an answer where there
is none.
"""

from __future__ import annotations

from types import SimpleNamespace

import foreign_sublayers
import pytest
import torch

import mhc_tilelang as mhc
from mhc_tilelang.convert import CONVENTIONS, orientation
from mhc_tilelang.errors import ConversionError

# name: axes that Sinkhorn normalises, first and last, and whether its matrix is then applied transposed
FOREIGN = {
    "mhc_tilelang": ((-2, -1), False),
    "deepseek": ((-1, -2), True),
    "liger": ((-1, -2), False),
    "transformer_engine": ((-1, -2), True),
    "lucidrains": ((-2, -1), True),
}


def foreign(name, eps=1e-6, dtype=torch.float32):
    axes, transposed = FOREIGN[name]

    def sublayer(probe):
        matrix = foreign_sublayers.sinkhorn(probe.logits, axes, eps, probe.sinkhorn_iters).to(dtype)
        x, layer_output, h_post = (tensor.to(dtype) for tensor in (probe.x, probe.layer_output, probe.h_post))
        x_next = (matrix.mT if transposed else matrix) @ x + h_post.unsqueeze(-1) * layer_output.unsqueeze(-2)
        return x_next.mT if name == "transformer_engine" else x_next

    return sublayer


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("iters", [1, 2, 20])
@pytest.mark.parametrize("name", FOREIGN)
def test_conventions_are_told_apart(name, iters, n):
    """Few iterations and 20 suffice, with an eps and without."""
    probe = mhc.convert.probe(n, 16, iters)
    for eps in (0.0, 1e-6):
        assert orientation(foreign(name, eps), probe) == CONVENTIONS[name]
        assert orientation(foreign(name, eps), probe, expected=name) == CONVENTIONS[name]


@pytest.mark.parametrize("name", FOREIGN)
def test_bfloat16_and_packed_streams(name):
    """Low precision is no reason to refuse; [T, n·C] has its streams where its numbers say; leading ones drop."""
    probe = mhc.convert.probe(4, 64)
    assert orientation(foreign(name, dtype=torch.bfloat16), probe) == CONVENTIONS[name]
    packed = foreign(name)
    assert orientation(lambda probe: packed(probe).flatten(1), probe) == CONVENTIONS[name]
    assert orientation(lambda probe: packed(probe)[None], probe) == CONVENTIONS[name]


def test_what_is_not_expected_is_named():
    probe = mhc.convert.probe()
    with pytest.raises(ConversionError, match=r"expected deepseek \(.*\), got lucidrains \(.*\)$"):
        orientation(foreign("lucidrains"), probe, expected="deepseek")
    with pytest.raises(
        ConversionError, match=r"expected deepseek \(.*\), got mhc_tilelang \(.*\): H_res is transposed"
    ):
        orientation(foreign("mhc_tilelang"), probe, expected="deepseek")
    with pytest.raises(ValueError, match=r"expected: expected one of mhc_tilelang, .*, got 'vllm'"):
        orientation(foreign("liger"), probe, expected="vllm")


def test_a_planted_transposition_is_found():
    """DeepSeek's comb taken for h_res, the field's most frequent bug."""
    comb = foreign("deepseek")

    def planted(probe):
        mixed = comb(probe) - probe.h_post.unsqueeze(-1) * probe.layer_output.unsqueeze(-2)
        matrix = foreign_sublayers.sinkhorn(probe.logits, (-1, -2), 1e-6, probe.sinkhorn_iters)
        torch.testing.assert_close(matrix.mT @ probe.x, mixed)
        return matrix @ probe.x + probe.h_post.unsqueeze(-1) * probe.layer_output.unsqueeze(-2)

    with pytest.raises(ConversionError, match=r"expected deepseek .*, got liger .*: H_res is transposed"):
        orientation(planted, mhc.convert.probe(), expected="deepseek")


def test_none_of_them():
    """Another function, NaN, a lost layer's output: no answer."""
    probe = mhc.convert.probe()
    for wrong in (
        lambda probe: probe.x,
        lambda probe: torch.full_like(probe.x, float("nan")),
        lambda probe: torch.zeros_like(probe.x),
        lambda probe: foreign("liger")(probe) * 1.1,
    ):
        with pytest.raises(ConversionError, match=r"expected x_next of one convention to 0.02, got relative errors"):
            orientation(wrong, probe)
    with pytest.raises(ValueError, match=r"expected x_next of 2048 elements, as x \[8, 4, 64\], got \[8, 64\]"):
        orientation(lambda probe: probe.layer_output, probe)
    with pytest.raises(TypeError, match=r"expected it to return a torch.Tensor, got tuple"):
        orientation(lambda probe: (probe.x,), probe)


def test_what_cannot_be_told_is_said():
    """Symmetric logits: a transposition leaves no trace."""
    probe = mhc.convert.probe()
    probe.logits.copy_(probe.logits + probe.logits.T.clone())
    with pytest.raises(ConversionError, match="expected conventions that the probe tells apart, got two"):
        orientation(foreign("mhc_tilelang"), probe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_streams": 9}, "probe: num_streams: expected one of"),
        ({"hidden_size": 0}, "probe: hidden_size: expected an int of at least 1, got 0"),
        ({"hidden_size": 4}, "probe: hidden_size: expected another number than num_streams"),
        ({"sinkhorn_iters": 2.0}, "probe: sinkhorn_iters: expected an int"),
    ],
)
def test_bad_probes(arguments, message):
    with pytest.raises(ValueError, match=message):
        mhc.convert.probe(**arguments)


def test_our_own_classes():
    """Modules, probed through their parameters: phi 0, the probe's bias. And `.connection` names the right one."""
    for make in (mhc.HyperConnection, mhc.convert.RowsFirstConnection):

        def module(probe, make=make):
            connection = make(mhc.MHCSpec(192, sinkhorn_iters=probe.sinkhorn_iters))
            connection.load_state_dict({**connection.state_dict(), "bias": probe.bias})
            with torch.no_grad():
                _, *mappings = connection(probe.x)
                return connection.merge(probe.x, probe.layer_output, *mappings)

        found = orientation(module, mhc.convert.probe(4, 192, 20))
        assert found.connection == make.__name__
        assert found.res == "[out, in]"


def test_transformers_module():
    """transformers' own class, at its 20 iterations."""
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    sizes = {"hidden_size": 192, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6}

    def sublayer(probe):
        module = modeling.DeepseekV4HyperConnection(SimpleNamespace(**sizes))
        module.load_state_dict({"fn": torch.zeros(24, 768), "base": probe.bias, "scale": torch.ones(3)})
        post, comb, _ = module(probe.x[None])
        return post.unsqueeze(-1) * probe.layer_output.unsqueeze(-2) + comb.mT @ probe.x

    assert orientation(sublayer, mhc.convert.probe(4, 192, 20), expected="deepseek").connection == "HyperConnection"
