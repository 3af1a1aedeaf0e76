"""Counts over the loops around a place, without going through them one by one.

Guards and indices that share no loop are independent: their counts are multiplied. Only loops that meet in a guard or
an index (`block · tile + c < C`) are laid out together, as the axes of one array.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from math import prod
from typing import TypeVar

import numpy as np
from tvm import tirx

from .accesses import Access
from .values import AuditError, Values

MAX_PLACES = 62  # whose set fits a machine's word; of more, a set is a Python number
Item = TypeVar("Item", bound=Hashable)


def executions(access: Access, values: Values) -> int:
    """Count how often the place runs."""
    groups = loop_groups(access, values, ())
    return prod(int(guard_mask(access, values, group).sum()) for group in groups) * is_reached(access, values)


def is_reached(access: Access, values: Values) -> bool:
    """Whether the guards that depend on sizes alone hold."""
    return all(bool(values.evaluate(guard, ())) for guard in access.guards if not values.loops_of(guard))


def guard_mask(access: Access, values: Values, group: Sequence[tirx.Var]) -> np.ndarray:
    """Return the mask of the group's loop combinations that guards allow; guards over other loops are left out."""
    mask = np.ones([values.length(loop) for loop in group], dtype=bool)
    for guard in access.guards:
        loops = values.loops_of(guard)
        if loops and loops[0] in group:
            mask &= values.evaluate(guard, group).astype(bool)
    return mask


def distinct(accesses: Sequence[Access], values: Values, grid: Sequence[tirx.Var]) -> int:
    """Count the elements of one buffer that the places touch; with the grid's loops, per block, summed.

    What a place touches is a product over groups of axes that no loop links. In each group every point is marked with
    the places that reach it, one bit a place; an element is touched when one bit is set in all its groups.
    """
    places = [access for access in accesses if executions(access, values)]
    if not places:
        return 0
    points = [(*access.indices, *grid) for access in places]
    sizes = [int(values.evaluate(extent, ())) for extent in places[0].buffer.shape]
    sizes += [values.length(loop) for loop in grid]
    links = [axis_links(access, values, point) for access, point in zip(places, points, strict=True)]
    touched = Counter({(1 << len(places)) - 1: 1})
    for axes in merge_sets([[axis] for axis in range(len(sizes))] + [link for one in links for link in one]):
        own_sizes = [sizes[axis] for axis in axes]
        reached = [
            reach(access, values, [point[axis] for axis in axes], own_sizes)
            for access, point in zip(places, points, strict=True)
        ]
        touched = product(touched, marks(reached))
    return sum(touched.values())


def axis_links(access: Access, values: Values, point: Sequence[tirx.PrimExpr]) -> list[list[int]]:
    """Return the axes of a point that loops link: through an index, or through a guard."""
    loops_of_axis = [set(values.loops_of(index)) for index in point]
    return [
        [axis for axis, loops in enumerate(loops_of_axis) if loops & set(group)]
        for group in loop_groups(access, values, point)
    ]


def loop_groups(access: Access, values: Values, point: Sequence[tirx.PrimExpr]) -> list[tuple[tirx.Var, ...]]:
    """Return the place's loops, those together that meet in a guard or an index."""
    meeting = [values.loops_of(expression) for expression in (*access.guards, *point)]
    return merge_sets([[loop] for loop in access.loops] + [list(loops) for loops in meeting])


def reach(access: Access, values: Values, point: Sequence[tirx.PrimExpr], sizes: Sequence[int]) -> np.ndarray:
    """Return the points [axes] that the place reaches, each as one number, row-major, ascending."""
    wanted = set(values.loops_of(*point))
    loops = [loop for group in loop_groups(access, values, point) if wanted & set(group) for loop in group]
    mask = guard_mask(access, values, loops)
    numbers = np.zeros((), dtype=np.int64)
    for index, size in zip(point, sizes, strict=True):
        at = np.broadcast_to(values.evaluate(index, loops), mask.shape)[mask]
        if at.min() < 0 or at.max() >= size:
            raise AuditError(
                f"{access.buffer.name}: expected indices from 0 to {size - 1}, got {at.min()} to {at.max()}"
            )
        numbers = numbers * size + at
    return ascending(numbers)


def ascending(numbers: np.ndarray) -> np.ndarray:
    """Return the distinct numbers, in order: `np.unique` without the hash table, which took ten times as long."""
    numbers = np.sort(numbers)
    return numbers[np.concatenate(([True], numbers[1:] != numbers[:-1]))]


def marks(reached: Sequence[np.ndarray]) -> Counter[int]:
    """Count the points that each set of places reaches together; a set is a number with a bit a place."""
    if len(reached) == 1:
        return Counter({1: len(reached[0])})
    points = ascending(np.concatenate(reached))
    sets = np.zeros(len(points), dtype=np.int64 if len(reached) <= MAX_PLACES else object)
    for place, own in enumerate(reached):
        sets[np.searchsorted(points, own)] |= 1 << place
    return Counter(dict(zip(*(column.tolist() for column in np.unique(sets, return_counts=True)), strict=True)))


def product(touched: Counter[int], more: Counter[int]) -> Counter[int]:
    """Points of two groups of axes together: the places that reach both."""
    both: Counter[int] = Counter()
    for one, count in touched.items():
        for other, ways in more.items():
            if one & other:
                both[one & other] += count * ways
    return both


def merge_sets(sets: Iterable[Sequence[Item]]) -> list[tuple[Item, ...]]:
    """Merge sets that share a member."""
    groups: list[dict[Item, None]] = []
    for one in sets:
        merged = dict.fromkeys(one)
        apart = []
        for group in groups:
            if merged.keys() & group.keys():
                merged = group | merged
            else:
                apart.append(group)
        groups = [*apart, merged] if merged else apart
    return [tuple(group) for group in groups]
