"""The contract of every reference function: leading dimensions, zero tokens, float dtypes, named shape errors."""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from mhc_tilelang import reference

NUM_STREAMS, HIDDEN_SIZE, NUM_TOKENS = 3, 7, 6
SPEC = SimpleNamespace(
    num_streams=NUM_STREAMS,
    hidden_size=HIDDEN_SIZE,
    sinkhorn_iters=3,
    sinkhorn_eps=1e-6,
    pre_eps=1e-6,
    rms_eps=1e-6,
    post_scale=2.0,
)


def random_arrays(**shapes):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


n, C, T = NUM_STREAMS, HIDDEN_SIZE, NUM_TOKENS
M, K = n * n + 2 * n, n * C
STREAM = random_arrays(x=(T, n, C))
MAPPED = random_arrays(x=(T, n, C), layer_output=(T, C), h_post=(T, n), h_res=(T, n, n))
PARAMETERS = random_arrays(phi=(M, K), alpha=(3,), bias=(M,), norm_weight=(K,))
HC_PARAMETERS = random_arrays(theta=(n + 2, C), alpha=(3,), bias=(M,), norm_weight=(C,))
HEAD_PARAMETERS = random_arrays(phi=(n, K), alpha=(1,), bias=(n,), norm_weight=(K,))

# name: arguments with a token dimension, arguments without, and what else the function takes.
CASES = {
    "expand": (random_arrays(h=(T, C)), {}, {"num_streams": n}),
    "absorb_norm_weight": ({}, random_arrays(phi=(M, K), norm_weight=(K,)), {}),
    "project": (STREAM, random_arrays(phi=(M, K)), {}),
    "rms_scale": ({"sum_squares": np.arange(1.0, 1.0 + T)}, {}, {"num_elements": K, "rms_eps": 1e-6}),
    "sinkhorn": (random_arrays(logits=(T, n, n)), {}, {}),
    "alpha_per_row": ({}, random_arrays(alpha=(3,)), {"num_streams": n}),
    "compute_logits": (random_arrays(dots=(T, M), scale=(T,)), random_arrays(alpha=(M,), bias=(M,)), {}),
    "split_groups": (random_arrays(logits=(T, M)), {}, {"num_streams": n}),
    "gate_pre": (random_arrays(logits=(T, n)), {}, {"pre_eps": 1e-6}),
    "gate_post": (random_arrays(logits=(T, n)), {}, {"post_scale": 2.0}),
    "coefficients": (STREAM, PARAMETERS, {"spec": SPEC}),
    "aggregate": (random_arrays(x=(T, n, C), h_pre=(T, n)), {}, {}),
    "pre": (STREAM, PARAMETERS, {"spec": SPEC}),
    "post": (MAPPED, {}, {}),
    "post_pre": (MAPPED, PARAMETERS, {"spec": SPEC}),
    "first_pre": (STREAM, {}, {}),
    "delayed_pre": ({**STREAM, **random_arrays(h_pre=(T, n))}, PARAMETERS, {"spec": SPEC}),
    "delayed_post_pre": ({**MAPPED, **random_arrays(h_pre=(T, n))}, PARAMETERS, {"spec": SPEC}),
    "expand_pre": (random_arrays(h=(T, C)), PARAMETERS, {"spec": SPEC}),
    "post_head": (MAPPED, HEAD_PARAMETERS, {"spec": SPEC}),
    "head_coefficients": (STREAM, HEAD_PARAMETERS, {"spec": SPEC}),
    "head": (STREAM, HEAD_PARAMETERS, {"spec": SPEC}),
    "rms_norm": (random_arrays(layer_input=(T, C)), random_arrays(weight=(C,)), {"eps": 1e-6}),
    "residual": (random_arrays(x=(T, C), layer_output=(T, C)), {}, {}),
    "normalize_streams": (STREAM, {}, {"rms_eps": 1e-6}),
    "hc_coefficients": (STREAM, HC_PARAMETERS, {"spec": SPEC}),
    "hc_pre": (STREAM, HC_PARAMETERS, {"spec": SPEC}),
    "hc_post": (MAPPED, {}, {}),
}
PER_TOKEN = [name for name, (tokens, _, _) in CASES.items() if tokens]
# Sizes that no other argument has to agree with.
FREE = {
    ("aggregate", "x"),
    ("expand", "h"),
    ("first_pre", "x"),
    ("gate_post", "logits"),
    ("gate_pre", "logits"),
    ("rms_norm", "layer_input"),
    ("normalize_streams", "x"),
    ("rms_scale", "sum_squares"),
}
ARGUMENTS = [(name, key) for name, case in CASES.items() for key in {**case[0], **case[1]} if (name, key) not in FREE]


