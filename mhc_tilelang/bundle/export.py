"""A bundle as a whole: every target's kernels, golden vectors, and the manifest.

It is made beside its place and moved there when it is whole, so that a bundle is never half there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..cli.device import versions
from ..errors import MHCError
from ..spec import MHCSpec
from . import cpu_target, cuda_target, golden, manifest, workload
from .described import Described, describe, unique_names

Tick = Callable[[], object]
ALIGNMENT = {"cpu": "of an element", "cuda": 16}


def kernels_for(
    spec: MHCSpec, dtype: str, target: str, forward_only: bool, rms_norm_eps: float | None
) -> list[Described]:
    """Return the kernels that a model needs on a target, traced and named. Loads tilelang."""
    common = {"num_streams": spec.num_streams, "hidden_size": spec.hidden_size, "dtype": dtype}
    wanted = workload.kernels_of(spec, dtype, target, forward_only, rms_norm_eps)
    return unique_names([describe(family, parameters, common) for family, parameters in wanted])


def export(
    spec: MHCSpec,
    dtype: str,
    targets: Sequence[str],
    folder: Path,
    *,
    forward_only: bool = False,
    rms_norm_eps: float | None = None,
    march: str | None = None,
    started: Callable[[int], Tick] = lambda _: lambda: None,
) -> dict[str, Any]:
    """Write a bundle to `folder`, which must not exist or be empty; returns its manifest.

    Args:
        spec, dtype: the model's.
        targets: "cpu" and CUDA architectures.
        forward_only: leave out what only a backward launches.
        rms_norm_eps: eps of connections that normalise the layer's input; None: there are none.
        march: processor architecture of the CPU's library; x86-64-v3 unless given.
        started: is told how many steps there will be, and returns what is called after each.

    Raises:
        MHCError: a target or march that there is none of, a folder that has files or cannot be written.
        CompilerError: a compiler is missing or refuses.
    """
    march = march or cpu_target.default_march()
    for target in targets:
        if target == "cpu":
            cpu_target.features_of(march)
        else:
            cuda_target.check_arch(target)
    kernels = {target: kernels_for(spec, dtype, target, forward_only, rms_norm_eps) for target in targets}
    tick = started(2 * sum(map(len, kernels.values())))
    folder = folder.resolve()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            found = "one with files" if folder.is_dir() else "a file"
            raise MHCError(f"--out {folder}: expected a new or an empty folder, got {found}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            made = Path(scratch) / "bundle"
            made.mkdir()
            facts = write(spec, dtype, kernels, forward_only, rms_norm_eps, march, made, tick)
            if folder.exists():
                folder.rmdir()
            os.replace(made, folder)
    except OSError as error:
        raise MHCError(f"--out {folder}: cannot be written: {error}") from error
    return facts


def write(
    spec: MHCSpec,
    dtype: str,
    kernels: dict[str, list[Described]],
    forward_only: bool,
    rms_norm_eps: float | None,
    march: str,
    folder: Path,
    tick: Tick,
) -> dict[str, Any]:
    """Write all files of a bundle; return the manifest."""
    targets: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    vectors: dict[str, Any] = {}
    for target, described in kernels.items():
        if target == "cpu":
            targets[target] = cpu_target.write(described, dtype, march, folder, tick)
        else:
            targets[target] = cuda_target.write(described, target, folder, tick)
        vectors[target] = golden.make(described, spec, dtype, target, forward_only, rms_norm_eps, arrays, tick)
    golden.write(folder, arrays, vectors)
    facts = {
        "format": manifest.FORMAT,
        "versions": {**versions(), "sources": manifest.sources_hash()},
        "spec": asdict(spec),
        "dtype": dtype,
        "forward_only": forward_only,
        "rms_norm_eps": rms_norm_eps,
        "layout": {"order": "row-major", "contiguous": True, "alignment": ALIGNMENT},
        "targets": targets,
        "golden": {target: f"golden/{target}/index.json" for target in targets},
    }
    manifest.write(folder, facts)
    return manifest.read(folder)


def total_bytes(facts: dict[str, Any]) -> int:
    """Return the size of a bundle's files."""
    return sum(file["bytes"] for file in facts["files"].values())
