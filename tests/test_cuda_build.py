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
from mhc_tilelang.kernels import FAMILIES, boundary_plans, plans
from mhc_tilelang.toolchain import find_nvcc

pytestmark = pytest.mark.nvcc

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120a")
FORWARD = (
    "split_phi",
    "project",
    "coefficients",
    "head_coefficients",
    "sinkhorn",
    "pre",
    "post",
    "expand",
    "post_project",
)
BACKWARD = (
    "project_backward",
    "coefficients_backward",
    "head_coefficients_backward",
    "sum_partials",
    "sinkhorn_backward",
    "pre_backward",
    "post_backward",
    "expand_backward",
)
# Products, long sums and much shared memory: where architectures differ.
HEAVY = ("project_backward", "coefficients_backward", "post_backward")
CHAINED = ("project", "pre", "post", "post_project")  # whose accesses or products differ by dtype
# One gradient alone, and what else `launch_backward` may ask for: (family, n, dtype, what is changed).
VARIANTS = [
    ("project_backward", 4, "bfloat16", {"weights": False, "aggregated": False}),
    ("project_backward", 4, "bfloat16", {"stream": False, "aggregated": False}),
    ("project_backward", 4, "bfloat16", {"rows": 4}),  # of the head
    ("post_backward", 4, "float32", {"layer_dtype": "bfloat16"}),
    ("post_backward", 4, "bfloat16", {"stream": False, "layer": False}),
    ("coefficients_backward", 4, "bfloat16", {"res_given": False}),
    ("sum_partials", 4, "bfloat16", {"lanes": 1}),
]


def backward_parameters(family: str, n: int, dtype: str, hidden_size: int = 1280, rows: int = 0, **changes) -> dict:
    """What `launch_backward` would compile a family with on a GPU, everything asked for but for `changes`."""
    spec = MHCSpec(hidden_size, n)
    sizes = {"num_streams": n, "hidden_size": hidden_size}
    stream = {**sizes, "dtype": dtype}
    tile = plans.reduction_tile(hidden_size, plans.BYTES[dtype], "cuda")
    plan = plans.projection_backward_plan(rows or spec.num_coefficients, hidden_size, dtype, "cuda")
    sinkhorn_block = plans.sinkhorn_backward_tokens(n, 20, "cuda")
    given = {"pre_given": True, "post_given": True, "res_given": True}
    constants = {"iters": 20, "sinkhorn_eps": 1e-6, "post_scale": 2.0, "block": sinkhorn_block}
    chosen = {
        "project_backward": {**stream, "plan": plan, "stream": True, "weights": True, "aggregated": True},
        "coefficients_backward": {**sizes, **constants, **given},
        "head_coefficients_backward": {**sizes, "block": plans.tokens_per_block("cuda")},
        "sum_partials": {"lanes": 16, "block": 256},
        "sinkhorn_backward": {"num_streams": n, "iters": 20, "eps": 1e-6, "block": sinkhorn_block},
        "pre_backward": {**stream, "tile": tile},
        "post_backward": {**stream, "layer_dtype": dtype, "tile": tile, "stream": True, "layer": True, "mixing": True},
        "expand_backward": {**stream, "tile": plans.channel_tile(hidden_size, plans.BYTES[dtype], "cuda")},
    }[family]
    return {**chosen, **changes}


