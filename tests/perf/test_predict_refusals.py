"""Refusals of `predict`, each with code or a shape that provokes it, and its words where it answers.

Would catch: a number for a kernel whose path depends on data, that spills in a loop, counts with atomics or uses tensor
instructions that the model does not know; for bytes, products or barriers that are not those of TIR and source; for a
set that fits the cache; one number below 20 µs; a verdict between two kernels too close to tell apart; a narrow band
for a fused kernel.
"""

from __future__ import annotations

import json
from itertools import product
from types import SimpleNamespace

import pytest
import sass

from mhc_tilelang import cli
from mhc_tilelang.compiler.cuda_source import CudaSource
from mhc_tilelang.compiler.toolchain import find_nvdisasm
from mhc_tilelang.errors import MHCError
from mhc_tilelang.perf.calls.cases import Case, Shape
from mhc_tilelang.perf.predict import launched, predicted, stored
from mhc_tilelang.perf.predict.barriers import count_barriers
from mhc_tilelang.perf.predict.block import Block, walk_block
from mhc_tilelang.perf.predict.devices import DEVICES, device
from mhc_tilelang.perf.predict.launched import Launched, build
from mhc_tilelang.perf.predict.model import Work, advice
from mhc_tilelang.perf.predict.walk import Argument, EndlessError, Entry
from mhc_tilelang.perf.traffic.audit import BufferTraffic, Movement

ENTRY = Entry("sm_90a", (Argument("x", "buffer"),), (10, 1, 1), (64, 1, 1))
B200 = DEVICES["b200"]
CASE = Case("post", Shape(4096, 4, 8192, "bfloat16"))
BLOCK = Block(4, 1451, 1.8, 4700, 1500, 2600, 0, 0, 640, 1300, 14)
WORK = Work(BLOCK, 8192, 5, 600_000_000)

LOOP = "S2R R1, SR_TID.X\nMOV R0, RZ\n.L_x_1:\n{body}\nIADD3 R0, R0, 0x1, RZ\nISETP.NE.AND P0, PT, R0, 0x8, PT\n"
LOOP += "@P0 BRA `(.L_x_1)\nEXIT"


def refused(text):
    code = sass.code(text)
    walked = walk_block(code, ENTRY)
    return "; ".join(launched.not_modelled(code, walked))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "LDG.E R4, desc[UR4][R2.64]\nISETP.GT.AND P0, PT, R4, RZ, PT\n@P0 EXIT\nEXIT",
            "depends on data: EXIT at 0x20",
        ),
        (
            LOOP.format(body="STL [R1], R9\nLDL R9, [R1]"),
            "spills inside a loop: 32 accesses to local memory a block, 2 in",
        ),
        (LOOP.format(body="ATOMG.E.ADD R5, desc[UR4][R2.64], R4"), "16 atomics a block"),
        (LOOP.format(body="REDG.E.ADD desc[UR4][R2.64], R4"), "16 atomics a block"),
        (LOOP.format(body="UTMALDG.2D [UR8], [UR6], desc[UR4]"), "TMA"),
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24\nEXIT", "does not know: HGMMA"),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]\nEXIT", "does not know: UTCHMMA"),
    ],
)
def test_what_the_machine_code_does_that_nothing_published_does(text, reason):
    assert reason in refused(text)


def test_spills_outside_loops_and_plain_code_are_let_through():
    assert refused("STL [R1], R9\nLDL R9, [R1]\n" + LOOP.format(body="FADD R5, R5, R5")) == ""


def moved(read, written=0):
    return {"x": BufferTraffic(Movement(read, read, read), Movement(written, written, written))}


def test_bytes_that_are_not_the_audits_are_refused():
    executed = {("x", "read"): 1000.0, ("x", "written"): 0.0}
    assert launched.bytes_differ(executed, moved(1000), ["x"], 0) == []
    assert launched.bytes_differ(executed, moved(990), ["x"], 0.01) == []  # an edge block
    [reason] = launched.bytes_differ(executed, moved(500), ["x"], 0.01)
    assert "x: bytes read differ" in reason
    [reason] = launched.bytes_differ(executed, moved(1000, 1000), ["x"], 0)
    assert "x: bytes written differ" in reason
    assert launched.bytes_differ(executed, moved(500), [], 0) == []  # small tensors come from caches
    [reason] = launched.bytes_differ({("", "read"): 4e6}, {}, [], 0)
    assert reason == "4.0 MB of accesses whose buffer is not known"


def test_products_that_are_not_the_tirs_are_refused():
    assert launched.products_differ(1000, 1000, 0) == []
    assert "products differ" in launched.products_differ(4000, 1000, 0.01)[0]
    assert "products differ" in launched.products_differ(float("nan"), 1000, 0.01)[0]  # a shape that is not known


