"""The SIMT executor: runs the CUDA source that tilelang generates, on the CPU, thread by thread, and watches it.

    interface.h     what the kernel's code and the executor ask of each other
    device.h        CUDA and tilelang's device templates, in place of their headers
    executor.h/cpp  blocks, threads as fibers, the grid, what is counted
    accesses.cpp    bounds, alignment and order of every load and store; shadow.h keeps who touched what
    together.cpp    barriers, operations of a warp (matrices.h), asynchronous copies
    atomics.cpp     blocks that synchronise by atomics, in turns; between.h keeps the order that these give
    counts.h        sectors of global memory, passes over the banks of shared memory
    build           compiles all that; launch: a GPU's limits, the call, findings and counts
    target          `executing()`: every kernel for CPU tensors runs here

Found are: accesses out of bounds, misaligned ones, reads of shared memory that nothing wrote or whose copy is not
waited for, races within a block and between blocks, barriers that not all threads reach, waits that never end. What it
cannot show: time, registers, caches, and the last bits of a tensor core's sums, of expf and of rsqrtf.
"""

from .launch import Conflict, Counts, Finding, LaunchError, SimtError, TensorCounts, launch
from .target import Launched, executing

__all__ = [
    "Conflict",
    "Counts",
    "Finding",
    "LaunchError",
    "Launched",
    "SimtError",
    "TensorCounts",
    "executing",
    "launch",
]
