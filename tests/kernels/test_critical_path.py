"""h_post and h_res made beside the aggregation, as on a GPU, instead of before it: no bit of anything may differ.

Would catch: a mapping of another token, a tail that is left out or overwritten, logits that are rounded on the way, a
backward that is given something else. The kernel's own results are compared with float64 in the checks (`CHECKS`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CPU, assert_same_bits, assert_views_can_start_anywhere

import mhc_tilelang as mhc
from mhc_tilelang import launch, ops
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.compiler.cuda_source import generate
from mhc_tilelang.compiler.simt import executing
from mhc_tilelang.kernels import boundary_plans
from mhc_tilelang.perf.calls.cases import Case as Call
from mhc_tilelang.perf.calls.cases import Shape
from mhc_tilelang.perf.calls.launches import launches
from mhc_tilelang.perf.inspect.compiler import compile_source

pytestmark = pytest.mark.usefixtures("poisoned")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASE = Case(4, 192, BF16, 67)  # a block of 64 tokens, and a tail
CASES = [
    CASE,
    pytest.param(Case(8, 192, FP32, 67), marks=pytest.mark.full),
    pytest.param(Case(2, 33, FP16, 130), marks=pytest.mark.full),
]


def in_both_places(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> tuple[Any, Any]:
    """Return the results of a call with the mappings computed before the aggregation, and beside it."""
    found = []
    for deferred in (False, True):
        monkeypatch.setattr(boundary_plans, "defers_mappings", lambda _, answer=deferred: answer)
        found.append(call())
    return found[0], found[1]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_tokens", [0, 1, None])
def test_boundary(case: Case, num_tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a boundary returns, and what its backward is given."""
    inputs = Inputs.of(case, CPU)
    tokens = [t[:num_tokens] for t in (inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res)]
    arguments = (*tokens, inputs.phi, inputs.alpha, inputs.bias, case.spec)
    before, beside = in_both_places(monkeypatch, lambda: launch.post_pre(*arguments))
    assert_same_bits(beside, before)


def test_buffers_and_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results written into given buffers, and streams that start at any element."""
    inputs = Inputs.of(CASE, CPU)

    def into(out: Any) -> Any:
        return ops.pre(inputs.x, inputs.phi, inputs.alpha, inputs.bias, CASE.spec, out=out)

    def buffered() -> Any:
        return into(tuple(torch.full_like(t, float("nan")) for t in into(None)))

    before, beside = in_both_places(monkeypatch, buffered)
    assert_same_bits(beside, before)
    assert_views_can_start_anywhere(
        lambda given, case: ops.pre(given.x, given.phi, given.alpha, given.bias, case.spec), CASE
    )


def test_gradients_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sublayers and a head: values, and gradients by a random upstream one, of the input and of every parameter."""
    generator = torch.Generator().manual_seed(5)
    spec = CASE.spec
    connections = [mhc.HyperConnection(spec, sublayer) for sublayer in range(3)]
    for connection in connections:
        torch.nn.init.normal_(connection.phi, std=0.05, generator=generator)
        torch.nn.init.normal_(connection.alpha, generator=generator)
    weight = torch.randn(spec.hidden_size, generator=generator).to(BF16)
    upstream = torch.randn(5, 7, spec.hidden_size, generator=generator).to(BF16)
    embedding = torch.randn(5, 7, spec.hidden_size, generator=generator).to(BF16)
    parameters = [p for connection in connections for p in connection.parameters()]

    def run() -> list[torch.Tensor]:
        h = embedding.clone().requires_grad_()
        stream = mhc.ResidualStream(h, num_streams=4)
        for connection in connections:
            stream.write(stream.read(connection) * weight)
        result = stream.reduce("sum")
        return [result, *torch.autograd.grad(result, [h, *parameters], upstream)]

    before, beside = in_both_places(monkeypatch, run)
    assert_same_bits(beside, before)
    assert all(bool(gradient.any()) for gradient in beside)


