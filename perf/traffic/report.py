"""The output of `mhc-tilelang traffic`: a row a kernel, then the sums of a sublayer, in units of C.

A unit is C elements of the stream's dtype a token, so that a plain residual, which reads two vectors and writes one,
is 3. The paper's numbers are those of its fused kernels (Section 4.3.1) and of Table 2, which has the same operations
one by one. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..calls.cases import Shape
from ..calls.table import AGGREGATED
from .formulas import float8_elements, stream_elements

if TYPE_CHECKING:
    from .audited import Audited

Pair = tuple[float, float]

FORWARD = ("project", "coefficients", "aggregate", "post")
BACKWARD = ("aggregate_backward", "coefficients_backward", AGGREGATED, "post_backward")

FOOTNOTES = """\
Units: C elements of the stream's dtype a token. read, written: stream tensors, every access of every block.
small: phi, partial sums, workspaces, coefficients, each element once; from caches: what blocks read again of them.
once: stream tensors, each once, the least a kernel of this name can move. paper: its kernels, read/written (Section
4.3.1); Table 2: the same operations unfused.
* some of what is read was read before by another block, and may come from a cache."""


@dataclass(frozen=True)
class Row:
    """A kernel's traffic at one shape, in units of C."""

    kernel: str
    shape: Shape
    traffic: Audited

    def units(self, num_bytes: int) -> float:
        """Bytes in units of C a token."""
        return num_bytes / (self.shape.num_tokens * self.shape.hidden_size * self.shape.itemsize)

    @property
    def floor(self) -> float | None:
        """Stream tensors of the kernel, each once; None for kernels that have none."""
        return sum(formula(self.kernel, self.shape.num_streams, self.shape.itemsize)) or None

    def as_json(self) -> dict[str, Any]:
        """One object of the JSON list."""
        paper_reads, paper_writes = paper_kernels(self.shape.num_streams).get(self.kernel, (None, None))
        return {
            "kernel": self.kernel,
            "num_streams": self.shape.num_streams,
            "hidden_size": self.shape.hidden_size,
            "dtype": self.shape.dtype,
            "num_tokens": self.shape.num_tokens,
            "reads_C": self.units(self.traffic.stream_read),
            "writes_C": self.units(self.traffic.stream_written),
            "small_C": self.units(self.traffic.small),
            "paper_reads_C": paper_reads,
            "paper_writes_C": paper_writes,
            "floor_C": self.floor,
        }

    def cells(self) -> list[str]:
        """One line of the table."""
        traffic, n = self.traffic, self.shape.num_streams
        again = self.units(traffic.small_per_block - traffic.small)
        line = [self.kernel, number(self.units(traffic.stream_read)) + "*" * bool(traffic.repeated)]
        line += [number(self.units(traffic.stream_written)), f"{self.units(traffic.small):.3f}", f"{again:.3f}"]
        line += [number(self.floor or 0), pair(paper_kernels(n).get(self.kernel)), pair(unfused(n).get(self.kernel))]
        return line


def formula(kernel: str, num_streams: int, itemsize: int = 2) -> Pair:
    """Elements of so many bytes read and written; pre's backward has the projection's read g_layer_input too."""
    if kernel == AGGREGATED:
        return num_streams + 1, num_streams
    read, written = stream_elements(kernel, num_streams)
    return read, written + float8_elements(kernel, itemsize)


def paper_kernels(n: int) -> dict[str, Pair]:
    """Read and written by the paper's fused kernels."""
    return {"project": (n, 0), "aggregate": (n, 1), "post": (n + 1, n)}


def unfused(n: int) -> dict[str, Pair]:
    """The paper's Table 2; post is its H^post, H^res and merge."""
    return {"project": (n, 0), "aggregate": (n, 1), "post": (3 * n + 1, 3 * n)}


def report(shape: Shape, target: str, rows: Sequence[Row], calls: Mapping[str, Audited]) -> str:
    """The table of kernels, and the sums; `calls` has every kernel's traffic."""
    from tabulate import tabulate

    headers = ["kernel", "read", "written", "small", "from caches", "once", "paper", "Table 2"]
    align = ["left", *["right"] * 7]
    title = f"{target}, n = {shape.num_streams}, C = {shape.hidden_size}, {shape.dtype}, {shape.num_tokens} tokens"
    table = tabulate([row.cells() for row in rows], headers=headers, disable_numparse=True, colalign=align)
    return "\n\n".join((title, table, sums(shape, calls)))


