"""What the README, the pages and the examples show must run as it stands, and lead somewhere.

Would catch: a snippet that fails; an exercise of the guide whose answer is wrong; an excerpt or a picture that is not
what its source says now; a file or a heading that was renamed while a link to it was not.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mhc_tilelang.perf import guide

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
GUIDE = [page for page in PAGES if page.startswith("docs/guide/")]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def examples(page: str) -> list[str]:
    """The Python blocks of a page that are no excerpts."""
    text = guide.EXCERPT.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("place", "hidden_size"), [(0, 256), (1, 1280)], ids=["stream", "functions"])
def test_readme_example_runs(place: int, hidden_size: int) -> None:
    """Word for word."""
    example = examples("README.md")[place]
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["out"].shape == (2, 512, hidden_size)
    if place == 0:
        assert all(p.grad is not None for c in names["connections"] for p in c.parameters())


PORTING = [page for page in PAGES if page.startswith("docs/porting/")]


@pytest.mark.parametrize("page", [*GUIDE, *PORTING, "docs/executor.md"])
def test_page_examples_run(page: str) -> None:
    """Word for word, from top to bottom, where the package that it ports from is installed; exercises assert."""
    example = "\n".join(examples(page))
    for package in re.findall(r"^from (transformers|hyper_connections)\b", example, re.MULTILINE):
        pytest.importorskip(package, minversion="5.23" if package == "transformers" else None)
    exec(compile(example, page, "exec"), {})


def test_every_chapter_has_an_exercise() -> None:
    chapters = [page for page in GUIDE if not page.endswith("README.md")]
    assert [page for page in chapters if not any("assert" in one for one in examples(page))] == []


@pytest.mark.parametrize("page", GUIDE)
def test_excerpts_are_fresh(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(guide.EXCERPT.findall(text)) == text.count("<!--"), "a comment that is no excerpt's"
    assert guide.refreshed(text, ROOT) == text, "stale: run make docs-guide"


def test_excerpts_that_are_not_their_source_are_noticed() -> None:
    """A changed line of code, a changed number in a row, a comment that names nothing."""
    page = (ROOT / "docs" / "guide" / "sinkhorn.md").read_text(encoding="utf-8")
    for old, new in (("T.reduce_sum(P", "T.reduce_max(P"), ("| sm_90a |", "| sm_80 |")):
        assert old in page
        assert guide.refreshed(page.replace(old, new), ROOT) == page
    for what in ("def nothing", "`for k` to `nothing`", "nothing"):
        with pytest.raises(LookupError, match=r"kernels/pre\.py"):
            guide.refreshed(f"<!-- from kernels/pre.py: {what} -->\n", ROOT)
    with pytest.raises(LookupError, match=r"no row nothing"):
        guide.refreshed("<!-- rows of docs/kernels/README.md: nothing -->\n", ROOT)


def test_figures_are_fresh(tmp_path: Path) -> None:
    """The same bytes, where matplotlib is the version that drew them."""
    matplotlib = pytest.importorskip("matplotlib")
    from mhc_tilelang.perf import figures_guide

    for path in figures_guide.write(tmp_path):
        stored = (ROOT / "docs" / "guide" / "figures" / path.name).read_bytes()
        if f"Matplotlib v{matplotlib.__version__},".encode() not in stored:
            pytest.skip("drawn by another version of matplotlib")
        assert path.read_bytes() == stored, f"{path.name} is stale: run make docs-guide"


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


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and docs/site.py make them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "]", one).lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_snippets_are_python(page: str) -> None:
    """Blocks of code are whole: catches one that was cut off, or left half edited."""
    for snippet in examples(page):
        compile(snippet, page, "exec")


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_links_lead_somewhere(page: str) -> None:
    """Relative links only, and their anchors; catches a placeholder that was left, too."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "@@" not in text
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", FENCED.sub("", text)):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_lists_begin_after_an_empty_line(page: str) -> None:
    """Catches a list that the site would run into the paragraph before it, its dashes shown as they are."""
    lines = FENCED.sub("", (ROOT / page).read_text(encoding="utf-8")).splitlines()
    for before, line in itertools.pairwise(lines):
        assert not line.startswith("- ") or before.startswith(("- ", "  ", "#")) or not before.strip(), line
