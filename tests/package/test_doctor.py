"""`mhc-tilelang doctor`: it names what is missing, in words and in its exit status, and needs none of it.

Would catch: a missing compiler that goes unnoticed, a doctor that needs the packages it looks for, a
requirement that differs from the package's own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from mhc_tilelang.cli import doctor
from mhc_tilelang.compiler import toolchain
from mhc_tilelang.errors import MHCError

SEARCHED = ("PATH", "CXX", "CUDA_HOME", "CUDA_PATH")


def run_doctor(path: Path, code: str = "", **environment: str) -> tuple[int, dict, str]:
    """Run doctor in a fresh process, after `code`; return its exit status, its JSON and what it printed."""
    kept = {name: value for name, value in os.environ.items() if name not in SEARCHED or name == "PATH"}
    file = path / "doctor.json"
    arguments = ["doctor", "--json", str(file)]
    code += f"\nimport sys\nfrom mhc_tilelang.cli import main\nsys.exit(main({arguments}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(file.read_text()), done.stdout


def rows_by_name(report: dict) -> dict[str, dict]:
    return {row["name"]: row for row in report["rows"]}


def program(directory: Path, name: str, output: str) -> Path:
    """Make an executable that prints `output`."""
    path = directory / name
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return path


def test_json_schema_and_versions(tmp_path: Path) -> None:
    status, report, shown = run_doctor(tmp_path)
    assert report["ok"] == (status == 0) == (report["missing"] == [])
    rows = rows_by_name(report)
    assert len(rows) == len(report["rows"])
    for row in report["rows"]:
        assert set(row) == {"name", "value", "status", "hint"}
        assert row["status"] in {"ok", "missing", "optional"}
        assert row["value"] in shown
    assert rows["torch"]["value"] == metadata.version("torch")
    assert rows["tilelang"]["value"] == metadata.version("tilelang")
    assert rows["tvm-ffi"]["value"] == metadata.version("apache-tvm-ffi")
    assert {"python", "C++ compiler", "nvcc", "nvdisasm", "CPU", "SIMD", "kernel cache", "torch threads"} <= set(rows)


def test_no_compiler_is_named_and_fails(tmp_path: Path) -> None:
    status, report, shown = run_doctor(tmp_path, PATH="")
    row = rows_by_name(report)["C++ compiler"]
    assert status == 1
    assert row["status"] == "missing"
    assert "g++" in row["hint"]
    assert "missing: C++ compiler" in shown


def test_wrong_cxx_and_cache_are_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "absent")  # in whose place no folder can be made
    cache = str(tmp_path / "link")
    status, report, _ = run_doctor(tmp_path, CXX="'no-such-compiler", MHC_TILELANG_CACHE=cache)
    rows = rows_by_name(report)
    assert status == 1
    assert "no-such-compiler" in rows["C++ compiler"]["value"]
    assert rows["kernel cache"]["status"] == "missing"
    assert rows["kernel cache"]["value"].startswith(f"{cache}, not writable")


@pytest.mark.parametrize("package", ["torch", "tilelang"])
def test_works_without(package: str, tmp_path: Path) -> None:
    hide = f"""
