"""Foundations of a bundle's checks: vectors of every kernel, a verification that can fail, hashes of all that matters.

Would catch: golden vectors that a form of the model is left out of, or that no second export gives again; a `--verify`
that compares a vector with itself; sources that change the meaning of a bundle and not its hash; a cubin that one
device loaded and another launches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_bundle import DTYPE, SPEC, small_bundle

from mhc_tilelang import cli, kernels, launch
from mhc_tilelang.bundle import driver, export, golden, load, manifest, verify, workload
from mhc_tilelang.bundle.described import UNUSED, describe
from mhc_tilelang.checking.inputs import Inputs
from mhc_tilelang.compiler import cpu
from mhc_tilelang.compiler.kernel import Buffer, Kernel, Signature
from mhc_tilelang.compiler.recording import recording
from mhc_tilelang.spec import MHCSpec

EPS = 1e-6


def test_every_form_has_vectors_and_a_second_export_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms in training have vectors: kernels with run-time scalars, and one that few tokens do not need."""

    def normed(spec: MHCSpec, inputs: Inputs, eps: float | None) -> Iterator[list[torch.Tensor]]:
        if eps is not None:
            weight = inputs.phi[0, : spec.hidden_size].contiguous()
            yield [launch.aggregate_norm_backward(inputs.layer_output, inputs.x, inputs.h_pre, weight, eps)[0]]

    monkeypatch.setattr(workload, "functions", lambda *_: [])
    monkeypatch.setattr(workload, "streams", normed)
    built: dict[str, Any] = {}
    compiled = golden.compile_float64
    monkeypatch.setattr(
        golden,
        "compile_float64",
        lambda kernel, scratch: built.get(kernel.name) or built.setdefault(kernel.name, compiled(kernel, scratch)),
    )
    described = export.kernels_for(SPEC, DTYPE, "cpu", True, EPS)
    families = [kernel.family for kernel in described]
    assert families == ["aggregate_norm_backward", "sum_partials", "sum_partials"]
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        arrays: dict[str, Any] = {}
        vectors = golden.make(described, SPEC, DTYPE, "cpu", True, EPS, arrays, lambda: None)
        assert [vector["kernel"] for vector in vectors] == [kernel.name for kernel in described]
        made.append({name: array.tobytes() for name, array in arrays.items()})
    assert made[0] == made[1]


def test_what_a_kernel_does_not_touch_is_unused() -> None:
    """Gradients that are not asked for: a host passes anything there, and no vector has them."""
    x, layer_output, h_post, h_res = (torch.empty(3, *shape, device="meta") for shape in ((4, 64), (64,), (4,), (4, 4)))
    with recording("cpu", 1) as noted:
        launch.post_backward(x, x, layer_output, h_post, h_res, needs_g_x=False, needs_g_layer_output=False)
    (one,) = noted
    kernel = describe(one.family, one.parameters, {"num_streams": 4, "hidden_size": 64, "dtype": "float32"})
    unused = {b.name for b, role in zip(kernel.signature.buffers, kernel.roles, strict=True) if role == UNUSED}
    assert unused >= {name for name, tensor in one.arguments.items() if tensor.numel() == 1}
    assert {"g_x", "g_layer_output"} <= unused


def nothing(write: Callable[[], None], outputs: list[torch.Tensor]) -> None:
    """A kernel that does not run."""


def last(write: Callable[[], None], outputs: list[torch.Tensor]) -> None:
    """One that is wrong in its last element."""
    write()
    for output in outputs:
        output.view(-1)[-1:] += 1


def zeros(write: Callable[[], None], outputs: list[torch.Tensor]) -> None:
    """One that writes zeros."""
    for output in outputs:
        output.zero_()


