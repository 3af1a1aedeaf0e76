"""Small CUDA kernels for the executor's tests: each has one planted defect, and a twin without it.

A kernel is written as tilelang would generate it. `DEFECT(wrong, right)` marks the one place where the twins differ.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from mhc_tilelang.compiler.cuda_source import CudaSource
from mhc_tilelang.compiler.simt import Counts, launch


def source(
    body: str, arguments: str, *, threads: int = 64, grid: tuple[str, str, str] = ("1", "1", "1"), shared_bytes: int = 0
) -> CudaSource:
    """A kernel named `kernel` from its body and its parameters, written in C."""
    names = tuple(re.findall(r"(\w+)(?:,|$)", arguments))
    code = f'extern "C" __global__ void __launch_bounds__({threads}, 1) kernel({arguments}) {{\n{body}\n}}\n'
    return CudaSource("kernel", code, names, grid, (threads, 1, 1), shared_bytes)


@dataclass(frozen=True)
class Planted:
    """A kernel with a defect that the executor names, or that changes its result."""

    kind: str
    body: str
    arguments: str = "const float* __restrict__ x, float* __restrict__ y"
    threads: int = 64
    blocks: int = 1
    elements: int = 64
    shared_bytes: int = 1024

    def twin(self, wrong: bool) -> CudaSource:
        """Build the kernel with the defect or without."""
        body = re.sub(r"DEFECT\((.*?), (.*?)\)!", r"\1" if wrong else r"\2", self.body)
        grid = (str(self.blocks), "1", "1")
        return source(body, self.arguments, threads=self.threads, grid=grid, shared_bytes=self.shared_bytes)

    def run(self, wrong: bool) -> tuple[torch.Tensor, torch.Tensor, Counts]:
        """x, y and the counts of a launch."""
        x = torch.arange(self.elements, dtype=torch.float32)
        y = torch.full_like(x, float("nan"))
        counts = launch(self.twin(wrong), "sm_80", {"x": x, "y": y}, {"num_elements": self.elements})
        return x, y, counts


SHARED = "extern __shared__ __align__(1024) uchar buf_dyn_shmem[];\nfloat* tile = (float*)buf_dyn_shmem;\n"
T = "((int)threadIdx.x)"
COPY = SHARED + f"tl::cp_async_gs<4>((&(tile[{T}])), (&(x[{T}])));\n"
COMMIT, WAIT, SYNC = "tl::cp_async_commit();\n", "tl::cp_async_wait<0>();\n", "__syncthreads();\n"

PLANTED = {
    "missing barrier": Planted(
        "race", SHARED + f"tile[{T}] = x[{T}];\nDEFECT(, __syncthreads();)!\ny[{T}] = tile[{T} ^ 32];"
    ),
    "missing barrier before the tile is used again": Planted(
        "race",
        SHARED
        + f"for (int k = 0; k < 2; ++k) {{\n  tile[{T}] = x[{T}];\n  __syncthreads();\n  y[{T}] = tile[63 - {T}];\n"
        + "  DEFECT(, __syncthreads();)!\n}",
    ),
    "a warp takes another's barrier": Planted(
        "race",
        SHARED
        + f"tile[{T}] = x[{T}];\nDEFECT(__syncwarp();, tl::NamedBarrier<64>::sync<1>();)!\ny[{T}] = tile[{T} ^ 32];",
    ),
    "tail not masked": Planted(
        "global out of bounds",
        f"int at = ((int)blockIdx.x) * 64 + {T};\nif (DEFECT(at <= num_elements, at < num_elements)!) y[at] = x[at];",
        arguments="const float* __restrict__ x, float* __restrict__ y, int num_elements",
        blocks=2,
        elements=100,
    ),
    "before the first element": Planted("global out of bounds", f"y[{T}] = x[{T} - DEFECT(1, 0)!];"),
    "shared tile too small": Planted(
        "shared out of bounds",
        SHARED + f"tile[{T}] = x[{T}];\n__syncthreads();\ny[{T}] = tile[{T} + DEFECT(1, 0)!];",
        shared_bytes=256,
    ),
    "missing wait": Planted(
        "missing cp.async wait", f"{COPY}{COMMIT}DEFECT(, tl::cp_async_wait<0>();)!\n{SYNC}y[{T}] = tile[{T}];"
    ),
    "wait for too few": Planted(
        "missing cp.async wait", f"{COPY}{COMMIT}tl::cp_async_wait<DEFECT(1, 0)!>();\n{SYNC}y[{T}] = tile[{T}];"
    ),
    "missing commit": Planted(
        "missing cp.async wait", f"{COPY}DEFECT(, tl::cp_async_commit();)!\n{WAIT}{SYNC}y[{T}] = tile[{T}];"
    ),
    "waited for, but seen by others too early": Planted(
        "race", f"{COPY}{COMMIT}{WAIT}DEFECT(, __syncthreads();)!\ny[{T}] = tile[{T} ^ 32];"
    ),
    "half the block at a barrier": Planted(
        "divergent barrier", f"if (DEFECT({T} < 32, {T} < 64)!) __syncthreads();\ny[{T}] = x[{T}];"
    ),
    "half a warp at a barrier": Planted(
        "divergent barrier",
        f"if (DEFECT({T} % 32 < 16, {T} < 64)!) tl::NamedBarrier<64>::sync<1>();\nif ({T} < 64) y[{T}] = x[{T}];",
        threads=128,
    ),
    "a barrier for more threads than come": Planted(
        "divergent barrier",
        f"if ({T} < 64) tl::NamedBarrier<DEFECT(96, 64)!>::sync<1>();\ny[{T} % 64] = x[{T} % 64];".replace(
            "y[", f"if ({T} < 64) y[", 1
        ),
        threads=128,
    ),
    "a barrier for part of a warp": Planted("invalid barrier", f"simt_barrier(1, DEFECT(48, 64)!);\ny[{T}] = x[{T}];"),
    "half a warp shuffles": Planted(
        "divergent warp",
        f"float v = x[{T}];\nif (DEFECT({T} % 32 < 16, true)!) v = tl::shfl_xor_sync(~0u, v, 1);\ny[{T}] = v;",
    ),
    "misaligned vector": Planted(
        "misaligned access", f"if ({T} < 8) *(float4*)(y + {T} * 4) = *(float4*)(x + ({T} * 4 + DEFECT(1, 0)!));"
    ),
    "misaligned copy": Planted(
        "misaligned access",
        SHARED
        + f"if ({T} < 8) tl::cp_async_gs<16>((&(tile[{T} * 4 + DEFECT(2, 0)!])), (&(x[{T} * 4])));\n"
        + f"{COMMIT}{WAIT}{SYNC}if ({T} < 32) y[{T}] = tile[{T}];",
    ),
    "shared memory that nothing wrote": Planted(
        "uninitialized shared memory",
        SHARED + f"if (DEFECT({T} != 5, true)!) tile[{T}] = x[{T}];\n__syncthreads();\ny[{T}] = tile[{T}];",
    ),
    "two blocks write one element": Planted(
        "race between blocks", f"y[{T} + DEFECT(0, 64 * ((int)blockIdx.x))!] = x[{T}];", blocks=2, elements=128
    ),
    "a block reads what another writes": Planted(
        "race between blocks",
        f"int at = 64 * ((int)blockIdx.x) + {T};\ny[at] = x[at] + DEFECT((((int)blockIdx.x) ? y[{T}] : 0.0f), 0.0f)!;",
        blocks=2,
        elements=128,
    ),
}
