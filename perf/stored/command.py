"""`mhc-tilelang bench report RESULTS.json… --out DIR`: stored results as `report.md` and pictures.

Every table and picture says where, when and with which versions its numbers were taken.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import MHCError
from ..bench.report import DOUBTFUL, megabytes, milliseconds
from ..figures.flops import flops
from ..overhead.report import WHAT_THE_PAPER_SAYS, one_line
from .from_json import load
from .results import KernelResults, Measurement, OverheadResults, OverheadRow, Spread

if TYPE_CHECKING:
    from ..figures.run import Picture

HELP = "write a report of stored results: Markdown and pictures"
NAME = "report.md"
MATPLOTLIB = "bench report: expected matplotlib, which draws the pictures: pip install 'mhc-tilelang[plots]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `mhc-tilelang bench report`."""
    text = "a file of `bench --json FILE` or `bench overhead --json FILE`"
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json", help=text)
    text = f"folder for {NAME} and the pictures, SVG and PNG; created if missing"
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=text)


def run(args: argparse.Namespace) -> int:
    """Read every file, draw, write; nothing is written when a file cannot be read."""
    stored = [load(path) for path in args.results]
    try:
        import matplotlib  # noqa: F401  # an extra: asked for by name before anything is drawn
    except ImportError as error:
        raise MHCError(f"{MATPLOTLIB} ({error})") from error
    sections = [section(results, prefix) for results, prefix in zip(stored, prefixes(args.results), strict=True)]
    sections.append(traffic_section())
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        written = [path for _, pictures in sections for picture in pictures for path in picture.save(args.out)]
        text = "\n\n".join(("# Measurements", *(markdown for markdown, _ in sections))) + "\n"
        (args.out / NAME).write_text(text, encoding="utf-8")
    except OSError as error:
        raise MHCError(f"bench report: cannot write --out {args.out}: {error.strerror or error}") from error
    print(f"{args.out / NAME} and {len(written)} pictures")
    return 0


def prefixes(paths: Sequence[Path]) -> list[str]:
    """Return a name for each file's pictures: the file's, with its folder and a number as far as needed."""
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.resolve().parent.name}-{path.stem}" for path in paths]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name}-{i}" for i, name in enumerate(names, start=1)]


def section(results: KernelResults | OverheadResults, prefix: str) -> tuple[str, list[Picture]]:
    """Return the Markdown of one file, and the pictures it shows."""
    from ..figures import kernels as figures_kernels
    from ..figures import sublayer as figures_sublayer

    if isinstance(results, KernelResults):
        title, pictures = "Kernels", list(figures_kernels.draw(results, prefix))
        blocks = [kernel_table(results), kernel_notes(results)]
    else:
        picture = figures_sublayer.overhead(results, prefix)
        title, pictures = "Overhead", [picture] if picture else []
        blocks = list(overhead_blocks(results))
    facts, method = results.facts, ", ".join(f"{name} {value}" for name, value in results.facts.method.items())
    about = "  \n".join(line for line in (str(facts), method, f"from `{facts.path.name}`") if line)
    return "\n\n".join((f"## {title}: {facts.device}", about, *map(link, pictures), *blocks)), pictures


def traffic_section() -> tuple[str, list[Picture]]:
    """Return the traffic of a sublayer, which is counted, not measured."""
    from importlib.metadata import version

    from ..figures.sublayer import stages, traffic

    picture = traffic(4, version("mhc-tilelang"))
    rows = [
        [stage.name.replace("\n", " ") + ("" if stage.here else " (these kernels in the delayed form)")]
        + [f"{count}C" for count in (stage.read, stage.written, stage.total)]
        for stage in stages(4)
    ]
    text = f"Counted from shapes, on no device; n = 4, mhc-tilelang {version('mhc-tilelang')}."
    table = markdown_table(["a sublayer, forward", "read", "written", "sum"], rows, "lrrr")
    return "\n\n".join(("## Traffic", text, link(picture), table)), [picture]


def link(picture: Picture) -> str:
    """Return the picture in Markdown."""
    return f"![{picture.title}]({picture.name}.svg)"


def kernel_table(results: KernelResults) -> str:
    """Return a row per kernel and shape."""
    headers = ["kernel", "tokens × n × C", "dtype", "time, ms", "quartiles", "GB/s", "of copy", "GFLOP/s"]
    headers += ["vs torch", "range", "fastest torch", "vs separate"]
    return markdown_table(headers, map(kernel_row, results.measurements), "lllrlrrrrllr")


