"""Numbers and tables of the pages: what a marker `<!-- = EXPRESSION -->` may call. `guide` puts in what comes out.

stored       timings, speedup, layers, layer_overhead     from perf/results/amd-epyc-2-cores
built        built                                                 from docs/kernels, which are of stored builds
model        predicted, simulated, simulated_step, overheads      arithmetic
counted      sublayer, traffic_sums                               formulas; the kernels' code

Every function returns text: a number with its unit, a Markdown table or a fenced block. None imports torch but
`traffic_sums`, which reads kernels.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from ..overhead import model
from ..overhead import table as overhead_table
from ..overhead.model import DEVICES, FORMS, FORWARD, IN_MODE, LABELS, OURS, TRAINING
from ..overhead.report import OURS_MEASURED, percent
from ..sizes import MODELS, SEQUENCE
from ..stored.command import kernel_table, markdown_table, overhead_row
from ..stored.from_json import load
from ..stored.results import KernelResults, OverheadResults

# Beside this file in a checkout; a wheel has no results.
STORED = Path(__file__).resolve().parents[1] / "results" / "amd-epyc-2-cores"
LAYER = "overhead-3b"

__all__ = [
    "built",
    "layer_overhead",
    "layers",
    "overheads",
    "predicted",
    "simulated",
    "simulated_step",
    "speedup",
    "sublayer",
    "timings",
    "traffic_sums",
]


# Stored


@cache
def kernels(name: str) -> KernelResults:
    """Return a stored file of `bench`."""
    found = load(STORED / f"{name}.json")
    assert isinstance(found, KernelResults), name
    return found


@cache
def layer_results() -> OverheadResults:
    """Return the stored file of `bench overhead`."""
    found = load(STORED / f"{LAYER}.json")
    assert isinstance(found, OverheadResults), LAYER
    return found


def timings(name: str, width: int | None = None, only: str = "", columns: str = "") -> str:
    """Return a stored benchmark's table: rows of one C and of kernels that have none, or `only` some; some columns."""
    found, wanted = kernels(name), only.split()
    if unknown := set(wanted) - {one.kernel for one in found.measurements}:
        raise LookupError(f"{name}: expected kernels that are measured in it, got {', '.join(sorted(unknown))}")
    rows = [
        one
        for one in found.measurements
        if (width is None or one.hidden_size in (None, width)) and (not wanted or one.kernel in wanted)
    ]
    return select(kernel_table(replace(found, measurements=tuple(rows))), columns)


def speedup(name: str, kernel: str, over: str) -> str:
    """Return the time of `over` (`separate` kernels or `torch`) divided by a kernel's own, as "1.23×"."""
    [one] = [one for one in kernels(name).measurements if one.kernel == kernel]
    other = one.separate if over == "separate" else one.fastest and one.fastest.time
    assert other, f"{name}: {kernel} has no {over}"
    return f"{other.over(one.time).median:.2f}×"


def layers(columns: str = "") -> str:
    """Return the table of the stored layer under every connection."""
    headers = ["connection", "mode", "step, ms", "quartiles", "overhead", "its quartiles", "saved for backward, MB"]
    return select(markdown_table(headers, map(overhead_row, layer_results().rows), "llrlrlr"), columns)


def layer_overhead(mode: str = TRAINING, connection: str = OURS_MEASURED) -> str:
    """Return the measured overhead of a connection in the stored layer, in percent."""
    names = LABELS[connection], IN_MODE[mode]
    [row] = [row for row in layer_results().rows if (row.connection, row.mode) == names]
    assert row.overhead
    return percent(row.overhead.median / 100)


def overheads() -> str:
    """Return the table of every percentage beside the paper's."""
    return overhead_table.overheads(layer_results())


def select(table: str, columns: str) -> str:
    """Return a Markdown table's first column and those named, separated by semicolons; all without names."""
    if not columns:
        return table
    lines = [line.split(" | ") for line in table.splitlines()]
    head = [cell.strip("| ") for cell in lines[0]]
    places = [0, *(head.index(name.strip()) for name in columns.split(";"))]
    return "\n".join(f"| {' | '.join(line[place].strip('| ') for place in places)} |" for line in lines)


def built(kernel: str, column: str, width: int = 0) -> str:
    """Return a column of a kernel's row in the table of kernel pages; of loads and stores, one width in bytes."""
    lines = built_table().splitlines()
    head, row = (
        [cell.strip() for cell in next(line for line in lines if line.startswith(f"| {name} |")).split("|")]
        for name in ("kernel", kernel)
    )
    cell = row[head.index(column)]
    return next(one.split("×")[0] for one in cell.split() if one.endswith(f"×{width}")) if width else cell


@cache
def built_table() -> str:
    """Return the page that sets the kernels side by side."""
    from ..inspect import pages

    return pages.index()


# Modelled


def predicted(name: str = "3b", form: str = OURS, mode: str = TRAINING, device: str = "H200") -> str:
    """Return the overhead that `bench overhead` predicts for a layer of a model, in percent."""
    found = model.predict(MODELS[name], DEVICES[device], mode, sequence=SEQUENCE)
    return percent(found.overhead[form])


def simulated(name: str = "27b", **assumed: object) -> str:
    """Return the overhead that `simulate` gives for a stage's steady state under changed assumptions, in percent."""
    from ..simulation.costs import Assumptions
    from ..simulation.overhead import overhead

    return percent(overhead(Assumptions(model=name, **assumed)))  # type: ignore[arg-type]


def simulated_step(name: str = "27b", **assumed: object) -> str:
    """Return the overhead that `simulate` gives for a whole 1F1B step under changed assumptions, in percent."""
    from ..simulation.costs import Assumptions
    from ..simulation.overhead import step_overhead

    return percent(step_overhead(Assumptions(model=name, **assumed)))  # type: ignore[arg-type]


# Counted


def sublayer(num_streams: int = 4) -> str:
    """Elements of a sublayer by who moves them, in units of C, as a table."""
    rows = [
        ["unfused (the paper's Table 2)", FORMS["unfused HC"].forward(num_streams), ""],
        *(
            [label, FORMS[name].elements(num_streams, FORWARD), FORMS[name].backward(num_streams)]
            for label, name in (
                ("the paper's kernels, and the released ones", "paper's kernels"),
                ("these, fused across the boundary", OURS),
                ("floor: one pass", "single-pass floor"),
            )
        ),
        ["plain residual", model.RESIDUAL.forward(num_streams), model.RESIDUAL.backward(num_streams)],
    ]
    return markdown_table(["", "forward", "backward"], [[str(cell) for cell in row] for row in rows], "lrr")


def traffic_sums() -> str:
    """Return the sums of `mhc-tilelang traffic`, counted from the kernels' code."""
    from ..calls.cases import POST_PRE, POST_PRE_BACKWARD, Case, Shape
    from ..traffic import report as traffic_report
    from ..traffic.audited import audit_call
    from ..traffic.command import DEFAULT_TOKENS, PARALLEL_BLOCKS

    shape = Shape(*DEFAULT_TOKENS, 4, 2560, "bfloat16")
    names = (POST_PRE, POST_PRE_BACKWARD, *traffic_report.FORWARD, *traffic_report.BACKWARD)
    calls = {name: audit_call(Case(name, shape), "cuda", PARALLEL_BLOCKS) for name in names}
    return f"```\n{traffic_report.sums(shape, calls)}\n```"
