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

# Bytes that a thread spills, of kernels by tiles but for the mappings; where n is 4 CI's builds have their own list.
SPILLS = {
    ("project", 3, "sm_100a"): 40,
    ("post_project", 3, "sm_80"): 16,
    ("post_project", 3, "sm_90a"): 16,
    ("project", 5, "sm_100a"): 40,
    ("project", 7, "sm_80"): 300,
    ("post_backward", 7, "sm_100a"): 16,
    ("post_backward", 8, "sm_80"): 148,
    ("aggregate_mappings", 8, "sm_100a"): 32,
    ("aggregate_mappings", 8, "sm_120a"): 8,
    ("coefficients_backward", 8, "sm_120a"): 112,
}
# Accesses to local memory a token, without a spill: sums that a reduction takes by their address.
LOCAL = {"post_backward (identity)": {5: 8, 6: 9, 7: 11, 8: 10}, "gates_backward": {8: 16}}
# Loads whose tensor the machine code does not tell.
UNTOLD = {
    ("post_backward", 1, "sm_80"),
    ("post_pre", 2, "sm_100a"),
    ("post_backward (identity)", 7, "sm_80"),
    ("post_backward", 8, "sm_80"),
    ("post_backward (identity)", 8, "sm_120a"),
}


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
    found = {(row.label, row.num_streams, row.arch): faults(row) for row in rows if faults(row)}
    assert {(row.label, row.num_streams, row.arch): row.spill_bytes for row in rows if row.spill_bytes} == SPILLS
    local = [row for row in rows if row.local_accesses and not row.spill_bytes]
    assert {(row.label, row.num_streams): row.local_accesses for row in local} == {
        (label, n): accesses for label, of_n in LOCAL.items() for n, accesses in of_n.items()
    }
    lines = {place: [line for line in each if "local memory" not in line] for place, each in found.items()}
    untold = {place: each for place, each in lines.items() if each}
    assert untold.keys() == UNTOLD
    assert all("read in the source, not in the machine code" in line for each in untold.values() for line in each)


def test_renewing_builds_what_changed_and_drops_what_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is asked of a kernel that is named: also a row that was counted otherwise, of the same source."""
    versions, rows = stored.read(stored.KERNELS)
    file = tmp_path / "rows.json"
    changed = next(row for row in rows if row.kernel == "sum_partials")
    gone = replace(changed, hidden_size=1)
    before = [replace(row, registers=0) if row == changed else row for row in rows]
    monkeypatch.setattr(compiler, "versions", lambda: versions)
    stored.write(file, [gone, *reversed(before)])
    of_key = {row.key: row for row in rows}
    monkeypatch.setattr(built, "build_function", lambda _, subject, arch: of_key[subject.key(arch)])
    monkeypatch.setattr(built.os, "cpu_count", lambda: 1)  # one process: this one, with what is planted
    stored.renew(["sum_partials"], file)
    assert stored.read(file) == (versions, rows)
    [(subject, arch)] = [(one, arch) for one, arch in stored.asked() if one.key(arch) == changed.key]
    assert built.build(subject, arch, replace(changed, registers=0)).registers == 0  # kept: of the same kernel
    assert built.build(subject, arch, replace(changed, made_from="of before")) == changed


def test_some_kernels_are_not_renewed_by_other_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two compilers would stand under the versions of one."""
    file = tmp_path / "rows.json"
    monkeypatch.setattr(compiler, "versions", lambda: {"nvcc": "13.0"})
    stored.write(file, [])
    monkeypatch.setattr(compiler, "versions", lambda: {"nvcc": "99.0"})
    with pytest.raises(MHCError, match="name no kernel, to build all"):
        stored.renew(["post"], file)
