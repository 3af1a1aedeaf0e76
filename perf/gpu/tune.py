"""Time the plans around a heuristic's choice: `python -m mhc_tilelang.perf.gpu.tune post_project --width 2560`.

For each family at one shape: enumerate (`tune_plans`), compile in parallel (`building`), run on the arguments of the
ordinary call, compare what every plan writes with what the heuristic's writes, and time those that agree in the same
rounds, from a cold cache (`timing`). On a GPU that `predict` has constants of, its cost model ranks them first
(`tune_rank`). Shares of a block are tried like plans (`tune_plans.shares`), and move no bit. A plan may change the
order of sums over channels or tokens, and so bits; those of bfloat16 and float16 then differ by a rounding. What is
compiled in is the heuristic's all the same: this only says where it is worth changing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ...cli.device import add_device_argument, describe, pick_device
from ...cli.json_output import add_json_argument, write_json
from ...errors import MHCError
from ...spec import STREAM_COUNTS
from ..calls.cases import Shape
from ..options import DTYPES, positive
from .building import Job, build_all
from .tune_arguments import adapt_arguments, changes, outputs_of

if TYPE_CHECKING:
    import torch

    from ...compiler.recording import Recorded
    from ..measure.timing import Statistics
    from ..predict.devices import Device
    from .tune_rank import Ranked

TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 1e-5}  # of the norm: a rounding, and the order of sums
TOKENS = {"cuda": 4096, "cpu": 1024}
REPEATS = {"cuda": 30, "cpu": 10}
SHOWN = 10
SAME, CLOSE, WRONG = "same bits", "close", "WRONG"


@dataclass(frozen=True)
class Tried:
    """A plan: what it changes, how its outputs compare, its time; `refused` says why where it could not run."""

    plan: str
    heuristic: bool
    outputs: str = ""
    refused: str = ""
    time: Statistics | None = None
    predicted_us: float | None = None


def calls_with(family: str) -> list[str]:
    """The calls that launch a family, those first that launch little else."""
    from ..calls.cases import Case
    from ..calls.launches import launches
    from ..calls.table import CALLS

    shapes = [Shape(tokens, 4, 2560, "bfloat16") for tokens in (4096, 64)]
    found = {
        name: [one.family for shape in shapes for one in launches(Case(name, shape), "cuda", 264)] for name in CALLS
    }
    return sorted((name for name, families in found.items() if family in families), key=lambda name: len(found[name]))


def find(family: str, shape: Shape, device: torch.device) -> Recorded:
    """The kernel of a family as an ordinary call launches it. Raises MHCError for a family that none launches."""
    from ...compiler.recording import record_launches
    from ..calls.every_call import every_call

    runs = every_call(shape, device)
    for name in calls_with(family):
        for one in record_launches(runs[name]):
            if one.family == family:
                return one
    raise MHCError(f"tune: {family}: expected a kernel family that a call launches here, got one that none does")


def ranked_plans(
    family: str, shape: Shape, gpu: Device, processes: int, limit: int | None = None
) -> tuple[list[Ranked], dict[str, Any]]:
    """The plans of a family by their predicted time, and the heuristic's. Raises MHCError where no call launches it."""
    from ..calls.cases import Case
    from ..calls.launches import launches
    from .tune_plans import alternatives, shares
    from .tune_rank import rank

    blocks = 2 * int(gpu.constants.sms)
    for call in calls_with(family):
        for one in launches(Case(call, shape), "cuda", blocks):
            if one.family == family:
                plans = [one.parameters, *[*shares(one), *alternatives(one.parameters, "cuda")][:limit]]
                return rank(one, plans, one.streams, gpu, processes), one.parameters
    raise MHCError(f"tune: {family}: expected a kernel family that a call launches here, got one that none does")


def tune(
    one: Recorded,
    target: str,
    processes: int,
    repeats: int,
    limit: int | None,
    ranked: Sequence[Ranked] = (),
) -> list[Tried]:
    """Every plan, the heuristic's first, then as `ranked`; of those that were timed, the fastest first."""
    from ... import compiler
    from ..measure.machine import last_level_cache
    from ..measure.timing import clock_for, measure
    from .building import brief
    from .tune_plans import alternatives, compiled, shares

    kind = "cpu" if target == "cpu" else "cuda"
    order = [each.parameters for each in ranked]
    others = [*shares(one), *alternatives(one.parameters, kind)]
    others.sort(key=lambda plan: order.index(plan) if plan in order else len(order))
    predicted = {changes(each.parameters, one.parameters): each.us for each in ranked}
    plans = [one.parameters, *others[:limit]]
    built = build_all([Job(one.family, compiled(plan)) for plan in plans], target, processes)
    errors = {str(each.job.parameters): each.error for each in built}
    written = outputs_of(one)
    tried, runs = [], {}
    for plan in plans:
        label, heuristic = changes(plan, one.parameters), plan is one.parameters
        if refused := errors[str(compiled(plan))]:
            tried.append(Tried(label, heuristic, refused=refused))
            continue
        try:
            arguments = adapt_arguments(one, plan, written)
            run = partial(compiler.kernel(one.family, target, **compiled(plan)), **arguments)
            run()
            outputs = compare(arguments, one.arguments, written)
        except Exception as error:  # a launch that the device refuses, or an argument that no longer fits
            tried.append(Tried(label, heuristic, refused=brief(error)))
            continue
        tried.append(Tried(label, heuristic, outputs))
        if outputs != WRONG:
            runs[label] = run
    device = next(value.device for value in one.arguments.values() if hasattr(value, "device"))
    times = measure(runs, clock_for(device, last_level_cache(device)), repeats)
    timed = [replace(each, time=times.get(each.plan), predicted_us=predicted.get(each.plan)) for each in tried]
    return sorted(timed, key=lambda each: each.time.median if each.time else float("inf"))