def kernel_row(one: Measurement) -> list[str]:
    """Return one line of the table."""
    fastest = one.fastest
    ratio = fastest.time.over(one.time) if fastest else None
    doubtful = any(spread.doubtful for spread in (one.time, one.copy_time, *([ratio] if ratio else [])))
    marks = ("\\*" if one.in_cache else "") + (DOUBTFUL if doubtful else "")
    operations = flops(one.kernel, one.num_streams, one.hidden_size, one.num_tokens)
    rate = f"{operations / one.time.median / 1e9:.1f}" if operations else "–"
    return [
        f"`{one.kernel}`{marks}",
        one.shape,
        one.dtype,
        milliseconds(one.time.median),
        quartiles(one.time),
        f"{one.num_bytes / one.time.median / 1e9:.1f}",
        f"{one.share_of_copy.median:.0%}",
        rate,
        f"{ratio.median:.2f}×" if ratio else "–",
        f"{ratio.lower_quartile:.2f} to {ratio.upper_quartile:.2f}" if ratio else "–",
        str(fastest) if fastest else "–",
        f"{one.separate.over(one.time).median:.2f}×" if one.separate else "–",
    ]


def quartiles(time: Spread) -> str:
    """Format quartiles in milliseconds."""
    return f"{milliseconds(time.lower_quartile)} to {milliseconds(time.upper_quartile)}"


def kernel_notes(results: KernelResults) -> str:
    """Return the legend of the columns."""
    copy = results.copy_bytes / results.copy_time.median / 1e9
    lines = [
        "time: one call. GB/s: every tensor's bytes once, over the time. of copy: GB/s over that of a torch copy of "
        "equal size in the same rounds. GFLOP/s: the formula's operations over the time. vs torch: the fastest "
        "timed form's time over the kernel's, above 1 where the kernel is faster; range: from its lower quartile over "
        "the kernel's upper one to the reverse; vs separate: the same of our own kernels one by one, where the kernel "
        "is fused across a boundary.",
        f"The largest copy, of {megabytes(results.copy_bytes)} MB, ran at {copy:.1f} GB/s.",
    ]
    if any(one.in_cache for one in results.measurements):
        lines.append("\\*: all bytes fit the last-level cache, so that GB/s is not memory bandwidth.")
    if any(one.time.doubtful or one.copy_time.doubtful for one in results.measurements):
        lines.append(f"{DOUBTFUL}: the machine was busy, most calls waited for a core.")
    return "\n\n".join(lines)


def overhead_blocks(results: OverheadResults) -> Iterator[str]:
    """Yield the model, the measured table, the predicted one where there is one."""
    yield f"One layer: {results.layer}. {one_line(WHAT_THE_PAPER_SAYS)}"
    if results.not_comparable:
        yield f"On this device the measured overhead is **{results.not_comparable}**"
    headers = ["connection", "mode", "step, ms", "quartiles", "over the plain residual", "quartiles", "memory, MB"]
    yield markdown_table(headers, map(overhead_row, results.rows), "llrlrlr")
    if results.predictions:
        rows = [[one.device, one.mode, one.variant, f"{one.overhead:+.1f} %"] for one in results.predictions]
        yield "Predicted from FLOPs and bytes by a model, not measured:"
        yield markdown_table(["device", "mode", "variant", "over the plain residual"], rows, "lllr")


def overhead_row(row: OverheadRow) -> list[str]:
    """Return one line of the table."""
    over = row.overhead
    return [
        row.connection,
        row.mode,
        milliseconds(row.seconds.median) + (DOUBTFUL if row.seconds.doubtful else ""),
        quartiles(row.seconds),
        f"{over.median:+.1f} %" if over else "–",
        f"{over.lower_quartile:+.1f} to {over.upper_quartile:+.1f} %" if over else "–",
        megabytes(row.memory_bytes) if row.memory_bytes else "–",
    ]


def markdown_table(headers: Sequence[str], rows: Iterable[list[str]], align: str) -> str:
    """Return a table in GitHub's Markdown; `align` has an l or r per column."""
    rules = [{"l": ":--", "r": "--:"}[letter] for letter in align]
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (list(headers), rules, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
