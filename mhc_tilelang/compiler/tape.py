"""Tapes: operations of a call on memory, recorded while it runs and replayed on other tensors of the same description.

    results, tape = record(run, tensors)     run(*tensors), as ever; allocations, launches and operations are noted
    results = tape.replay(tensors)           the same ones once more: nothing is checked, planned or looked up

`run` decides everything by what describes its tensors (shapes, dtypes, devices, where they start), never by what is in
them; a replay must be given tensors of that description. A tape holds no memory of tensors. `record` returns
None instead of one where it saw something that it does not follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .kernel import Kernel, taping

aten = torch.ops.aten
ALLOCATIONS = (
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)
Slots = list[Any]  # tensors by number: first those that are given, then those that are made


class NotThereError(Exception):
    """What a tape would use of others' memory is not to be had now. The call may be made from its beginning."""


class Step(NamedTuple):
    """Tensors that are made, a launch, and tensors that are let go of.

    Attributes:
        makes: (slot, template, make): like a template, which has no memory, or else what `make` gives.
        launch: None behind the last launch.
        by_address: whether the launch takes addresses; else it takes tensors.
        operands: picks them from all.
        constants: the arguments behind.
        drops: slots that nothing uses after this.
    """

    makes: tuple[tuple[int, Any, Callable[[Slots], Any] | None], ...]
    launch: Callable[..., Any] | None
    by_address: bool
    operands: Callable[[Slots], Any]
    constants: tuple[Any, ...]
    drops: tuple[int, ...] = ()


class Tape(NamedTuple):
    """The steps of a call, how many slots they fill, those given whose addresses count, and those of the results."""

    steps: tuple[Step, ...]
    num_made: int
    addressed: tuple[int, ...]
    results: tuple[int | None, ...]

    def replay(self, given: Sequence[Any]) -> tuple[Any, ...]:
        """The results, from tensors that are described as those that the tape was recorded with."""
        slots = [*given, *[None] * self.num_made]
        addresses = [0] * len(slots)
        for slot in self.addressed:
            addresses[slot] = slots[slot].data_ptr()
        for makes, launch, by_address, operands, constants, drops in self.steps:
            for slot, template, make in makes:
                tensor = slots[slot] = torch.empty_like(template) if make is None else make(slots)
                addresses[slot] = tensor.data_ptr()
            if by_address:
                launch(*operands(addresses), *constants)  # type: ignore[misc]
            elif launch is not None:
                launch(operands(slots), *constants)
            for slot in drops:
                slots[slot] = None
        return tuple([None if slot is None else slots[slot] for slot in self.results])


def record(run: Callable[..., Sequence[Any]], given: Sequence[Any]) -> tuple[tuple[Any, ...], Tape | None]:
    """Run a call: its results, and its tape, which is None where something was not followed."""
    with torch._C._AutoDispatchBelowAutograd():
        # An object of its own for each tensor, also where one is given twice.
        named = [aten.alias(one) if isinstance(one, torch.Tensor) else one for one in given]
        recorder = Recorder(named)
        outer, taping.recorder = taping.recorder, recorder
        try:
            with recorder:
                results = tuple(run(*named))
        finally:
            taping.recorder = outer
        return results, recorder.tape(results)


class _Seen(NamedTuple):
    """A tensor, and where it lies: in the memory of the slot `root`, elements behind that one's start."""

    tensor: torch.Tensor
    root: int
    start: int


class _Noted(NamedTuple):
    """A launch; an operation, which makes or changes the slots `made`; or an allocation, which calls nothing."""

    call: Callable[..., Any] | None
    operands: tuple[int, ...] = ()
    constants: tuple[Any, ...] = ()
    by_address: bool = False
    made: tuple[int, ...] = ()


