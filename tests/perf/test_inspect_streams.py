"""Stored builds: the file is kept as calls launch kernels, and what is wrong with some of `matrix.other_streams`.

Would catch: a row of a kernel that is no more or another by now, one that is built though nothing changed, a spill or a
narrow access that nothing names, one that is named and gone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mhc_tilelang.errors import MHCError
from mhc_tilelang.perf.inspect import built, compiler, matrix, stored
from mhc_tilelang.perf.inspect.faults import faults

# Bytes: of `post_project` for two blocks a multiprocessor, as on sm_100a at n = 4.
SPILLS = {("post_project", 3, "sm_80"): 16, ("post_project", 3, "sm_90a"): 16, ("project", 3, "sm_100a"): 40}
# Sums that a reduction takes by their address: eight accesses a token at n = 5, ten at n = 8.
LOCAL = "post_backward (identity)"
UNTOLD = ("post_backward", 1, "sm_80")  # loads whose tensor the machine code does not tell


@pytest.mark.full
def test_builds_are_of_the_kernels_as_they_are() -> None:
    from mhc_tilelang.compiler import tracing
    from mhc_tilelang.perf.inspect.row import hash_source

    kept = {row.key: row.made_from for row in stored.read(stored.KERNELS)[1]}
    for subject, arch in stored.asked():
        made_from = hash_source(tracing.trace(subject.kernel, subject.parameters(arch)), subject, arch)
        assert kept[subject.key(arch)] == made_from, "make inspect-kernels"


def test_faults_are_those_that_are_known() -> None:
    keys = {subject.key(arch) for subject, arch in matrix.other_streams()}
    rows = [row for row in stored.read(stored.KERNELS)[1] if row.key in keys]
    assert {(row.label, row.num_streams, row.arch): row.spill_bytes for row in rows if row.spill_bytes} == SPILLS
    assert {row.label for row in rows if faults(row)} == {LOCAL, UNTOLD[0], *(label for label, *_ in SPILLS)}
    [untold] = [row for row in rows if row.label == UNTOLD[0] and faults(row)]
    assert (untold.label, untold.num_streams, untold.arch) == UNTOLD
    assert all("not in the machine code" in each for each in faults(untold))


def test_renewing_builds_what_changed_and_drops_what_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kernels that are named: all that is asked of `sum_partials`, one row of which the source has changed."""
    versions, rows = stored.read(stored.KERNELS)
    file = tmp_path / "rows.json"
    changed = next(row for row in rows if row.kernel == "sum_partials")
    gone = replace(changed, hidden_size=1)
    before = [replace(row, registers=0, made_from="of before") if row == changed else row for row in rows]
    monkeypatch.setattr(compiler, "versions", lambda: versions)
    stored.write(file, [gone, *reversed(before)])
    monkeypatch.setattr(built, "build_function", lambda *_: changed)
    monkeypatch.setattr(built.os, "cpu_count", lambda: 1)  # one process: this one, with what is planted
    stored.renew(["sum_partials"], file)
    assert stored.read(file) == (versions, rows)


def test_some_kernels_are_not_renewed_by_other_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two compilers would stand under the versions of one."""
    file = tmp_path / "rows.json"
    monkeypatch.setattr(compiler, "versions", lambda: {"nvcc": "13.0"})
    stored.write(file, [])
    monkeypatch.setattr(compiler, "versions", lambda: {"nvcc": "99.0"})
    with pytest.raises(MHCError, match="name no kernel, to build all"):
        stored.renew(["post"], file)
