"""`mhc-tilelang bench --peers`: every convention converted, every gap named, no peer timed that differs.

The peers are stand-ins written from their documented formulas, so none has to be installed. Would catch: comb taken
for h_res or its rows left in the wrong order, a post multiplier or an iteration count left at a default, a result of
another function that is timed, a peer that vanishes without a word, one broken package that ends the measurement.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peer_stand_ins import Connection, TileKernels, stand_ins
from torch import Tensor

from mhc_tilelang import cli, reference
from mhc_tilelang.checking import run as checks
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.run import Row
from mhc_tilelang.perf.bench import run as bench
from mhc_tilelang.perf.calls.cases import (
    BACKWARD_KERNELS,
    BOUNDARY_KERNELS,
    KERNELS,
    SUBLAYER_INPUT,
    Case,
    Shape,
)
from mhc_tilelang.perf.calls.every_call import Given
from mhc_tilelang.perf.calls.workloads import Workload, workload
from mhc_tilelang.perf.measure.timing import Sample
from mhc_tilelang.perf.peers import PEERS, deepseek, huggingface, lucidrains, prepare, select
from mhc_tilelang.perf.peers.compiled import compiled
from mhc_tilelang.perf.peers.peer import Peer, UnsupportedError
from mhc_tilelang.perf.peers.prepare import Compared, Loaded, compare, load

CPU = torch.device("cpu")
EVERY = (*KERNELS, *BACKWARD_KERNELS, *BOUNDARY_KERNELS, SUBLAYER_INPUT)
SMALL = ("--device", "cpu", "--widths", "64", "--tokens", "32", "--repeats", "2")


def make(kernel: str, n: int = 4, dtype: str = "bfloat16", tokens: int = 128) -> Workload:
    shape = Shape(tokens, n, 64, dtype)
    load = workload(Case(kernel, shape), Given.of(shape, CPU))
    load.run()
    return load


def compared(peer: Peer, kernel: str, **sizes: Any) -> Compared:
    made = make(kernel, **sizes)
    with torch.no_grad():
        return compare(Loaded("it", "1", peer), kernel, made.arguments, made.outputs())


COVERED = [pytest.param(name, kernel, id=f"{name}-{kernel}") for name, peer in stand_ins().items()
           for kernel in peer.functions]  # fmt: skip


@pytest.mark.parametrize(("name", "kernel"), COVERED)
def test_conversions(name: str, kernel: str) -> None:
    """A peer that computes what it documents agrees, and is what runs when it is timed."""
    call = compared(stand_ins()[name], kernel)
    assert call.skipped == ""
    assert call.run is not None, (call.output, call.error)
    assert call.error is not None
    assert call.error <= call.tolerance
    assert call.because or call.error < 2e-4


@pytest.mark.parametrize(("name", "kernel"), COVERED)
def test_two_streams_agree_or_are_skipped(name: str, kernel: str) -> None:
    call = compared(stand_ins()[name], kernel, n=2)
    assert call.run is not None or call.skipped == "needs n = 4, got 2"


def test_every_kernel_is_covered_or_left_out_with_a_reason() -> None:
    for peer in stand_ins().values():
        for kernel in EVERY:
            if kernel not in peer.functions:
                with pytest.raises(UnsupportedError, match=r"\w"):
                    peer.function(kernel)


class Transposed(TileKernels):
    """comb taken for h_res, the field's most frequent bug."""

    def _mhc_post_fwd(self, _: Any, comb: Tensor, *tensors: Tensor) -> None:
        super()._mhc_post_fwd(_, comb.mT, *tensors)


class Defaults(TileKernels):
    """TileKernels' defaults: multiplier 1, 10 iterations."""

    def _mhc_pre_split_mixes_fwd(self, parameters: Any, *tensors: Tensor) -> None:
        super()._mhc_pre_split_mixes_fwd((parameters[0], 1.0, *parameters[2:]), *tensors)

    def _mhc_sinkhorn_fwd(self, parameters: Any, *tensors: Tensor) -> None:
        super()._mhc_sinkhorn_fwd((*parameters[:2], 10, parameters[3]), *tensors)


class Unwritten(TileKernels):
    def _mhc_pre_apply_mix_fwd(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("kernels", "kernel", "output"),
    [
        (Transposed, "post", "x_next"),
        (Defaults, "coefficients", "h_post"),
        (Defaults, "sinkhorn", "h_res"),
        (Unwritten, "aggregate", "layer_input"),
    ],
)
def test_a_peer_that_differs_is_not_timed(kernels: type[TileKernels], kernel: str, output: str) -> None:
    call = compared(deepseek.declare(kernels()), kernel)
    assert call.run is None
    assert call.skipped == ""
    assert call.output == output
    assert not call.error <= call.tolerance