def compare(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], written: Sequence[str]) -> str:
    """Compare outputs with the expected ones: a verdict. Partial sums in different numbers are added up first."""
    import torch

    verdict = SAME
    for name in written:
        one, other = got[name], expected[name]
        if one.shape != other.shape:
            one, other = one.sum(0), other.sum(0)
        if not torch.equal(one, other):
            norm = torch.linalg.vector_norm
            error = float(norm((one - other).float()) / norm(other.float()).clamp_min(1e-30))
            if not error <= TOLERANCE[str(other.dtype).rpartition(".")[2]]:  # NaN is refused too
                return WRONG
            verdict = CLOSE
    return verdict


def table(tried: Sequence[Tried]) -> str:
    """The ten fastest, and the heuristic's wherever it stands."""
    from tabulate import tabulate

    timed = [each for each in tried if each.time]
    chosen = next((each for each in timed if each.heuristic), None)
    lines = []
    for place, each in enumerate(timed, start=1):
        if each.time and (place <= SHOWN or each.heuristic):
            quartiles = f"{each.time.lower_quartile * 1e3:.4g} to {each.time.upper_quartile * 1e3:.4g}"
            ratio = f"{chosen.time.median / each.time.median:.2f}x" if chosen and chosen.time else ""
            mark = "heuristic" if each.heuristic else ""
            model = f"{each.predicted_us / 1e3:.4g}" if each.predicted_us else ""
            lines.append(
                (place, f"{each.time.median * 1e3:.4g}", model, quartiles, ratio, each.outputs, mark, each.plan)
            )
    headers = ("", "time, ms", "predicted", "quartiles", "faster", "outputs", "", "plan")
    return tabulate(lines, headers=headers, disable_numparse=True, colalign=("right", "right", *["left"] * 6))


def parser() -> argparse.ArgumentParser:
    """The options."""
    one = argparse.ArgumentParser(prog="python -m mhc_tilelang.perf.gpu.tune", description=__doc__.split("\n")[0])
    one.add_argument("families", nargs="+", metavar="FAMILY", help="kernel families, such as post_project")
    add_device_argument(one)
    one.add_argument("--tokens", type=positive, metavar="T", help="token count (default: 4096, on a CPU 1024)")
    one.add_argument("--streams", type=int, choices=STREAM_COUNTS, default=4, help="residual streams, n (default: 4)")
    one.add_argument("--width", type=positive, default=2560, metavar="C", help="hidden size (default: 2560)")
    one.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the stream (default: bfloat16)")
    one.add_argument("--plans", type=positive, metavar="N", help="plans besides the heuristic's (default: all)")
    one.add_argument("--processes", type=positive, metavar="N", help="compilers at a time (default: one per core)")
    one.add_argument("--repeats", type=positive, metavar="R", help="rounds that count (default: 30, on a CPU 10)")
    text = "rank the plans by what they are predicted to take on b200, h200, h100 or a file's GPU, and run none"
    one.add_argument("--predict", metavar="GPU", help=text)
    add_json_argument(one)
    return one


def main(argv: Sequence[str] | None = None) -> int:
    """Tune one family after the other; 1 where a plan wrote something else."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except MHCError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    """Print a table a family, and what was refused."""
    import torch

    from ...compiler import target_of
    from ..predict import devices
    from . import tune_rank

    processes = args.processes or os.cpu_count() or 1
    if args.predict:
        shape = Shape(args.tokens or TOKENS["cuda"], args.streams, args.width, args.dtype)
        content = {}
        for family in args.families:
            asked = devices.device(args.predict)
            ranked, heuristic = ranked_plans(family, shape, asked, processes, args.plans)
            print(
                f"{family}, {shape.num_tokens} x {shape.num_streams} x {shape.hidden_size}, {shape.dtype}, predicted:"
            )
            print(tune_rank.table(ranked, heuristic) + "\n")
            content[family] = [(changes(each.parameters, heuristic), each.us, each.why) for each in ranked]
        write_json(args.json, {"gpu": args.predict, "families": content})
        return 0
    device = pick_device(args.device)
    gpu = devices.named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    shape = Shape(args.tokens or TOKENS[device.type], args.streams, args.width, args.dtype)
    repeats = args.repeats or REPEATS[device.type]
    results: dict[str, list[Tried]] = {}
    for family in args.families:
        ranked, heuristic = ranked_plans(family, shape, gpu, processes) if gpu else ([], {})
        if gpu:
            print(tune_rank.table(ranked, heuristic) + "\n")
        with torch.no_grad():
            one = find(family, shape, device)
            results[family] = tune(one, target_of(device), processes, repeats, args.plans, ranked)
        tried = results[family]
        refused, wrong = (
            sum(bool(test) for test in tests)
            for tests in ([each.refused for each in tried], [each.outputs == WRONG for each in tried])
        )
        print(
            f"{family}, {shape.num_tokens} x {shape.num_streams} x {shape.hidden_size}, {shape.dtype}: "
            f"{len(tried)} plans, {refused} refused, {wrong} wrong\n{table(tried)}\n"
        )
    found = {family: [asdict(each) for each in tried] for family, tried in results.items()}
    facts = {"device": describe(device), "shape": asdict(shape), "repeats": repeats, "families": found}
    write_json(args.json, facts)
    return 1 if any(each.outputs == WRONG for tried in results.values() for each in tried) else 0


if __name__ == "__main__":
    sys.exit(main())