def sums(shape: Shape, calls: Mapping[str, Audited]) -> str:
    """A sublayer's tables, forward and backward; `calls` has the fused boundary and the kernels of both ways."""
    from tabulate import tabulate

    return "\n\n".join(
        tabulate(
            lines,
            headers=[f"a sublayer, {way}", "read", "written", "sum", "small"],
            disable_numparse=True,
            colalign=["left", *["right"] * 4],
        )
        for way, lines in (("forward", forward_sums(shape, calls)), ("backward", backward_sums(shape, calls)))
    )


def forward_sums(shape: Shape, calls: Mapping[str, Audited]) -> list[list[str]]:
    """Return the rows of a sublayer's forward: ours, the paper's, and the least possible."""
    n = shape.num_streams
    return [
        ours("ours, fused across the boundary, as ResidualStream runs it", Row("forward", shape, calls["post_pre"])),
        ours("ours, kernel by kernel", total("forward", FORWARD, shape, calls)),
        theirs("the paper's kernels, 4n + 2", 3 * n + 1, n + 1),
        theirs("the paper's Table 2, unfused, 8n + 2", 5 * n + 1, 3 * n + 1),
        theirs("floor: single-pass boundary, 2n + 2", n + 1, n + 1),
        theirs("plain residual, 3", 2, 1),
    ]


def backward_sums(shape: Shape, calls: Mapping[str, Audited]) -> list[list[str]]:
    """Return the rows of a sublayer's backward, in units of C.

    `pre` and `post` each give a gradient of x. The released kernels add the second to the first as they go, which
    their 9n + 3 contains; ours, one by one, leave it to autograd. Fused, the boundary's two passes have it, 4n + 4.
    """
    n = shape.num_streams
    row = total("backward", BACKWARD, shape, calls)
    again = row.units(row.traffic.repeated)
    fused = Row("backward", shape, calls["post_pre_backward"])
    rows = [
        ours("ours, fused across the boundary, as ResidualStream runs it", fused),
        ours("ours, kernel by kernel", row),
    ]
    if again:
        read, written = row.units(row.traffic.stream_read) - again, row.units(row.traffic.stream_written)
        rows.append(theirs("kernel by kernel, each stream tensor read once", read, written))
    read, written = row.units(row.traffic.stream_read) + 2 * n, row.units(row.traffic.stream_written) + n
    return [
        *rows,
        theirs("kernel by kernel, and autograd's sum of both g_x, 3n", read, written),
        theirs("the released kernels, both g_x added, 9n + 3", 6 * n + 2, 3 * n + 1),
        theirs("floor: single-pass boundary, 3n + 3", 2 * n + 2, n + 1),
        theirs("plain residual, 3", 2, 1),
    ]


def total(name: str, kernels: Sequence[str], shape: Shape, calls: Mapping[str, Audited]) -> Row:
    """Sum several kernels to one row."""
    first, *rest = (calls[kernel] for kernel in kernels)
    return Row(name, shape, sum(rest, start=first))


def ours(label: str, row: Row) -> list[str]:
    """A line of the sums: what was counted."""
    read, written = row.units(row.traffic.stream_read), row.units(row.traffic.stream_written)
    repeated = "*" * bool(row.traffic.repeated)
    line = [label, number(read) + repeated, number(written), number(read + written) + repeated]
    return [*line, f"{row.units(row.traffic.small):.3f}"]


def theirs(label: str, read: float, written: float) -> list[str]:
    """A line of the sums: a number of the literature, or one derived from ours."""
    return [label, number(read), number(written), number(read + written), ""]


def number(units: float) -> str:
    """A number in its shortest form: 9, 8.25; empty for none."""
    return f"{units:.4g}" if units else ""


def pair(numbers: Pair | None) -> str:
    """Read and written; empty where the paper has no such kernel."""
    return "/".join(map(str, numbers)) if numbers else ""
