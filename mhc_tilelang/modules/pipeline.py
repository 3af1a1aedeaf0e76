"""Traffic between pipeline stages: the wide stream, n times as much as a plain residual's.

`ResidualStream.hand_over` and `ResidualStream.from_streams` are the two ends of it.
"""

from __future__ import annotations

import torch

from ..arguments import STREAM_DTYPES, check_spec
from ..spec import MHCSpec
from .connections import check_kind


def wire_bytes(spec: MHCSpec, tokens: int, dtype: torch.dtype = torch.bfloat16, connection: str = "mhc") -> int:
    """Return the bytes of the streams that a stage sends to the next. Their gradient comes back, as large.

    Args:
        spec: sizes; n·C elements of the stream's dtype per token, and with delayed_pre n of h_pre in float32.
        tokens: number of tokens of a micro-batch, or of all that a step sends.
        dtype: the stream's.
        connection: "mhc" or "hc"; "residual" for a plain one, with C elements per token.

    Raises ValueError or TypeError, which names the argument.
    """
    check_spec("wire_bytes", spec)
    check_kind("wire_bytes", "connection", connection)
    if type(tokens) is not int or tokens < 0:
        raise ValueError(f"wire_bytes: tokens: expected an int of at least 0, got {tokens!r}")
    if dtype not in STREAM_DTYPES:
        wanted = " or ".join(str(known) for known in STREAM_DTYPES)
        raise TypeError(f"wire_bytes: dtype: expected {wanted}, got {dtype}")
    if connection == "residual":
        return tokens * spec.hidden_size * dtype.itemsize
    h_pre = 4 * spec.num_streams if spec.delayed_pre else 0
    return tokens * (spec.stream_size * dtype.itemsize + h_pre)
