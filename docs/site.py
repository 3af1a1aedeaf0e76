"""What mkdocs lacks for these pages, as hooks: they link into the repository, whose README is the first of them.

A link that leaves docs/ works in a repository browser. In the site its target becomes a page under source/: Markdown as
it is, code highlighted, a folder as a list; pictures and data are copied. So the site is whole without the repository.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)]*)?(\))")
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".c": "c", ".cu": "cuda", ".toml": "toml", ".sh": "sh"}


def place(path: str) -> str:
    """Where the site has a path of the repository, both relative: what is in docs/ stays, the rest is a source page."""
    if path.startswith("docs/"):
        inner = path.removeprefix("docs/")
        return inner + "/README.md" if (ROOT / path).is_dir() else inner
    if path == "README.md":
        return "index.md"
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    if Path(path).suffix in LANGUAGES or not Path(path).suffix:
        return f"source/{path}.md"
    return f"source/{path}"


def relinked(text: str, path: str) -> tuple[str, set[str]]:
    """The text of a page of the repository with links as the site has them, and the paths that they lead to."""
    targets = set()

    def link(match: re.Match[str]) -> str:
        opening, target, anchor, closing = match.groups()
        found = normpath(join(dirname(path), target))
        if not (ROOT / found).exists():
            return match.group()  # for mkdocs to name
        targets.add(found)
        return f"{opening}{relpath(place(found), dirname(place(path)) or '.')}{anchor or ''}{closing}"

    blocks = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    return "".join(b if b.startswith("```") else LINK.sub(link, b) for b in blocks), targets


def source_page(path: str) -> str:
    """The page of a file or folder that is no Markdown."""
    full = ROOT / path
    if full.is_dir():
        names = sorted(f"{one.name}/" if one.is_dir() else one.name for one in full.iterdir())
        shown = [name for name in names if not name.startswith((".", "__pycache__"))]
        return f"# {path}/\n\n" + "\n".join(f"- `{name}`" for name in shown) + "\n"
    language = LANGUAGES.get(full.suffix, "text")
    return f"# {path}\n\n``````{language}\n{full.read_text(encoding='utf-8')}\n``````\n"


def on_config(config: Any) -> Any:
    """A folder in the nav, its name with a slash at the end, stands for its pages that are not named there."""
    named = {path for section in config.nav for path in paths_in(section)}
    sections = [expanded(section, named) for section in config.nav]
    config.nav = [section for section in sections if paths_in(section)]
    return config


def paths_in(entry: Any) -> list[str]:
    """Every path below an entry of the nav."""
    if isinstance(entry, str):
        return [entry]
    inner = entry.values() if isinstance(entry, dict) else entry
    return [path for one in inner for path in paths_in(one)]


def expanded(section: Any, named: set[str]) -> Any:
    """A section with its folder, if it has one, replaced by the pages in it; README.md is the first of them."""
    if not isinstance(section, dict):
        return section
    result = {}
    for title, entries in section.items():
        flat = []
        for entry in entries if isinstance(entries, list) else [entries]:
            if not entry.endswith("/"):
                flat.append(entry)
                continue
            pages = sorted((ROOT / "docs" / entry).glob("*.md"), key=lambda path: (path.name != "README.md", path.name))
            uris = [path.relative_to(ROOT / "docs").as_posix() for path in pages]
            flat += [uri for uri in uris if uri not in named]
        result[title] = flat if isinstance(entries, list) else flat[0]
    return result


def on_files(files: Files, config: Any) -> Files:
    """Add the README, and everything outside docs/ that a page links to, pages of pages included."""
    waiting = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    done = set()
    while waiting:
        path = waiting.pop()
        if path in done or (path.startswith("docs/") and not path.endswith(".md")):
            continue
        done.add(path)
        is_markdown = path.endswith(".md")
        if is_markdown:
            text, targets = relinked((ROOT / path).read_text(encoding="utf-8"), path)
            waiting += sorted(targets)
        if path.startswith("docs/"):
            continue
        uri = place(path)
        if is_markdown:
            files.append(File.generated(config, uri, content=text))
        elif uri.endswith(".md"):
            files.append(File.generated(config, uri, content=source_page(path)))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Links of the pages in docs/ as the site has them; those of others were rewritten when they were added."""
    if page.file.generated_by:
        return markdown
    return relinked(markdown, os.path.join("docs", page.file.src_uri))[0]
