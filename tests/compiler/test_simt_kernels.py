"""Every kernel as the CUDA that tilelang generates for it, executed on the CPU and compared with the float64 reference.

What a GPU would run, but for nvcc: tiles, threads, barriers, fragments, tails. `compiler.simt` also sees what no result
shows: races, reads of what was never written, accesses out of bounds.
"""

from __future__ import annotations

import pytest
import torch

from mhc_tilelang import launch
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.checking.run import CHECKS, check_case
from mhc_tilelang.compiler.cuda_source import generate
from mhc_tilelang.compiler.simt import Launched, executing
from mhc_tilelang.compiler.simt.target import load_or_generate
from mhc_tilelang.kernels import FAMILIES
from mhc_tilelang.kernels.projection_plans import WarpsPlan
from mhc_tilelang.perf.calls.cases import Case as Call
from mhc_tilelang.perf.calls.cases import Shape
from mhc_tilelang.perf.calls.launches import launches as launches_of
from mhc_tilelang.perf.calls.table import CALLS
from mhc_tilelang.perf.traffic.audit import audit

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")

# (n, C, dtype, tokens): tails of tokens and channels, several chunks and splits, channels one by one.
MAIN = Case(4, 144, BF16, 37)
CASES = [MAIN, Case(8, 136, BF16, 70), Case(4, 72, FP16, 70), Case(4, 72, FP32, 70)]
FULL = [
    Case(2, 136, BF16, 129),
    Case(4, 33, BF16, 3),
    Case(4, 640, BF16, 65),
    Case(2, 72, FP32, 37),
    Case(8, 72, FP16, 37),
]
SOON_GENERATED = (
    "post",
    "aggregate",
    "post_backward",
    "aggregate_backward",
    "expand",
    "expand_backward",
    "sinkhorn",
    "replay",
)
STREAMS = {
    one.family: one.streams
    for call in CALLS
    for one in launches_of(Call(call, Shape(300, 4, 640, "bfloat16")), "cuda", 264)
    if one.streams
}
ALONE = [kernel for kernel in CHECKS if kernel.removesuffix("_aggregated") in STREAMS]
OF_STREAMS = [kernel for kernel in CHECKS if kernel in ALONE or kernel.startswith(("post_", "expand_pre"))]
# Calls whose kernels, or more of them, other checks launch.
HELD_BY_OTHERS = (
    *("post_head", "post_head_backward", "expand_pre_backward", "project_backward"),
    *("identity_post_pre", "identity_post_pre_backward"),
)


def runs() -> list:
    """Every kernel in bfloat16, in other dtypes those that see the stream. CI takes them at n = 4, and of the rest what
    tilelang does not take half a minute for.
    """
    found = []
    for case in CASES + FULL:
        for kernel in CHECKS if case.dtype == BF16 else OF_STREAMS:
            n, hidden_size, dtype = case.num_streams, case.hidden_size, str(case.dtype).removeprefix("torch.")
            takes_long = (case != MAIN and kernel not in ALONE) or kernel in HELD_BY_OTHERS
            takes_long |= case != MAIN and kernel == "aggregate_mappings"
            takes_long |= case != MAIN and kernel == "project_backward_aggregated"
            takes_long |= case not in (MAIN, CASES[-1]) and kernel == "project"
            marks = [pytest.mark.full] if case in FULL or takes_long else []
            found.append(pytest.param(case, kernel, id=f"{kernel}-n{n}-C{hidden_size}-{dtype}", marks=marks))
    return found


@pytest.mark.parametrize(("case", "kernel"), runs())
def test_against_float64(case: Case, kernel: str, poisoned: None) -> None:
    """Within the bounds that hold on every device; a finding of the executor raises."""
    with executing() as launches:
        row = check_case(kernel, case, Inputs.of(case, CPU))
    assert launches
    assert row.passed, f"{row.error:.1e} exceeds {row.tolerance:.1e}"


@pytest.fixture(scope="module")
def all_launches() -> list[Launched]:
    """Every launch of every check at one case whose rows are whole sectors."""
    with executing() as launches:
        for kernel in CHECKS:
            if kernel not in HELD_BY_OTHERS:
                check_case(kernel, MAIN, Inputs.of(MAIN, CPU))
    return launches


def test_every_family_is_executed(all_launches: list[Launched]) -> None:
    """Catches a family that no check launches."""
    assert {launched.family for launched in all_launches} == set(FAMILIES)


