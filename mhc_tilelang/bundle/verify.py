"""A bundle against its own word: every file's hash, and its kernels on the golden vectors where they can run.

Neither tilelang nor a compiler is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..compiler import target_of
from ..errors import BundleError
from . import cpu_target, golden, manifest
from .described import INPUT, OUTPUT
from .load import Bundle

SHOWN = 5  # files that are named where there are more than there should be


@dataclass(frozen=True)
class Result:
    """An output of a kernel: the largest share of its tolerance that an element takes, 1 being the limit.

    Where the kernel did not run, `note` says why.
    """

    target: str
    kernel: str
    output: str
    share: float
    ran: bool
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the result is within the tolerance, or was not run."""
        return not self.ran or self.share <= 1


def check_files(folder: Path) -> dict[str, Any]:
    """Check that a bundle's files are as exported; return its manifest. Raises BundleError for the first that is not.

    There must be no other files, and the golden vectors that the indices name must be among them.
    """
    facts = manifest.read(folder)
    if added := manifest.others(folder, facts):
        names = ", ".join(added[:SHOWN]) + (f" and {len(added) - SHOWN} more" if len(added) > SHOWN else "")
        raise BundleError(f"{folder}: expected no files but those of the manifest, got {names}")
    for name in facts["files"]:
        manifest.content_of(folder, facts, name)
    arrays = golden.arrays_of(manifest.content_of(folder, facts, golden.ARRAYS))
    for target in facts["targets"]:
        for vector in vectors_of(folder, facts, target):
            for buffer in vector["buffers"]:
                if buffer["array"] is not None and buffer["array"] not in arrays:
                    where = f"{folder}: {golden.ARRAYS}: {vector['kernel']}"
                    raise BundleError(f"{where}: expected an array {buffer['array']}, got none")
    return facts


def vectors_of(folder: Path, facts: dict[str, Any], target: str) -> list[dict[str, Any]]:
    """Return the golden vectors of a target."""
    name = facts["golden"].get(target)
    if name is None:
        raise BundleError(f"{folder}: golden: expected an index for {target}, got none")
    vectors: list[dict[str, Any]] = json.loads(manifest.content_of(folder, facts, name))
    return vectors


def results(folder: Path, facts: dict[str, Any]) -> Iterator[Result]:
    """Yield every output of every kernel that has a golden vector."""
    bundle = Bundle(folder)
    arrays = golden.arrays_of(manifest.content_of(folder, facts, golden.ARRAYS))
    for target, part in facts["targets"].items():
        entries = {entry["name"]: entry for entry in part["kernels"]}
        reason = why_not(target, part, folder)
        for vector in vectors_of(folder, facts, target):
            name, outputs = vector["kernel"], [b for b in vector["buffers"] if b["role"] == OUTPUT]
            if reason:
                yield from (Result(target, name, b["name"], 0.0, False, reason) for b in outputs)
                continue
            got = run(bundle, target, entries[name], vector, arrays)
            for b in outputs:
                yield Result(target, name, b["name"], share_of(b, golden.tensor_of(arrays, b), got[b["name"]]), True)


def why_not(target: str, part: dict[str, Any], folder: Path) -> str:
    """Why this machine cannot run a target's kernels; empty if it can."""
    if part["kind"] == "cpu":
        try:
            cpu_target.check_machine(part, str(folder))
        except BundleError:
            return "not for this processor"
        return ""
    if not torch.cuda.is_available():
        return "no GPU here"
    here = target_of(torch.device("cuda", 0))
    return "" if here == target else f"the GPU here is {here}"


def run(
    bundle: Bundle, target: str, entry: dict[str, Any], vector: dict[str, Any], arrays: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Call a kernel on its golden inputs, with outputs that are NaN before."""
    device = torch.device("cpu" if bundle.manifest["targets"][target]["kind"] == "cpu" else "cuda")
    tensors = {}
    for buffer in vector["buffers"]:
        if buffer["role"] == INPUT:
            tensors[buffer["name"]] = golden.tensor_of(arrays, buffer).to(device)
        else:
            dtype = getattr(torch, buffer["dtype"])
            tensors[buffer["name"]] = torch.full(buffer["shape"], torch.nan, dtype=dtype, device=device)
    scalars = {name: vector["numbers"][name] for name in entry["scalars"]}
    bundle.kernel(target, entry)(**tensors, **scalars)
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def share_of(buffer: dict[str, Any], kept: torch.Tensor, got: torch.Tensor) -> float:
    """Return the largest share of the tolerance, of the elements that were kept.

    Infinite for a NaN anywhere, and for any difference where none is allowed.
    """
    if got.isnan().any():
        return float("inf")
    expected, values = kept.double(), got.flatten()[:: buffer["step"]].double()
    distance = (values - expected).abs()
    share = distance / (buffer["atol"] + buffer["rtol"] * expected.abs())
    return float(torch.where(distance == 0, 0.0, share).max()) if share.numel() else 0.0
