"""Every gradient against central differences, and what holds for every backward alike.

`test_reference_autograd` holds the same gradients against PyTorch, entry by entry.
"""

import inspect
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from mhc_tilelang import reference

HIDDEN_SIZE, NUM_TOKENS = 5, 6
# T tokens, n streams, C channels, K = n·C, M = n² + 2n, R = n + 2. What begins with T is per token, and so is its
# gradient; the others are parameters. In the order of the signature, which is that of the gradients.
MAPPED = {"x": "TnC", "layer_output": "TC", "h_post": "Tn", "h_res": "Tnn"}
PARAMETERS = {"phi": "MK", "alpha": "3", "bias": "M", "norm_weight": "K"}
HEAD_PARAMETERS = {"phi": "nK", "alpha": "1", "bias": "n", "norm_weight": "K"}
GATES = {"phi": "GK", "alpha": "2", "bias": "G", "norm_weight": "K"}
HC_PARAMETERS = {"theta": "RC", "alpha": "3", "bias": "M", "norm_weight": "C"}
CASES = {
    "absorb_norm_weight": {"phi": "MK", "norm_weight": "K"},
    "aggregate": {"x": "TnC", "h_pre": "Tn"},
    "coefficients": {"x": "TnC", **PARAMETERS},
    "collapse": {"x": "TnC"},
    "compute_logits": {"dots": "TM", "scale": "T", "alpha": "M", "bias": "M"},
    "delayed_post_pre": {**MAPPED, "h_pre": "Tn", **PARAMETERS},
    "delayed_pre": {"x": "TnC", "h_pre": "Tn", **PARAMETERS},
    "expand": {"h": "TC"},
    "expand_pre": {"h": "TC", **PARAMETERS},
    "gates": {"x": "TnC", **GATES},
    "hc_coefficients": {"x": "TnC", **HC_PARAMETERS},
    "hc_post": MAPPED,
    "hc_pre": {"x": "TnC", **HC_PARAMETERS},
    "head": {"x": "TnC", **HEAD_PARAMETERS},
    "head_coefficients": {"x": "TnC", **HEAD_PARAMETERS},
    "identity_post": {"x": "TnC", "layer_output": "TC", "h_post": "Tn"},
    "identity_pre": {"x": "TnC", **GATES},
    "rms_norm": {"layer_input": "TC", "weight": "C"},
    "normalize_streams": {"x": "TnC"},
    "post": MAPPED,
    "post_head": {**MAPPED, **HEAD_PARAMETERS},
    "post_pre": {**MAPPED, **PARAMETERS},
    "pre": {"x": "TnC", **PARAMETERS},
    "project": {"x": "TnC", "phi": "MK"},
    "residual": {"x": "TC", "layer_output": "TC"},
    "rms_scale": {"sum_squares": "T"},
    "sinkhorn": {"logits": "Tnn"},
}
# Parts of a larger step, a walk over many, and a constant: nothing that a loss would be taken of.
WITHOUT_GRADIENT = {"alpha_per_row", "gate_post", "gate_pre", "residual_coefficients", "run_stream", "split_groups"}
WITHOUT_GRADIENT |= {"Step", "Sublayer", "first_pre", "stream_steps", "dequantize", "quantize", "round_e4m3"}

every_function = pytest.mark.parametrize("name", CASES)
every_shape = pytest.mark.parametrize(("n", "std"), [(2, 2.0), (4, 2.0), (8, 2.0), (2, 6.0), (4, 6.0), (8, 6.0)])


