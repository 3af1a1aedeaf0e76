"""Text and JSON about the peers. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..bench.run import Result
    from .prepare import Loaded, PeerResult

TIME = "time: of the peer's own call in its own layout; one that returns new tensors allocates them within it."


def facts(loaded: Sequence[Loaded]) -> list[dict[str, Any]]:
    """Return the peers that were asked for, for the header and the JSON; `skipped` is None of those that run."""
    return [
        {
            "name": one.name,
            "version": one.version or None,
            "skipped": one.skipped or None,
            "note": (one.peer and one.peer.note) or None,
        }
        for one in loaded
    ]


def header(peers: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for those that run, and one for each that does not."""
    running = [f"{peer['name']} {peer['version']}" for peer in peers if not peer["skipped"]]
    lines = [f"peers: {', '.join(running)}"] if running else []
    lines += [f"{peer['name']}: {peer['note']}" for peer in peers if peer["note"]]
    return lines + [f"{peer['name']}: skipped: {peer['skipped']}" for peer in peers if peer["skipped"]]


def table(results: Sequence[Result]) -> list[str]:
    """Return a row per peer and case, then what they were skipped for, each reason once; nothing without peers."""
    from tabulate import tabulate

    pairs = [(result, peer) for result in results for peer in result.peers]
    rows = [row(result, peer) for result, peer in pairs if not peer.call.skipped]
    headers = ["peer", "its function", "kernel", "C", "tokens", "time, ms", "vs kernel", "differs by", "allowed"]
    align = ["left", "left", "left", *["right"] * 6]
    lines = [tabulate(rows, headers=headers, disable_numparse=True, colalign=align), "", TIME] if rows else []
    lines += list_skipped(pairs)
    reasons = {peer.call.because: None for _, peer in pairs if peer.call.because}
    for reason in reasons:
        who = dict.fromkeys(peer.call.peer for _, peer in pairs if peer.call.because == reason)
        lines.append(f"allowed more than rounding in float32, {', '.join(who)}: {reason}.")
    if any(peer.time is None and not peer.call.skipped for _, peer in pairs):
        lines.append("DIFFERS: what it returns is not the kernel's result, so it is not timed.")
    return lines


def list_skipped(pairs: Sequence[tuple[Result, PeerResult]]) -> list[str]:
    """List peers and reasons, a line each, with the kernels that they concern."""
    kernels: dict[tuple[str, str], dict[str, None]] = {}
    for result, peer in pairs:
        if peer.call.skipped:
            kernels.setdefault((peer.call.peer, peer.call.skipped), {})[result.case.kernel] = None
    return [f"{name}: skipped {', '.join(which)}: {reason}" for (name, reason), which in kernels.items()]


def row(result: Result, peer: PeerResult) -> list[str]:
    """Return one line of the table."""
    call, case = peer.call, result.case
    line = [call.peer, call.function, case.kernel, str(case.hidden_size or ""), str(case.shape.num_tokens)]
    if peer.time is None:
        line += ["DIFFERS", ""]
    else:
        doubtful = "!" if peer.time.doubtful else ""
        line += [f"{peer.time.median * 1e3:.3g}{doubtful}", f"{peer.time.median / result.kernel.median:.2f}×"]
    return [*line, f"{call.error:.1e}", f"{call.tolerance:.0e}"]


def as_json(result: Result, peer: PeerResult) -> dict[str, Any]:
    """One peer on one case. `time` and `over_kernel` are None where it was skipped or differs."""
    call, time = peer.call, peer.time
    return {
        "peer": call.peer,
        "function": call.function or None,
        "skipped": call.skipped or None,
        "error": None if call.error is None or call.error != call.error else call.error,  # JSON has no NaN
        "output": call.output or None,
        "tolerance": call.tolerance,
        "because": call.because or None,
        "agrees": None if call.skipped else time is not None,
        "time": asdict(time) if time else None,
        "over_kernel": time.median / result.kernel.median if time else None,
    }
