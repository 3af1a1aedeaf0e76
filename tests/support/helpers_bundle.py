"""A bundle that is quick to make, shared by the tests of export, loading and hosts."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from atexit import register
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from mhc_tilelang import compiler, launch, ops
from mhc_tilelang.bundle import export, load, workload
from mhc_tilelang.checking.inputs import Inputs
from mhc_tilelang.spec import MHCSpec

SPEC = MHCSpec(64)
DTYPE = "bfloat16"
RUN = """
import torch
import mhc_tilelang as mhc
from mhc_tilelang import launch

def results():
    torch.manual_seed(3)
    T = 37
    x, f = torch.randn(T, 4, 64).bfloat16(), torch.randn(T, 64).bfloat16()
    return [
        mhc.expand(f, 4),
        mhc.sinkhorn(torch.randn(T, 4, 4)),
        mhc.post(x, f, torch.rand(T, 4), torch.rand(T, 4, 4)),
        launch.project(x, torch.randn(24, 256) / 8),
    ]
"""


def few_functions(spec: MHCSpec, inputs: Inputs) -> Iterator[list[torch.Tensor]]:
    """Yield four kernels: a copy, a 16-bit result, a float32 one, and one with a scalar argument."""
    yield [ops.expand(inputs.h, spec.num_streams)]
    yield [ops.sinkhorn(inputs.logits, spec.sinkhorn_iters, spec.sinkhorn_eps)]
    yield [ops.post(inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res)]
    yield [launch.project(inputs.x, inputs.phi)]


def make(folder: Path, targets: list[str], functions=few_functions) -> Path:
    """A bundle of what these functions launch forward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "functions", functions)
        patch.setattr(workload, "streams", lambda *_: [])
        patch.setattr(workload, "TOKEN_COUNTS", (1,))
        export.export(SPEC, DTYPE, targets, folder, forward_only=True)
    return folder


@cache
def small_bundle() -> Path:
    """The CPU's, made once a process; copy it to change it."""
    scratch = Path(tempfile.mkdtemp(prefix="mhc-bundle-"))
    register(shutil.rmtree, scratch, ignore_errors=True)
    return make(scratch / "bundle", ["cpu"])


def blocked_imports(*names: str) -> str:
    """Python that lets these packages not be imported."""
    return f"""
import sys
class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {names!r}:
            raise ImportError(f'{{name}} is blocked')
sys.meta_path.insert(0, Refusing())
"""


PYTHON = sys.executable


def use(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Kernels come from these bundles, and none is loaded yet."""
    monkeypatch.setattr(compiler, "_kernels", {})
    monkeypatch.setenv(compiler.BUNDLE_VARIABLE, os.pathsep.join(map(str, folders)))
    load.open_bundle.cache_clear()


def changed_bytes(folder: Path, name: str) -> None:
    """Change a byte in the middle of a file."""
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / name).write_bytes(content)
