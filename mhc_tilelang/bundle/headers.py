"""The C headers of a bundle: prototypes of the CPU's kernels, and tables that a host can loop over.

    cpu/mhc_kernels.h       one prototype a kernel, plain C
    cpu/mhc_table.h         the same kernels as a constant table: names, arguments, a call with arrays
    sm_90a/mhc_kernels.h    one entry a kernel: cubin, function, argument types, grid, block, shared memory

Nothing in them has state: tables are `static const`, in the host's own translation unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .described import OUTPUT, Described
from .launch_size import c_of

if TYPE_CHECKING:
    from ..compiler.cuda_source import CudaSource

C_TYPES = {"float32": "float", "bfloat16": "uint16_t", "float16": "uint16_t"}
OPEN = """#ifdef __cplusplus
extern "C" {
#endif
"""
CLOSE = """#ifdef __cplusplus
}
#endif
"""


def prototypes(kernels: Sequence[Described], dtype: str) -> str:
    """`mhc_kernels.h` of the CPU target."""
    parts = [
        f"""/* The kernels of this bundle, for streams of {dtype}. bfloat16 and float16 are passed as their 16 bits.

   Buffers are contiguous and row-major, of the shapes given; each needs the alignment of its elements only. Outputs
   must not overlap inputs. `threads` is how many OpenMP threads may run. A function keeps no state and allocates
   nothing: it can be called from any number of threads. No size may be 0. Sizes are not checked. */
#pragma once

#include <stdint.h>

{OPEN}"""
    ]
    for kernel in kernels:
        comment = "; ".join(f"{buffer['name']} {buffer['shape']} {role}" for buffer, role in described_buffers(kernel))
        parts.append(f"/* {comment} */\nvoid {kernel.symbol}({', '.join(c_arguments(kernel))});\n")
    return "\n".join([*parts, CLOSE])


def described_buffers(kernel: Described) -> list[tuple[dict[str, str], str]]:
    """Names and shapes as text, and roles."""
    pairs = zip(kernel.signature.buffers, kernel.roles, strict=True)
    return [({"name": b.name, "shape": f"[{', '.join(map(str, b.shape))}]"}, role) for b, role in pairs]


def c_arguments(kernel: Described) -> list[str]:
    """Return the parameters of a kernel's C function."""
    pairs = zip(kernel.signature.buffers, kernel.roles, strict=True)
    buffers = [f"{'' if role == OUTPUT else 'const '}{C_TYPES[b.dtype]} *{b.name}" for b, role in pairs]
    return [*buffers, *(f"{kind} {number}" for number, kind in kernel.numbers.items()), "int threads"]


def table(kernels: Sequence[Described]) -> str:
    """`mhc_table.h` of the CPU target."""
    parts = [
        """/* The kernels of mhc_kernels.h as a table; `call` takes buffers and numbers in the names' order. Numbers are
   doubles, which hold every size and every float. */
#pragma once

#include <stddef.h>

#include "mhc_kernels.h"

struct mhc_entry {
  const char *name;
  int num_buffers, num_numbers;
  const char *buffers; /* names, a space between them */
  const char *numbers; /* run-time sizes, then scalars */
  void (*call)(void *const *buffers, const double *numbers, int threads);
};
"""
    ]
    for kernel in kernels:
        buffers = [
            f"({'' if role == OUTPUT else 'const '}{C_TYPES[b.dtype]} *)b[{k}]"
            for k, (b, role) in enumerate(zip(kernel.signature.buffers, kernel.roles, strict=True))
        ]
        numbers = [f"({kind})n[{k}]" for k, kind in enumerate(kernel.numbers.values())]
        unused = "" if numbers else "  (void)n;\n"
        parts.append(
            f"static void mhc_call_{kernel.name}(void *const *b, const double *n, int threads) {{\n{unused}"
            f"  {kernel.symbol}({', '.join([*buffers, *numbers, 'threads'])});\n}}\n"
        )
    parts.append("static const struct mhc_entry mhc_entries[] = {")
    parts += [f"    {{{row_of(kernel)}, mhc_call_{kernel.name}}}," for kernel in kernels]
    parts.append("};\nstatic const size_t mhc_num_entries = sizeof(mhc_entries) / sizeof(mhc_entries[0]);\n")
    return "\n".join(parts)


def row_of(kernel: Described) -> str:
    """Return the leading fields of a kernel's row in both tables: name, counts, buffers, numbers."""
    buffers = " ".join(buffer.name for buffer in kernel.signature.buffers)
    counts = f"{len(kernel.signature.buffers)}, {len(kernel.numbers)}"
    return f'"{kernel.name}", {counts}, "{buffers}", "{" ".join(kernel.numbers)}"'


def launches(arch: str, kernels: Sequence[tuple[Described, CudaSource, dict[str, Any]]]) -> str:
    """`mhc_kernels.h` of a CUDA architecture; with each kernel the `launch` of its manifest entry."""
    parts = [
        f"""/* How the cubins of this folder, for {arch}, are launched.

   Buffers are contiguous, row-major and start on 16 bytes. Numbers are run-time sizes, then scalars, in the order of
   `numbers`, as doubles. The parameters of `function` are named by `parameters` in their order: buffers as pointers,
   numbers as int32_t, int64_t or float as `types` says (p, i, l, f). Where shared_bytes is above 48 KB, set
   CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES to it. Do not launch where a size is 0. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define MHC_MIN(a, b) ((a) < (b) ? (a) : (b))
#define MHC_MAX(a, b) ((a) > (b) ? (a) : (b))

struct mhc_kernel {{
  const char *name;
  int num_buffers, num_numbers;
  const char *buffers, *numbers; /* names, a space between them */
  const char *cubin, *function, *parameters, *types;
  unsigned threads[3], shared_bytes;
  void (*grid)(const double *numbers, unsigned *grid);
}};
"""
    ]
    rows = []
    for kernel, source, launch in kernels:
        sizes = "".join(
            f"  const int64_t {name} = (int64_t)n[{k}];\n  (void){name};\n"
            for k, (name, kind) in enumerate(kernel.numbers.items())
            if kind != "float"
        )
        grid = "".join(f"  grid[{k}] = (unsigned)({c_of(extent)});\n" for k, extent in enumerate(source.grid))
        unused = "" if sizes else "  (void)n;\n"
        parts.append(
            f"static void mhc_grid_{kernel.name}(const double *n, unsigned *grid) {{\n{unused}{sizes}{grid}}}\n"
        )
        types = "".join(kind for _, kind in launch["arguments"])
        names = " ".join(name for name, _ in launch["arguments"])
        threads = ", ".join(map(str, source.threads))
        cubin = launch["cubin"].rpartition("/")[2]
        rows.append(
            f'    {{{row_of(kernel)}, "{cubin}", "{source.entry}", "{names}", "{types}", {{{threads}}}, '
            f"{source.shared_bytes}, mhc_grid_{kernel.name}}},"
        )
    parts += ["static const struct mhc_kernel mhc_kernels[] = {", *rows, "};"]
    parts.append("static const size_t mhc_num_kernels = sizeof(mhc_kernels) / sizeof(mhc_kernels[0]);\n")
    return "\n".join(parts)
