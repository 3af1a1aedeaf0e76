"""Kernels from bundles, for `compile.kernel`: found by what they are compiled with, checked, and never compiled.

A bundle is opened once a process: its manifest is checked then, a library or cubin when the first kernel needs it.
Nothing is kept of a bundle or a kernel that is refused. Loads neither tilelang nor a compiler.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..compiler.kernel import Kernel, Signature
from ..errors import BundleError
from . import cpu_target, manifest
from .described import encode_parameters, key_of


class Bundle:
    """An open bundle. Raises BundleError where its manifest is missing, changed or of another format."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = manifest.read(folder)
        self.targets: dict[str, dict[str, dict[str, Any]]] = {
            target: {key_of(entry["family"], entry["parameters"]): entry for entry in part["kernels"]}
            for target, part in self.manifest["targets"].items()
        }
        self._library: Path | None = None
        self._lock = threading.Lock()

    def kernel(self, target: str, entry: dict[str, Any]) -> Kernel:
        """Return a kernel of the manifest. Raises BundleError if its code was changed or this machine cannot run it."""
        if self.manifest["targets"][target]["kind"] == "cpu":
            from ..compiler.cpu.build import bind

            library = self.library(target)
            try:
                return bind(library, entry["family"], entry["symbol"], signature_of(entry))
            except (OSError, AttributeError) as error:
                raise BundleError(f"{library}: expected a library that this system loads, got {error}") from None
        from . import driver

        launch = entry["launch"]
        cubin = manifest.content_of(self.folder, self.manifest, launch["cubin"])
        return driver.kernel(entry["family"], signature_of(entry), cubin, launch)

    def library(self, target: str) -> Path:
        """Return the CPU's library, checked once."""
        with self._lock:
            if self._library is None:
                facts = self.manifest["targets"][target]
                cpu_target.check_machine(facts, str(self.folder))
                manifest.content_of(self.folder, self.manifest, facts["library"])
                self._library = (self.folder / facts["library"]).resolve()
            return self._library


def signature_of(entry: dict[str, Any]) -> Signature:
    """Return the signature of a kernel of the manifest."""
    return Signature.from_json(entry, entry["name"])


@cache
def open_bundle(folder: Path) -> Bundle:
    """Open a bundle whose kernels this package may call: it must be made with the same plans and signatures."""
    bundle = Bundle(folder)
    made_with, here = bundle.manifest["versions"].get("sources"), manifest.sources_hash()
    if made_with != here:
        raise BundleError(
            f"{folder}: expected a bundle made with this build of the kernels ({here}), got one made with {made_with}; "
            "export it again"
        )
    return bundle


def kernel(named: str, family: str, target: str, parameters: dict[str, Any]) -> Kernel:
    """Return the kernel of a family from the bundles that `named` lists, as $PATH lists folders; the first that has it.

    Raises BundleError where none has it, or one is damaged.
    """
    bundles = [open_bundle(Path(folder).resolve()) for folder in named.split(os.pathsep) if folder]
    key = key_of(family, parameters)
    for bundle in bundles:
        entry = bundle.targets.get(target, {}).get(key)
        if entry is not None:
            return bundle.kernel(target, entry)
    raise BundleError(missing(bundles, family, target, parameters))


def missing(bundles: Sequence[Bundle], family: str, target: str, parameters: dict[str, Any]) -> str:
    """Describe the kernel that was wanted, and the closest ones that the bundles have."""
    wanted = encode_parameters(parameters)
    lines = [f"no bundle has the kernel {family} for {target} with {in_words(wanted)}"]
    for bundle in bundles:
        entries = [entry for entry in bundle.targets.get(target, {}).values() if entry["family"] == family]
        if target not in bundle.targets:
            has = f"kernels for {', '.join(bundle.targets)}, none for {target}"
        elif not entries:
            has = f"no {family}; it has {', '.join(sorted({e['family'] for e in bundle.targets[target].values()}))}"
        else:
            closest = min((differences(wanted, entry["parameters"]) for entry in entries), key=len)
            has = f"{family} with {in_words(closest)}"
        lines.append(f"  {bundle.folder} has {has}")
    lines.append("export what is missing, or unset $MHC_TILELANG_BUNDLE to compile it")
    return "\n".join(lines)


def differences(wanted: dict[str, Any], has: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters in which a kernel of a bundle is not the one that was asked for."""
    return {name: value for name, value in has.items() if name not in wanted or wanted[name] != value}


def in_words(parameters: dict[str, Any]) -> str:
    """Parameters in a message; those of a plan in brackets."""

    def word(value: Any) -> str:
        if not isinstance(value, dict):
            return str(value)
        return f"{value['type']}({', '.join(f'{k}={word(v)}' for k, v in value.items() if k != 'type')})"

    return ", ".join(f"{name}={word(value)}" for name, value in parameters.items()) or "no parameters"
