"""Predictions kept with the source, for what has no nvcc: `python -m mhc_tilelang.perf.predict.stored` makes them.

Every call of CALLS at one width, the fused boundary at those of all models, on every device of `devices`, from a cold
last-level cache, as `bench` measures. Each row has a hash of the TIR of its kernels, their sizes and the device's
constants, which a test compares: only what has changed is predicted anew, everything with `--again`, as after a change
of the model. `simulate`, `bench overhead` and docs/tuning.md read them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ..calls.cases import Case, Shape
from .devices import DEVICES, FILES, Device

FILE = Path(__file__).with_name("predictions.json")
TOKENS, STREAMS, DTYPE, WIDTH = 4096, 4, "bfloat16", 2560
WIDTHS = (WIDTH,)  # at which `simulate` has them; each further one is minutes of nvcc
BOUNDARY = ("post_pre", "post_pre_backward")
CALLS = (
    *("expand", "aggregate", "aggregate_norm", "post", "project", "coefficients", "sinkhorn"),
    *("aggregate_quantized", "post_pre", "post_pre_delayed", "post_pre_quantized", "replay"),
    *("expand_backward", "aggregate_backward", "aggregate_norm_backward"),
    *("post_backward", "project_backward_aggregated", "coefficients_backward", "sinkhorn_backward"),
    "post_pre_backward",
)


def cases(width: int) -> list[Case]:
    """Return the cases predicted at a width: every call at WIDTH, the fused boundary alone at other models' widths."""
    calls = CALLS if width == WIDTH else BOUNDARY
    return [Case(call, Shape(TOKENS, STREAMS, width, DTYPE)) for call in calls]


def digest(case: Case, device: Device) -> str:
    """Hash the inputs of a prediction, except for the tools and the model. Loads tilelang."""
    from .predicted import launches_of

    launches = launches_of(case, device, "")
    texts = [f"{one.function.script()} {sorted(one.sizes.items())}" for one in launches]
    return hashlib.sha256("\0".join([*texts, FILES[device.name].read_text()]).encode()).hexdigest()[:16]


@cache
def rows() -> dict[tuple[str, str, int], dict[str, Any]]:
    """Load the stored predictions, by device, call and width."""
    stored = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else []
    return {(row["gpu"], row["name"], row["hidden_size"]): row for row in stored}


class Connection(NamedTuple):
    """Predicted µs of a sublayer's fused boundary, forward and backward, at TOKENS tokens: middle, low, high."""

    forward: tuple[float, float, float]
    backward: tuple[float, float, float]


def connection(device: str, hidden_size: int, num_streams: int) -> Connection | str:
    """Return the stored times of the fused boundary, or the reason why there are none."""
    found = []
    for call in BOUNDARY:
        row = rows().get((device.lower(), call, hidden_size)) if num_streams == STREAMS else None
        if row is None:
            return f"{device}, n = {num_streams}, C = {hidden_size}: nothing is stored"
        if row["low"] is None:
            return f"{call} at C = {hidden_size}: no answer: {row['reasons'][0]}"
        middle = row["us"] or (row["low"] + row["high"]) / 2
        found.append((middle, row["low"], row["high"]))
    return Connection(*found)


def delayed(connection: Connection, device: str, hidden_size: int, is_beside: bool) -> Connection | None:
    """Return a connection with the forward of the delayed form, if that is stored; where the coefficients are beside
    the layer, without them, who cost nothing there. The backward is as it was: the delayed one is not predicted.
    """
    row = rows().get((device.lower(), "post_pre_delayed", hidden_size))
    if row is None or row["low"] is None:
        return None
    middle = row["us"] or (row["low"] + row["high"]) / 2
    hidden = [part for part in row["parts"] if part["family"] == "coefficients"] if is_beside else []
    times = zip((middle, row["low"], row["high"]), ("us", "low", "high"), strict=True)
    forward = [us - sum(part[key] for part in hidden) for us, key in times]
    return Connection((forward[0], forward[1], forward[2]), connection.backward)


def write(again: bool) -> None:
    """Predict what has changed since it was stored, or everything; each row is stored as it comes."""
    from .predicted import predict

    wanted = {(d.name, c.kernel, width): (c, d) for width, d in product(WIDTHS, DEVICES.values()) for c in cases(width)}
    found = {key: row for key, row in rows().items() if key in wanted}
    for key, (case, device) in wanted.items():
        made_from = digest(case, device)
        if again or key not in found or found[key]["digest"] != made_from:
            print(*key, file=sys.stderr, flush=True)
            found[key] = round_numbers({**predict(case, device, flushed=True).as_row(), "digest": made_from})
            lines = (json.dumps(found[key]) for key in wanted if key in found)
            FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def round_numbers(value: Any) -> Any:
    """Round every number with a fraction to four digits: what lies beyond moves with numpy."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: round_numbers(each) for name, each in value.items()}
    return [round_numbers(each) for each in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    write("--again" in sys.argv)
