"""Calls that are prepared: a call like one that has passed every check replays its tape instead (`compiler.tape`).

`find` knows a call by everything that a check or a plan looks at: the function, its numbers with their types, and of
every tensor shape, dtype, device, where it starts within 16 bytes, and whether it requires a gradient; beside them the
grad mode and the number of threads. The first call with a key is an ordinary one, with all checks; the second is
recorded; later ones replay. There are at most `MOST` keys, and those found first go first. Each takes some 10 KB: 5 MB.

Prepared are plain dense tensors that have elements, contiguous and on a CPU or GPU; and only where nothing has to see
the operators (see `possible`). For all others a call is what it always was. To replace a function of `launch`, of its
plans, or one that hands out kernels, as tests and tuning do, forgets every key.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import compiler, kernels, launch
from ..compiler.tape import NotThereError, Tape, record
from ..kernels.plans import MAX_ACCESS_BYTES
from ..launch import beside

MOST = 512
_KERNEL = compiler.kernel
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_ready: dict[tuple, Any] = {}

Key = tuple[Any, ...]


class Prepared:
    """A call that computes results from tensors: first by `run` of constants and tensors, then by its tape."""

    def __init__(self, run: Callable[..., Sequence[Any]], constants: tuple[Any, ...]) -> None:
        self.constants = constants
        self._run = partial(run, constants)
        self._tape: Tape | None = None
        self._is_recorded = False

    def __call__(self, *tensors: Any) -> tuple[Any, ...]:
        """The results of `run`."""
        if self._tape is not None:
            with suppress(NotThereError):
                return self._tape.replay(tensors)
        if self._is_recorded:
            return tuple(self._run(*tensors))
        results, self._tape = record(self._run, tensors)
        self._is_recorded = True
        return results


def possible() -> bool:
    """Whether nothing has to see the operator of a call, or its kernels.

    That is a compiler or tracer, a transform of torch.func, a dual level of forward mode, a mode, a profiler; an
    emulator, or what notes launches; a stream beside the current one, which a tape would not launch on.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or compiler._emulators
        or compiler.kernel is not _KERNEL
        or beside.asked() is not None
    )


def describe(what: tuple[Any, ...], given: Sequence[Any]) -> Key | None:
    """The key of a call, `what` and its tensors, numbers among them; None for one that is not prepared."""
    key: list[Any] = [what, torch.get_num_threads()]
    try:
        for one in given:
            if type(one) in _PLAIN:
                address = one.data_ptr()  # none of a sparse tensor, 0 of one without elements, or on meta
                if not address or not one.is_contiguous() or one.is_neg():
                    return None
                key += (one.shape, one.dtype, one.get_device(), one.requires_grad, address % MAX_ACCESS_BYTES)
            elif isinstance(one, torch.Tensor):
                return None
            else:
                key += (type(one), one)
    except RuntimeError:  # of a sparse or nested one
        return None
    return tuple(key)


def run(
    what: tuple[Any, ...], tensors: Sequence[Any], compute: Callable[..., Sequence[Any]], constants: tuple[Any, ...]
) -> Sequence[Any]:
    """Compute from the constants and tensors, by the prepared call if there is one: an operator, below autograd."""
    key = describe(what, tensors) if possible() else None
    ready = find(key)
    if ready is not None:
        found: Sequence[Any] = ready(*tensors)
        return found
    results = compute(constants, *tensors)
    if key is not None:
        remember(key, Prepared(compute, constants))
    return results


def find(key: Key | None) -> Any:
    """Return the call remembered for a key, None if there is none."""
    try:
        return None if key is None else _ready.get(key)
    except TypeError:  # a list given for a number
        return None


def remember(key: Key, ready: Any) -> None:
    """Have `find` find it."""
    while len(_ready) >= MOST:
        _ready.pop(next(iter(_ready), key), None)
    _ready[key] = ready


def forget() -> None:
    """Have every call checked and prepared anew."""
    _ready.clear()


class _Deciding(ModuleType):
    """A module whose functions decide what a call launches: tapes hold what those said that were there before."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        forget()


_decide = (launch.__name__, kernels.__name__)
for _name, _module in [*sys.modules.items()]:
    if _name.startswith(_decide) or _module is compiler:
        _module.__class__ = _Deciding