SOURCE = """extern "C" __global__ void k(float* x, int n) {{
  for (int i = 0; i < min((((int)blockIdx.x) + 1) * 2, n); ++i) {{
    if ({guard}) {{
      x[i] = 0;
    }} else {{
      __syncthreads();
    }}
    float s = tl::AllReduce<tl::SumOp, 128, 1, 0, tl::NamedBarrier<128>>::run(x[i], x);
  }}
  int other = (n < 3) ? 1 : 2;
}}"""


@pytest.mark.parametrize(
    ("guard", "block", "expected"),
    [("i % 2 == 0", 1, 2 + 4 * 4), ("i % 2 == 0 && n < 3", 0, 2 + 2 * 4), ("((int)threadIdx.x) == 0", 1, None)],
)
def test_barriers_are_counted_in_the_source(guard, block, expected):
    source = CudaSource("k", SOURCE.format(guard=guard), ("x", "n"), ("2", "1", "1"), (128, 1, 1), 0)
    found = count_barriers(source, {"n": 5}, (block, 0, 0))
    assert found == expected or expected is None
    assert bool(launched.barriers_differ(expected or 18, found)) == (expected is None)
    assert "barriers differ: 18 a block executed, 17 in the source" in launched.barriers_differ(18, 17)


def answer(work=WORK, reasons=(), family="post", gpu=B200):
    found = Launched(family, work, tuple(reasons), work.bytes)
    return predicted.answer(family, CASE, gpu, [found], reasons)


def test_a_refused_row_has_no_number():
    row = answer(reasons=["post: the path depends on data"])
    assert (row.us, row.low, row.high, row.regime) == (None, None, None, predicted.REFUSED)
    assert row.reasons == ("post: the path depends on data",)


def test_below_20_us_there_is_an_interval_and_no_number():
    row = answer(WORK._replace(grid=100, bytes=10_000_000))
    assert row.us is None
    assert row.regime == "launch and latency"
    assert 0 < row.low < row.high < 40
    assert "below 20 µs" in row.reasons[0]


def test_a_set_that_fits_the_cache_is_refused():
    [reason] = launched.fits_cache(66 << 20, B200.cache_bytes)
    assert "66 MiB of 126 MiB" in reason
    assert "--flushed" in reason
    assert launched.fits_cache(200 << 20, B200.cache_bytes) == []


def test_fused_kernels_get_a_wide_band_and_assumed_constants_widen_it():
    plain, fused, hopper = answer(), answer(family="post_project"), answer(gpu=DEVICES["h200"])
    assert plain.high / plain.low == pytest.approx(1.08**2, rel=1e-6)
    assert fused.high / fused.low == pytest.approx(1.6**2, rel=1e-6)
    assert hopper.high / hopper.low > 1.05 * 1.08**2
    assert plain.low < plain.us < plain.high


def test_compare_says_cannot_say():
    one, near, far = answer(), answer(WORK._replace(bytes=680_000_000)), answer(WORK._replace(bytes=900_000_000))
    assert "cannot say" in predicted.compare(one, near)
    assert "post is predicted to be faster" in predicted.compare(one, far._replace(name="other"))
    assert "post is predicted to be faster" in predicted.compare(far._replace(name="other"), one)
    assert "cannot say" in predicted.compare(one, answer(reasons=["no"]))
    fused = answer(WORK._replace(bytes=900_000_000), family="post_project")
    assert "resembles nothing measured" in predicted.compare(one, fused)


def test_a_walk_without_end_is_a_refusal_of_its_call(monkeypatch):
    """The rest of a table has its answers."""

    def endless(launch, _):
        raise EndlessError(f"expected an end of {launch.family}")

    monkeypatch.setattr(predicted, "walk_launch", endless)
    found = predicted.predict(CASE, B200, flushed=True)
    assert (found.us, found.low, found.reasons) == (None, None, ("post: expected an end of post",))


