"""Launches of CUDA kernels, with stand-ins for tilelang and the driver: nothing here has run on a GPU.

Would catch: tilelang's Python wrapper in front of every launch, a kernel found in tilelang's cache that is called
otherwise, a launch on another device than that of its tensors, a current device left changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mhc_tilelang.compiler import cuda
from mhc_tilelang.compiler.kernel import Buffer, Signature


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The current device, the last of these; it starts as 0."""
    stack = [0]

    @contextmanager
    def device(wanted: Any) -> Iterator[None]:
        stack.append(wanted.index)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: stack[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    return stack


def adapter(kind: str, run: Any) -> Any:
    """tilelang's, as it compiled the kernel, found it in its cache, or with another backend."""
    module = SimpleNamespace(main=run)
    executables = {"compiled": SimpleNamespace(jit=lambda: module), "cached": module}
    if kind == "another":
        return SimpleNamespace()
    return SimpleNamespace(get_exportable_executable=lambda: executables[kind])


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("kind", ["compiled", "cached", "another"])
def test_launches(kind: str, index: int, current: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[Any, ...]] = []

    class JITKernel:
        def __init__(self) -> None:
            self.adapter = adapter(kind, lambda *given: launched.append((current[-1], *given)))

        def __call__(self, *given: Any) -> None:
            assert kind == "another"
            launched.append((current[-1], *given))

    monkeypatch.setattr(cuda, "trace", lambda *_: None)
    monkeypatch.setattr(cuda, "build", lambda *_: JITKernel())
    monkeypatch.setattr(
        cuda, "signature_of", lambda _: Signature((Buffer("x", "float32", ("T",)),), {"eps": "float32"})
    )
    tensor = SimpleNamespace(device=SimpleNamespace(index=index))
    kernel = cuda.load("post", {}, "sm_90a")
    kernel.launch([tensor], {"T": 3}, [0.5])
    assert launched == [(index, tensor, 0.5)]
    assert current == [0]
    assert kernel.native is None
