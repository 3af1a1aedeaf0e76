"""The backward of a boundary: all gradients from two passes, against float64 and against the separate kernels.

Would catch: a term of g left out (from outside, the aggregation, ρ, phi), h_res or its gradient transposed, a tile, a
range of tokens or a block of channels left out or added twice, a tail that leaks, sums that depend on the batch.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CPU, DTYPES, MIXED_DTYPES, assert_same_bits, every_n_and_dtype, named
from helpers_backward import in_nan

from mhc_tilelang import launch, reference
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.inputs import Case, Gradients, Inputs
from mhc_tilelang.kernels import boundary_plans

pytestmark = pytest.mark.usefixtures("poisoned")
SMALL = Case(4, 333, torch.bfloat16, 67)
# A CPU's tile has 24 tokens, 16 for float32; 768 share a partial g_phi; a block has 128 channels, 32 at n = 8.
CASES = every_n_and_dtype(67)
CASES += [named(path, Case(4, size, torch.bfloat16, 67)) for path, size in {"one-channel": 1, "odd-tail": 333}.items()]
CASES += [named("tokens", Case(4, 64, torch.float32, tokens)) for tokens in (1, 16, 17, 768, 769, 4300)]
GPU_CASES = [case for case in every_n_and_dtype(67, "gpu-plan") if case.values[0].num_streams <= 4]
UPSTREAM = ("g_x", "g_h", "g_h_post", "g_h_res")
NAMES = ("g_x", "g_layer_output", "g_h_post", "g_h_res", "g_phi", "g_alpha", "g_bias")
WIDE = ("g_x", "g_layer_output")
PER_TOKEN = NAMES[:4]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def mixed(inputs):
    return inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res


def parameters(inputs):
    return inputs.phi, inputs.alpha, inputs.bias


class Drawn:
    """A boundary at a case: its inputs, what its forward returned, and upstream gradients."""

    def __init__(self, case):
        self.case, self.spec = case, case.spec
        self.inputs, gradients = Inputs.of(case, CPU), Gradients.of(case, CPU)
        self.upstream = {name: getattr(gradients, name) for name in UPSTREAM}
        self.g_h_pre = gradients.g_h_pre
        self.forward = launch.post_pre(*mixed(self.inputs), *parameters(self.inputs), case.spec)

    def backward(self, **changes):
        upstream, i, f = {**self.upstream, **changes}, self.inputs, self.forward
        got = launch.post_pre_backward(
            *upstream.values(), *mixed(i), *parameters(i), f.x_next, f.h_pre, f.projected, self.spec
        )
        return dict(zip(NAMES, got, strict=False))

    def separate(self):
        """Return the gradients of the separate kernels; autograd would add the two of x_next in the stream's dtype."""
        i, f, (g_x, g_input, g_post, g_res) = self.inputs, self.forward, self.upstream.values()
        g_pre = launch.aggregate_backward(g_input, f.x_next)
        g_projected, g_alpha, g_bias = launch.coefficients_backward(
            g_pre, g_post, g_res, f.projected, i.alpha, i.bias, self.spec
        )
        g_next, g_phi = launch.project_backward(g_projected, f.x_next, i.phi, h_pre=f.h_pre, g_layer_input=g_input)
        values = (*launch.post_backward(g_next + g_x, *mixed(i)), g_phi, g_alpha, g_bias)
        return dict(zip(NAMES, values, strict=True))

    def float64(self, **changes):
        """Return float64 gradients from the rounded x_next: its rounding is the forward's, no error of the backward.

        Through post as it is, then through pre at that x_next.
        """
        upstream = {**self.upstream, **changes}
        g_x, *others = (None if g is None else numpy64(g) for g in upstream.values())
        exact = [numpy64(t) for t in (self.forward.x_next, *parameters(self.inputs))]
        g_pre, *of_parameters, _ = reference.pre_backward(*others, *exact, self.spec)
        total = g_pre if g_x is None else g_pre + g_x
        mapped = reference.post_backward(total, *[numpy64(t) for t in mixed(self.inputs)])
        return dict(zip(NAMES, (*mapped, *of_parameters), strict=True))


def errors(got, expected):
    """Root of the mean square of each gradient's error, over that of the gradient."""

    def root(values):
        return np.sqrt(np.mean(np.square(values)))

    return {name: root(numpy64(got[name]) - expected[name]) / root(expected[name]) for name in expected}


