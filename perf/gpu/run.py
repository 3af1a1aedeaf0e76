"""The Python part of `on_gpu.sh`: `python -m mhc_tilelang.perf.gpu.run ACTION`.

    compile PART    build every kernel that a part's steps launch, in parallel, into the disk caches; with --list only
                    say how many, and how long that takes
    launch          run every call once at a small size, for a sanitizer to watch
    collect         the steps' records, their JSON and their logs as two files, and the table that comes last

A step of the script leaves NAME.step (a line: status, seconds, limit), NAME.log and, if it measures, NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..bench.ready import CHECKED_TOKENS
from ..calls.cases import WIDTHS, Shape
from ..options import DTYPES, positive
from .building import Job, build_all, unique

TARGET = "sm_90a"
PARALLEL_BLOCKS = 2 * 132  # sets no compiled size, only run-time ones
TOKENS = 4096
PARTS = ("smoke", "correctness", "bench", "overhead", "counters", "peers", "tune")
# Tiles of tokens, a width that no tile divides; few tokens, which a boundary crosses in one launch, and more.
SANITIZED = (Shape(33, 4, 136, "bfloat16"), Shape(129, 4, 136, "bfloat16"))


def shapes_of(part: str) -> list[Shape]:
    """Return the shapes whose kernels a part's steps launch; "smoke" is what is launched before all else."""
    if part == "smoke":
        return [*SANITIZED]
    if part == "counters":
        return [Shape(TOKENS, 4, 2560, "bfloat16")]
    if part != "correctness":  # each of them checks its kernels at the width that it measures, with few tokens
        return [Shape(tokens, 4, width, "bfloat16") for width in WIDTHS for tokens in (CHECKED_TOKENS, TOKENS)]
    from ...checking.real_stream import HIDDEN_SIZE
    from ...checking.run import cases

    checked = [Shape(c.num_tokens, c.num_streams, c.hidden_size, str(c.dtype).rpartition(".")[2]) for c in cases()]
    stream = [Shape(1024, 4, HIDDEN_SIZE, dtype) for dtype in DTYPES]
    tested = [Shape(4097, 4, 1280, "bfloat16"), Shape(300, 8, 1280, "float32"), Shape(300, 4, 7168, "float16")]
    return [*(shape for shape in checked if shape.num_tokens), *stream, *tested, *SANITIZED]


def jobs_of(part: str) -> list[Job]:
    """Return the kernels of every call at these shapes, each once."""
    from ..calls.cases import Case
    from ..calls.launches import launches
    from ..calls.table import CALLS

    found = [
        launch
        for shape in shapes_of(part)
        for name in CALLS
        for launch in launches(Case(name, shape), "cuda", PARALLEL_BLOCKS)
    ]
    return unique(Job(launch.family, launch.parameters) for launch in found)


def compile_part(args: argparse.Namespace) -> int:
    """Build; 1 where something did not."""
    jobs, processes = jobs_of(args.part), args.processes or os.cpu_count() or 1
    estimate = sum(job.seconds for job in jobs) / processes
    print(f"{len(jobs)} kernels for {args.arch} in {processes} processes: about {estimate:.0f} s from empty caches")
    if args.list:
        return 0
    built = build_all(jobs, args.arch, processes)
    failed = [one for one in built if one.error]
    for one in failed:
        print(f"FAILED {one.job.family} {one.job.parameters}: {one.error}")
    print(
        f"compiled {len(built) - len(failed)} of {len(built)}, {sum(one.seconds for one in built):.0f} s of one process"
    )
    return 1 if failed else 0


def launch_every_call(args: argparse.Namespace) -> int:
    """Launch every call of `launches` once, uncompared: a sanitizer slows down what runs beside kernels too."""
    import torch

    from ...cli.device import pick_device
    from ..calls.every_call import every_call

    device = pick_device(args.device)
    for shape in SANITIZED:
        for name, run in every_call(shape, device).items():
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()  # what a kernel did wrong is raised before the next one starts
            print(name, shape.num_tokens, flush=True)
    return 0


@dataclass(frozen=True)
class Step:
    """Record of a step; `result` is the JSON that it wrote, `last` the last line that it printed."""

    name: str
    status: str
    seconds: int
    limit: int
    last: str
    result: Any = None


def read_steps(folder: Path) -> list[Step]:
    """Return the steps that left a record in a folder, in the order in which they ended."""
    steps = []
    for path in sorted(folder.glob("*.step"), key=lambda path: path.stat().st_mtime_ns):
        status, seconds, limit = path.read_text(encoding="utf-8").split()
        log, result = path.with_suffix(".log"), path.with_suffix(".json")
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        steps.append(Step(path.stem, status, int(seconds), int(limit), last, read_json(result)))
    return steps


def read_json(path: Path) -> Any:
    """Return the JSON a step wrote; None if it wrote none, or was stopped while writing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def collect(args: argparse.Namespace) -> int:
    """Write two files of all steps so far, and print the table."""
    steps = read_steps(args.work)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = json.dumps({"steps": [asdict(step) for step in steps]}, indent=1)
    (args.out / "on-gpu.json").write_text(facts + "\n", encoding="utf-8")
    with (args.out / "on-gpu.log").open("w", encoding="utf-8") as file:
        for step in steps:
            log = args.work / f"{step.name}.log"
            text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
            file.write(f"=== {step.name}: {step.status} after {step.seconds} s\n{text}\n")
    if args.table:
        print(table(steps))
    return 0


def table(steps: Sequence[Step]) -> str:
    """Return a line a step: short, since a terminal's end may be all that is kept."""
    width = max((len(step.name) for step in steps), default=4)
    lines = [f"{'step':{width}}  status    seconds  of limit  last line"]
    for step in steps:
        lines.append(
            f"{step.name:{width}}  {step.status:8}  {step.seconds:7}  {step.limit:8}  {step.last[:90]}".rstrip()
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the three actions."""
    main_parser = argparse.ArgumentParser(
        prog="python -m mhc_tilelang.perf.gpu.run", description=__doc__.splitlines()[0]
    )
    actions = main_parser.add_subparsers(metavar="ACTION", required=True)
    one = actions.add_parser("compile", help="build a part's kernels in parallel")
    one.add_argument("part", choices=PARTS)
    one.add_argument("--arch", default=TARGET, help=f"a CUDA architecture (default: {TARGET})")
    one.add_argument("--processes", type=positive, metavar="N", help="compilations at a time (default: one per core)")
    one.add_argument("--list", action="store_true", help="only say how many kernels, and how long they take")
    one.set_defaults(run=compile_part)
    one = actions.add_parser("launch", help="run every call once at a small size")
    one.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to run on (auto: a GPU)")
    one.set_defaults(run=launch_every_call)
    one = actions.add_parser("collect", help="write two files of all steps")
    one.add_argument("work", type=Path, help="folder with the steps' records")
    one.add_argument("out", type=Path, help="folder for the two files")
    one.add_argument("--table", action="store_true", help="also print the table")
    one.set_defaults(run=collect)
    return main_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one action; its exit status."""
    args = parser().parse_args(argv)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
