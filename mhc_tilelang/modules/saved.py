"""Tensors that an autograd graph keeps for its backward: its nodes, the tensors they saved, and how many bytes.

PyTorch shows what a node saved as `_raw_saved_…` attributes, `SavedTensor`s, on which hooks can be registered after the
fact (`torch.autograd.graph`, "hooks for saved tensors"). Nothing is unpacked here: `data` is looked at, which is the
tensor itself, or whatever a hook packed it as.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch

PLAIN = (torch.Tensor, torch.nn.Parameter)


def saved_bytes(*outputs: torch.Tensor) -> int:
    """Bytes that the graph of `outputs` keeps for its backward, parameters that it saved included.

    Tensors that share a storage count once, and whole. What `ResidualStream(…, recompute=…)` makes again in the
    backward does not count: it is not kept.

    Raises:
        ValueError: a tensor was saved through other saved-tensor hooks, which may have put it anywhere, or
            as a subclass of torch.Tensor.
    """
    from .blocks import Handle

    sizes: dict[int, int] = {}
    for node in nodes(outputs):
        for saved in saved_by(node):
            if isinstance(saved.data, Handle) or (saved.data is None and saved.unpack_hook is None):
                continue
            if not is_untouched(saved):
                raise ValueError(f"saved_bytes: expected tensors without saved-tensor hooks, got one at {node.name()}")
            storage = saved.data.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()  # on meta all data lie at 0
    return sum(sizes.values())


def sequence_number() -> int:
    """Return the number that the next node of this thread's graphs gets."""
    number: int = torch.autograd._get_sequence_nr()
    return number


def nodes(outputs: Iterable[torch.Tensor], since: int = 0) -> Iterator[Any]:
    """Yield the nodes from which `outputs` come, each once, of those that this thread made from `since` on."""
    waiting: list[Any] = [output.grad_fn for output in outputs]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node._sequence_nr() < since:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def saved_by(node: Any) -> Iterator[Any]:
    """Yield a node's saved tensors as `SavedTensor`s; none of one that was freed, or of a C++ extension's."""
    node_type: Any = type(node)
    for name in _names(node_type):
        try:
            saved = getattr(node, name)
        except RuntimeError:  # freed by a backward
            continue
        yield from saved if isinstance(saved, (tuple, list)) else (() if saved is None else (saved,))


def is_untouched(saved: Any) -> bool:
    """Whether a plain tensor was saved, and as it is."""
    return saved.unpack_hook is None and type(saved.data) in PLAIN


@cache
def _names(node_type: type) -> tuple[str, ...]:
    return tuple(name for name in dir(node_type) if name.startswith("_raw_saved_"))
