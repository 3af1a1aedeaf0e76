"""`coefficients` on a CUDA stream beside the current one, where a caller has asked for it.

In the delayed form nothing before the layer waits for a sublayer's own coefficients: `post` and the next `pre` do. So
they may be launched on a side stream, forked from the current one here, while the layer runs. The caller joins: the
current stream waits for the side stream before anything reads h_pre, h_post or h_res (`modules.ResidualStream`).

The caching allocator gives a freed block back to the stream that it came from. What the side stream reads and writes is
recorded there; `projected` comes from the side stream's memory, and is recorded on the current one, whose backward
reads it. Fork and join are events, which a CUDA graph captures.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .coefficients import coefficients

_asked = threading.local()


def asked() -> torch.cuda.Stream | None:
    """Return the stream that this thread's coefficients are launched on within `coefficients_on`; None without."""
    return getattr(_asked, "stream", None)


@contextmanager
def coefficients_on(stream: torch.cuda.Stream) -> Iterator[None]:
    """Launch the coefficients of delayed forms on this stream, within the block and this thread."""
    before = asked()
    _asked.stream = stream
    try:
        yield
    finally:
        _asked.stream = before


def coefficients_beside(
    partial: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor, *rest: object, out: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """`coefficients` of a delayed form, into `out` -> projected; beside what follows where that was asked for."""
    stream = asked()
    if stream is None:
        return coefficients(partial, alpha, bias, *rest, out=out)[3]  # type: ignore[arg-type]
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        projected = coefficients(partial, alpha, bias, *rest, out=out)[3]  # type: ignore[arg-type]
    for tensor in (partial, alpha, bias, *out):
        tensor.record_stream(stream)
    projected.record_stream(current)
    return projected
