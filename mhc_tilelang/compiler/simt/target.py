"""The executor as a target: within `executing`, CPU tensors are computed by generated CUDA code.

    with simt.executing() as launches:
        h_res = mhc.sinkhorn(logits)
    launches[-1].counts.tensors["logits"].read_sectors

Every check, operator and module then runs the kernels that a GPU would run, with a GPU's plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import compiler
from ..architectures import SHARED_BYTES
from ..cpu.build import kernel_hash
from ..disk_cache import Made, get_or_make
from ..kernel import Kernel, Signature
from ..tracing import progress
from .launch import Counts, CudaSource, launch

if TYPE_CHECKING:
    import torch

PACKAGE = Path(compiler.__file__).parent
MAKERS = (PACKAGE / "cuda.py", PACKAGE / "cuda_source.py")  # what a source is made by, besides what makes CPU kernels
ARCH = "sm_80"
PARALLEL_BLOCKS = 8  # few, so that small shapes are split as large ones are


@dataclass(frozen=True)
class Launched:
    """A kernel that was executed: family, what it is compiled with, its run-time sizes and scalars, what it did."""

    family: str
    parameters: dict[str, Any]
    numbers: dict[str, float]
    counts: Counts


class Entered(NamedTuple):
    """An `executing` that is entered: what it has seen, and how its kernels with atomics run."""

    launches: list[Launched]
    resident: int
    seed: int


_open: list[Entered] = []


@contextmanager
def executing(arch: str = ARCH, parallel_blocks: int = PARALLEL_BLOCKS, seed: int = 0) -> Iterator[list[Launched]]:
    """Execute every kernel for CPU tensors as the CUDA of `arch`; yields the launches, as they come.

    Of kernels that synchronise by atomics, `parallel_blocks` run at a time, in an order that `seed` gives.

    Raises SimtError where a kernel is defective, LaunchError where a GPU would refuse the launch.
    """
    if arch not in SHARED_BYTES:
        raise ValueError(f"executing: arch: expected one of {', '.join(SHARED_BYTES)}, got {arch!r}")
    if parallel_blocks < 1:
        raise ValueError(f"executing: parallel_blocks: expected at least 1, got {parallel_blocks}")
    launches: list[Launched] = []
    with compiler.emulating(compiler.Emulator(f"simt-{arch}", partial(load, arch), parallel_blocks)):
        _open.append(Entered(launches, parallel_blocks, seed))
        try:
            yield launches
        finally:
            del _open[next(k for k, entered in enumerate(_open) if entered.launches is launches)]


def load(arch: str, family: str, parameters: dict[str, Any]) -> Kernel:
    """Return the kernel of a family as one that the executor runs."""
    source, signature = load_or_generate(family, parameters, arch)

    def run(tensors: Sequence[torch.Tensor], sizes: dict[str, int], scalars: list[float]) -> None:
        named = dict(zip((buffer.name for buffer in signature.buffers), tensors, strict=True))
        numbers = {**sizes, **dict(zip(signature.scalars, scalars, strict=True))}
        used = {name: tensor for name, tensor in named.items() if name in source.arguments}
        innermost = _open[-1]
        counts = launch(source, arch, used, numbers, innermost.resident, innermost.seed)
        for entered in _open:
            entered.launches.append(Launched(family, parameters, numbers, counts))

    return Kernel(family, signature, run)


def load_or_generate(family: str, parameters: dict[str, Any], arch: str) -> tuple[CudaSource, Signature]:
    """Return a kernel's source and signature, cached on disk: tilelang takes seconds to generate some."""
    made_by = "".join(path.read_text(encoding="utf-8") for path in MAKERS)
    name = f"{family}-{kernel_hash(family, {**parameters, 'arch': arch, 'made by': made_by}, False)}"

    def make(_scratch: Path) -> Made:
        from ..cuda_source import generate_from
        from ..tracing import signature_of, trace

        with progress(family, arch, parameters):
            func = trace(family, parameters)
            return {"source": asdict(generate_from(func, arch)), "signature": asdict(signature_of(func))}, None

    def use(facts: dict[str, Any], _file: Path) -> tuple[CudaSource, Signature]:
        source: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["source"].items()}
        return CudaSource(**source), Signature.from_json(facts["signature"], name)

    return get_or_make("cuda-source", name, make, use)
