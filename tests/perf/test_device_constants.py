"""The measurement of a device's constants, without a device: its program compiles, its kernels run on the executor, and
what it would print gives the constants back.

Would catch: a program that nvcc refuses, a copy of other bytes than it claims, a chase that hits the same line twice, a
unit or a sign that is wrong on the way to the device file, a file that `predict --gpu` does not read.
"""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from mhc_tilelang.compiler.cuda_source import CudaSource
from mhc_tilelang.compiler.simt import launch
from mhc_tilelang.compiler.toolchain import find_nvcc
from mhc_tilelang.errors import MHCError
from mhc_tilelang.perf.gpu import constants
from mhc_tilelang.perf.predict.devices import device

CODE = f"#define MHC_KERNELS_ONLY\n{constants.SOURCE.read_text()}"


@pytest.mark.nvcc
@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_the_program_compiles(tmp_path, arch):
    assert constants.build(tmp_path, arch).stat().st_size > 0


def execute(kernel, threads, grid, tensors, numbers):
    source = CudaSource(
        kernel,
        CODE,
        (*tensors, *numbers),
        (str(grid), "1", "1"),
        (threads, 1, 1),
        0,
        (*["handle"] * len(tensors), *["int32"] * len(numbers)),
    )
    return launch(source, "sm_90a", tensors, numbers)


@pytest.mark.parametrize(("reads", "writes"), [(2, 1), (0, 3)])
def test_a_copy_moves_what_it_claims(reads, writes):
    count = 700
    source = torch.ones(max(1, reads) * count * 4)
    to = torch.zeros(writes * count * 4)
    sizes = {"blocks": 2, "count": count, "reads": reads, "writes": writes}
    counts = execute("copy_mix", 256, 2, {"to": to, "from": source}, sizes)
    assert counts.tensors["from"].read_distinct == counts.tensors["from"].read_bytes == reads * count * 16
    assert counts.tensors["to"].written_distinct == counts.tensors["to"].written_bytes == writes * count * 16
    assert (to == 4 * reads).all()


def test_a_chase_follows_the_pointers():
    following = torch.tensor([3, 0, 1, 2], dtype=torch.int32)
    last = torch.full((1,), -1, dtype=torch.int32)
    counts = execute("chase", 1, 1, {"last": last, "next": following}, {"steps": 3})
    assert last.item() == 1  # 0, 3, 2, 1
    assert counts.tensors["next"].read_bytes == 3 * 4


def test_a_block_meets_as_often_as_it_is_asked_to():
    done = torch.zeros(1, dtype=torch.int32)
    assert execute("meet", 128, 1, {"done": done}, {"times": 9}).barriers == 9
    assert done.item() == 9


CLOCK, LATENCY, BLOCK, BARRIER, LAUNCH = 1.8, 950.0, 160.0, 14.0, 2.1
SPEEDS = {(1, 1): 4.5, (2, 1): 4.6, (4, 1): 4.8}


def printed():
    """Return the program's output for a device with the constants above."""
    to_us = 1 / (CLOCK * 1e3)
    copies = [
        {"reads": r, "writes": w, "bytes": size, "us": 3.0 + size / speed / 1e6}
        for (r, w), speed in SPEEDS.items()
        for size in (1e8, 8e8)
    ]
    return {
        **{"name": "mine", "major": 9, "minor": 0, "sms": 132, "l2_bytes": 50 << 20, "copies": copies},
        "chase": {"steps": 1000, "us": 1000 * LATENCY * to_us},
        "empty": {"blocks": 132 * 100, "one_us": LAUNCH, "many_us": LAUNCH + 100 * BLOCK * to_us},
        "barriers": [
            {"warps": warps, "times": 50, "us": 50 * (28 + BARRIER * (warps / 4 - 1)) * to_us} for warps in (4, 8, 32)
        ],
        "spin": {"cycles": 4_000_000, "us": 4_000_000 * to_us},
    }


def test_constants_come_back(tmp_path):
    path = tmp_path / "device.json"
    path.write_text(json.dumps(constants.device_of(printed())))
    found = device(str(path))
    got = found.constants
    expected = {"clock_ghz": CLOCK, "latency": LATENCY, "block_cycles": BLOCK, "barrier_cycles": BARRIER}
    expected |= {"launch_us": LAUNCH, "bandwidth": 4.6, "sms": 132}
    for name, value in expected.items():
        assert getattr(got, name) == pytest.approx(value, rel=1e-9), name
    assert (found.arch, found.cache_bytes) == ("sm_90a", 50 << 20)
    assert found.table["bandwidth"][1:3] == pytest.approx((4.5, 4.8))
    assert found.table["overlap"].source.startswith("B200's")
    assert "2:1 4.60" in found.table["bandwidth"].source


def test_a_gpu_without_a_model_is_refused():
    with pytest.raises(MHCError, match=r"expected a GPU of sm_80, .* got 7\.5"):
        constants.device_of({**printed(), "major": 7, "minor": 5})


def test_a_failing_program_is_one_line(tmp_path, capsys, monkeypatch):
    failing = subprocess.CompletedProcess([], 1, "", "cudaMalloc: no CUDA-capable device is detected")
    monkeypatch.setattr(constants, "build", lambda *_: "program")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failing)
    assert constants.main(["--out", str(tmp_path / "d.json")]) == 1
    assert "no CUDA-capable device" in capsys.readouterr().err