import sys
from importlib import metadata
sys.modules[{package!r}] = None
real = metadata.version
def version(name):
    if name == {package!r}:
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
"""
    status, report, _ = run_doctor(tmp_path, hide)
    row = rows_by_name(report)[package]
    assert (status, row["status"], row["value"]) == (1, "missing", "not installed")
    assert row["hint"].startswith(f'pip install "{package}>=')


def test_broken_torch_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    [row] = doctor.torch_rows(doctor.import_torch())
    assert (row.name, row.status) == ("torch build", "missing")


def test_does_not_load_tilelang(tmp_path: Path) -> None:
    _, _, shown = run_doctor(tmp_path, "import atexit, sys; atexit.register(lambda: print('tilelang' in sys.modules))")
    assert shown.splitlines()[-1] == "False"


def test_too_old_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "2.9.1+cpu")
    row = doctor.package_row("torch", "torch", (2, 10))
    assert row == doctor.Row("torch", "2.9.1+cpu, too old", "missing", 'pip install "torch>=2.10"')


def test_oldest_versions_are_the_packages_own() -> None:
    required = {
        found["name"]: found["oldest"] or ""
        for line in metadata.requires("mhc-tilelang") or []
        if "extra ==" not in line and (found := re.match(r"(?P<name>[\w-]+)(.*>=(?P<oldest>[\d.]+))?", line))
    }
    assert {name: doctor.format_version(oldest) for name, oldest in doctor.OLDEST.items()}.items() <= required.items()
    assert metadata.metadata("mhc-tilelang")["Requires-Python"] == f">={doctor.format_version(doctor.OLDEST_PYTHON)}"


def test_unwritable_json_is_a_known_error(tmp_path: Path) -> None:
    with pytest.raises(MHCError, match="cannot write --json"):
        doctor.write_json(tmp_path / "absent" / "doctor.json", {})


@pytest.mark.parametrize(("required", "status"), [(False, "optional"), (True, "missing")])
def test_nvcc_is_required_only_with_a_gpu(required: bool, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_nvcc", lambda: None)
    assert doctor.nvcc_row(required).status == status


def test_nvcc_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TileLang's order: $CUDA_HOME wins over the PATH, and nothing else is tried when it has no nvcc."""
    for variable in SEARCHED:
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "home" / "bin").mkdir(parents=True)
    release = "Cuda compilation tools, release 13.0, V13.0.88"
    on_path = program(tmp_path, "nvcc", release)
    in_home = program(tmp_path / "home" / "bin", "nvcc", release)

    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.find_nvcc() == toolchain.Tool(str(on_path), "PATH")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert toolchain.find_nvcc() == toolchain.Tool(str(in_home), "$CUDA_HOME")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolchain.find_nvcc() is None
    assert toolchain.version_of(toolchain.Tool(str(on_path), "PATH")) == release


def test_nvdisasm_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The PATH wins; without a package of that name, what lies beside nvcc is found."""
    for variable in SEARCHED:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(metadata, "files", lambda _: [])
    (tmp_path / "home" / "bin").mkdir(parents=True)
    on_path = program(tmp_path, "nvdisasm", "V13.0.88")
    program(tmp_path / "home" / "bin", "nvcc", "V13.0.88")

    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.find_nvdisasm() == toolchain.Tool(str(on_path), "PATH")
    monkeypatch.setenv("PATH", "")
    assert toolchain.find_nvdisasm() is None
    assert doctor.nvdisasm_row().status == "optional"
    beside = program(tmp_path / "home" / "bin", "nvdisasm", "V13.0.88")
    assert toolchain.find_nvdisasm() == toolchain.Tool(str(beside), "beside nvcc")


def test_gpu_unseen_by_torch_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", "NVIDIA H200")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    [row] = doctor.gpu_rows(None)
    assert row.status == "optional"
    assert row.value.startswith("NVIDIA H200, not usable")
    assert "CUDA build of torch" in row.hint


@pytest.mark.gpu
def test_gpu_is_described(tmp_path: Path) -> None:
    import torch

    _, report, _ = run_doctor(tmp_path)
    value = rows_by_name(report)["GPU 0"]["value"]
    assert torch.cuda.get_device_name(0) in value
    assert "driver unknown" not in value


def test_size_of_what_others_remove_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and a file are gone by the time that they are looked at: as of a kernel that is compiled just now."""
    for name in ("gone", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"1234")
    (tmp_path / "kept" / "link").symlink_to(tmp_path / "absent")
    scan = os.scandir

    def scandir(path: str | Path | int) -> object:
        if not isinstance(path, int) and Path(path).name == "gone":
            shutil.rmtree(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert doctor.size_of(tmp_path) == 4


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "2 KiB"), (5 << 20, "5 MiB"), (3 << 30, "3.0 GiB")],
)
def test_human_bytes(count: int, text: str) -> None:
    assert doctor.human_bytes(count) == text