class Case:
    """A function's arrays, logits of the given std, and upstream gradients; every constant is large enough to show."""

    def __init__(self, name, n=4, std=2.0):
        self.name = name
        C, K = HIDDEN_SIZE, n * HIDDEN_SIZE
        sizes = {"T": NUM_TOKENS, "n": n, "C": C, "K": K, "M": n * n + 2 * n, "R": n + 2, "G": 2 * n}
        sizes |= {"1": 1, "2": 2, "3": 3}
        rng = np.random.default_rng(0)
        draw = {
            "logits": lambda shape: std * rng.standard_normal(shape),
            "phi": lambda shape: std / np.sqrt(K) * rng.standard_normal(shape),
            "theta": lambda shape: rng.standard_normal(shape) / np.sqrt(C),
        }
        draw |= dict.fromkeys(
            ("alpha", "norm_weight", "scale", "sum_squares"), lambda shape: rng.uniform(0.7, 1.3, shape)
        )
        self.arrays = {
            key: draw.get(key, rng.standard_normal)(tuple(sizes[d] for d in dims)) for key, dims in CASES[name].items()
        }
        spec = SimpleNamespace(num_streams=n, hidden_size=C, sinkhorn_iters=4, sinkhorn_eps=1e-2, pre_eps=1e-2)
        spec.rms_eps, spec.post_scale, spec.post_eps = 0.5, 1.7, 1e-2
        constants = {"spec": spec, "num_streams": n, "num_elements": K, "rms_eps": 0.5, "iters": 4, "eps": 1e-2}
        taken = inspect.signature(getattr(reference, name)).parameters
        self.constants = {key: value for key, value in constants.items() if key in taken}
        self.upstream = [rng.standard_normal(output.shape) for output in self.outputs()]

    def outputs(self, **changed):
        return as_tuple(getattr(reference, self.name)(**{**self.arrays, **changed}, **self.constants))

    def gradients(self, upstream=None, **changed):
        """{argument: its gradient}."""
        upstream = self.upstream if upstream is None else upstream
        backward = getattr(reference, self.name + "_backward")
        gradients = as_tuple(backward(*upstream, **{**self.arrays, **changed}, **self.constants))
        return dict(zip(self.arrays, gradients, strict=True))

    def is_per_token(self, key):
        return CASES[self.name][key][0] == "T"

    def map_tokens(self, change):
        """The arrays with `change` made to all that is per token, as keywords."""
        return {key: change(array) if self.is_per_token(key) else array for key, array in self.arrays.items()}

    def map_upstream(self, change):
        """The upstream gradients alike; only `absorb_norm_weight` has none per token."""
        return self.upstream if self.name == "absorb_norm_weight" else [change(g) for g in self.upstream]

    def choices_of_upstream(self):
        """All outputs together, and each alone."""
        alone = [
            [g if k == index else None for k, g in enumerate(self.upstream)] for index in range(len(self.upstream))
        ]
        return [self.upstream, *alone]


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


class Differences:
    """Directional derivatives of all outputs by one argument: along 24 of its entries, and two directions through all.

    The step is the cube root of 2^-52, where the rounding error ε/h and the truncation error h² are about equal.
    """

    def __init__(self, case, key, num_entries=24, step=6e-6):
        array, rng = case.arrays[key], np.random.default_rng(1)
        directions = np.zeros((min(array.size, num_entries) + 2, array.size))
        entries = rng.choice(array.size, len(directions) - 2, replace=False)
        directions[np.arange(len(entries)), entries] = 1.0
        directions[-2:] = rng.standard_normal((2, array.size)) / np.sqrt(array.size)
        self.directions = directions.reshape(-1, *array.shape)
        self.slopes = []
        for direction in self.directions:
            ahead, behind = (case.outputs(**{key: array + h * direction}) for h in (step, -step))
            self.slopes.append([(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)])

    def agree(self, gradient, upstream):
        """Whether Σ gradient·direction is Σ upstream·slope, to 2e-8 of the gradient's norm.

        ε/h and h² are 4e-11 of outputs near 1; at std 6, where gates saturate, a gradient is down to 1e-2 of its
        outputs. The worst of all the cases here is 2e-9.
        """
        if gradient.shape != self.directions.shape[1:]:
            return False
        expected = [
            sum((g * slope).sum() for g, slope in zip(upstream, slopes, strict=True) if g is not None)
            for slopes in self.slopes
        ]
        actual = [(gradient * direction).sum() for direction in self.directions]
        return np.abs(np.subtract(actual, expected)).max() <= 2e-8 * np.linalg.norm(gradient)