@pytest.mark.parametrize("spoil", [nothing, last, zeros])
def test_verify_names_a_wrong_kernel(
    spoil: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every kernel of a bundle, spoilt: no row passes, and the command says so."""
    right = load.Bundle.kernel

    def spoilt(self: load.Bundle, target: str, entry: dict[str, Any]) -> Kernel:
        kernel = right(self, target, entry)

        def launch(tensors: list[torch.Tensor], sizes: dict[str, int], scalars: list[int]) -> None:
            named = zip(entry["buffers"], tensors, strict=True)
            spoil(lambda: kernel.launch(tensors, sizes, scalars), [t for b, t in named if b["role"] == "out"])

        return Kernel(kernel.name, kernel.signature, launch)

    monkeypatch.setattr(load.Bundle, "kernel", spoilt)
    rows = list(verify.results(small_bundle(), manifest.read(small_bundle())))
    assert len(rows) == 4
    assert not any(row.passed for row in rows)
    assert cli.main(["export", "--verify", str(small_bundle())]) == 1
    assert capsys.readouterr().out.count("WRONG") == 4


def test_a_share_is_of_the_elements_that_were_kept() -> None:
    """Large outputs keep every step-th element: one of them that is off counts, and is compared with its own."""
    got = torch.randn(5, golden.MANY)
    step = golden.step_of(got.numel())
    assert step > 1
    kept, facts = got.flatten()[::step].clone(), {"step": step, "atol": 0.0, "rtol": 2.0**-23}
    assert verify.share_of(facts, kept, got) == 0
    got.view(-1)[3 * step] *= 1.001
    assert verify.share_of(facts, kept, got) > 1


def test_all_that_gives_a_kernel_its_meaning_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashed are launches, the kernels and their plans, the CPU's lowering and its header."""
    hashed: set[Path] = set()
    facts_of = manifest.facts_of
    monkeypatch.setattr(manifest, "facts_of", lambda path: (hashed.add(path.resolve()), facts_of(path))[1])
    manifest.sources_hash.__wrapped__()
    launching = {m.__file__ for name, m in sys.modules.items() if name.startswith("mhc_tilelang.launch")}
    assert launching
    wanted = {Path(name).resolve() for name in launching if name}
    wanted |= {path.resolve() for path in Path(kernels.__file__).parent.rglob("*.py")}
    lowering = Path(cpu.__file__).parent
    wanted |= {path.resolve() for pattern in ("*.py", "*.h") for path in lowering.rglob(pattern)}
    wanted |= {lowering.parent / f"{name}.py" for name in ("kernel", "tracing", "cuda", "cuda_source")}
    assert wanted <= hashed


def test_each_device_loads_a_cubin_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function belongs to the context that loaded it: one per device, each once, on its own stream."""
    entered: list[int] = []
    loaded: list[int] = []
    started: list[tuple[int, int, int]] = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        entered.append(wanted.index)
        yield
        entered.pop()

    def load_cubin(*_: object) -> int:
        loaded.append(entered[-1])
        return entered[-1]

    def start(function: int, at: driver.Launch, stream: int) -> None:
        assert entered[-1] == function
        started.append((function, at.arguments[0].value, stream))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda wanted: SimpleNamespace(cuda_stream=100 + wanted.index))
    monkeypatch.setattr(driver, "load", load_cubin)
    monkeypatch.setattr(driver, "start", start)
    facts = {
        "function": "f",
        "grid": ["num_tokens", "1", "1"],
        "threads": [32, 1, 1],
        "shared_bytes": 0,
        "arguments": [["x", "p"]],
    }
    kernel = driver.kernel("post", Signature((Buffer("x", "float32", ("num_tokens",)),), ()), b"cubin", facts)
    for index in (0, 1, 0, 1):
        x: Any = SimpleNamespace(device=torch.device("cuda", index), data_ptr=lambda: 0x1000)
        kernel.launch([x], {"num_tokens": 5}, [])
    assert loaded == [0, 1]
    assert started == [(0, 0x1000, 100), (1, 0x1000, 101)] * 2


MODEL = "--model custom --hidden-size 96 --num-streams 2 --sinkhorn-iters 7 --dtype float16 --rms-norm-eps 1e-5"


def test_every_option_reaches_what_is_exported_and_warmed_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches one that is parsed and passed over: a bundle or a cache without what was asked for."""
    spec, forward = MHCSpec(96, 2, sinkhorn_iters=7), [*MODEL.split(), "--forward-only"]
    asked: list[tuple] = []

    def exported(*arguments: object, started: object, **options: object) -> dict[str, Any]:
        asked.append((arguments, options))
        return {"targets": {}, "files": {}}

    def kernels_of(*arguments: object) -> list:
        asked.append(arguments)
        return []

    monkeypatch.setattr(export, "export", exported)
    monkeypatch.setattr(workload, "kernels_of", kernels_of)
    assert cli.main(["export", *forward, "--arch", "cpu,sm_90a", "--march", "native", "--out", str(tmp_path)]) == 0
    options = {"forward_only": True, "rms_norm_eps": 1e-5, "march": "native"}
    assert asked.pop() == ((spec, "float16", ["cpu", "sm_90a"], tmp_path), options)
    assert cli.main(["warmup", *forward, "--device", "cpu"]) == 0
    assert asked.pop() == (spec, "float16", "cpu", True, 1e-5)
    assert cli.main(["warmup", *MODEL.split(), "--device", "cpu", "--constants", "paper"]) == 0
    assert asked.pop() == (MHCSpec.paper(96, num_streams=2, sinkhorn_iters=7), "float16", "cpu", False, 1e-5)