def call(name, tokens, parameters, rest):
    """All results of one function, as a tuple even if there is one."""
    results = getattr(reference, name)(**tokens, **parameters, **rest)
    return results if isinstance(results, tuple) else (results,)


def reshape_tokens(arrays, *leading):
    return {name: array.reshape(*leading, *array.shape[1:]) for name, array in arrays.items()}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_leading_dimensions_are_only_tokens(name):
    """[T, ...], [2, 1, T/2, ...] and a single token without dimension agree. Catches a hard-wired axis."""
    tokens, parameters, rest = CASES[name]
    flat = call(name, tokens, parameters, rest)
    nested = call(name, reshape_tokens(tokens, 2, 1, T // 2), parameters, rest)
    last = call(name, {key: array[-1] for key, array in tokens.items()}, parameters, rest)
    for f, many, one in zip(flat, nested, last, strict=True):
        assert many.shape == (2, 1, T // 2, *f.shape[1:])
        np.testing.assert_allclose(many.reshape(f.shape), f, rtol=1e-13)
        np.testing.assert_allclose(one, f[-1], rtol=1e-13)


@pytest.mark.parametrize("name", PER_TOKEN)
def test_zero_tokens(name):
    """Catches a reshape to −1, which numpy cannot infer from nothing, and a maximum over no tokens."""
    tokens, parameters, rest = CASES[name]
    some = call(name, tokens, parameters, rest)
    none = call(name, {key: array[:0] for key, array in tokens.items()}, parameters, rest)
    assert [result.shape for result in none] == [(0, *result.shape[1:]) for result in some]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("name", CASES)
def test_narrow_inputs_are_computed_in_float64(name, dtype):
    """Catches arithmetic in the dtype of the input: the result must be that of the same values in float64."""
    narrow = [{key: array.astype(dtype) for key, array in group.items()} for group in CASES[name][:2]]
    wide = [{key: array.astype(np.float64) for key, array in group.items()} for group in narrow]
    rest = CASES[name][2]
    for actual, expected in zip(call(name, *narrow, rest), call(name, *wide, rest), strict=True):
        assert actual.dtype == np.float64
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", CASES)
def test_inputs_are_left_alone(name):
    """Catches work done in place: float64 inputs are not copied on the way in."""
    frozen = [{key: array.copy() for key, array in group.items()} for group in CASES[name][:2]]
    for group in frozen:
        for array in group.values():
            array.flags.writeable = False
    call(name, *frozen, CASES[name][2])


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_shapes_that_disagree_are_refused(name, argument):
    """Each argument with an element or a dimension missing. Catches numpy broadcasting what does not agree.

    The first array sets the sizes for the others, so the one that is named may be another one.
    """
    tokens, parameters, rest = CASES[name]
    array = {**tokens, **parameters}[argument]
    for wrong in (array[..., 1:], array[..., 0]):
        changed = [{**group, argument: wrong} if argument in group else group for group in (tokens, parameters)]
        with pytest.raises(ValueError, match=r"^[a-z_]+: expected shape \[.*\], got \[.*\]$"):
            call(name, *changed, rest)


def test_message_quotes_expected_and_got():
    x, phi = STREAM["x"], PARAMETERS["phi"]
    with pytest.raises(ValueError, match=r"^phi: expected shape \[15, 21\], got \[21, 15\]$"):
        reference.coefficients(x, phi.T, PARAMETERS["alpha"], PARAMETERS["bias"], SPEC)
    with pytest.raises(ValueError, match=r"^x: expected shape \[\.\.\., 3, 7\], got \[6, 7, 3\]$"):
        reference.pre(np.swapaxes(x, 1, 2), phi, PARAMETERS["alpha"], PARAMETERS["bias"], SPEC)
    with pytest.raises(ValueError, match=r"^logits: expected shape \[\.\.\., n, n\], got \[3, 4\]$"):
        reference.sinkhorn(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"^num_streams: expected at least 1, got 0$"):
        reference.expand(np.zeros((2, 3)), 0)


def test_tokens_do_not_broadcast():
    """Catches a coefficient of one token silently used for all."""
    with pytest.raises(ValueError, match=r"^h_res: expected shape \[6, 3, 3\], got \[1, 3, 3\]$"):
        reference.post(**{**MAPPED, "h_res": MAPPED["h_res"][:1]})


def test_imports_nothing_but_numpy():
    """The oracle shares no code with what it judges: itself, the standard library and numpy only."""
    for path in Path(reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [] if node.level == 1 else [node.module or "..."]
            else:
                continue
            roots = {module.split(".")[0] for module in modules}
            assert roots <= {"numpy", *sys.stdlib_module_names}, path