def parameters(family: str, n: int, dtype: str, hidden_size: int = 1280) -> dict:
    """What `launch` would compile a family with on a GPU."""
    if family in BACKWARD:
        return backward_parameters(family, n, dtype, hidden_size)
    spec = MHCSpec(hidden_size, n)
    rows = n if family == "head_coefficients" else spec.num_coefficients
    plan = plans.projection_plan(rows, hidden_size, dtype, "cuda")
    if family == "post_project":
        plan = boundary_plans.post_project_plan(rows, n, hidden_size, dtype, "cuda")
        stream = {"num_streams": n, "hidden_size": hidden_size, "dtype": dtype, "layer_dtype": dtype}
        return {**stream, "plan": plan, "aggregated": False}
    block = plans.tokens_per_block("cuda")
    sizes = {"num_streams": n, "hidden_size": hidden_size}
    constants = {"pre_eps": spec.pre_eps, "rms_eps": spec.rms_eps, "block": block}
    if family in ("pre", "post", "expand"):
        tile = plans.channel_tile(hidden_size, plans.BYTES[dtype], "cuda")
        layer = {"layer_dtype": dtype} if family == "post" else {}
        return {**sizes, "dtype": dtype, **layer, "tile": tile}
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
    cases = [(family, arch, 4, "bfloat16") for family in FORWARD for arch in ARCHITECTURES]
    cases += [(family, "sm_90a", n, "bfloat16") for family in FORWARD for n in (2, 8)]
    cases += [(family, "sm_90a", 4, dtype) for family in CHAINED for dtype in ("float16", "float32")]
    cases += [("project", "sm_90a", 8, "float32")]
    cases += [(family, "sm_90a", 4, "bfloat16") for family in BACKWARD]
    cases += [(family, arch, 4, "bfloat16") for family in HEAVY for arch in ARCHITECTURES if arch != "sm_90a"]
    cases += [(family, "sm_90a", n, "bfloat16") for family in HEAVY for n in (2, 8)]
    cases += [("sinkhorn_backward", "sm_90a", 8, "bfloat16"), ("project_backward", "sm_90a", 4, "float16")]
    cases += [(family, "sm_90a", n, "float32") for family in ("project_backward", "post_backward") for n in (4, 8)]
    return cases


@pytest.mark.parametrize(("family", "arch", "n", "dtype"), builds())
def test_builds(family: str, arch: str, n: int, dtype: str, tmp_path: Path) -> None:
    assert_builds(family, parameters(family, n, dtype), arch, tmp_path)


@pytest.mark.parametrize(("family", "n", "dtype", "changes"), VARIANTS)
def test_variants_build(family: str, n: int, dtype: str, changes: dict, tmp_path: Path) -> None:
    assert_builds(family, backward_parameters(family, n, dtype, **changes), "sm_90a", tmp_path)


@pytest.mark.parametrize("dtype", plans.BYTES)
@pytest.mark.parametrize("n", [2, 4, 8])
def test_shared_memory_fits_every_architecture(n: int, dtype: str) -> None:
    """Of every plan of `project_backward`; float32 at n = 4 takes 96.5 of the 99 KB that sm_120 has."""
    from mhc_tilelang import cuda, tracing

    func = tracing.trace("project_backward", backward_parameters("project_backward", n, dtype))
    assert shared_bytes(func) <= min(cuda.SHARED_BYTES.values())


def test_every_family_is_built() -> None:
    """Catches a family that is added and not built for a GPU."""
    assert {*FORWARD, *BACKWARD} == set(FAMILIES)


def assert_builds(family: str, chosen: dict, arch: str, folder: Path) -> None:
    """Fragments whole, shared memory within the architecture's, and no spill on the one the tiles are made for."""
    from mhc_tilelang import cuda, tracing

    func = tracing.trace(family, chosen)
    source = cuda.build(func, arch, family, chosen).get_kernel_source()
    assert_fragments_are_whole(func, source)
    assert shared_bytes(func) <= cuda.SHARED_BYTES[arch]
    if arch == "sm_90a":  # a second nvcc run a kernel is enough
        assert spilled_bytes(source, arch, folder) == 0


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
    """The threads of a block, and the shared and fragment buffers that something touches."""
    from tvm import tirx

    from mhc_tilelang.cpu.views import accesses_of

    touched = {access.buffer for access in accesses_of(func.body)}
    threads, buffers = [], []

    def visit(node) -> None:
        if isinstance(node, tirx.SBlock):
            buffers.extend(buffer for buffer in node.alloc_buffers if buffer in touched)
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