def test_what_its_kernels_do_not_take_is_skipped() -> None:
    peer = stand_ins()["tile-kernels"]
    assert compared(peer, "aggregate", dtype="float16").skipped == "needs a bfloat16 stream, got float16"
    assert compared(peer, "project", tokens=37).skipped == "needs tokens in multiples of 32 on a CPU, got 37"
    assert compared(peer, "project_backward", tokens=32).skipped == "needs tokens in multiples of 128 on a CPU, got 32"


def test_a_peer_that_raises_is_skipped() -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a\nlong  story")

    assert compared(deepseek.declare(broken), "aggregate").skipped == "fails: RuntimeError: a long story"


def test_missing_and_broken_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "tile-kernels":
            raise metadata.PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(prepare.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "hyper_connections", None)
    monkeypatch.setitem(sys.modules, lucidrains.MODULE, None)
    monkeypatch.setitem(sys.modules, huggingface.MODULE, SimpleNamespace(DeepseekV4HyperConnection=Connection))
    tile_kernels, liger_kernel, hyper_connections, transformers = load(PEERS, CPU)
    assert tile_kernels.skipped == "not installed (pip install tile-kernels)"
    assert (liger_kernel.version, liger_kernel.skipped) == ("1.2", "needs a GPU: its kernels are Triton's")
    assert hyper_connections.skipped.startswith("does not import: ModuleNotFoundError: ")
    assert (transformers.skipped, transformers.version) == ("", "1.2")
    assert transformers.peer is not None


def test_only_the_part_that_is_needed_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tile_kernels' own import fails with tilelang 0.1.15; its mHC kernels alone do not."""
    package = tmp_path / "tile_kernels"
    (package / "mhc").mkdir(parents=True)
    (package / "__init__.py").write_text("from . import mhc\nimport tilelang.not_there\n")
    (package / "mhc" / "__init__.py").write_text("")
    (package / "mhc" / "post_kernel.py").write_text("_mhc_post_fwd = 'found'\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "tile_kernels"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert deepseek.import_factories()("post_kernel")._mhc_post_fwd == "found"
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "tile_kernels"]:
            del sys.modules[name]


def test_a_tilelang_kernel_of_someone_else_runs_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes its tensors in order and any token count, and loads from disk a second time."""
    import tilelang.language as T

    monkeypatch.setenv("MHC_TILELANG_CACHE", str(tmp_path))

    def get_tir(size: int) -> Any:
        tokens = T.dynamic("tokens")

        @T.prim_func
        def doubled(x: T.Tensor[(tokens, size), T.bfloat16], y: T.Tensor[(tokens, size), T.float32]):
            with T.Kernel(tokens, threads=32) as t:
                tile = T.alloc_fragment((size,), T.float32)
                T.copy(x[t, 0], tile)
                for c in T.Parallel(size):
                    tile[c] = 2 * tile[c]
                T.copy(tile, y[t, 0])

        return doubled

    for tokens in (3, 5):
        x, y = torch.randn(tokens, 16).bfloat16(), torch.full((tokens, 16), torch.nan)
        compiled(SimpleNamespace(get_tir=get_tir), CPU, 16)(x, y)
        assert torch.equal(y, 2 * x.float())
    assert len(list(tmp_path.rglob("peer-doubled-*.so"))) == 1


def test_the_sublayer_input_is_the_three_kernels() -> None:
    """Its outputs are float64's, its bytes theirs."""
    made = make(SUBLAYER_INPUT, dtype="float32", tokens=37)
    a = made.arguments
    exact = {name: numpy64(a[name]) for name in ("x", "phi", "alpha", "bias")}
    h_pre, h_post, h_res = reference.coefficients(**exact, spec=a["spec"])
    expected = {"layer_input": reference.aggregate(exact["x"], h_pre), "h_post": h_post, "h_res": h_res}
    for name, output in made.outputs().items():
        assert abs(numpy64(output) - expected[name]).max() < 1e-5, name
    parts = [make(kernel, dtype="float32", tokens=37).traffic for kernel in SUBLAYER_INPUT.split("+")]
    assert made.traffic.total == sum(part.total for part in parts)