@every_shape
@every_function
def test_gradients_are_central_differences(name, n, std):
    """They agree for every output alone and all together, by every argument."""
    case = Case(name, n, std)
    choices = [(upstream, case.gradients(upstream)) for upstream in case.choices_of_upstream()]
    for key in case.arrays:
        differences = Differences(case, key)
        assert [differences.agree(gradients[key], upstream) for upstream, gradients in choices] == [True] * len(choices)


def one_wrong_row(gradient):
    """The first token, row or number has the last one's gradient; where there is one only, a sign is wrong."""
    wrong = gradient.copy()
    wrong[0] = gradient[-1] if len(gradient) > 1 else -gradient[0]
    return wrong


def transposed(matrices):
    return np.swapaxes(matrices, -1, -2)


@pytest.mark.parametrize("n", [2, 4, 8])
@every_function
def test_central_differences_reject_what_is_wrong(name, n):
    """Tests the test above: zeros, 1 % too much, a wrong row and a transposed matrix may not pass."""
    case = Case(name, n)
    gradients = case.gradients()
    mutations = {"zeroed": np.zeros_like, "one percent up": lambda g: 1.01 * g, "one wrong row": one_wrong_row}
    for key, dims in CASES[name].items():
        differences = Differences(case, key)
        mutated = {label: mutate(gradients[key]) for label, mutate in mutations.items()}
        if dims == "Tnn":
            mutated["transposed"] = transposed(gradients[key])
        assert [label for label, wrong in mutated.items() if differences.agree(wrong, case.upstream)] == []


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize(
    "name", ["sinkhorn", "coefficients", "pre", "post_pre", "expand_pre", "hc_coefficients", "hc_pre"]
)
def test_central_differences_reject_a_transposed_upstream_gradient(name, n):
    """g_h_res is [out, in] as h_res is. It is the last output of each, and reaches every parameter's gradient."""
    case = Case(name, n)
    wrong = case.gradients([*case.upstream[:-1], transposed(case.upstream[-1])])
    key = {"sinkhorn": "logits"}.get(name, "bias")
    assert not Differences(case, key).agree(wrong[key], case.upstream)


def test_what_trains_has_a_backward_beside_it():
    """X_backward takes gradients named g_..., as many as X has outputs, then X's own arguments, named the same."""
    forward = {name for name in reference.__all__ if not name.endswith("_backward")}
    assert forward - WITHOUT_GRADIENT == set(CASES)
    assert set(reference.__all__) - forward == {name + "_backward" for name in CASES}
    for name in CASES:
        function, backward = getattr(reference, name), getattr(reference, name + "_backward")
        parameters = list(inspect.signature(function).parameters.values())
        taken = list(inspect.signature(backward).parameters.values())
        num_outputs = len(Case(name).upstream)
        assert all(p.name.startswith("g_") and p.default is p.empty for p in taken[:num_outputs])
        assert taken[num_outputs:] == parameters
        assert [p.name for p in parameters if p.name in CASES[name]] == list(CASES[name])
        assert inspect.getmodule(backward) is inspect.getmodule(function)


@every_function
def test_absent_upstream_gradients_are_zeros(name):
    case = Case(name)
    for upstream in [*case.choices_of_upstream(), [None] * len(case.upstream)]:
        zeros = [np.zeros_like(g) if u is None else u for g, u in zip(case.upstream, upstream, strict=True)]
        gradients = case.gradients(upstream)
        for key, expected in case.gradients(zeros).items():
            np.testing.assert_array_equal(gradients[key], expected)
            assert gradients[key].shape == case.arrays[key].shape


@pytest.mark.parametrize("name", [name for name, dims in CASES.items() if "norm_weight" in dims])
def test_without_a_norm_weight(name):
    """The weight's gradient is None, the others are those at a weight of 1."""
    case = Case(name)
    absent = case.gradients(norm_weight=None)
    ones = case.gradients(norm_weight=np.ones_like(case.arrays["norm_weight"]))
    assert absent.pop("norm_weight") is None
    for key, gradient in absent.items():
        np.testing.assert_array_equal(gradient, ones[key])