@pytest.mark.parametrize("family", STREAMS)
def test_traffic_is_as_audited(family: str, all_launches: list[Launched]) -> None:
    """Threads request the stream's bytes that the audit counts in the TIR, in whole sectors."""
    for launched in (launched for launched in all_launches if launched.family == family):
        audited = audit(family, launched.parameters, launched.numbers)
        for name in STREAMS[family]:
            if name not in launched.counts.tensors:
                continue  # not asked for
            counted, expected = launched.counts.tensors[name], audited[name]
            assert (counted.read_bytes, counted.written_bytes) == (expected.read.accessed, expected.written.accessed)
            distinct = (counted.read_distinct, counted.written_distinct)
            assert distinct == (expected.read.distinct, expected.written.distinct)
            if launched.parameters["hidden_size"] == MAIN.hidden_size:  # not the small sums over equal streams
                if name == "values":
                    continue  # whose rows of single bytes are four sectors and a half
                sectors = 32 * (counted.read_sectors + counted.written_sectors)
                # By warps, project_backward's lanes store a slot: 16 bytes of each of four streams, half a sector. The
                # next slot writes the other half, which L2 puts beside it.
                by_warps = isinstance(launched.parameters.get("plan"), WarpsPlan)
                halves = by_warps and family == "project_backward" and name == "g_x"
                assert sectors == (1 + halves) * (counted.read_bytes + counted.written_bytes)


def test_the_same_bits_as_on_the_cpu_target() -> None:
    """Equal orders of operations give equal bits: the kernels that mix streams, Sinkhorn's sums."""
    inputs = Inputs.of(MAIN, CPU)
    x, h, h_pre, h_post, h_res = inputs.x, inputs.h, inputs.h_pre, inputs.h_post, inputs.h_res
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(BF16)
    partial = torch.randn(9, 300, generator=torch.Generator().manual_seed(2))

    def results() -> list[torch.Tensor]:
        g_x, g_layer_output, _, _ = launch.post_backward(g, x, h, h_post, h_res)
        applied = [launch.expand(h, 4), launch.aggregate(x, h_pre), launch.post(x, h, h_post, h_res)]
        sums = [launch.sum_partials(partial), launch.expand_backward(g)]
        streams, inputs = launch.replay(x, [launch.Written(h, h_post, h_res)] * 2, {0: h_pre, 2: h_pre})
        return [*applied, *sums, *streams, *inputs.values(), g_x, g_layer_output]  # type: ignore[list-item]

    with executing():
        executed = results()
    for got, expected in zip(executed, results(), strict=True):
        assert torch.equal(got, expected)


def test_a_token_has_the_same_bits_in_every_batch() -> None:
    """The promise of the kernels, on the code that a GPU runs: alone, among others, at any place, in any split."""
    case = Case(4, 144, BF16, 130)
    inputs = Inputs.of(case, CPU)

    def mapped(tokens: slice) -> list[torch.Tensor]:
        x = inputs.x[tokens]
        plan = launch.projection_plan(x, inputs.phi.shape[0])
        partial = launch.project(x, inputs.phi, plan)
        return list(launch.coefficients(partial, inputs.alpha, inputs.bias, case.spec, plan)[:3])

    with executing(parallel_blocks=1):
        whole = mapped(slice(0, 130))
    for tokens, blocks in ((slice(77, 78), 8), (slice(3, 100), 4), (slice(64, 130), 40)):
        with executing(parallel_blocks=blocks):
            for got, expected in zip(mapped(tokens), whole, strict=True):
                assert torch.equal(got, expected[tokens])


@pytest.mark.parametrize("kernel", ["expand", "aggregate", "post"])
def test_misaligned_views(kernel: str) -> None:
    """Streams that start at any element take narrower accesses, which the executor would refuse if too wide."""
    n, hidden_size, num_tokens = 4, 64, 5
    generator = torch.Generator().manual_seed(0)

    def view(*shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        return torch.randn(size + 1, generator=generator).to(BF16)[1:].view(shape)

    x, h = view(num_tokens, n, hidden_size), view(num_tokens, hidden_size)
    h_pre = torch.rand(num_tokens, n, generator=generator)
    h_res = torch.rand(num_tokens, n, n, generator=generator)
    call = {
        "expand": lambda: launch.expand(h, n),
        "aggregate": lambda: launch.aggregate(x, h_pre),
        "post": lambda: launch.post(x, h, h_pre, h_res),
    }[kernel]
    with executing():
        got = call()
    assert torch.equal(got, call())


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.full] * (f not in SOON_GENERATED)) for f in FAMILIES]
)
def test_what_ran_is_what_ships(family: str, all_launches: list[Launched]) -> None:
    """The source for sm_90a is that for sm_80, which was executed.

    tilelang's prover works on a budget and what it proves within it varies, so that an index may be written one way or
    another: what differs is generated again.
    """
    parameters = next(launched.parameters for launched in all_launches if launched.family == family)
    shipped, ran = generate(family, parameters, "sm_90a"), [load_or_generate(family, parameters, "sm_80")[0]]
    while shipped not in ran and len(ran) < 4:
        ran.append(generate(family, parameters, "sm_80"))
    assert shipped in ran
