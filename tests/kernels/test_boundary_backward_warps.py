"""The thread-level form of `boundary_backward`, executed as CUDA, against float64.

Would catch: a lane's tokens, channels or stream mistaken for another's; a half of phi or of g_dots left out, or
multiplied with the wrong one; a slot's sum handed to another stream; a tile that is copied over before it was read; a
tail of tokens or channels that leaks or is left out; a missing barrier, wait or bound, which this code sets itself.
"""

from __future__ import annotations

import re

import pytest
import torch
from damaged import damaged

from mhc_tilelang import compiler
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.compiler import cuda
from mhc_tilelang.compiler.simt import SimtError, executing
from mhc_tilelang.compiler.simt.target import load_or_generate
from mhc_tilelang.compiler.tracing import trace
from mhc_tilelang.kernels import boundary_plans, projection_plans
from mhc_tilelang.launch.post_pre_backward import mixing_backward

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
WIDE = ("g_x", "g_layer_output")
BF16, FP16 = torch.bfloat16, torch.float16


class Drawn:
    """Arguments of the kernel, and its results against float64."""

    def __init__(
        self, num_streams, hidden_size, dtype, num_tokens, rows=None, outside=True, aggregated=True, delayed=False
    ):
        n, torch_generator = num_streams, torch.Generator().manual_seed(num_tokens)
        rows = rows or n * n + 2 * n

        def normal(*shape):
            return torch.randn(shape, generator=torch_generator)

        self.n, self.dtype, self.delayed = n, dtype, delayed
        self.g_x_next = normal(num_tokens, n, hidden_size).to(dtype) if outside else None
        self.g_layer_input = normal(num_tokens, hidden_size).to(dtype) if aggregated else None
        self.g_projected = normal(rows + 1, num_tokens)
        self.x, self.layer_output = (
            normal(num_tokens, n, hidden_size).to(dtype),
            normal(num_tokens, hidden_size).to(dtype),
        )
        self.h_pre, self.h_post, self.h_res = normal(num_tokens, n), normal(num_tokens, n), normal(num_tokens, n, n)
        self.phi = 0.3 * normal(rows, n * hidden_size)

    def run(self, arch="sm_90a", parallel_blocks=8):
        """Run as generated CUDA."""
        arguments = (self.g_x_next, self.g_layer_input, self.g_projected, self.x, self.layer_output)
        with executing(arch, parallel_blocks=parallel_blocks) as launches:
            g_x, g_layer_output, phi, mixing = mixing_backward(
                *arguments, self.h_pre, self.h_post, self.h_res, self.phi, needs_g_h_pre=self.delayed
            )
        (self.launched,) = launches
        assert isinstance(self.launched.parameters["plan"], projection_plans.WarpsPlan)
        sums = mixing.double().sum(0).view(self.n, -1, self.x.shape[0]).permute(2, 0, 1)
        found = {"g_x": g_x, "g_layer_output": g_layer_output, "g_phi": phi.double().sum(0).view(self.phi.shape)}
        found |= {"g_h_post": sums[..., 0], "g_h_res": sums[..., 1 : self.n + 1]}
        return found | ({"g_h_pre": sums[..., self.n + 1]} if self.delayed else {})

    def float64(self):
        """Return float64 gradients from an x_next that is rounded as the kernel's."""
        x, layer, h_post, h_res, phi = (
            t.double() for t in (self.x, self.layer_output, self.h_post, self.h_res, self.phi)
        )
        g_dots, rho = self.g_projected.double().split([len(phi), 1])
        x_next = torch.einsum("tji,tic->tjc", h_res, x) + h_post[..., None] * layer[:, None]
        x_next = x_next.to(self.dtype).double()
        g = torch.einsum("mt,mk->tk", g_dots, phi).view(x.shape) + rho[0][:, None, None] * x_next
        if self.g_x_next is not None:
            g += self.g_x_next.double()
        if self.g_layer_input is not None:
            g += self.h_pre.double()[..., None] * self.g_layer_input.double()[:, None]
        expected = {
            "g_x": torch.einsum("tji,tjc->tic", h_res, g),
            "g_layer_output": torch.einsum("tj,tjc->tc", h_post, g),
            "g_phi": torch.einsum("mt,tjc->mjc", g_dots, x_next).flatten(1),
            "g_h_post": torch.einsum("tjc,tc->tj", g, layer),
            "g_h_res": torch.einsum("tjc,tic->tji", g, x),
        }
        if self.delayed:
            expected["g_h_pre"] = torch.einsum("tc,tjc->tj", self.g_layer_input.double(), x_next)
        return expected


