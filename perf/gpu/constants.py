"""Measure a device's constants for `predict`, in two minutes: `python -m mhc_tilelang.perf.gpu.constants --out FILE`.

`constants.cu` is built for the GPU at hand and run; from what it prints:

    bandwidth       median over the mixes of reads and writes of the slope between two sizes; its range is theirs
    clock_ghz       cycles of a spin over its time
    latency         time of a step of the chase, in cycles
    launch_us       from launch to launch of an empty block
    block_cycles    of an SM, for each block of a grid of empty ones
    barrier_cycles  slope of a barrier's cycles over the further warps of a scheduler

What no microbenchmark gives (overlap, pace, tail) is B200's, fitted, and says so. `predict --gpu FILE` reads it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ...compiler.toolchain import find_nvcc
from ...errors import MHCError
from ..predict.devices import DEVICES
from ..predict.model import SCHEDULERS

SOURCE = Path(__file__).with_suffix(".cu")
ARCHS = {(8, 0): "sm_80", (9, 0): "sm_90a", (10, 0): "sm_100a", (12, 0): "sm_120a"}
NOT_MEASURED = ("overlap", "pace", "tail")


def build(folder: Path, arch: str) -> Path:
    """Compile the program. Raises MHCError with the compiler's words."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise MHCError("constants: expected nvcc, found none")
    made = folder / "constants"
    command = [nvcc.path, "-O2", "-std=c++17", f"-arch={arch}", str(SOURCE), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MHCError(f"constants: nvcc failed:\n{done.stderr.strip()}")
    return made


def device_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a device's file from what the program printed."""
    arch = ARCHS.get((raw["major"], raw["minor"]))
    if arch is None:
        raise MHCError(f"constants: expected a GPU of {', '.join(ARCHS.values())}, got {raw['major']}.{raw['minor']}")
    clock = raw["spin"]["cycles"] / raw["spin"]["us"] / 1e3
    slopes = bandwidths(raw["copies"])
    cycles = {one["warps"]: one["us"] * clock * 1e3 / one["times"] for one in raw["barriers"]}
    fewest, most = min(cycles), max(cycles)
    empty = raw["empty"]
    one_more = (empty["many_us"] - empty["one_us"]) * clock * 1e3 * raw["sms"] / empty["blocks"]
    found = {
        "sms": (raw["sms"], "cudaDeviceProp"),
        "clock_ghz": (clock, "clock64 over the time of a spin"),
        "latency": (raw["chase"]["us"] * clock * 1e3 / raw["chase"]["steps"], "a pointer chase over 1 GiB"),
        "launch_us": (empty["one_us"], "launches of an empty block, one after the other"),
        "block_cycles": (one_more, "a grid of empty blocks"),
        "barrier_cycles": (
            (cycles[most] - cycles[fewest]) / ((most - fewest) / SCHEDULERS),
            f"a block of {fewest} and one of {most} warps that only meet",
        ),
    }
    table = {name: {"value": value, "source": f"measured: {source}"} for name, (value, source) in found.items()}
    mixes = ", ".join(f"{mix} {slope:.2f}" for mix, slope in slopes.items())
    middle, source = median(slopes.values()), f"measured: copies by reads:writes, TB/s: {mixes}"
    table["bandwidth"] = {"value": middle, "low": min(slopes.values()), "high": max(slopes.values()), "source": source}
    for name in NOT_MEASURED:
        constant = DEVICES["b200"].table[name]
        table[name] = {"value": constant.value, "source": f"B200's, {constant.source}"}
    return {"name": raw["name"], "arch": arch, "cache_bytes": raw["l2_bytes"], "constants": table}


def bandwidths(copies: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """TB/s of each mix: bytes over time between the smaller and the larger size."""
    found = {}
    for mix in dict.fromkeys((one["reads"], one["writes"]) for one in copies):
        small, large = (one for one in copies if (one["reads"], one["writes"]) == mix)
        found["{}:{}".format(*mix)] = (large["bytes"] - small["bytes"]) / (large["us"] - small["us"]) / 1e6
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Build, run, store."""
    parser = argparse.ArgumentParser(
        prog="python -m mhc_tilelang.perf.gpu.constants", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the device file to write")
    parser.add_argument("--arch", default="native", help="architecture for nvcc (default: this GPU's)")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([build(Path(folder), args.arch)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise MHCError(f"constants: {done.stderr.strip()}")
        found = device_of(json.loads(done.stdout))
    except MHCError as error:
        print(error, file=sys.stderr)
        return 1
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, one in found["constants"].items():
        print(f"{name:15} {one['value']:10.4g}  {one['source']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