@every_function
def test_leading_dimensions_are_only_tokens(name):
    """[T, ...] and [2, 1, T/2, ...] agree, and the tokens' own gradients add up to the parameters'.

    Catches a hard-wired axis, a sum over only the first of several, and a mean in place of a sum.
    """
    case = Case(name)
    flat = case.gradients()

    def nest(array):
        return array.reshape(2, 1, NUM_TOKENS // 2, *array.shape[1:])

    nested = case.gradients(case.map_upstream(nest), **case.map_tokens(nest))
    single = [
        case.gradients(case.map_upstream(lambda array, t=t: array[t]), **case.map_tokens(lambda array, t=t: array[t]))
        for t in range(NUM_TOKENS)
    ]
    for key, expected in flat.items():
        tokens = [gradients[key] for gradients in single]
        if case.is_per_token(key):
            np.testing.assert_allclose(nested[key], nest(expected), rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(tokens, expected, rtol=1e-12, atol=1e-14)
        else:
            np.testing.assert_allclose(nested[key], expected, rtol=1e-11, atol=1e-13)
            if name != "absorb_norm_weight":
                np.testing.assert_allclose(sum(tokens), expected, rtol=1e-11, atol=1e-13)


@every_function
def test_zero_tokens(name):
    """Per token nothing, for parameters zeros: catches an empty sum that is refused, and one of shape [0]."""
    case = Case(name)

    def none(array):
        return array[:0]

    if name != "absorb_norm_weight":
        for key, gradient in case.gradients(case.map_upstream(none), **case.map_tokens(none)).items():
            shape = case.arrays[key].shape
            np.testing.assert_array_equal(gradient, np.zeros((0, *shape[1:]) if case.is_per_token(key) else shape))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@every_function
def test_narrow_inputs_are_computed_in_float64(name, dtype):
    """The result is that of the same values in float64: catches arithmetic in the dtype of an input."""
    case = Case(name)
    narrow = {key: array.astype(dtype) for key, array in case.arrays.items()}
    upstream = [g.astype(dtype) for g in case.upstream]
    wide = {key: array.astype(np.float64) for key, array in narrow.items()}
    expected = case.gradients([g.astype(np.float64) for g in upstream], **wide)
    for key, gradient in case.gradients(upstream, **narrow).items():
        assert gradient.dtype == np.float64
        np.testing.assert_array_equal(gradient, expected[key])


@every_function
def test_inputs_are_left_alone(name):
    """Catches work done in place, and a gradient that a caller could not add to without changing another array."""
    case = Case(name)
    inputs = [*case.arrays.values(), *case.upstream]
    for array in inputs:
        array.flags.writeable = False
    gradients = list(case.gradients().values())
    for index, gradient in enumerate(gradients):
        assert gradient.flags.writeable
        assert not any(np.shares_memory(gradient, other) for other in [*inputs, *gradients[:index]])


@every_function
def test_shapes_that_disagree_are_refused(name):
    """Each argument, then each upstream gradient, with an element or a dimension missing."""
    case = Case(name)

    def refused(upstream=None, **changed):
        with pytest.raises(ValueError, match=r"^[a-z_]+: expected shape \[.*\], got \[.*\]$"):
            case.gradients(upstream, **changed)

    for key, array in case.arrays.items():
        refused(**{key: array[..., 1:]})
        refused(**{key: array[..., 0]})
    for index, gradient in enumerate(case.upstream):
        for wrong in (gradient[..., 1:], gradient[..., 0], gradient[None]):
            refused([*case.upstream[:index], wrong, *case.upstream[index + 1 :]])


def test_message_names_the_upstream_gradient():
    case = Case("post")
    with pytest.raises(ValueError, match=r"^g_x_next: expected shape \[6, 4, 5\], got \[6, 5, 4\]$"):
        case.gradients([transposed(case.upstream[0])])