def test_one_measured_point_scales_the_others(tmp_path, monkeypatch):
    from mhc_tilelang.perf.stored import from_json, results

    def point(tokens, ms):
        sizes = {"kernel": "post", "num_tokens": tokens, "num_streams": 4, "hidden_size": 8192, "dtype": "bfloat16"}
        return SimpleNamespace(**sizes, time=SimpleNamespace(median=ms / 1e3))

    class Stored(results.KernelResults):
        def __init__(self):
            object.__setattr__(self, "measurements", (point(4096, 0.12), point(64, 1.0)))

    monkeypatch.setattr(from_json, "load", lambda _: Stored())
    by_tokens = {4096: answer(), 64: answer(reasons=["small"]), 8192: answer(WORK._replace(bytes=2 * WORK.bytes))}
    monkeypatch.setattr(predicted, "predict", lambda case, *_, **__: by_tokens[case.shape.num_tokens])
    factors = predicted.measured_factors(tmp_path, B200, 4)
    assert factors == {("post", 8192, "bfloat16"): pytest.approx(120 / answer().us)}
    other = predicted.scale(by_tokens[8192], factors["post", 8192, "bfloat16"])
    assert other.us == pytest.approx(120 / answer().us * by_tokens[8192].us)
    assert other.high / other.low == pytest.approx(1.14**2)
    assert "measured over predicted" in other.reasons[-1]
    assert predicted.scale(by_tokens[64], 2.0) == by_tokens[64]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bytes": 2_000_000_000}, "move fewer bytes"),
        ({"block": BLOCK._replace(round_trips=100.0)}, "load earlier"),
        ({"block": BLOCK._replace(barriers=5000.0)}, "meet less often"),
        ({"block": BLOCK._replace(issued=300_000.0, cycles=90_000.0)}, "execute less"),
        ({"block": BLOCK._replace(shared=90_000.0)}, "shared memory"),
        (
            {"block": Block(1, 100, 0, 40, 10, 10, 0, 0, 0, 4, 0), "grid": 400_000, "bytes": 1000},
            "fewer, longer blocks",
        ),
        ({"block": BLOCK._replace(cycles=90_000.0), "grid": 2 * 740 + 10, "bytes": 1000}, "even the waves out"),
        ({"grid": 1, "bytes": 1000, "block": Block(1, 100, 0, 40, 10, 10, 0, 0, 0, 4, 0)}, "launch less often"),
    ],
)
def test_the_advice_is_about_what_costs_most(change, sentence):
    assert sentence in advice(WORK._replace(**change), B200.constants)