class Recorder(TorchDispatchMode):
    """Sees every operation below autograd; kernels tell it of their launches."""

    def __init__(self, given: Sequence[Any]) -> None:
        super().__init__()
        self._seen: list[Any] = []  # by slot, a `_Seen` each; these keep the tensors alive, whose ids are told apart
        self._by_id: dict[int, int] = {}
        self._noted: list[_Noted] = []
        self._is_followed = True
        self._num_given = len(given)
        for one in given:
            if isinstance(one, torch.Tensor):
                self._add(one)
            else:
                self._seen.append(None)

    def launched(self, kernel: Kernel, tensors: list[Any], sizes: dict[str, int], scalars: list[Any]) -> None:
        """Note a launch."""
        if kernel.native is None:
            self._noted.append(_Noted(kernel.launch, self._find(tensors), (sizes, scalars)))
        else:
            numbers = (*sizes.values(), *scalars, torch.get_num_threads())
            kinds = kernel.native.argtypes[len(tensors) :]  # converted once: at each call it took a third of it
            constants = tuple(kind(number) for kind, number in zip(kinds, numbers, strict=True))
            self._noted.append(_Noted(kernel.native, self._find(tensors), constants, by_address=True))

    def given(self, tensor: torch.Tensor, find: Callable[[], torch.Tensor | None]) -> None:
        """Note memory of others that the call uses: each replay asks `find` for it."""
        self._noted.append(_Noted(lambda _: find(), made=(self._add(tensor),)))

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it is."""
        kwargs = kwargs or {}
        returned = func(*args, **kwargs)
        outputs = returned if isinstance(returned, (tuple, list)) else (returned,)
        if func in ALLOCATIONS:
            self._noted.append(_Noted(None, made=(self._add(returned),)))
        elif not func._schema.is_mutable and _share_memory(*args[:1], *outputs):
            for view in outputs:
                self._add(view, *self._find(args[:1]))
        else:
            self._note_operation(func, args, kwargs, outputs)
        return returned

    def _note_operation(self, func: Any, args: tuple, kwargs: dict[str, Any], outputs: Sequence[Any]) -> None:
        """An operation on tensors and then constants: it makes new ones, or changes the first, which it returns."""
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        constants = args[len(tensors) :]
        others = tree_leaves((constants, kwargs))
        if any(isinstance(one, torch.Tensor) for one in others) or not all(
            isinstance(o, torch.Tensor) for o in outputs
        ):
            self._is_followed = False
            return
        operands = self._find(tensors)
        made = tuple(self._by_id[id(one)] if id(one) in self._by_id else self._add(one) for one in outputs)
        self._noted.append(_Noted(lambda tensors: func(*tensors, *constants, **kwargs), operands, made=made))

    def _add(self, tensor: torch.Tensor, base: int = -1) -> int:
        """A new slot, of a tensor in memory of its own or in that of the slot `base`."""
        slot = root = len(self._seen)
        start = 0
        if base < 0:
            self._is_followed &= tensor.is_contiguous()
        else:
            of = self._seen[base]
            root, start = of.root, of.start + (tensor.data_ptr() - of.tensor.data_ptr()) // tensor.element_size()
            self._is_followed &= tensor.dtype == of.tensor.dtype
        self._seen.append(_Seen(tensor, root, start))
        self._by_id[id(tensor)] = slot
        return slot

    def _find(self, tensors: Sequence[Any]) -> tuple[int, ...]:
        """The slots of tensors. One that was never seen comes from elsewhere, and a tape would keep it."""
        found = tuple(self._by_id.get(id(tensor), -1) for tensor in tensors)
        self._is_followed &= -1 not in found
        return found

    def tape(self, results: Sequence[Any]) -> Tape | None:
        """The tape of what was noted; None where that is not everything, or a result has no memory of its own."""
        found = self._find([one for one in results if one is not None])
        if not self._is_followed:
            return None
        roots = [self._seen[slot].root for slot in found]
        sizes = zip((self._seen[slot].tensor.numel() for slot in found), roots, strict=True)
        whole = all(size == self._seen[root].tensor.numel() for size, root in sizes)
        if not whole or len({*roots}) < len(roots) or min(roots, default=self._num_given) < self._num_given:
            return None
        return self._assemble([None if one is None else self._by_id[id(one)] for one in results])

    def _assemble(self, results: list[int | None]) -> Tape:
        """Steps, with the views that are needed as tensors, and with what is used for the last time where."""
        steps: list[Step] = []
        makes: list[Any] = []
        views: dict[int, int] = {}  # slot: root
        last: dict[int, int] = {}  # root: the last step that uses it
        addressed = set[int]()
        used = {self._seen[slot].root for one in self._noted if not one.by_address for slot in one.operands}
        allocated = {one.made[0] for one in self._noted if one.call is None} - used
        # What is used by address alone has the shape of its result from the beginning.
        shaped = {
            self._seen[slot].root: slot for slot in results if slot is not None and self._seen[slot].root in allocated
        }

        def as_tensor(slot: int) -> int:
            if self._is_root(slot):
                return self._seen[slot].root
            if slot not in views:
                views[slot] = self._seen[slot].root
                makes.append((slot, None, _viewing(self._seen[slot])))
            return slot

        for one in self._noted:
            last |= {self._seen[slot].root: len(steps) for slot in (*one.operands, *one.made)}
            if one.by_address:
                places = [self._seen[slot] for slot in one.operands]
                addressed |= {place.root for place in places if place.root < self._num_given}
                picked = _pick([(place.root, place.start * place.tensor.element_size()) for place in places])
            else:
                picked = _pick([(as_tensor(slot), 0) for slot in one.operands])
            if one.call is None:
                (slot,) = one.made
                makes.append((slot, _template(self._seen[shaped.get(slot, slot)].tensor), None))
            elif one.made:
                made = tuple(as_tensor(slot) if slot in one.operands else slot for slot in one.made)
                makes += _making(one.call, picked, made)
            else:
                steps.append(Step(tuple(makes), one.call, one.by_address, picked, one.constants))
                makes = []
        kept = {self._seen[slot].root for slot in results if slot is not None}
        filled: list[int | None] = []
        for result in results:
            if result is None:
                filled.append(None)
            elif self._is_root(result) or self._seen[result].root in shaped:
                filled.append(self._seen[result].root)
            else:  # a shape of its own, and yet no view to anyone
                filled.append(len(self._seen) + len(filled))
                makes.append((len(self._seen) + len(filled) - 1, None, _reshaping(self._seen[result])))
        steps.append(Step(tuple(makes), None, False, tuple, ()))
        for k, step in enumerate(steps):
            done = {root for root, at in last.items() if at == k and root >= self._num_given} - kept
            steps[k] = step._replace(drops=(*done, *(slot for slot, root in views.items() if root in done)))
        num_made = len(self._seen) + len(filled) - self._num_given
        return Tape(tuple(steps), num_made, tuple(addressed), tuple(filled))

    def _is_root(self, slot: int) -> bool:
        """Whether a tensor is described as the one whose memory it lies in."""
        seen = self._seen[slot]
        tensor, of = seen.tensor, self._seen[seen.root].tensor
        return (seen.start, tensor.shape, tensor.stride()) == (0, of.shape, of.stride())


def _share_memory(first: Any = None, *others: Any) -> bool:
    return all(
        isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for one in (first, *others)
    )


def _viewing(seen: _Seen) -> Callable[[Slots], torch.Tensor]:
    """Return a function that makes a view of a slot's root."""
    shape, stride, root, start = seen.tensor.shape, seen.tensor.stride(), seen.root, seen.start
    return lambda slots: slots[root].as_strided(shape, stride, slots[root].storage_offset() + start)


