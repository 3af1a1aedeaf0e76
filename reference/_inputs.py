"""Argument checks of every function here: convert to float64, refuse shapes that disagree.

`Spec` names the attributes that are read from a spec; any object that has them will do.
"""

from collections.abc import Sequence
from types import EllipsisType
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
# Of x, phi, alpha, bias and norm_weight, in this order; the last is None where no norm_weight is given.
ProjectionGradients = tuple[Array, Array, Array, Array, Array | None]


class Spec(Protocol):
    """The sizes and constants of a connection; `mhc_tilelang.MHCSpec` is one."""

    @property
    def hidden_size(self) -> int: ...  # C

    @property
    def num_streams(self) -> int: ...  # n

    @property
    def sinkhorn_iters(self) -> int: ...

    @property
    def sinkhorn_eps(self) -> float: ...

    @property
    def pre_eps(self) -> float: ...

    @property
    def rms_eps(self) -> float: ...

    @property
    def post_scale(self) -> float: ...

    @property
    def post_eps(self) -> float: ...  # of an identity connection; 0 else


def as_float64(name: str, value: ArrayLike, shape: Sequence[int | str | EllipsisType]) -> Array:
    """`value` in float64; a ValueError that quotes `name` if it does not have this shape.

    A leading `...` stands for any leading dimensions. A letter stands for any size, the same one wherever it
    occurs: `(..., "n", "n")` is a batch of square matrices.
    """
    array = np.asarray(value, dtype=np.float64)
    trailing = [size for size in shape if not isinstance(size, EllipsisType)]
    num_leading = array.ndim - len(trailing)

    sizes: dict[str, int] = {}
    agrees = num_leading == 0 or (num_leading > 0 and ... in shape)
    for expected, got in zip(trailing, array.shape[max(num_leading, 0) :], strict=False):
        agrees &= got == (sizes.setdefault(expected, got) if isinstance(expected, str) else expected)
    if not agrees:
        raise ValueError(f"{name}: expected shape {_shape_text(shape)}, got {_shape_text(array.shape)}")
    return array


def as_gradient(name: str, value: ArrayLike | None, shape: Sequence[int]) -> Array:
    """`value` as `as_float64` returns it; zeros for None, the gradient of an output that nothing was made of."""
    return np.zeros(shape) if value is None else as_float64(name, value, shape)


def _shape_text(shape: Sequence[int | str | EllipsisType]) -> str:
    return "[" + ", ".join("..." if size is ... else str(size) for size in shape) + "]"
