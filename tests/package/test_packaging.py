"""The wheel holds the four folders under one import name, complete.

Would catch: a sub-package missing in pyproject.toml, a header that is not package data, a stray import name.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALLED_AS = {
    "mhc_tilelang": "mhc_tilelang",
    "kernels": "mhc_tilelang/kernels",
    "perf": "mhc_tilelang/perf",
    "reference": "mhc_tilelang/reference",
}
SHIPPED = ("*.py", "*.h", "py.typed")


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Build the wheel from a copy, so that no earlier build in the tree can complete it; list its files."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", *INSTALLED_AS):
        (source / name).symlink_to(ROOT / name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(target),
    ]
    done = subprocess.run([*pip, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = target.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_only_import_name(wheel_files: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mhc_tilelang"}


@pytest.mark.parametrize("folder", INSTALLED_AS)
def test_every_file_is_shipped(folder: str, wheel_files: set[str]) -> None:
    files = [path for pattern in SHIPPED for path in (ROOT / folder).rglob(pattern)]
    expected = {f"{INSTALLED_AS[folder]}/{path.relative_to(ROOT / folder).as_posix()}" for path in files}
    assert f"{INSTALLED_AS[folder]}/__init__.py" in expected
    assert expected - wheel_files == set()


@pytest.mark.parametrize(
    "name", ["mhc_tilelang", *(f"mhc_tilelang.{name}" for name in ("kernels", "perf", "reference"))]
)
def test_import_resolves_outside_the_tree(name: str, tmp_path: Path) -> None:
    code = f"import importlib.util; print(importlib.util.find_spec({name!r}).origin)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert Path(done.stdout.strip()) == ROOT / name.removeprefix("mhc_tilelang.") / "__init__.py", done.stderr


def test_license_is_in_the_wheel(wheel_files: set[str]) -> None:
    assert any(name.endswith("licenses/LICENSE") for name in wheel_files)