def test_selection() -> None:
    assert select(["none"]) == ()
    assert select(["transformers", "tile-kernels"]) == ("tile-kernels", "transformers")
    assert select(["all"]) == tuple(PEERS)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check passes, and every call takes a millisecond more than the one before."""
    passed = Row("post", "bfloat16", 4, 64, 32, error=0.0, tolerance=1.0, torch_error=0.0, passed=True)
    monkeypatch.setattr(checks, "iterate", lambda *_: [passed])
    ticks = iter(range(1, 100_000))

    def clock(run: Callable[[], object]) -> Sample:
        run()
        return Sample(1e-3 * next(ticks))

    monkeypatch.setattr(bench, "clock_for", lambda *_: clock)


def run_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernels: TileKernels, *options: str) -> dict[str, Any]:
    def load_one(name: str, _device: torch.device) -> Loaded:
        if name == "liger-kernel":
            return Loaded(name, "0.8", skipped="needs a GPU")
        return Loaded(name, "1.2", {**stand_ins(), "tile-kernels": deepseek.declare(kernels)}[name])

    monkeypatch.setattr(prepare, "load_one", load_one)
    file = tmp_path / "bench.json"
    assert cli.main(["bench", *SMALL, *options, "--json", str(file)]) == 0
    loaded: dict[str, Any] = json.loads(file.read_text())
    return loaded


@pytest.mark.usefixtures("ticking")
def test_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A peer that agrees, one that differs, one without the function, one that cannot run: all four are there."""
    options = ("--peers", "all", "--kernels", "post", "aggregate")
    got = run_bench(monkeypatch, tmp_path, Transposed(), *options)
    out = capsys.readouterr().out
    peers = {peer["name"]: peer for peer in got["method"]["peers"]}
    assert list(peers) == list(PEERS)
    assert peers["liger-kernel"] == {"name": "liger-kernel", "version": "0.8", "skipped": "needs a GPU", "note": None}
    assert "peers: tile-kernels 1.2, hyper-connections 1.2, transformers 1.2" in out
    assert "liger-kernel: skipped: needs a GPU" in out

    results = {result["kernel"]: {peer["peer"]: peer for peer in result["peers"]} for result in got["results"]}
    assert set(results["post"]) == set(PEERS) - {"liger-kernel"}
    differs = results["post"]["tile-kernels"]
    assert differs["error"] > 0.1
    assert (differs["agrees"], differs["time"], differs["over_kernel"]) == (False, None, None)
    agrees, [post, _] = results["post"]["transformers"], got["results"]
    assert agrees["agrees"] is True
    assert 1e-3 < agrees["error"] < agrees["tolerance"]
    assert "stream's dtype" in agrees["because"]
    assert agrees["over_kernel"] == pytest.approx(agrees["time"]["median"] / post["time"]["median"])
    lacks = results["aggregate"]["transformers"]
    assert (lacks["skipped"], lacks["agrees"], lacks["time"]) == (huggingface.PARTS, None, None)

    [line] = [line for line in out.splitlines() if line.startswith("tile-kernels") and "mhc_post" in line]
    assert "DIFFERS" in line
    assert f"{differs['error']:.1e}" in line
    [line] = [line for line in out.splitlines() if line.startswith("transformers") and "mixing" in line]
    assert f"{agrees['over_kernel']:.2f}×" in line
    assert f"hyper-connections: skipped post, aggregate: {lucidrains.ANOTHER}" in out


@pytest.mark.usefixtures("ticking")
def test_with_peers_the_sum_of_kernels_is_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got = run_bench(monkeypatch, tmp_path, TileKernels(), "--peers", "transformers")
    assert [result["kernel"] for result in got["results"]] == [
        *KERNELS,
        *BACKWARD_KERNELS,
        *BOUNDARY_KERNELS,
        SUBLAYER_INPUT,
    ]
    [peer] = got["results"][-1]["peers"]
    assert (peer["function"], peer["agrees"]) == ("DeepseekV4HyperConnection", True)


@pytest.mark.usefixtures("ticking")
def test_no_peers_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    got = run_bench(monkeypatch, tmp_path, TileKernels())
    assert got["method"]["peers"] == []
    assert [result["kernel"] for result in got["results"]] == [*KERNELS, *BACKWARD_KERNELS, *BOUNDARY_KERNELS]
    assert all(result["peers"] == [] for result in got["results"])
    assert "peer" not in capsys.readouterr().out


def test_an_unknown_peer_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--peers", "megatron"])
    assert "--peers" in capsys.readouterr().err