def test_devices(tmp_path):
    with pytest.raises(MHCError, match="expected b200, h200, h100 or a file with constants, got a100"):
        device("a100")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(B200.facts()))
    assert device(str(path)).constants == B200.constants
    for spoil, message in [
        (lambda d: d["constants"].pop("tail"), "expected constants"),
        (lambda d: d["constants"]["latency"].update(low=5000), "expected 0 ≤ low ≤ value ≤ high"),
        (lambda d: d.update(arch="gfx942"), "arch: expected sm_80"),
        (lambda d: d.pop("cache_bytes"), "KeyError"),
    ]:
        content = B200.facts()
        spoil(content)
        path.write_text(json.dumps(content))
        with pytest.raises(MHCError, match=message):
            device(str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "KERNEL: expected any of"),
        (["post", "--validate"], "KERNEL: expected none beside --validate"),
        (["--validate", "--gpu", "h100"], "--gpu: expected none beside --validate"),
        (["post", "--compare", "post", "aggregate"], "KERNEL: expected none beside --compare"),
        (["post", "--timeline"], "--timeline: expected one KERNEL, one shape and --out DIR"),
        (["post", "--gpu", "mi300"], "--gpu: expected b200"),
        (["--peers", "--out", "x"], "--out: expected none beside --peers"),
    ],
)
def test_options_that_say_nothing_are_refused(arguments, message, capsys):
    assert cli.main(["predict", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_validation_and_peers_are_printed(tmp_path, capsys):
    path = tmp_path / "found.json"
    assert cli.main(["predict", "--validate", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["median"] <= 0.07
    assert found["p90"] <= 0.20
    assert {"table", "name", "tokens", "measured_us", "predicted_us"} <= set(found["rows"][0])
    assert cli.main(["predict", "--peers", "--json", str(path)]) == 0
    assert len(json.loads(path.read_text())["rows"]) == 140
    assert "outside" in capsys.readouterr().out  # the bad rows are shown


@pytest.mark.parametrize(
    "call", [pytest.param(call, marks=[] if call == "post" else [pytest.mark.full]) for call in stored.CALLS]
)
def test_stored_predictions_are_of_the_kernels_as_they_are(call):
    for width, gpu in product(stored.WIDTHS, DEVICES.values()):
        for case in (case for case in stored.cases(width) if case.kernel == call):
            row = stored.rows()[gpu.name, call, width]
            assert row["digest"] == stored.digest(case, gpu), "stale: run make docs-predict"


def test_what_is_stored_of_a_boundary(monkeypatch):
    def row(call, us, low, high, reasons=()):
        return ("h200", call, 2560), {"us": us, "low": low, "high": high, "reasons": reasons}

    both = [row("post_pre", 132.0, 76.0, 215.0), row("post_pre_backward", None, 10.0, 30.0)]
    monkeypatch.setattr(stored, "rows", lambda: dict(both))
    assert stored.connection("H200", 2560, 4) == ((132.0, 76.0, 215.0), (20.0, 10.0, 30.0))
    assert "nothing is stored" in stored.connection("H200", 2560, 8)
    assert "nothing is stored" in stored.connection("A100", 2560, 4)
    monkeypatch.setattr(
        stored, "rows", lambda: dict([both[0], row("post_pre_backward", None, None, None, ["x: spills"])])
    )
    assert stored.connection("H200", 2560, 4) == "post_pre_backward at C = 2560: no answer: x: spills"


def test_the_page_is_fresh():
    from pathlib import Path

    from mhc_tilelang.perf.predict import report
    from mhc_tilelang.perf.predict.fit import validate

    docs = Path(__file__).parents[2] / "docs"
    text = (docs / "predict.md").read_text(encoding="utf-8")
    assert report.refresh(text, validate()) == text, "stale: run make docs-predict"
    text = (docs / "tuning.md").read_text(encoding="utf-8")
    assert report.tuning(text) == text, "stale: run make docs-predict"


@pytest.mark.nvcc
@pytest.mark.skipif(find_nvdisasm() is None, reason="no nvdisasm")
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("float s = 0; for (int i = 0; x[i] > 0; ++i) s += x[i]; y[threadIdx.x] = s;", "depends on data"),
        ("atomicAdd(y, x[threadIdx.x]);", "atomics"),
        ("float s = 0; for (int i = 0; i < n; ++i) s += x[i * 32 + threadIdx.x]; y[threadIdx.x] = s;", ""),
    ],
)
def test_what_nvcc_makes_of_a_kernel_is_refused_or_walked(body, reason):
    head = 'extern "C" __global__ void k(const float* __restrict__ x, float* __restrict__ y, int n)'
    dtypes = ("handle", "handle", "int32")
    source = CudaSource("k", f"{head} {{ {body} }}", ("x", "y", "n"), ("3", "1", "1"), (32, 1, 1), 0, dtypes)
    built = build(source, "sm_90a")
    walked = walk_block(built.code, built.entry({"n": 37}))
    found = "; ".join(launched.not_modelled(built.code, walked))
    assert reason in found
    if not reason:
        assert found == ""
        assert walked.moved == {(0, "read"): 37 * 128, (1, "written"): 128}


@pytest.mark.nvcc
@pytest.mark.skipif(find_nvdisasm() is None, reason="no nvdisasm")
def test_a_kernel_is_predicted_from_its_build(tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.json"
    common = ["--gpu", "b200", "--width", "2560", "--json", str(path)]
    assert cli.main(["predict", "aggregate", "--tokens", "16384", "64", *common]) == 0
    row, small = json.loads(path.read_text())["rows"]
    wanted = {"name", "gpu", "tokens", "hidden_size", "dtype", "us", "low", "high", "regime", "memory_us", "sm_us"}
    assert wanted | {"launches"} <= set(row)
    assert row["regime"] == "memory"
    assert row["low"] < row["us"] < row["high"]
    assert row["memory_us"] == pytest.approx(16384 * (5 * 2560 * 2 + 16) / B200.constants.bandwidth / 1e6, rel=1e-3)
    assert small["us"] is None
    assert "fits the last-level cache" in small["reasons"][0]
    text = capsys.readouterr().out
    assert "Predicted from machine code" in text
    assert "nothing here was measured" in text

    # A walk that loses every other iteration is not believed.
    from mhc_tilelang.perf.predict import launched

    def halved(built, entry, honest=launched.walk_grid):
        walked = honest(built, entry)
        return walked._replace(moved={place: amount / 2 for place, amount in walked.moved.items()})

    monkeypatch.setattr(launched, "walk_grid", halved)
    assert cli.main(["predict", "aggregate", "--tokens", "16384", *common]) == 0
    [row] = json.loads(path.read_text())["rows"]
    assert row["us"] is None
    assert "bytes read differ" in row["reasons"][0]


def test_pictures_of_predictions(tmp_path):
    pytest.importorskip("matplotlib")
    from mhc_tilelang.perf.predict.figure import stacks, timeline
    from mhc_tilelang.perf.predict.schedule import steady
    from mhc_tilelang.perf.predict.walk import walk

    stack = answer().parts[0].stack
    assert sum(stack.values()) == pytest.approx(answer().us, rel=1e-6)
    stacks([answer(), answer(reasons=["no"])]).save(tmp_path)
    text = LOOP.format(body="LDG.E R4, desc[UR4][R2.64] | wr=0\nFADD R5, R5, R4 | wait=1\nBAR.SYNC 0x0")
    code = sass.code(text)
    found = steady(code, walk(code, ENTRY).of_warp(0), B200.constants.latency)
    assert found.iterations == 8
    assert found.total("wait for memory") == pytest.approx(B200.constants.latency, abs=30)
    assert found.instructions == 6
    timeline(found, "loop", CASE.shape, B200).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"predict-b200.png", "timeline-loop-b200.svg"}
