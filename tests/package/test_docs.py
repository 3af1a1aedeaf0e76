"""Documentation under test: README, pages and examples run as they stand, and their links lead somewhere.

Would catch: a snippet that fails; an exercise of the guide whose answer is wrong; an excerpt, a table, a number or a
picture that is not what its source says now; a measured number that no source holds; a file or a heading that was
renamed while a link to it was not.
"""

from __future__ import annotations

import difflib
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mhc_tilelang.kernels import FAMILIES
from mhc_tilelang.perf.figures import excerpts as guide
from mhc_tilelang.perf.figures import facts

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WRITTEN = {ROOT / "docs" / "kernels" / name for name in (*(f"{kernel}.md" for kernel in FAMILIES), "README.md")}
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in {*(ROOT / "docs").rglob("*.md")} - WRITTEN)
GUIDE = [page for page in PAGES if page.startswith("docs/guide/")]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def examples(page: str) -> list[str]:
    """The Python blocks of a page that are no excerpts."""
    text = guide.EXCERPT.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("page", "hidden_size"), [("README.md", 256), ("docs/use.md", 1280)])
def test_first_examples_run(page: str, hidden_size: int) -> None:
    """Word for word."""
    [example] = examples(page)
    names: dict = {}
    exec(compile(example, page, "exec"), names)
    assert names["out"].shape == (2, 512, hidden_size)
    if page == "README.md":
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


def differences(page: str, text: str) -> list[str]:
    """The lines of a page that are not what their sources say, each with the line as it should be."""
    shown, fresh = text.splitlines(), guide.refresh(text, ROOT).splitlines()
    changed = [line for line in difflib.ndiff(shown, fresh) if line[0] in "+-"]
    return [f"{page} is stale: run make docs-guide, or write", *changed] if changed else []


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_what_a_page_takes_is_fresh(page: str) -> None:
    """Excerpts, tables, numbers; and every comment is a marker that is understood."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert guide.find_misplaced(text) == [], "a comment that is no marker, or follows no number"
    found = differences(page, text)
    assert found == [], "\n".join(found)


def test_what_is_not_its_source_is_noticed() -> None:
    """A changed line of code, row, cell or number, and the message has the right one; a comment that names nothing."""
    for name, old, new in (
        ("docs/guide/sinkhorn.md", "T.reduce_sum(P", "T.reduce_max(P"),
        ("docs/guide/sinkhorn.md", "| sm_90a |", "| sm_80 |"),
        ("README.md", "5.9 %<!--", "5.8 %<!--"),
        ("README.md", "(1.35×<!--", "(1.53×<!--"),
        ("docs/overhead.md", "27b 9.1 %", "27b 9.2 %"),
        ("docs/at-scale-model.md", "12.5 %<!--", "12.4 %<!--"),
        ("docs/guide/boundary.md", "255<!--", "254<!--"),
    ):
        page = (ROOT / name).read_text(encoding="utf-8")
        assert old in page, name
        found = differences(name, page.replace(old, new))
        assert any(line.startswith("+") and old in line for line in found), name
    for what in ("def nothing", "`for k` to `nothing`", "nothing"):
        with pytest.raises(LookupError, match=r"kernels/aggregate\.py"):
            guide.refresh(f"<!-- from kernels/aggregate.py: {what} -->\n", ROOT)
    with pytest.raises(LookupError, match=r"no row nothing"):
        guide.refresh("<!-- rows of docs/kernels/README.md: nothing -->\n", ROOT)
    for expression in ("nothing()", 'predicted("28b")', 'speedup("default", "nothing", "torch")'):
        with pytest.raises(LookupError, match=re.escape(expression)):
            guide.refresh(f"7.1 %<!-- = {expression} -->\n", ROOT)
    for comment in ("<!-- from nowhere -->", "some<!-- = predicted() -->", "<!-- = predicted() --> 7.1 %"):
        assert guide.find_misplaced(comment + "\n") != []


# Arithmetic that stands on its page, of devices that nothing was measured on.
ARITHMETIC = ("docs/tuning.md", "docs/critical-path.md", "docs/single-pass-boundary.md")
GENERATED = ("docs/study/",)  # held by tests of their own
PROSE = ["README.md", *(page for page in PAGES if not page.startswith((*ARITHMETIC, *GENERATED)))]
# Numbers of a kind that commands print: per cents, ratios, parts of C, counts of tests.
PRINTED = re.compile(r"\d[\d.,]*(?: ?%|×(?! ?\d))|\d+\.\d+·?C\b|\d[\d,]* (?:tests|cases)\b")
KNOWN = {
    "6.7 %": "the paper's",
    "1.5C": "a bound that test_perf_audited.py holds; and 7,680 B a token in units of C",
    "0.025C": "64 B a token in units of C",
    "12.5C": "(n + 1)·C·(L_r − 1) + … at n = 4, L_r = 6",
    "5.8C": "the same",
    "99 %": "of matrices drawn once, in conventions.md",
}


def held_by_nothing(text: str) -> list[str]:
    """Such numbers in prose that no marker holds."""
    prose = FENCED.sub("", guide.BLOCK.sub("", guide.EXCERPT.sub("", text)))
    return [found for found in PRINTED.findall(guide.NUMBER.sub("", prose)) if found not in KNOWN]


@pytest.mark.parametrize("page", PROSE)
def test_numbers_that_commands_print_are_held(page: str) -> None:
    """A number of a kind that commands print has a marker; else it is right on the day that it is written."""
    found = held_by_nothing((ROOT / page).read_text(encoding="utf-8"))
    assert found == [], f"{page}: {found}: mark them (perf/figures/excerpts.py), or leave them to the command"


def test_numbers_that_nothing_holds_are_noticed() -> None:
    for text in ("It adds 5.9 %.", "1.35× faster", "0.404C of small tensors", "6,440 tests ran", "453 of 453 cases"):
        assert len(held_by_nothing(text)) == 1, text
    for text in ("adds 5.9 %<!-- = layer_overhead() -->", "2048 × 4 × 1024", "14C", "```\n5.9 %\n```", "the 6.7 %"):
        assert held_by_nothing(text) == [], text


@pytest.mark.parametrize("name", ["default", "2048x4x1024-all-baselines", "2048x4x1024-boundary"])
def test_the_stored_report_is_that_of_the_stored_results(name: str) -> None:
    """Pages take rows of report.md."""
    table = facts.timings(name)
    assert table in (facts.STORED / "report" / "report.md").read_text(encoding="utf-8"), "make the report again"


def test_figures_are_fresh(tmp_path: Path) -> None:
    """Figures have the same bytes, where matplotlib is the version that drew them."""
    matplotlib = pytest.importorskip("matplotlib")
    from mhc_tilelang.perf.figures import guide as figures_guide

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
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        if path in WRITTEN:  # by `make docs`
            continue
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_lists_begin_after_an_empty_line(page: str) -> None:
    """Catches a list that the site would run into the paragraph before it, its dashes shown as they are."""
    lines = FENCED.sub("", (ROOT / page).read_text(encoding="utf-8")).splitlines()
    for before, line in itertools.pairwise(lines):
        assert not line.startswith("- ") or before.startswith(("- ", "  ", "#")) or not before.strip(), line
