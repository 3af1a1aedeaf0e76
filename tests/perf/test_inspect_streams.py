"""Stored builds at numbers of streams other than 2, 4 and 8: every kernel at each, and what is wrong with some.

Would catch: a kernel without a build at some n, a spill or a narrow access that nothing names, one that is named and
gone.
"""

from __future__ import annotations

from dataclasses import replace

from mhc_tilelang.perf.inspect import matrix, stored
from mhc_tilelang.perf.inspect.faults import faults, resources

STREAMS = (1, 3)
SPILLS = {("post_project", 3): 16}  # for two blocks a multiprocessor, as on sm_100a at n = 4
# By tiles, which hold x_next and the layer's input in registers: of four streams this kernel is thread-level code.
SPLIT = "post_project"


def test_every_kernel_is_built() -> None:
    """On the main architecture, in bfloat16; those that n reaches, but for connections without h_res."""
    _, rows = stored.read(stored.OTHER_STREAMS)
    subjects = [one for n in STREAMS for one in matrix.subjects(replace(matrix.STUDIED, num_streams=n))]
    wanted = {one.key(matrix.MAIN) for one in subjects if "identity" not in one.variant and "gates" not in one.kernel}
    assert wanted == {row.key for row in rows}


def test_faults_are_those_that_are_known() -> None:
    _, rows = stored.read(stored.OTHER_STREAMS)
    assert {(row.label, row.num_streams): row.spill_bytes for row in rows if row.spill_bytes} == SPILLS
    assert {row.kernel for row in rows if faults(row)} == {SPLIT}
    assert {row.label for row in rows if resources(row)} == {label for label, _ in SPILLS}
