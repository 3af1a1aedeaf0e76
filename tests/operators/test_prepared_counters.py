"""Prepared calls whose kernels use memory that is kept for others: counters of a stream (`launch.workspace`).

Would catch: counters that a replay takes from the call it was recorded of, a replay that goes on without any.
"""

from __future__ import annotations

import pytest
import torch

from mhc_tilelang.compiler.kernel import taping
from mhc_tilelang.compiler.tape import NotThereError, record
from mhc_tilelang.operators import prepared


def test_memory_of_others_is_asked_for_at_each_replay() -> None:
    """Counters are those of the stream that replays; where there are none the call is an ordinary one."""
    kept = [torch.full((8,), 1.0), torch.full((8,), 2.0)]
    found = [kept[0], kept[1], None]

    def run(x: torch.Tensor) -> tuple[torch.Tensor]:
        given = kept[0]
        if taping.recorder is not None:
            taping.recorder.given(given, lambda: found.pop(0))
        return (x + given[2:6],)

    x = torch.arange(4.0)
    (first,), tape = record(run, [x])
    assert tape is not None
    results = [first, *(tape.replay([x])[0] for _ in range(2))]
    assert torch.equal(torch.stack(results), x + torch.tensor([[1.0], [1.0], [2.0]]))
    with pytest.raises(NotThereError):
        tape.replay([x])
    ready = prepared.Prepared(lambda _, *tensors: run(*tensors), ())
    for answer, added in ((None, 1), (kept[1], 2), (None, 1)):  # recorded, replayed, refused
        found[:] = [answer]
        assert torch.equal(ready(x)[0], x + added)
