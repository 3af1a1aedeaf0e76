"""manifest.json: what a bundle holds, and the checks that nothing of it was changed.

    format            of this file; another one is refused
    versions          of what made the bundle; `sources`: a hash of the kernels' and the loader's sources
    spec, dtype       of the model
    layout            what every buffer is: contiguous, and aligned to so many bytes
    targets           per target what its code needs (see `cpu_target`, `cuda_target`), and its kernels
    golden            the golden vectors' index per target
    files             size and sha256 of every other file

`manifest.sha256` has the hash of manifest.json itself, in the format of `sha256sum`. Hashes find damage and mistakes;
they do not tell who made a bundle. Imports neither torch nor tilelang.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import BundleError

FORMAT = 1
MANIFEST, SEAL = "manifest.json", "manifest.sha256"
REQUIRED = {
    "format": int,
    "versions": dict,
    "spec": dict,
    "dtype": str,
    "layout": dict,
    "targets": dict,
    "golden": dict,
    "files": dict,
}
PACKAGE = Path(__file__).resolve().parent.parent


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Add the hashes of all files that are in the folder, and write the manifest and its seal."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, SEAL))
    files = {path.relative_to(folder).as_posix(): facts_of(path) for path in paths}
    text = json.dumps({**manifest, "files": files}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    (folder / SEAL).write_text(f"{sha256(text.encode())}  {MANIFEST}\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle. Raises BundleError where it is missing, changed, or of another format."""
    try:
        content, seal = (folder / MANIFEST).read_bytes(), (folder / SEAL).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{folder}: expected a bundle with {MANIFEST} and {SEAL}, got {error}") from None
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise BundleError(f"{folder / MANIFEST}: expected JSON, got {error}") from None
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:  # before the hash: a newer format may be sealed in another way
        raise BundleError(f"{folder / MANIFEST}: format: expected {FORMAT}, got {version!r}; export the bundle again")
    if seal[:1] != [sha256(content)]:
        raise BundleError(f"{folder / MANIFEST}: expected sha256 {' '.join(seal[:1])}, got {sha256(content)}")
    for name, kind in REQUIRED.items():
        if not isinstance(manifest.get(name), kind):
            got = type(manifest.get(name)).__name__
            raise BundleError(f"{folder / MANIFEST}: {name}: expected {kind.__name__}, got {got}")
    return manifest


def content_of(folder: Path, manifest: dict[str, Any], name: str) -> bytes:
    """A file of the bundle, checked. Raises BundleError where it is missing, changed, or not the bundle's."""
    facts = manifest["files"].get(name)
    if facts is None:
        raise BundleError(f"{folder}: {name}: expected a file that the manifest names, got one that it does not")
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise BundleError(f"{folder}: {name}: expected {facts['bytes']} bytes, got {error.strerror}") from None
    if sha256(content) != facts["sha256"]:
        raise BundleError(f"{folder}: {name}: expected sha256 {facts['sha256']}, got {sha256(content)}: it was changed")
    return content


def facts_of(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": sha256(content)}


def sha256(content: bytes) -> str:
    """As hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


@cache
def sources_hash() -> str:
    """A hash of the sources that a kernel, its plan and its call come from: another build's may differ in meaning."""
    from .. import kernels

    files = [*Path(kernels.__file__).parent.glob("*.py"), *PACKAGE.glob("launch*.py")]
    files += [path for path in (PACKAGE / "cpu").iterdir() if path.suffix in (".py", ".h")]
    files += [PACKAGE / name for name in ("kernel.py", "tracing.py", "cuda.py", "cuda_source.py")]
    return sha256("".join(sorted(facts_of(path)["sha256"] for path in files)).encode())[:20]
