"""The disk cache in $MHC_TILELANG_CACHE: compiled kernels and generated sources.

    FOLDER/NAME.json   {"format", "name", "facts", "file": {"bytes", "sha256"} or {}, "seal": a hash of the others}
    FOLDER/NAME.so     the file that belongs to the record, if one does

NAME has a hash of what the entry is made from, so nothing stale is found. Both files are written elsewhere and
renamed, the record last: a writer that was killed or ran out of space leaves nothing that is found; of two at once,
which make equal files, the last one's stay. Before a file is loaded, its size and hash must be those of its record, and
the record must fit its seal: what was cut off, changed, or is another entry's is rebuilt, with a line on stderr. What
others than this user and root could have written is refused (`trust`). Imports neither torch nor tilelang.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from ..errors import CompilerError
from . import trust
from .json_input import fields

VARIABLE = "MHC_TILELANG_CACHE"
FORMAT = 1
RECORD = {"format": int, "name": str, "facts": dict, "file": dict, "seal": str}
FILE = {"bytes": int, "sha256": str}
Made = tuple[dict[str, Any], "Path | None"]
T = TypeVar("T")


def location() -> Path:
    """Return the cache's folder: $MHC_TILELANG_CACHE, else mhc-tilelang in the user's cache.

    What tilelang itself compiles for CUDA, it keeps in $TILELANG_CACHE_DIR. Raises CompilerError for a user of whom
    the system knows no home, as in a container that runs under a number.
    """
    if named := os.environ.get(VARIABLE):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mhc-tilelang"
    except RuntimeError:
        raise CompilerError(
            f"expected a home to keep kernels in, got a user (uid {os.geteuid()}) without one. Name a folder that can "
            f"be written and run from in ${VARIABLE}"
        ) from None


def get_or_make(
    folder: str,
    name: str,
    make: Callable[[Path], Made],
    use: Callable[[dict[str, Any], Path], T],
    suffix: str = ".so",
) -> T:
    """Return `use` of an entry, which is made first if it is missing, damaged or of no use.

    Args:
        folder: within the cache.
        name: the entry's name, with a hash of what it is made from.
        make: is given an empty folder within `folder`; returns facts as JSON has them, and a file it wrote or None.
        use: is given the facts and where the file is. It may raise for facts that it cannot read or a file that the
            system does not load: then the entry is rebuilt, once.
        suffix: the file's suffix.

    Raises:
        TrustError: others than this user and root can write to the cache or to the entry.
        CompilerError: the cache cannot be written.
    """
    try:
        place = open_folder(folder)
        try:
            facts, file = read(place, name, suffix)
            return use(facts, file)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            from tqdm import tqdm  # a bar that is up stays whole

            tqdm.write(f"mhc-tilelang: {error}: rebuilt", file=sys.stderr)
        facts, file = write(place, name, suffix, make)
        return use(facts, file)
    except OSError as error:
        where = location() / folder
        hint = f"Name a folder that can be written and run from in ${VARIABLE}"
        raise CompilerError(f"cannot keep kernels in {where}: {error}. {hint}") from error


def open_folder(folder: str) -> Path:
    """Return the real path of a cache folder, created if missing: for this user alone where none was named."""
    root = location()
    mode = 0o755 if os.environ.get(VARIABLE) else 0o700
    for missing in reversed([path for path in (root, *root.parents) if not path.exists()]):
        missing.mkdir(mode, exist_ok=True)
    place = trust.check(root) / folder
    place.mkdir(0o755, exist_ok=True)
    return trust.check(place)


def read(place: Path, name: str, suffix: str) -> tuple[dict[str, Any], Path]:
    """Return the facts of an entry and its file, verified. Raises FileNotFoundError where there is no record.

    ValueError or OSError with what was expected and what came where one is damaged, TrustError where others can write.
    """
    path, file = place / f"{name}.json", place / f"{name}{suffix}"
    content = trust.check(path).read_bytes()
    try:
        loaded = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    record = fields(loaded, RECORD, str(path))
    for field, expected in (("format", FORMAT), ("name", name), ("seal", seal_of(record))):
        if record[field] != expected:
            raise ValueError(f"{path}: {field}: expected {expected!r}, got {record[field]!r}")
    if record["file"]:
        facts = fields(record["file"], FILE, f"{path}: file")
        if not file.is_file():
            raise ValueError(f"{file}: expected a file of {facts['bytes']} bytes, got none")
        file = trust.check(file)
        if (got := facts_of(file, facts["bytes"])) != facts:
            raise ValueError(f"{file}: expected {facts}, got {got}")
    return record["facts"], file


def write(place: Path, name: str, suffix: str, make: Callable[[Path], Made]) -> tuple[dict[str, Any], Path]:
    """Make an entry, and put it in its place; the record last. Returns what `read` would."""
    file = place / f"{name}{suffix}"
    with TemporaryDirectory(dir=place) as scratch:
        facts, made = make(Path(scratch))
        record: dict[str, Any] = {"format": FORMAT, "name": name, "facts": facts}
        record["file"] = {} if made is None else facts_of(made)
        text = json.dumps({**record, "seal": seal_of(record)})
        if made is not None:
            put(made, file)
        written = Path(scratch) / "record"
        written.write_text(text, encoding="utf-8")
        put(written, place / f"{name}.json")
    return dict(json.loads(text)["facts"]), file


def put(made: Path, place: Path) -> None:
    """Rename a file to its place, replacing a folder that is in the way; no other user may write to it."""
    trust.close(made)
    if place.is_dir() and not place.is_symlink():
        os.replace(place, made.with_name(f"{made.name}.in-the-way"))  # and removed with what is left there
    os.replace(made, place)


def facts_of(file: Path, expected: int | None = None) -> dict[str, Any]:
    """Size and hash of a file; the size alone where it is not the expected one."""
    size = file.stat().st_size
    if expected is not None and size != expected:
        return {"bytes": size}
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def seal_of(record: dict[str, Any]) -> str:
    """Return a hash of a record's fields but its seal."""
    rest = {name: value for name, value in record.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
