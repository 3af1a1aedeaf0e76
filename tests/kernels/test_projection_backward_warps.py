"""The thread-level form of `project_backward`, executed as CUDA, against float64.

Would catch: streams shared out wrongly between blocks; a term of g_x or a half of an operand left out; a form that
reads or writes what it should not; a tail of tokens or channels that leaks; a stage that is copied over too early.
"""

from __future__ import annotations

import pytest
import torch

from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.compiler.simt import executing
from mhc_tilelang.kernels import projection_plans
from mhc_tilelang.launch.projection import project_backward

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
BF16, FP16 = torch.bfloat16, torch.float16
FORMS = {  # streams, channels, dtype, tokens; rows of phi; what is given or needed; the architecture
    "aggregated": ((4, 200, BF16, 70), 24, {"aggregated": True}, "sm_90a"),
    "float16": ((4, 72, FP16, 129), 24, {"aggregated": False}, "sm_90a"),
    "eight streams": ((8, 72, BF16, 70), 80, {"aggregated": True}, "sm_90a"),
    "two streams": ((2, 136, BF16, 37), 8, {"aggregated": True}, "sm_90a"),
    "one stream": ((1, 72, BF16, 70), 24, {"aggregated": True}, "sm_90a"),
    "a head": ((4, 72, BF16, 70), 4, {"aggregated": True}, "sm_90a"),
    "g_x only": ((4, 72, BF16, 70), 24, {"aggregated": True, "needs_g_phi": False}, "sm_90a"),
    "g_phi only": ((4, 72, BF16, 70), 24, {"aggregated": False, "needs_g_x": False}, "sm_90a"),
    "little shared memory": ((8, 72, FP16, 70), 80, {"aggregated": True}, "sm_120a"),
    "real width": ((4, 2560, BF16, 37), 24, {"aggregated": True}, "sm_90a"),
}
QUICK = ("aggregated", "float16", "eight streams", "one stream", "g_phi only")


@pytest.mark.parametrize("form", [pytest.param(f, marks=[pytest.mark.full] * (f not in QUICK)) for f in FORMS])
@pytest.mark.parametrize("parallel_blocks", [1, 64])
def test_matches_float64(form, parallel_blocks):
    """A block walks over all tokens, or each has one tile.

    g_x rounds once, 0.41 U in the mean square; g_phi has split operands: 2^-17 of a term at most.
    """
    (n, hidden_size, dtype, num_tokens), rows, options, arch = FORMS[form]
    aggregated, needs = options["aggregated"], {key: value for key, value in options.items() if key != "aggregated"}
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    x, g_input = normal(num_tokens, n, hidden_size).to(dtype), normal(num_tokens, hidden_size).to(dtype)
    g_projected, h_pre, phi = normal(rows + 1, num_tokens), normal(num_tokens, n), 0.3 * normal(rows, n * hidden_size)
    given = {"h_pre": h_pre, "g_layer_input": g_input} if aggregated else {}
    with executing(arch, parallel_blocks=parallel_blocks) as launches:
        g_x, g_phi = project_backward(g_projected, x, phi, **given, **needs)
    first = launches[0]
    assert isinstance(first.parameters["plan"], projection_plans.WarpsPlan)

    g_dots, rho = g_projected.double().split([rows, 1])
    wide = x.double()
    exact = torch.einsum("mt,mk->tk", g_dots, phi.double()).view(x.shape) + rho[0][:, None, None] * wide
    if aggregated:
        exact += h_pre.double()[..., None] * g_input.double()[:, None]
    exact_phi = torch.einsum("mt,tk->mk", g_dots, wide.flatten(1))
    for got, expected, bound in ((g_x, exact, 0.5 * ROUNDING[dtype]), (g_phi, exact_phi, 0.0)):
        if got is not None:
            error, scale = numpy64(got) - numpy64(expected), numpy64(expected)
            assert (error**2).mean() ** 0.5 <= (1e-5 + bound) * (scale**2).mean() ** 0.5
    assert (g_x is None) == ("needs_g_x" in needs)
    assert (g_phi is None) == ("needs_g_phi" in needs)
