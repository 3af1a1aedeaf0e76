"""`mhc.convert`: keys, shapes, dtypes and round trips of state dicts.

Would catch: a permutation that is not undone by its inverse, an order of alphas that is lost, a value that is rounded
or copied on the way, keys that are left out or passed over in silence, half a conversion.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from foreign_states import C, heads, states

import mhc_tilelang as mhc
from mhc_tilelang.errors import ConversionError

MODULES = ("deepseek", "transformers", "liger", "transformer_engine", "megatron", "lucidrains")
PAIRS = [(name, getattr(mhc.convert, name).import_state, getattr(mhc.convert, name).export_state) for name in MODULES]
PAIRS.append(
    ("unconstrained", mhc.convert.lucidrains.import_unconstrained, mhc.convert.lucidrains.export_unconstrained)
)
EACH = pytest.mark.parametrize(("name", "take", "give"), PAIRS, ids=[name for name, *_ in PAIRS])
OURS = {"unconstrained": {"theta", "alpha", "bias"}, "transformer_engine": {"phi", "alpha", "bias", "norm_weight"}}


def assert_equal_states(got, expected):
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    ("name", "take", "give", "n"),
    [(*pair, n) for pair in PAIRS for n in ((4,) if pair[0] == "transformer_engine" else (2, 4, 8))],
    ids=lambda value: str(value) if isinstance(value, (str, int)) else "",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trips_are_exact(name, take, give, n, dtype):
    """Theirs to ours and back, and ours to theirs and back, bits, shapes and dtypes; the source is left alone."""
    theirs = {key: tensor.to(dtype) for key, tensor in states(name, n).items()}
    before = {key: tensor.clone() for key, tensor in theirs.items()}
    ours = take(theirs)
    assert set(ours) == OURS.get(name, {"phi", "alpha", "bias"})
    assert_equal_states(give(ours), theirs)
    assert_equal_states(take(give(ours)), ours)
    assert_equal_states(theirs, before)


@EACH
def test_results_load(name, take, give):
    """Into the class that computes the same, strictly."""
    spec = mhc.MHCSpec(C)
    make = mhc.UnconstrainedHyperConnection if name == "unconstrained" else mhc.HyperConnection
    state = take(states(name))
    state.pop("norm_weight", None)
    make(spec).load_state_dict(state)


@EACH
def test_keys_are_exact(name, take, give):
    """A missing and an unknown key are both named, with what was expected."""
    for convert, state in ((take, states(name)), (give, take(states(name)))):
        required = [key for key in state if key != "norm_weight"]
        for key in required:
            spoilt = {other: tensor for other, tensor in state.items() if other != key}
            with pytest.raises(ConversionError, match=rf"state: expected the keys .*{key}.* got missing {key}$"):
                convert(spoilt)
        with pytest.raises(ConversionError, match=r"got unknown weight, other$"):
            convert({**state, "weight": torch.ones(1), "other": torch.ones(1)})
        with pytest.raises(ConversionError, match=rf"got missing {required[0]}; unknown weight$"):
            convert({**{k: v for k, v in state.items() if k != required[0]}, "weight": torch.ones(1)})
        with pytest.raises(TypeError, match=f"{required[0]}: expected a torch.Tensor, got list"):
            convert({**state, required[0]: [1.0]})


@EACH
def test_shapes_are_checked(name, take, give):
    """One tensor at a time, one element too long on its last axis (a scalar: an axis too many): named, refused."""
    for convert, state in ((take, states(name)), (give, take(states(name)))):
        for key, tensor in state.items():
            if (key, name) == ("theta", "unconstrained"):
                continue  # any number of channels
            longer = torch.cat((tensor, tensor[..., :1]), -1) if tensor.ndim else tensor.reshape(1)
            with pytest.raises(ValueError, match=r"expected .*, got"):
                convert({**state, key: longer})


@pytest.mark.parametrize("name", ["deepseek", "transformers", "megatron", "liger"])
def test_transposed_projections_are_named(name):
    state = dict(states(name))
    key = next(key for key, tensor in state.items() if tensor.ndim == 2)
    with pytest.raises(ValueError, match=rf"{name}.import_state: {key}: expected shape .*\(transposed\?\)"):
        getattr(mhc.convert, name).import_state({**state, key: state[key].T})


def test_what_needs_no_permutation_is_not_copied():
    """alpha, heads and Liger's phi share memory with what came."""
    theirs = states("deepseek")
    assert mhc.convert.deepseek.import_state(theirs)["alpha"] is theirs["scale"]
    liger = states("liger")
    ours = mhc.convert.liger.import_state(liger)
    assert ours["phi"].data_ptr() == liger["phi"].data_ptr()
    assert ours["bias"] is liger["b"]
    assert mhc.convert.liger.export_state(ours)["phi"].data_ptr() == liger["phi"].data_ptr()
    for name in ("deepseek", "transformers"):
        head = heads(name)
        assert {id(t) for t in getattr(mhc.convert, name).import_head(head).values()} == {id(t) for t in head.values()}


