"""Stored builds of `matrix.other_streams`, other n and identity connections: every kernel, and what is wrong with some.

Would catch: a kernel without a build at some n, a spill or a narrow access that nothing names, one that is named and
gone; with `full` a build of a kernel that is no longer so.
"""

from __future__ import annotations

import pytest

from mhc_tilelang.perf.inspect import matrix, stored
from mhc_tilelang.perf.inspect.faults import faults

# Bytes: of `post_project` for two blocks a multiprocessor, as on sm_100a at n = 4.
SPILLS = {("post_project", 3, "sm_80"): 16, ("post_project", 3, "sm_90a"): 16, ("project", 3, "sm_100a"): 40}
# Sums that a reduction takes by their address: eight accesses a token at n = 5, ten at n = 8.
LOCAL = "post_backward (identity)"
UNTOLD = ("post_backward", 1, "sm_80")  # loads whose tensor the machine code does not tell


def test_every_kernel_is_built() -> None:
    _, rows = stored.read(stored.OTHER_STREAMS)
    assert [one.key(arch) for one, arch in matrix.other_streams()] == [row.key for row in rows]


@pytest.mark.full
def test_builds_are_of_the_kernels_as_they_are() -> None:
    from mhc_tilelang.compiler import tracing
    from mhc_tilelang.perf.inspect.row import hash_source

    kept = {row.key: row.made_from for row in stored.read(stored.OTHER_STREAMS)[1]}
    for subject, arch in matrix.other_streams():
        made_from = hash_source(tracing.trace(subject.kernel, subject.parameters(arch)), subject, arch)
        assert kept[subject.key(arch)] == made_from, "python -m mhc_tilelang.perf.inspect.stored --other-streams"


def test_faults_are_those_that_are_known() -> None:
    _, rows = stored.read(stored.OTHER_STREAMS)
    assert {(row.label, row.num_streams, row.arch): row.spill_bytes for row in rows if row.spill_bytes} == SPILLS
    assert {row.label for row in rows if faults(row)} == {LOCAL, UNTOLD[0], *(label for label, *_ in SPILLS)}
    [untold] = [row for row in rows if row.label == UNTOLD[0] and faults(row)]
    assert (untold.label, untold.num_streams, untold.arch) == UNTOLD
    assert all("not in the machine code" in each for each in faults(untold))
