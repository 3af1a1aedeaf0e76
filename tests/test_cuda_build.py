"""Every kernel builds for every CUDA architecture, without a GPU.

Marked `nvcc`: skipped by name where there is no nvcc, never in CI. What the build alone can show is checked on
the way: shared memory against each architecture's limit, register spills, and that tilelang has given every
fragment room for all its elements (0.1.15 lays one out by its first loop and truncates it if that loop covers
only a part, without a word).
"""

from __future__ import annotations

import re
import subprocess
from math import prod
from pathlib import Path

import pytest

from mhc_tilelang import MHCSpec
from mhc_tilelang.kernels import plans
from mhc_tilelang.toolchain import find_nvcc

pytestmark = pytest.mark.nvcc

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120a")
EVERY_FAMILY = ("split_phi", "project", "coefficients", "head_coefficients", "sinkhorn", "pre", "post", "expand")


def parameters(family: str, n: int, dtype: str, hidden_size: int = 1280) -> dict:
    """What `launch` would compile a family with on a GPU."""
    spec = MHCSpec(hidden_size, n)
    rows = n if family == "head_coefficients" else spec.num_coefficients
    plan = plans.projection_plan(rows, hidden_size, dtype, "cuda")
    block = plans.tokens_per_block("cuda")
    sizes = {"num_streams": n, "hidden_size": hidden_size}
    constants = {"pre_eps": spec.pre_eps, "rms_eps": spec.rms_eps, "block": block}
    if family in ("pre", "post", "expand"):
        tile = plans.channel_tile(hidden_size, plans.BYTES[dtype], "cuda")
        return {**sizes, "dtype": dtype, "tile": tile}
    if family == "sinkhorn":
        return {"num_streams": n, "iters": 20, "eps": 1e-6, "block": block}
    if family == "split_phi":
        return {**sizes, "plan": plan}
    if family == "project":
        return {**sizes, "dtype": dtype, "plan": plan}
    if family == "head_coefficients":
        return {**sizes, "plan": plan, **constants}
    return {**sizes, "plan": plan, "iters": 20, "sinkhorn_eps": 1e-6, "post_scale": 2.0, **constants}


def builds() -> list:
    """n = 4, bfloat16 on every architecture; the other n and dtypes on Hopper, the one the tiles are made for."""
    cases = [(family, arch, 4, "bfloat16") for family in EVERY_FAMILY for arch in ARCHITECTURES]
    cases += [(family, "sm_90a", n, "bfloat16") for family in EVERY_FAMILY for n in (2, 8)]
    cases += [(family, "sm_90a", 4, dtype) for family in ("project", "pre", "post") for dtype in ("float16", "float32")]
    cases += [("project", "sm_90a", 8, "float32")]
    return cases


@pytest.mark.parametrize(("family", "arch", "n", "dtype"), builds())
def test_builds(family: str, arch: str, n: int, dtype: str, tmp_path: Path) -> None:
    from mhc_tilelang import cuda, tracing

    chosen = parameters(family, n, dtype)
    func = tracing.trace(family, chosen)
    source = cuda.build(func, arch, family, chosen).get_kernel_source()
    assert_fragments_are_whole(func, source)

    assert shared_bytes(func) <= cuda.SHARED_BYTES[arch]
    if arch == "sm_90a":  # the tiles are made for it, and a second nvcc run a kernel is enough
        assert spilled_bytes(source, arch, tmp_path) == 0


def assert_fragments_are_whole(func, source: str) -> None:
    """Catches a fragment laid out by a loop over a part of it: its other elements would share registers.

    In the source, fragments of one name are told apart by a number.
    """
    declared = re.findall(r"^\s+\w+ (\w+?)(?:_\d+)?\[(\d+)\];", source, re.MULTILINE)
    threads, buffers = tiles_of(func)
    fragments = [buffer for buffer in buffers if buffer.scope() == "local.fragment"]
    for name in {buffer.name for buffer in fragments}:
        needed = [-(-prod(map(int, b.shape)) // threads) for b in fragments if b.name == name]
        given = [int(size) for declared_name, size in declared if declared_name == name]
        assert len(given) >= len(needed)
        for room, elements in zip(sorted(given, reverse=True), sorted(needed, reverse=True), strict=False):
            assert room >= elements, f"{name}: {room} registers a thread for {elements} elements"


def tiles_of(func) -> tuple[int, list]:
    """The threads of a block, and the shared and fragment buffers."""
    from tvm import tirx

    threads, buffers = [], []

    def visit(node) -> None:
        if isinstance(node, tirx.SBlock):
            buffers.extend(node.alloc_buffers)
            threads.extend(node.annotations.get("tl.launch_threads", [])[:1])

    tirx.stmt_functor.post_order_visit(func.body, visit)
    return int(threads[0]), buffers


def shared_bytes(func) -> int:
    """Shared memory of a block as written: every shared tile once per pipeline stage."""
    from tvm import tirx

    stages = [1]
    tirx.stmt_functor.post_order_visit(
        func.body,
        lambda node: stages.append(int(node.annotations.get("num_stages", 1))) if isinstance(node, tirx.For) else None,
    )
    shared = [buffer for buffer in tiles_of(func)[1] if buffer.scope().startswith("shared")]
    return max(stages) * sum(prod(int(e) for e in b.shape) * b.dtype.itemsize for b in shared)


def spilled_bytes(source: str, arch: str, folder: Path) -> int:
    """Bytes of registers that ptxas spills to memory when it compiles tilelang's source."""
    import tilelang

    home = Path(tilelang.__file__).parent
    (folder / "kernel.cu").write_text(source)
    includes = [f"-I{home / 'src'}", f"-I{home / '3rdparty' / 'cutlass' / 'include'}"]
    command = [find_nvcc().path, "-std=c++20", "-w", "-fmad=false", "-cubin", "-Xptxas", "-v", *includes]
    command += ["-gencode", f"arch={arch.replace('sm_', 'compute_')},code={arch}"]
    command += ["-o", str(folder / "kernel.cubin"), str(folder / "kernel.cu")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill", report))


def test_a_truncated_fragment_is_found() -> None:
    """The check above must be able to fail: a fragment whose first loop covers a part of it."""
    import tilelang.language as T

    from mhc_tilelang import cuda

    @T.prim_func
    def truncated(values: T.Tensor[(8, 32), T.float32], halves: T.Tensor[(2, 4, 32), T.float32]):
        with T.Kernel(1, threads=32):
            whole = T.alloc_fragment((8, 32), T.float32)
            T.copy(values, whole)
            for k, t in T.Parallel(4, 32):
                halves[0, k, t] = whole[k, t]
            for k, t in T.Parallel(4, 32):
                halves[1, k, t] = whole[k + 4, t]

    source = cuda.build(truncated, "sm_90a", "truncated", {}).get_kernel_source()
    with pytest.raises(AssertionError, match="whole: 4 registers a thread for 8 elements"):
        assert_fragments_are_whole(truncated, source)
