"""Bytes and cases, against the paper's kernels and against the tensors that the kernels get.

Would catch: a tensor that is counted twice or not at all, a default size that fits the cache, a case that is
measured twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_tilelang.kernels import projection_plans
from mhc_tilelang.perf.calls.cases import BACKWARD_KERNELS, KERNELS, Case, Shape, cpu_tokens, make_cases
from mhc_tilelang.perf.calls.every_call import Given
from mhc_tilelang.perf.calls.workloads import workload
from mhc_tilelang.perf.measure.machine import cpu_clock_mhz, cpu_last_level_cache
from mhc_tilelang.perf.traffic.formulas import small_bytes, stream_elements, traffic

STREAM_DTYPES = ("bfloat16", "float32")
STREAMS = ("h", "x", "layer_input", "layer_output", "x_next")


@pytest.mark.parametrize("n", [2, 4, 8])
def test_stream_traffic_is_that_of_the_papers_kernels(n: int) -> None:
    assert stream_elements("project", n) == (n, 0)
    assert stream_elements("aggregate", n) == (n, 1)
    assert stream_elements("post", n) == (n + 1, n)
    assert stream_elements("expand", n) == (1, n)
    assert stream_elements("sinkhorn", n) == stream_elements("coefficients", n) == (0, 0)
    papers = [sum(stream_elements(kernel, n)) for kernel in ("project", "aggregate", "post")]
    assert sum(papers) == 4 * n + 2


@pytest.mark.parametrize("n", [2, 4, 8])
def test_stream_traffic_of_the_backward(n: int) -> None:
    """Every kernel's backward reads what the forward read and a gradient of what it wrote."""
    assert stream_elements("expand_backward", n) == (n, 1)
    assert stream_elements("project_backward", n) == (n, n)
    assert stream_elements("aggregate_backward", n) == (n + 1, 0)
    assert stream_elements("post_backward", n) == (2 * n + 1, n + 1)
    assert stream_elements("sinkhorn_backward", n) == stream_elements("coefficients_backward", n) == (0, 0)


def nbytes(values: Any) -> int:
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("kernel", KERNELS + BACKWARD_KERNELS)
@pytest.mark.parametrize("dtype", STREAM_DTYPES)
@pytest.mark.parametrize("n", [2, 4, 8])
def test_bytes_are_those_of_the_tensors(kernel: str, dtype: str, n: int) -> None:
    """Bytes are counted tensor by tensor, in and out; for the projection's partial sums, the tensor itself.

    What `out` does not have: the rows that `coefficients` keeps for its backward, and the backward's workspace of two
    blocks of tokens, written and read.
    """
    shape = Shape(num_tokens=70, num_streams=n, hidden_size=64, dtype=dtype)
    stream = Given.of(shape, torch.device("cpu"))
    load = workload(Case(kernel, shape), stream)
    inputs, outputs = dict(load.arguments), load.outputs()
    if kernel == "coefficients":
        inputs = {"partial": stream.partial, "alpha": inputs["alpha"], "bias": inputs["bias"]}
        outputs["projected"] = stream.projected
    if kernel == "project":
        outputs = {"partial": stream.partial}
    workspace = 2 * 2 * (3 + n * n + 2 * n) * 4 if kernel == "coefficients_backward" else 0
    assert load.traffic.total == nbytes(inputs.values()) + nbytes(outputs.values()) + workspace
    streams = [tensor for name, tensor in (inputs | outputs).items() if name.removeprefix("g_") in STREAMS]
    assert load.traffic.stream == nbytes(streams)


def test_split_phi_counts_its_halves() -> None:
    """GPUs read phi once, and write and read its two bfloat16 halves, 48 rows."""
    shape = Shape(num_tokens=4096, num_streams=4, hidden_size=2560, dtype="bfloat16")
    plan = projection_plans.projection_plan(24, 4, 2560, "bfloat16", "cuda")
    phi, halves, partial = 24 * 10240 * 4, 48 * 10240 * 2, (24 + 1) * 4096 * 4
    assert small_bytes(Case("project", shape), plan, num_slabs=1) == phi + 2 * halves + partial
    assert traffic(Case("project", shape), plan, num_slabs=1).stream == 4096 * 10240 * 2


def test_partials_of_g_phi_are_written_and_read() -> None:
    """Ranges of tokens that fill an H200; one range of few tokens is the sum itself, and costs nothing."""
    plan = projection_plans.projection_plan(24, 4, 2560, "bfloat16", "cuda")
    phi = 24 * 10240 * 4
    for tokens, slabs in ((32, 0), (512, 6), (4096, 13), (16384, 26)):
        shape = Shape(num_tokens=tokens, num_streams=4, hidden_size=2560, dtype="bfloat16")
        small = small_bytes(Case("project_backward", shape), plan, num_slabs=1)
        assert small == 2 * phi + 25 * tokens * 4 + 2 * slabs * phi


def test_cases_are_not_repeated_for_what_a_kernel_does_not_see() -> None:
    shapes = [Shape(64, 4, C, dtype) for dtype in STREAM_DTYPES for C in (32, 64)]
    cases = make_cases(KERNELS + BACKWARD_KERNELS, shapes)
    backward = {kernel: sum(case.kernel == f"{kernel}_backward" for case in cases) for kernel in KERNELS}
    count = {kernel: sum(case.kernel == kernel for case in cases) for kernel in KERNELS}
    assert count == backward == {"expand": 4, "project": 4, "coefficients": 2, "sinkhorn": 1, "aggregate": 4, "post": 4}
    assert [case.shape for case in cases] == sorted((case.shape for case in cases), key=shapes.index)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20, 32 << 20, 400 << 20])
@pytest.mark.parametrize("hidden_size", [1280, 1920, 7168])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_default_streams_miss_the_cache(cache_bytes: int, hidden_size: int, itemsize: int) -> None:
    tokens = cpu_tokens(4, hidden_size, itemsize, cache_bytes)
    stream = tokens * 4 * hidden_size * itemsize
    assert tokens & (tokens - 1) == 0
    assert cache_bytes < stream <= max(64 << 20, 2 * cache_bytes)


def test_last_level_cache_is_the_highest_data_cache(tmp_path: Path) -> None:
    caches = [(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "1024K"), (3, "Unified", "32M")]
    for index, facts in enumerate(caches):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size"), facts, strict=True):
            (folder / name).write_text(f"{value}\n")
    assert cpu_last_level_cache(tmp_path) == 32 << 20
    assert cpu_last_level_cache(tmp_path / "absent") == 0


def test_clock_is_the_fastest_cores(tmp_path) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text("processor : 0\ncpu MHz\t\t: 2399.998\n\nprocessor : 1\ncpu MHz : 3100.4\n", encoding="utf-8")
    assert cpu_clock_mhz(facts) == 3100
    facts.write_text("Processor : an Arm\n", encoding="utf-8")
    assert cpu_clock_mhz(facts) is None
    assert cpu_clock_mhz(tmp_path / "absent") is None