def _making(call: Callable[..., Any], picked: Callable[[Slots], Any], made: tuple[int, ...]) -> list[Any]:
    """Return steps that make the tensors of an operation: the first, and with it the others."""

    def make(slots: Slots) -> torch.Tensor:
        returned = call(picked(slots))
        if returned is None:
            raise NotThereError
        if not isinstance(returned, torch.Tensor):
            for slot, one in zip(made, returned, strict=True):
                slots[slot] = one
        return slots[made[0]] if len(made) > 1 else returned

    return [(made[0], None, make), *((slot, None, itemgetter(slot)) for slot in made[1:])]


def _reshaping(seen: _Seen) -> Callable[[Slots], torch.Tensor]:
    """Return a function that gives a slot's root another shape without a view in autograd's sense."""
    shape, root = seen.tensor.shape, seen.root
    return lambda slots: aten._unsafe_view.default(slots[root], shape)


def _pick(places: Sequence[tuple[int, int]]) -> Callable[[Slots], Any]:
    """Return a function that picks slots and adds to each; it returns a tuple or list."""
    slots = [slot for slot, _ in places]
    if len(slots) < 2 or any(start for _, start in places):
        return lambda given: [given[slot] + start if start else given[slot] for slot, start in places]
    return itemgetter(*slots)


def _template(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the description of a contiguous one, and the memory of one element."""
    if tensor.numel() == 1:
        return torch.empty_like(tensor)
    return torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