def assert_matches(drawn, got):
    """Wide results round once: 0.41 U in the mean square, for mantissas spread evenly. The rest is float32 throughout:
    1e-5 is what sums of a few thousand terms and split operands leave. x_next is rounded from float32 here and from
    float64 there: one element in 2^15 comes out a unit in the last place apart, which is 1.3e-5 of g_phi.
    """
    expected = drawn.float64()
    assert got.keys() == expected.keys()
    for name, value in got.items():
        error = numpy64(value) - numpy64(expected[name])
        distance = (error**2).mean() ** 0.5 / (numpy64(expected[name]) ** 2).mean() ** 0.5
        rounded = 0.5 * ROUNDING[drawn.dtype] if name in WIDE else 2e-5 if name == "g_phi" else 0.0
        assert distance <= 1e-5 + rounded, (name, distance)


FORMS = {  # a tail of tokens and of channels in each
    "ordinary": ((4, 200, BF16, 70), {}, "sm_90a"),
    "float16, delayed": ((4, 72, FP16, 70), {"delayed": True}, "sm_90a"),
    "delayed": ((4, 72, BF16, 35), {"delayed": True}, "sm_90a"),
    "nothing from outside": ((4, 200, BF16, 37), {"outside": False, "aggregated": False}, "sm_90a"),
    "not aggregated": ((4, 72, BF16, 37), {"aggregated": False}, "sm_90a"),
    "not outside": ((4, 72, BF16, 37), {"outside": False}, "sm_90a"),
    "two streams": ((2, 136, BF16, 70), {}, "sm_90a"),
    "two streams, delayed": ((2, 72, FP16, 70), {"delayed": True}, "sm_90a"),
    "a head": ((4, 136, BF16, 70), {"rows": 4}, "sm_90a"),
    "a head of two": ((2, 72, BF16, 70), {"rows": 2}, "sm_90a"),
    "little shared memory": ((4, 136, BF16, 70), {}, "sm_120a"),
    "real width": ((4, 2560, BF16, 37), {}, "sm_90a"),
}
QUICK = ("ordinary", "float16, delayed", "nothing from outside", "two streams", "a head", "little shared memory")


@pytest.mark.parametrize("form", [pytest.param(f, marks=[pytest.mark.full] * (f not in QUICK)) for f in FORMS])
def test_matches_float64(form):
    sizes, changes, arch = FORMS[form]
    drawn = Drawn(*sizes, **changes)
    assert_matches(drawn, drawn.run(arch))


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 129])
def test_any_number_of_tokens(num_tokens):
    drawn = Drawn(4, 200, BF16, num_tokens)
    assert_matches(drawn, drawn.run())


def test_how_ranges_are_cut_moves_no_token():
    """A range a tile, and one of all tiles, which takes both stages in turn, have equal bits per token."""
    drawn = Drawn(4, 200, BF16, 129)
    several, one = drawn.run(parallel_blocks=4 * 5), drawn.run(parallel_blocks=4)
    assert drawn.launched.numbers["num_ranges"] == 1
    names = [name for name in several if name != "g_phi"]
    assert all(torch.equal(several[name], one[name]) for name in names)
    assert_matches(drawn, several)
    assert_matches(drawn, one)


def test_a_tokens_gradients_depend_on_no_other_token():
    """NaN in one token: no bit of another's moves."""
    clean = Drawn(4, 200, BF16, 70)
    expected = clean.run()
    for name in ("x", "layer_output", "h_post", "h_res", "g_x_next", "g_layer_input"):
        spoilt = Drawn(4, 200, BF16, 70)
        tensor = getattr(spoilt, name).clone()
        tensor[33].view(-1)[0] = torch.nan
        setattr(spoilt, name, tensor)
        got, others = spoilt.run(), torch.arange(70) != 33
        names = [each for each in got if each != "g_phi"]
        assert all(torch.equal(got[each][others], expected[each][others]) for each in names), name


