"""Blocks that synchronise by atomics, on the executor: what orders them, what does not, and waits that never end.

Would catch: an order that relaxed atomics give, or a barrier does not pass on; a plain access beside an atomic that is
taken for harmless; blocks that run one after another where a GPU has them at a time, which no wait would survive.
"""

from __future__ import annotations

import re

import pytest
import torch
from simt_kernels import T, source

from mhc_tilelang.compiler.simt import Counts, SimtError, launch

B = "((int)blockIdx.x)"
RELAXED, ACQUIRE, RELEASE, ACQ_REL = 0, 2, 3, 4
# Block 0 gives, the others take what it wrote once they see its word; `word` has room for what else is counted.
GIVE = f"""
if ({B} == 0) {{
  y[{T}] = x[{T}];
  __syncthreads();
  if ({T} == 0) AtomicStore((&(word[0])), 1, {RELEASE});
}} else {{
  if ({T} == 0) while (AtomicLoad((&(word[0])), {ACQUIRE}) == 0) {{ }}
  __syncthreads();
  y[64 * {B} + {T}] = y[{T} ^ 1];
}}
"""
# The last to come adds up what all have written.
COUNT = f"""
__shared__ int told[1];
y[64 * {B} + {T}] = x[{T}];
__syncthreads();
if ({T} == 0) told[0] = AtomicAddRet((&(word[0])), 1, {ACQ_REL});
__syncthreads();
if (told[0] == 3) y[256 + {T}] = y[{T}] + y[64 + {T}] + y[128 + {T}] + y[192 + {T}];
"""
FENCED = COUNT.replace(f"if ({T} == 0) told", f"if ({T} == 0) {{ __threadfence(); told").replace(
    f"1, {ACQ_REL});", f"1, {RELAXED}); __threadfence(); }}"
)
# Blocks take tickets and wait for the one before them.
TICKETS = f"""
__shared__ int told[1];
if ({T} == 0) {{
  told[0] = AtomicAddRet((&(word[0])), 1, {RELAXED});
  while (AtomicLoad((&(word[1])), {ACQUIRE}) < told[0]) {{ }}
}}
__syncthreads();
y[{T}] = told[0];
__syncthreads();
if ({T} == 0) AtomicAdd((&(word[1])), 1, {ACQ_REL});
"""


def run(body: str, blocks: int = 4, resident: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Counts]:
    kernel = source(
        body, "const float* __restrict__ x, float* __restrict__ y, int* __restrict__ word", grid=(f"{blocks}", "1", "1")
    )
    y, word = torch.full((64 * (blocks + 1),), float("nan")), torch.zeros(4, dtype=torch.int32)
    tensors = {"x": torch.arange(64.0), "y": y, "word": word}
    return y, word, launch(kernel, "sm_80", tensors, {}, resident, seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("resident", [1, 2, 4])
def test_what_is_ordered_is_clean(resident: int, seed: int) -> None:
    """Whatever the order of blocks and turns: counting, by acquire and release or by fences, and waiting for a lower
    ticket; waiting for block 0 where all are on the device.
    """
    for body in (COUNT, FENCED):
        y, word, _ = run(body, resident=resident, seed=seed)
        assert word[0] == 4
        assert torch.equal(y[256:], 4 * torch.arange(64.0))
    y, word, _ = run(TICKETS, resident=resident, seed=seed)
    assert word[:2].tolist() == [4, 4]
    assert y[0] == 3
    if resident == 4:
        y, _, counts = run(GIVE, resident=resident, seed=seed)
        assert torch.equal(y[64:128], torch.arange(64.0).view(-1, 2).flip(1).flatten())
        assert counts.tensors["y"].written_distinct == 4 * 256


DROPPED = "__syncthreads();"
PLANTED = {
    "a relaxed store": (GIVE, f"1, {RELEASE}", f"1, {RELAXED}", "race between blocks"),
    "a relaxed load": (GIVE, f", {ACQUIRE}", f", {RELAXED}", "race between blocks"),
    "a relaxed count": (COUNT, f", {ACQ_REL}", f", {RELAXED}", "race between blocks"),
    "a count that does not acquire": (COUNT, f", {ACQ_REL}", f", {RELEASE}", "race between blocks"),
    "a count that does not release": (COUNT, f", {ACQ_REL}", f", {ACQUIRE}", "race between blocks"),
    "no fence before": (FENCED, "__threadfence(); told", "told", "race between blocks"),
    "no fence after": (FENCED, "); __threadfence();", ");", "race between blocks"),
    "no barrier before": (COUNT, DROPPED, "", "race between blocks"),
    "a plain read of the word": (COUNT, "if (told[0] == 3)", "if (word[0] > 0)", "race between blocks"),
    "a wait for a higher ticket": (TICKETS, "< told[0]", "< told[0] + 1", "deadlock"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_defect_is_named(name: str) -> None:
    body, right, wrong, kind = PLANTED[name]
    assert right in body
    with pytest.raises(SimtError) as raised:
        run(body.replace(right, wrong, 1), resident=2)
    assert kind in raised.value.kinds


def test_a_wait_for_a_block_that_has_no_room_is_a_deadlock() -> None:
    """Block 3 is the one that gives: with all on the device it does, with two the others fill it."""
    last = re.sub(r"\(\(int\)blockIdx\.x\)", "(3 - ((int)blockIdx.x))", GIVE)
    run(last, resident=4)
    with pytest.raises(SimtError, match=r"deadlock.*2 of 4; 0 have ended"):
        run(last, resident=2)


def test_the_barrier_passes_on_what_one_thread_acquired() -> None:
    """Without the barrier the other threads have no order, though they run later."""
    body = GIVE.replace("{ }\n  __syncthreads();", "{ }\n")
    assert body != GIVE
    with pytest.raises(SimtError, match="race between blocks"):
        run(body)
