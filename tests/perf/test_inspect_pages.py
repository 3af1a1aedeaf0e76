"""The page of a kernel has all that the kernel is. Needs no nvcc: registers and counts come from the stored builds.

Would catch: a kernel without a page or a stored build; a helper that a page leaves out.
"""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from mhc_tilelang import cli
from mhc_tilelang.kernels import FAMILIES
from mhc_tilelang.perf.inspect import explain, pages, stored, terminal
from mhc_tilelang.perf.inspect.matrix import STUDIED
from mhc_tilelang.perf.inspect.occupancy import ARCHITECTURES


@pytest.mark.parametrize("kernel", FAMILIES)
def test_page_has_all_that_the_kernel_uses_of_its_module(kernel: str) -> None:
    """Every function of its own module that the code on the page names is on the page too."""
    module, factory = FAMILIES[kernel]
    text = explain.source_of(import_module(f"mhc_tilelang.kernels.{module}"), module, factory)
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    shown = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
    source = (Path(__file__).parents[2] / "kernels" / f"{module}.py").read_text(encoding="utf-8")
    own = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assert factory in shown
    assert {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)} & own <= shown


def test_stored_builds_are_the_kernels_of_now() -> None:
    """Catches a kernel that calls launch and of which no build is stored, and a build of one that is no more."""
    _, rows = stored.read(stored.KERNELS)
    assert [row.key for row in rows] == [one.key(arch) for one, arch in stored.asked()]
    assert {row.arch for row in rows} == set(ARCHITECTURES)
    assert all(row.made_from for row in rows)


def test_stored_peers_are_built_at_the_studied_shape() -> None:
    versions, rows = stored.read(stored.TILE_KERNELS)
    assert [row.kernel for row in rows] == list(pages.PEERS)
    assert {(row.num_streams, row.hidden_size, row.dtype) for row in rows} == {
        (STUDIED.num_streams, STUDIED.hidden_size, STUDIED.dtype)
    }
    kept, _ = stored.read(stored.KERNELS)
    assert {name: versions[name] for name in kept} == kept


def test_explain_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """The page is printed as fitted to a terminal."""
    assert cli.main(["inspect", "aggregate", "--explain"]) == 0
    page = explain.page("aggregate")
    assert terminal.fit(page, terminal.width()).rstrip() in capsys.readouterr().out


def test_writing_removes_the_page_of_a_kernel_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "pages", lambda: {"post.md": "post\n"})
    (tmp_path / "gone.md").write_text("gone")
    pages.write(tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"post.md": "post\n"}