@pytest.mark.parametrize("name", ["deepseek", "transformers"])
def test_heads(name):
    """Round trip, and refusals: n comes from the base, and the projection must fit it."""
    module, head = getattr(mhc.convert, name), heads(name)
    ours = module.import_head(head)
    mhc.HyperHead(mhc.MHCSpec(C)).load_state_dict(ours)
    assert_equal_states(module.export_head(ours), head)
    fn, scale, base = head
    with pytest.raises(ValueError, match=f"{name}.import_head: {fn}: expected shape \\[4, 4·C\\]"):
        module.import_head({**head, fn: states("deepseek")["fn"]})
    with pytest.raises(ValueError, match=f"{name}.import_head: {base}: expected one of"):
        module.import_head({**head, base: torch.ones(9)})
    with pytest.raises(ConversionError, match=f"missing {scale}"):
        module.import_head({fn: head[fn], base: head[base]})


def test_scalar_head_scale():
    """TileKernels takes a scalar; ours is [1]."""
    head = dict(heads("deepseek"))
    ours = mhc.convert.deepseek.import_head({**head, "scale": head["scale"][0]})
    assert_equal_states(ours, mhc.convert.deepseek.import_head(head))


MODELS = {
    "deepseek": ("layers.0.hc_attn", "layers.0.hc_ffn", "layers.1.hc_attn", "mtp.0.hc_ffn", "hc_head"),
    "transformers": ("model.layers.0.attn_hc", "model.layers.0.ffn_hc", "model.hc_head"),
    "megatron": ("decoder.layers.0.self_attention_hyper_connection", "decoder.layers.0.mlp_hyper_connection"),
}
OTHERS = ("model.layers.0.self_attn.q_a_proj.weight", "layers.0.attn_norm.weight", "lm_head.weight", "norm.weight")


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    """Every connection is found under its name, foreign keys are left, and the way back gives the keys that came."""
    module, separator = getattr(mhc.convert, name), "_" if name == "deepseek" else "."
    theirs = {}
    for seed, place in enumerate(MODELS[name]):
        state = heads(name) if place.endswith("head") else states(name, seed=seed)
        theirs |= {f"{place}{separator}{key}": tensor for key, tensor in state.items()}
    ours = module.import_model({**dict.fromkeys(OTHERS, torch.ones(2)), **theirs})
    assert set(ours) == set(MODELS[name])
    assert_equal_states(ours[MODELS[name][1]], module.import_state(states(name, seed=1)))
    assert_equal_states(module.export_model(ours), theirs)

    some = next(key for key in theirs if key.startswith(MODELS[name][1]))
    with pytest.raises(ConversionError, match=f"^{MODELS[name][1]}: {name}.import_state: state: .* got missing "):
        module.import_model({key: tensor for key, tensor in theirs.items() if key != some})
    with pytest.raises(ConversionError, match="unknown surplus"):
        module.import_model({**theirs, f"{MODELS[name][0]}{separator}surplus": torch.ones(1)})
    with pytest.raises(
        ConversionError, match=f"{name}.import_model: state: expected keys that match .*, got norm.weight"
    ):
        module.import_model({"norm.weight": torch.ones(1)})
    with pytest.raises(
        ConversionError, match=f"{name}.export_model: connections: expected names that end in .*, got it"
    ):
        module.export_model({"it": ours[MODELS[name][0]]})