def assert_matches_float64(got, expected, dtype):
    """Wide results round once to the dtype: 0.41 U in the mean square, for mantissas spread evenly. The rest is float32
    throughout: 1e-5 is what sums of a few thousand terms, Sinkhorn's steps and split operands leave.
    """
    for name, error in errors(got, expected).items():
        assert error <= 1e-5 + (0.5 * ROUNDING[dtype] if name in WIDE else 0.0), (name, error)


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """The form that a GPU takes; it runs on a CPU as well, which takes the separate kernels by default."""
    monkeypatch.setattr(boundary_plans, "backward_is_fused", lambda *_: True)


@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case):
    drawn = Drawn(case)
    assert_matches_float64(drawn.backward(), drawn.float64(), case.dtype)


@pytest.fixture
def gpu_plan(monkeypatch):
    """The GPU's plan of the tile-level kernel, as for a layer of another dtype; it still runs on the CPU."""
    plan = boundary_plans.boundary_backward_plan
    monkeypatch.setattr(boundary_plans, "boundary_backward_plan", lambda *sizes: plan(*sizes[:4], "cuda", "another"))


@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.usefixtures("gpu_plan")
def test_gpu_plan_matches_float64(case):
    """Halves and padding rows."""
    drawn = Drawn(case)
    assert_matches_float64(drawn.backward(), drawn.float64(), case.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_less_than_the_separate_kernels(dtype):
    """No gradient is further from float64 than the separate kernels' is, which round g twice to the dtype."""
    drawn = Drawn(Case(4, 192, dtype, 600))
    expected = drawn.float64()
    fused, separate = errors(drawn.backward(), expected), errors(drawn.separate(), expected)
    for name in PER_TOKEN:
        assert fused[name] <= 1.2 * separate[name] + 1e-6, name


@pytest.mark.parametrize("absent", ["g_x", "g_h", "g_h_post", "g_h_res"])
def test_absent_gradients_count_as_zero(absent):
    drawn = Drawn(replace(SMALL, dtype=torch.float32))
    none = drawn.backward(**{absent: None})
    assert_matches_float64(none, drawn.float64(**{absent: None}), torch.float32)


def test_each_term_shows():
    """Tests the tests above: without its outside, its aggregation, or its projection, g is far off."""
    drawn = Drawn(replace(SMALL, dtype=torch.float32))
    expected = drawn.float64()
    for name in ("g_x", "g_h"):
        assert errors(drawn.backward(**{name: None}), expected)["g_x"] > 0.1
    without_phi = drawn.backward(g_h_post=None, g_h_res=None)
    assert errors(without_phi, expected)["g_phi"] > 0.1


def test_a_tokens_gradients_depend_on_no_other_token():
    """Batches of 1 to 67, and a place in each. Catches a row of another token, and sums that follow the batch."""
    drawn = Drawn(SMALL)
    whole = drawn.backward()
    for size in (1, 2, 23, 24, 25, 48, 66):
        part = Drawn(SMALL)
        fields = {n: getattr(part.inputs, n)[67 - size :] for n in ("x", "layer_output", "h_post", "h_res")}
        part.inputs = replace(part.inputs, **fields)
        part.upstream = {name: g[67 - size :] for name, g in part.upstream.items()}
        part.forward = launch.post_pre(*mixed(part.inputs), *parameters(part.inputs), SMALL.spec)
        got = part.backward()
        assert_same_bits([got[n] for n in PER_TOKEN], [whole[n][67 - size :] for n in PER_TOKEN])


def test_same_call_twice_and_thread_count():
    drawn = Drawn(Case(4, 333, torch.bfloat16, 1100))
    before = torch.get_num_threads()
    first = drawn.backward()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert_same_bits(drawn.backward().values(), first.values())
    finally:
        torch.set_num_threads(before)


def test_reads_nothing_else():
    """Every tensor inside a buffer of NaN, aligned and not."""
    drawn = Drawn(SMALL)
    expected = drawn.backward()
    for offset in (0, 1):
        inside = Drawn(SMALL)
        inside.inputs = Inputs(**{name: in_nan(t, offset) for name, t in vars(drawn.inputs).items()})
        inside.upstream = {name: in_nan(g, offset) for name, g in drawn.upstream.items()}
        assert_same_bits(inside.backward().values(), expected.values())


@pytest.mark.parametrize("field", ["x", "layer_output", "h_post", "h_res"])
def test_nan_stays_in_its_token(field):
    """NaN in the last token, whose weights padding rows take, changes no bit of another token's gradients."""
    drawn, spoilt = Drawn(SMALL), Drawn(SMALL)
    tensor = getattr(spoilt.inputs, field).clone()
    tensor[-1].view(-1)[0] = torch.nan
    spoilt.inputs = replace(spoilt.inputs, **{field: tensor})
    got, clean = spoilt.backward(), drawn.backward()
    assert_same_bits([got[n][:-1] for n in PER_TOKEN], [clean[n][:-1] for n in PER_TOKEN])
    assert torch.isnan(got["g_phi"]).any()


def test_delayed_form():
    """layer_input by a given h_pre: its gradient is returned, and the one of the h_pre that was returned is taken."""
    drawn = Drawn(replace(SMALL, dtype=torch.float32))
    i, f = drawn.inputs, drawn.forward
    got = launch.post_pre_backward(
        *drawn.upstream.values(),
        *mixed(i),
        *parameters(i),
        f.x_next,
        i.h_pre,
        f.projected,
        drawn.spec,
        is_delayed=True,
        g_h_pre_next=drawn.g_h_pre,
    )
    x_next, *exact = [numpy64(t) for t in (f.x_next, *parameters(i))]
    upstream = [numpy64(t) for t in (drawn.g_h_pre, *list(drawn.upstream.values())[2:])]
    g_through, *of_parameters, _ = reference.coefficients_backward(*upstream, x_next, *exact, drawn.spec)
    g_aggregated, g_pre = reference.aggregate_backward(numpy64(drawn.upstream["g_h"]), x_next, numpy64(i.h_pre))
    total = g_through + g_aggregated + numpy64(drawn.upstream["g_x"])
    expected = (*reference.post_backward(total, *[numpy64(t) for t in mixed(i)]), *of_parameters, g_pre)
    names = (*NAMES, "g_h_pre")
    expected = dict(zip(names, expected, strict=True))
    found = dict(zip(names, got, strict=False))  # no layer norm, so no gradient of its weight
    assert_matches_float64(found, expected, torch.float32)


@pytest.mark.parametrize(("dtype", "layer_dtype"), MIXED_DTYPES)
def test_a_layer_of_another_dtype(dtype, layer_dtype):
    """16 bits in a float32 stream, as under autocast, or the reverse: g_layer_output has the layer's dtype."""
    drawn = Drawn(replace(SMALL, dtype=dtype, layer_dtype=layer_dtype))
    got, expected = drawn.backward(), drawn.float64()
    assert got["g_layer_output"].dtype == layer_dtype
    of_layer = {name: expected.pop(name) for name in ("g_layer_output",)}
    assert_matches_float64(got, expected, dtype)
    assert_matches_float64(got, of_layer, layer_dtype)


def test_no_token_gives_zero_gradients_of_parameters():
    got = Drawn(replace(SMALL, num_tokens=0)).backward()
    assert got["g_x"].shape == (0, 4, 333)
    assert not any(got[name].any() for name in ("g_phi", "g_alpha", "g_bias"))


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=[pytest.mark.full] * (d != torch.float32)) for d in DTYPES])
@pytest.mark.parametrize("delayed", [pytest.param(False, marks=pytest.mark.full), True])
def test_separate_kernels_at_8_streams(delayed, dtype, monkeypatch):
    """The form of GPUs at n = 8: the same gradients, but the stream's g is rounded twice before it is mixed."""
    drawn = Drawn(Case(8, 192, dtype, 67))
    i, f = drawn.inputs, drawn.forward
    forms = {"is_delayed": True, "g_h_pre_next": drawn.g_h_pre} if delayed else {}

    def backward():
        upstream, left = drawn.upstream.values(), (f.x_next, i.h_pre if delayed else f.h_pre, f.projected)
        return launch.post_pre_backward(*upstream, *mixed(i), *parameters(i), *left, drawn.spec, **forms)

    fused = backward()
    monkeypatch.setattr(boundary_plans, "backward_is_fused", lambda *_: False)
    separate = backward()
    assert (separate.g_h_pre is not None) == delayed
    for name, one, other in zip(fused._fields, separate, fused, strict=True):
        if other is not None:
            distance, scale = (one - other).float().square().mean().sqrt(), other.float().square().mean().sqrt()
            assert one.dtype == other.dtype, name
            assert distance <= (1e-5 + 2 * ROUNDING[dtype]) * scale, name
