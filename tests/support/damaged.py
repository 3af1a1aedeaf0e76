"""Damaged kernels: the generated source of a family is changed before the executor compiles it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from mhc_tilelang import compiler
from mhc_tilelang.compiler.simt import target

Mutation = Callable[[str], str]


@contextmanager
def damaged(family: str, mutate: Mutation) -> Iterator[None]:
    """Damage a kernel's source within this block."""
    generated = target.load_or_generate

    def generate_damaged(name: str, parameters: dict[str, Any], arch: str) -> tuple:
        source, signature = generated(name, parameters, arch)
        return (replace(source, code=mutate(source.code)) if name == family else source), signature

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "load_or_generate", generate_damaged)
        patch.setattr(compiler, "_kernels", {})
        yield