def test_lucidrains_refuses_what_has_no_equal():
    """Dynamic weights there, phi here, and two scales that are one there: an error that says why."""
    lucidrains, state = mhc.convert.lucidrains, dict(states("lucidrains"))
    for key in ("dynamic_alpha_fn", "dynamic_beta_fn", "norm.gamma"):
        weights = torch.zeros_like(state[key])
        weights.view(-1)[3] = 1e-8
        with pytest.raises(ConversionError, match=f"import_state: {key}: expected 0, got weights"):
            lucidrains.import_state({**state, key: weights})
    ours = mhc.HyperConnection(mhc.MHCSpec(C)).state_dict()
    lucidrains.export_state(ours)
    with pytest.raises(ConversionError, match="export_state: phi: expected 0, got weights"):
        lucidrains.export_state({**ours, "phi": ours["phi"] + 1e-8})
    plain = mhc.UnconstrainedHyperConnection(mhc.MHCSpec(C)).state_dict()
    with pytest.raises(ConversionError, match="export_unconstrained: alpha: expected one value for pre and res"):
        lucidrains.export_unconstrained({**plain, "alpha": torch.tensor([1.0, 1.0, 2.0])})


def test_lucidrains_streams():
    """[(b n), s, C] and back; stream i of sequence b is row b·n + i there."""
    x = torch.randn(2, 5, 4, C)
    folded = mhc.convert.lucidrains.export_stream(x)
    assert folded.shape == (8, 5, C)
    assert torch.equal(folded[6], x[1, :, 2])
    assert torch.equal(mhc.convert.lucidrains.import_stream(folded, 4), x)
    with pytest.raises(ValueError, match="residuals: expected shape"):
        mhc.convert.lucidrains.import_stream(folded[:7], 4)


def test_megatron_needs_a_convention_with_streams_outermost():
    state = states("megatron")
    with pytest.raises(TypeError, match="convention: expected a Convention, got str"):
        mhc.convert.megatron.import_state(state, "deepseek")
    with pytest.raises(ValueError, match="convention: expected streams outermost, got innermost"):
        mhc.convert.megatron.export_state(state, mhc.convert.CONVENTIONS["transformer_engine"])


@pytest.mark.parametrize("n", [2, 4, 8])
def test_swapped_rows(n: int) -> None:
    """Gates stay, res rows go from [out, in] to [in, out] and back."""
    labels = torch.tensor([*range(2 * n), *(1000 + 10 * j + i for j in range(n) for i in range(n))])
    swapped = mhc.convert.swapped_rows(labels, n)
    assert swapped[: 2 * n].tolist() == [*range(2 * n)]
    assert swapped[2 * n :].tolist() == [1000 + 10 * j + i for i in range(n) for j in range(n)]
    assert torch.equal(mhc.convert.swapped_rows(swapped, n), labels)


def test_swapped_columns_follow_the_stream():
    """phi's columns and the stream that they multiply, both with streams innermost: the same product."""
    x, phi = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(7, 20, dtype=torch.float64)
    innermost = mhc.convert.swapped_streams(x).flatten(1) @ mhc.convert.swapped_columns(phi, 4).T
    torch.testing.assert_close(innermost, x.flatten(1) @ phi.T)
    assert torch.equal(mhc.convert.swapped_columns(mhc.convert.swapped_columns(phi, 4), 5), phi)


def test_importing_the_package_loads_no_framework():
    """Not even `mhc.convert` does; an integration loads its own, on first use."""
    code = (
        "import sys, mhc_tilelang as mhc; mhc.convert.transformers.NAMES; mhc.integrations; "
        "assert not {'transformers', 'hyper_connections'} & set(sys.modules); "
        "assert 'transformers' in dir(mhc.integrations)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'jax'"):
        mhc.integrations.jax  # noqa: B018


@pytest.mark.parametrize("between", [(), (5,), (5, 6)])
def test_lucidrains_streams_of_any_rank(between: tuple[int, ...]) -> None:
    """Whatever lies between batch and channels keeps its order. Catches an axis that changes places with another."""
    x = torch.randn(2, *between, 4, 3)
    folded = mhc.convert.lucidrains.export_stream(x)
    for b in range(2):
        for i in range(4):
            assert torch.equal(folded[4 * b + i], x[b, ..., i, :])
    assert torch.equal(mhc.convert.lucidrains.import_stream(folded, 4), x)


def test_models_of_another_convention():
    """A whole model's states are those of its sublayers one by one, in the convention that is asked for."""
    megatron, earlier, place = mhc.convert.megatron, mhc.convert.CONVENTIONS["liger"], MODELS["megatron"][0]
    state = states("megatron")
    model = {f"{place}.{name}": tensor for name, tensor in state.items()}
    ours = megatron.import_model(model, earlier)
    assert_equal_states(ours[place], megatron.import_state(state, earlier))
    assert not torch.equal(ours[place]["phi"], megatron.import_state(state)["phi"])
    assert_equal_states(megatron.export_model(ours, earlier), model)