BARRIER, WAIT = r"__syncthreads\(\);", r"tl::cp_async_wait<0>\(\);"
PLANTED = {  # a pattern, which of the places that it fits, what stands there instead, what is found
    "without the barrier before a tile is read": (BARRIER, 0, "", "race"),
    "without the barrier before g_phi": (BARRIER, 1, "", "race"),
    "without the wait": (WAIT, 0, "", "missing cp.async wait"),
    "rows of h_res exchanged": (r"(res_tile\)\[\(\(\(int\)threadIdx\.x\))", 0, r"\1 ^ 1", ""),
    "a token too many is copied": (
        r"(cp_async.*token_\d+) < num_tokens",
        4,
        r"\1 <= num_tokens",
        "global out of bounds",
    ),
    "a token too many is stored": (r"(bool inside = .*) < num_tokens", 0, r"\1 <= num_tokens", "global out of bounds"),
    "channels beyond the last are copied": (r"(cp_async.*x_tile.*channel) < 200", 0, r"\1 < 208", ""),
    "channels beyond the last are stored": (r"(bool inside = .*channel) < 200", 0, r"\1 < 208", ""),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_what_tilelang_no_longer_guards_is_watched(fault):
    """Tests the tests above: barriers, waits and bounds are this kernel's own, and each is missed."""
    pattern, number, instead, kind = PLANTED[fault]
    damages = []

    def damage(code):
        place = list(re.finditer(pattern, code))[number]
        damages.append(place.expand(instead))
        return code[: place.start()] + damages[-1] + code[place.end() :]

    drawn = Drawn(4, 200, BF16, 129)
    with damaged("boundary_backward", damage), pytest.raises((SimtError, AssertionError)) as found:
        assert_matches(drawn, drawn.run(parallel_blocks=4))
    assert damages
    assert not kind or kind in found.value.kinds, found.value


def test_passes_are_off_for_this_kernel_alone():
    form = {"has_g_x_next": True, "has_g_layer_input": True, "needs_g_h_pre": False}
    sizes = {"num_streams": 2, "hidden_size": 64, "layer_dtype": "bfloat16", **form}
    plan = boundary_plans.boundary_backward_plan(8, 2, 64, "bfloat16", "cuda")
    off = cuda.configs_of(trace("boundary_backward", {**sizes, "dtype": "bfloat16", "plan": plan}))
    assert len(off) == len(cuda.PASS_CONFIGS) + 2
    plan = boundary_plans.boundary_backward_plan(8, 2, 64, "float32", "cuda")
    assert cuda.configs_of(trace("boundary_backward", {**sizes, "dtype": "float32", "plan": plan})) == cuda.PASS_CONFIGS


def test_which_form_is_for_what():
    def form(n, hidden_size, dtype, layer_dtype="", arch="sm_90a", target="cuda"):
        room = compiler.SHARED_BYTES[arch]
        return boundary_plans.boundary_backward_plan(n * n + 2 * n, n, hidden_size, dtype, target, layer_dtype, room)

    for arch, stages in {"sm_80": 2, "sm_90a": 2, "sm_100a": 2, "sm_120a": 1}.items():
        plan = form(4, 2560, "bfloat16", arch=arch)
        assert (plan.stages, boundary_plans.boundary_shared_bytes(plan) <= compiler.SHARED_BYTES[arch]) == (
            stages,
            True,
        )
    both = 2 * (boundary_plans.boundary_shared_bytes(form(4, 2560, "bfloat16")) + 1024)
    assert both <= 228 * 1024  # two blocks share a multiprocessor
    assert isinstance(form(2, 8, "float16", "float16"), projection_plans.WarpsPlan)
    for tile_level in ((4, 333, "bfloat16"), (4, 2560, "float32"), (4, 64, "bfloat16", "float32")):
        assert isinstance(form(*tile_level), boundary_plans.BoundaryBackwardPlan)
    assert isinstance(form(4, 2560, "bfloat16", target="cpu"), boundary_plans.BoundaryBackwardPlan)


@pytest.mark.parametrize(("multiprocessors", "ranges"), [(132, 13), (148, 22), (1, 1)])
def test_ranges_follow_the_device(multiprocessors, ranges):
    """Ranges fill whole waves of 40 blocks a range, at 4096 tokens and C = 2560."""
    plan = boundary_plans.boundary_backward_plan(24, 4, 2560, "bfloat16", "cuda")
    per_range = boundary_plans.tiles_per_range(4096, plan, 2560, 2 * multiprocessors)
    assert -(-4096 // (per_range * plan.tokens)) == ranges


def test_shared_bytes_are_what_the_kernel_takes():
    """The plan counts what tilelang allocates for the largest form, but for alignment."""
    sizes, changes, arch = FORMS["float16, delayed"]
    drawn = Drawn(*sizes, **changes)
    drawn.run(arch)
    source, _ = load_or_generate("boundary_backward", drawn.launched.parameters, arch)
    counted = boundary_plans.boundary_shared_bytes(drawn.launched.parameters["plan"])
    assert source.shared_bytes <= counted <= source.shared_bytes + 1024