@pytest.mark.full  # half a minute of lowering; `test_warps` holds the thread-level kernels to the tiles' bits
def test_on_a_gpus_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated CUDA, by tiles, has equal bits too; there a block of mappings has as many tokens as `pre` threads."""
    case = Case(4, 144, FP32, 37)
    inputs = Inputs.of(case, CPU)
    with executing() as launched:
        plan = launch.projection_plan(inputs.x, case.spec.num_coefficients)
        partial = launch.project(inputs.x, inputs.phi, plan)

        def read() -> list[torch.Tensor]:
            n, tokens = case.num_streams, case.num_tokens
            shapes = ((tokens, case.hidden_size), (tokens, n), (tokens, n), (tokens, n, n))
            out = tuple(torch.empty(shape, dtype=FP32) for shape in shapes)
            return [
                *out,
                launch.coefficients_and_aggregate(
                    inputs.x, partial, inputs.alpha, inputs.bias, case.spec, plan, out=out
                ),
            ]

        before, beside = in_both_places(monkeypatch, read)
    assert_same_bits(beside, before)
    assert [one.family for one in launched][-4:] == ["coefficients", "aggregate", "coefficients", "aggregate_mappings"]


def test_where_it_is_done() -> None:
    """Only GPUs do it, without a further launch, and only where this sublayer's own h_pre aggregates.

    Where warps project, whose phi is split first, it is one launch less.
    """

    def families(kernel: str, target: str, dtype: str = "float32") -> list[str]:
        call = Call(kernel, Shape(1024, 4, 1280, dtype))
        return [launched.family for launched in launches(call, target, 8)]

    assert families("post_pre", "cuda") == ["post_project", "coefficients", "aggregate_mappings"]
    assert families("post_pre", "cuda", "bfloat16") == ["split_phi", "post_project", "coefficients_aggregate"]
    assert families("post_pre", "cpu") == ["post_project", "coefficients", "aggregate"]
    assert "aggregate_mappings" not in families("post_pre_delayed", "cuda")


PDL = {
    "coefficients": ["cudaGridDependencySynchronize();", "cudaTriggerProgrammaticLaunchCompletion();"],
    "aggregate_mappings": ["cudaGridDependencySynchronize();"],
}


@pytest.mark.nvcc
@pytest.mark.full
@pytest.mark.parametrize("family", ["coefficients", "aggregate_mappings"])
def test_pdl_launches_build(family: str) -> None:
    """The wait comes before any access of memory and before the trigger, and costs no register; sm_80 has neither.

    Catches a load that is moved over the wait, which `const __restrict__` would allow, and tilelang leaves out here.
    """
    call = Call("post_pre", Shape(1024, 4, 1280, "float32"))
    [parameters] = [one.parameters for one in launches(call, "cuda", 8) if one.family == family]
    plain, pdl = (generate(family, {**parameters, "pdl": on}, "sm_90a").code for on in (False, True))
    calls = [line.strip() for line in pdl.splitlines() if line.strip().startswith("cuda")]
    assert calls == PDL[family]
    body = pdl[pdl.rindex("__global__") :]
    assert "[" not in re.sub(r"^  [a-z0-9_]+ \w+\[\d+\];$", "", body[: body.index(calls[0])], flags=re.MULTILINE)
    assert "__restrict__" not in pdl
    assert compile_source(pdl, "sm_90a").registers == compile_source(plain, "sm_90a").registers
    with pytest.raises(Exception, match="PDL is not supported"):
        generate(family, {**parameters, "pdl": True}, "sm_80")


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("hidden_size", [64, 1280, 2560, 7168])
def test_plans(n: int, hidden_size: int) -> None:
    """A token a thread, and no more warps asked for than the smallest multiprocessor has: 48, of sm_120."""
    plan = boundary_plans.aggregate_mappings_plan(n, hidden_size, 2, "cuda")
    assert plan.tokens == plan.tile.threads
    assert 1 <= plan.blocks_per_sm <= 16
    assert plan.blocks_per_sm * plan.tile.threads <= 48 * 32
