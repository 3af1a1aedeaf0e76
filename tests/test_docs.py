"""What the README and the examples show must run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("place", "hidden_size"), [(0, 256), (1, 1280)], ids=["stream", "functions"])
def test_readme_example_runs(place: int, hidden_size: int) -> None:
    """Word for word."""
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[place]
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["out"].shape == (2, 512, hidden_size)
    if place == 0:
        assert all(p.grad is not None for c in names["connections"] for p in c.parameters())


# Three steps of a small model: without arguments the example trains for minutes.
GPT = "gpt.py --steps 3 --batch 2 --context 32 --width 32 --depth 2 --heads 2"
COMMANDS = [
    *(path.name for path in sorted((ROOT / "examples").glob("*.py")) if path.name != "gpt.py"),
    *(f"porting/{path.name}" for path in sorted((ROOT / "examples" / "porting").glob("*.py"))),
    f"{GPT} --connection residual",
    f"{GPT} --connection hc",
    f"{GPT} --connection mhc --recompute --dtype bfloat16 --text README.md",
    *(pytest.param(f"{GPT} --world 2{more}", marks=pytest.mark.full) for more in ("", " --parallel ddp")),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.replace(f"{GPT} ", "gpt.py "))
def test_example_runs(command: str) -> None:
    name, *arguments = command.split()
    call = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout


PORTING = sorted((ROOT / "docs" / "porting").glob("*.md"))


@pytest.mark.parametrize("page", PORTING, ids=lambda page: page.stem)
def test_porting_page_runs(page: Path) -> None:
    """The Python of a page, from top to bottom and word for word, where the package that it ports from is installed."""
    example = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    for package in re.findall(r"^from (transformers|hyper_connections)\b", example, re.MULTILINE):
        pytest.importorskip(package, minversion="5.23" if package == "transformers" else None)
    exec(compile(example, page.name, "exec"), {})


PAGES = [str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *PORTING)]


@pytest.mark.parametrize("page", PAGES)
def test_snippets_are_python(page: str) -> None:
    """Blocks of code are whole: catches one that was cut off, or left half edited."""
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
        compile(snippet, page, "exec")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Relative links only; catches a file that was moved, and a placeholder that was left."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "@@" not in text
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target
