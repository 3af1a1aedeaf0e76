"""The walk through machine code against the executor, which runs the generated source: two ways to the same counts.

Every block of a small launch is walked. Would catch: a trip count, a guard or an address that the walk computes
wrongly, a barrier or a product that it misses, barriers that are counted wrongly in the source, an instruction whose
semantics it has wrong.
"""

from math import prod

import pytest
import torch

from mhc_tilelang.compiler.cuda_source import generate_from
from mhc_tilelang.compiler.simt import launch as execute
from mhc_tilelang.compiler.toolchain import find_nvdisasm
from mhc_tilelang.compiler.tracing import signature_of, trace
from mhc_tilelang.kernels import FAMILIES
from mhc_tilelang.perf.calls.cases import Case, Shape
from mhc_tilelang.perf.calls.launches import launches
from mhc_tilelang.perf.calls.table import CALLS
from mhc_tilelang.perf.predict.barriers import count_barriers
from mhc_tilelang.perf.predict.launched import build
from mhc_tilelang.perf.predict.walk import walk

pytestmark = [pytest.mark.nvcc, pytest.mark.skipif(find_nvdisasm() is None, reason="no nvdisasm")]

ARCH, SHAPE = "sm_90a", Shape(70, 4, 1280, "bfloat16")
QUICK = ("aggregate_backward", "project")
LONG = tuple(name for name in FAMILIES if name not in (*QUICK, "replay", "post_pre"))  # post_pre polls


def launch_of(family):
    for call in CALLS:
        for launch in launches(Case(call, SHAPE), "cuda", 1):
            if launch.family == family:
                return launch
    pytest.skip(f"{family}: no call launches it at this shape")


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in LONG)])
def test_the_walk_counts_what_the_executor_counts(family):
    launch = launch_of(family)
    func = trace(family, launch.parameters)
    source = generate_from(func, ARCH)
    tensors = {
        buffer.name: torch.zeros(
            [launch.sizes[size] if isinstance(size, str) else size for size in buffer.shape],
            dtype=getattr(torch, buffer.dtype),
        )
        for buffer in signature_of(func).buffers
    }
    counts = execute(source, ARCH, {name: t for name, t in tensors.items() if name in source.arguments}, launch.sizes)

    built = build(source, ARCH)
    entry = built.entry(launch.sizes)
    walked = {(name, side): 0 for name in tensors for side in ("read", "written")}
    barriers = products = in_source = 0
    for number in range(prod(entry.grid)):
        x, y, z = entry.grid
        found = walk(built.code, entry, (number % x, number // x % y, number // (x * y) % z))
        assert not found.undecided
        for index, warps, accesses in found.steps:
            kind = built.code[index].kind
            products += len(warps) * (kind in ("HMMA", "IMMA"))
            barriers += len(warps) * (kind == "BAR")
            for access in accesses.values():
                assert access.buffer >= 0
                side = "written" if kind in ("STG", "ST") else "read"
                walked[source.arguments[access.buffer], side] += access.lanes * access.width
        in_source += count_barriers(source, launch.sizes, (number % x, number // x % y, number // (x * y) % z))
    assert products == counts.mma
    assert in_source == counts.barriers
    assert barriers == counts.barriers * entry.warps
    for name, traffic in counts.tensors.items():
        assert walked[name, "written"] == traffic.written_bytes, name
        # nvcc loads a scalar once that the source asks for twice.
        assert walked[name, "read"] <= traffic.read_bytes, name
        assert walked[name, "read"] >= traffic.read_distinct, name
