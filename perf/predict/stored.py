"""Predictions kept with the source, for what has no nvcc: `python -m mhc_tilelang.perf.predict.stored` makes them.

Every call of CALLS at WIDTHS on every device of `devices`, from a cold last-level cache, as `bench` measures. Each row
has a hash of the TIR of its kernels and of the device's constants; a test compares. `simulate`, `bench overhead` and
docs/tuning.md read them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from ..calls.cases import Case, Shape
from .devices import DEVICES, FILES, Device

FILE = Path(__file__).with_name("predictions.json")
TOKENS, STREAMS, WIDTHS, DTYPE = 4096, 4, (2560,), "bfloat16"
CALLS = (
    *("expand", "aggregate", "aggregate_norm", "post", "project", "coefficients", "sinkhorn"),
    *("post_pre", "post_pre_delayed", "replay", "expand_backward", "aggregate_backward", "aggregate_norm_backward"),
    *("post_backward", "project_backward_aggregated", "coefficients_backward", "sinkhorn_backward"),
    "post_pre_backward",
)


def cases(width: int) -> list[Case]:
    """What is predicted at a width."""
    return [Case(call, Shape(TOKENS, STREAMS, width, DTYPE)) for call in CALLS]


def digest(case: Case, device: Device) -> str:
    """Of what a prediction is made from, but for the tools and the model. Loads tilelang."""
    from ...compiler.tracing import trace
    from .predicted import launches_of

    texts = [trace(one.family, one.parameters).script() for one in launches_of(case, device, "")]
    return hashlib.sha256("\0".join([*texts, FILES[device.name].read_text()]).encode()).hexdigest()[:16]


@cache
def rows() -> dict[tuple[str, str, int], dict[str, Any]]:
    """What is stored, by device, call and width."""
    stored = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else []
    return {(row["gpu"], row["name"], row["hidden_size"]): row for row in stored}


def write() -> None:
    """Predict everything anew."""
    from .predicted import predict

    found = []
    for width in WIDTHS:
        for device in DEVICES.values():
            for case in cases(width):
                print(device.name, case.kernel, width, file=sys.stderr, flush=True)
                row = predict(case, device, flushed=True).as_row()
                found.append(rounded({**row, "digest": digest(case, device)}))
    FILE.write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """Four digits of every number with a fraction: what lies beyond moves with numpy."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    write()
