"""manifest.json: what a bundle holds, and the checks that nothing of it was changed.

    format            of this file; another one is refused
    versions          of what made the bundle; `sources`: a hash of the kernels' and the loader's sources
    spec, dtype       of the model
    layout            what every buffer is: contiguous, and its alignment in bytes
    targets           per target what its code needs (see `cpu_target`, `cuda_target`), and its kernels
    golden            the golden vectors' index per target
    files             size and sha256 of every other file

`manifest.sha256` has the hash of manifest.json itself, in the format of `sha256sum`. Hashes find damage and mistakes;
they do not tell who made a bundle. So what others than this user and root can write is refused (`trust`), here too.
Imports neither torch nor tilelang.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from ..compiler import trust
from ..compiler.json_input import fields, strings
from ..compiler.kernel import Signature
from ..errors import BundleError

FORMAT = 2
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
FILE = {"bytes": int, "sha256": str}
TARGET: dict[str, dict[str, type]] = {
    "cpu": {"system": str, "machine": str, "march": str, "features": list, "library": str},
    "cuda": {"arch": str},
}
KERNEL = {"name": str, "symbol": str, "family": str, "parameters": dict}
LAUNCH = {"cubin": str, "function": str, "arguments": list, "grid": list, "threads": list, "shared_bytes": int}
PACKAGE = Path(__file__).resolve().parent.parent


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Add the hashes of all files that are in the folder, and write the manifest and its seal."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, SEAL))
    files = {path.relative_to(folder).as_posix(): facts_of(path) for path in paths}
    text = json.dumps({**manifest, "files": files}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    (folder / SEAL).write_text(f"{sha256(text.encode())}  {MANIFEST}\n", encoding="utf-8")
    for path in (folder, *folder.rglob("*")):
        trust.close(path)


def read(folder: Path) -> dict[str, Any]:
    """Return the manifest of a bundle. Raises BundleError where it is missing, changed, or of another format.

    TrustError where others than this user and root can write to the folder.
    """
    try:
        trust.check(folder)
        content = trust.check(folder / MANIFEST).read_bytes()
        seal = trust.check(folder / SEAL).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{folder}: expected a bundle with {MANIFEST} and {SEAL}, got {error}") from None
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{folder / MANIFEST}: expected JSON, got {error}") from None
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:  # before the hash: a newer format may be sealed in another way
        raise BundleError(f"{folder / MANIFEST}: format: expected {FORMAT}, got {version!r}; export the bundle again")
    if seal[:1] != [sha256(content)]:
        raise BundleError(f"{folder / MANIFEST}: expected sha256 {' '.join(seal[:1])}, got {sha256(content)}")
    try:
        check_fields(manifest, str(folder / MANIFEST))
    except ValueError as error:
        raise BundleError(str(error)) from None
    return manifest


def check_fields(manifest: Any, where: str) -> None:
    """Raise ValueError for the first field that is not there or of another type, of those that loading reads."""
    fields(manifest, REQUIRED, where)
    for name, facts in manifest["files"].items():
        fields(facts, FILE, f"{where}: files: {name}")
    for target, part in manifest["targets"].items():
        at = f"{where}: targets: {target}"
        kind = fields(part, {"kind": str, "kernels": list}, at)["kind"]
        if kind not in TARGET:
            raise ValueError(f"{at}: kind: expected {' or '.join(TARGET)}, got {kind}")
        fields(part, TARGET[kind], at)
        if kind == "cpu":
            strings(part["features"], f"{at}: features")
        for entry in part["kernels"]:
            kernel = f"{at}: {fields(entry, KERNEL, at)['name']}"
            Signature.from_json(entry, kernel)
            if kind == "cuda":
                fields(fields(entry, {"launch": dict}, kernel)["launch"], LAUNCH, f"{kernel}: launch")


def content_of(folder: Path, manifest: dict[str, Any], name: str) -> bytes:
    """Return a file of the bundle, checked. Raises BundleError where it is missing, changed, or not the bundle's.

    TrustError where others than this user and root can write to it.
    """
    facts = manifest["files"].get(name)
    if facts is None:
        raise BundleError(f"{folder}: {name}: expected a file that the manifest names, got one that it does not")
    try:
        content = trust.check(folder / name).read_bytes()
    except OSError as error:
        raise BundleError(f"{folder}: {name}: expected {facts['bytes']} bytes, got {error.strerror}") from None
    if len(content) != facts["bytes"]:
        raise BundleError(f"{folder}: {name}: expected {facts['bytes']} bytes, got {len(content)}: it was changed")
    if sha256(content) != facts["sha256"]:
        raise BundleError(f"{folder}: {name}: expected sha256 {facts['sha256']}, got {sha256(content)}: it was changed")
    return content


def others(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """List files in a bundle's folder that the manifest does not name; folders count where nothing named is in them."""
    named = {MANIFEST, SEAL, *manifest["files"]}
    named |= {parent.as_posix() for name in manifest["files"] for parent in Path(name).parents}
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return sorted(set(found) - named)


def facts_of(path: Path) -> dict[str, Any]:
    """Return the manifest's entry for a file: its size and its hash."""
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": sha256(content)}


def sha256(content: bytes) -> str:
    """Return the digest in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


@cache
def sources_hash() -> str:
    """Hash the sources that a kernel, its plan and its call come from: another build's may differ in meaning."""
    from .. import kernels

    compiler = PACKAGE / "compiler"
    files = [*Path(kernels.__file__).parent.glob("*.py"), *PACKAGE.glob("launch/*.py")]
    files += [path for path in (compiler / "cpu").iterdir() if path.suffix in (".py", ".h")]
    files += [compiler / name for name in ("kernel.py", "tracing.py", "cuda.py", "cuda_source.py")]
    return sha256("".join(sorted(facts_of(path)["sha256"] for path in files)).encode())[:20]
