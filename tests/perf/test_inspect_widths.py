"""Access widths of tensors in the machine code: in listings written by hand, planted kernels, the stored builds.

Would catch: a 16-byte access that nvcc splits and that passes for a wide one, a small tensor's 4 bytes taken for the
stream's, an access whose tensor goes unseen, a kernel that is excused and needs it no longer.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from test_inspect import ROW

from mhc_tilelang.perf.inspect import explain, matrix, sass, stored
from mhc_tilelang.perf.inspect.faults import SPLIT, faults, known_splits, splits
from mhc_tilelang.perf.inspect.machine_accesses import UNKNOWN, machine_accesses

# x and y are streams, h is small; the first access is in line 3.
SOURCE = """
extern "C" __global__ void k(const half_t* __restrict__ x, const float* __restrict__ h, half_t* __restrict__ y) {
  v = *(uint4*)(x + 8);
  tl::cp_async_gs<16>((&(tile[8])), (&(x[16])));
  v.x = h[0] * ((float)x[3]);
  *(uint4*)(y + 8) = v;
  y[0] = x[1];
  v.x = h[1];
}
"""


def listing(*instructions: tuple[str, str]) -> str:
    """Instructions, each with the places that nvdisasm names before it, if it does."""
    lines = []
    for address, (place, instruction) in enumerate(instructions):
        lines += [f"\t//## File {each}" for each in place.split("; ")] if place else []
        lines.append(f"        /*{16 * address:04x}*/             {instruction} ;")
    return "\n".join(["\t.section\t.text.k", *lines])


def at(line: int) -> str:
    return f'"kernel.cu", line {line}'


STORE = "@!P2 STG.E{} desc[UR12][R28.64+0x{}], R20"
SPLIT_STORE = [(at(6), STORE.format("", 0)), (at(2), "IADD3 R1, R1, 1, RZ"), (at(6), STORE.format("", 4))]
SPLIT_STORE += [("", STORE.format("", 8)), ("", STORE.format("", "c"))]  # the same line, as nvdisasm writes it
OF_H = (at(8), "LDG.E R6, [R8.64]")


@pytest.mark.parametrize(
    ("instructions", "reads", "writes"),
    [
        ([(at(3), "LDG.E.128.CONSTANT R4, desc[UR4][R4.64]")], {"x": {"128": 1}}, {}),
        ([(at(6), STORE.format(".128", 0))], {}, {"y": {"128": 1}}),
        (SPLIT_STORE, {}, {"y": {"32": 4}}),
        ([*SPLIT_STORE, (at(6), STORE.format(".128", 80))], {}, {"y": {"128": 1, "32": 4}}),
        ([(at(6), STORE.format(".64", 0)), ("", STORE.format(".64", 8))], {}, {"y": {"64": 2}}),
        (
            [
                (
                    f'"/templates/copy.h", line 59 inlined at "kernel.cu", line 4; {at(4)}',
                    "LDGSTS.E.BYPASS.LTC128B.128 [R7], [R8.64]",
                )
            ],
            {"x": {"128": 1}},
            {},
        ),
        ([(at(5), "LDG.E.U16 R5, [R4.64]"), ("", "LDG.E R6, [R8.64]")], {"x": {"16": 1}}, {}),  # h is the other
        ([(at(7), "LDG.E.U16 R5, [R4.64]"), ("", "STG.E.U16 [R8.64], R5")], {"x": {"16": 1}}, {"y": {"16": 1}}),
        ([(at(8), "LDG.E R5, [R4.64]")], {}, {}),  # h alone
        ([(at(2), "LDG.E R5, [R4.64]")], {}, {}),  # of h, which nothing else reads
        ([OF_H, (at(2), "LDG.E R5, [R4.64]")], {UNKNOWN: {"32": 1}}, {}),
        ([(at(2), "LDG.E.64 R4, [R4.64]")], {UNKNOWN: {"64": 1}}, {}),  # not as wide as the source reads h
        ([OF_H, ('"/templates/copy.h", line 6', "LDG.E R5, [R4.64]")], {UNKNOWN: {"32": 1}}, {}),  # not our line 6
        ([OF_H, (at(6), "LDG.E R5, [R4.64]")], {UNKNOWN: {"32": 1}}, {}),  # that line stores
        ([(at(6), "STS.128 [R4], R8"), ("", "LDL R5, [R1]"), ("", "UTMASTG.2D [UR4], [UR8]")], {}, {"y": {"bulk": 1}}),
    ],
)
def test_an_instruction_is_of_the_tensor_of_its_line(instructions: list, reads: dict, writes: dict) -> None:
    assert machine_accesses(SOURCE, listing(*instructions), ["x", "y"]) == (reads, writes)


INLINED = '"/templates/copy.h", line 136 inlined at "kernel.cu", line {0}; "kernel.cu", line {0}'
LOADS = ("LDG.E.128 R4, [R4.64]", "@P0 LDG.E.128 R8, [R6.64]")


def test_calls_of_one_function_may_share_a_line() -> None:
    """As nvdisasm lists two loads in a row by one inlined function: the second one's tensor is not left unseen."""
    code = SOURCE.replace("v = *(uint4*)(x + 8);", "v = tl::load_global_128((&(x[8])));")
    code = code.replace("v.x = h[1];", "v = *(uint4*)(y + 8);")
    run = listing((INLINED.format(3), LOADS[0]), ("", LOADS[1]))
    assert machine_accesses(code, run, ["x", "y"])[0] == {"x": {"128": 2}, "y": {"128": 1}}
    alone = listing((INLINED.format(3), LOADS[0]), (at(2), "IADD3 R1, R1, 1, RZ"))
    assert machine_accesses(code, alone, ["x", "y"])[0] == {"x": {"128": 1}}
    narrow = listing((INLINED.format(3), LOADS[0]), ("", "LDG.E.64 R8, [R6.64]"))
    assert "y" not in machine_accesses(code, narrow, ["x", "y"])[0]
    other_lines = listing((at(3), LOADS[0]), ("", LOADS[1]))
    assert "y" not in machine_accesses(code, other_lines, ["x", "y"])[0]


def test_small_tensors_are_left_out() -> None:
    """And of a kernel that has no others, everything."""
    assert machine_accesses(SOURCE, listing(*SPLIT_STORE), []) == ({}, {})


READ = {"x": {"128": 4}, "layer_output": {"128": 1}}
WRITTEN = {"x_next": {"128": 4}}


@pytest.mark.parametrize(
    ("reads", "writes", "found"),
    [
        (READ, WRITTEN, []),
        (READ, {"x_next": {"bulk": 1}}, []),
        (READ, {"x_next": {"256": 2}}, []),
        ({**READ, "x": {"128": 4, "32": 3}}, WRITTEN, []),  # h_pre's, in one line with x's
        (READ, {"x_next": {"128": 3, "32": 4}}, ["1 of 4 accesses by which x_next is written split: 3×16 4×4 bytes"]),
        (READ, {"x_next": {"64": 4}}, ["2 of 2 accesses by which x_next is written split: 4×8 bytes"]),
        (
            {**READ, "x": {"128": 3, "16": 8}},
            WRITTEN,
            ["1 of 4 accesses by which x is read split: 3×16 8×2 bytes"],
        ),
        ({"layer_output": {"128": 1}}, WRITTEN, ["x read in the source, not in the machine code"]),
        ({**READ, UNKNOWN: {"128": 7, "32": 3}}, WRITTEN, []),  # too few for a split access to be among them
        ({**READ, UNKNOWN: {"32": 4}}, WRITTEN, ["a tensor that the listing does not tell read 4×4"]),
    ],
)
def test_splits_are_named(reads: dict, writes: dict, found: list[str]) -> None:
    row = replace(ROW, machine_reads=reads, machine_writes=writes)
    assert faults(row) == splits(row) == found
    assert known_splits(row) == []


def test_rows_that_start_anywhere_have_no_width() -> None:
    """Nor have streams beside another dtype that of the wider one."""
    narrow = {"x_next": {"16": 4}}
    assert splits(replace(ROW, hidden_size=1281, machine_reads=READ, machine_writes=narrow)) == []
    beside = {"stream_reads": {"x": [16], "layer_output": [8]}, "machine_reads": {**READ, "layer_output": {"64": 1}}}
    mixed = replace(ROW, variant="16-bit layer", dtype="float32", machine_writes=WRITTEN, **beside)
    assert faults(mixed) == []
    assert faults(replace(mixed, variant="")) == ["layer_output read 8 bytes wide"]


def test_a_kernel_that_is_excused_says_why() -> None:
    row = replace(ROW, kernel="expand_project", machine_reads=READ, machine_writes={"x_next": {"128": 3, "32": 4}})
    assert faults(row) == []
    assert known_splits(row) == [f"{splits(row)[0]} ({SPLIT['expand_project']})"]
    assert f"Split by nvcc:\n\n- expand_project on sm_90a: {known_splits(row)[0]}." in explain.stream_table([row])
    assert "| expand_project | sm_90a | `x_next` | – | 3×16 4×4 |" in explain.stream_table([row])


def test_kernels_that_are_excused_are_those_that_split() -> None:
    """Fails when one of them is rebuilt and splits no more, as when another begins to. CI's builds alone."""
    keys = {subject.key(arch) for subject, arch in matrix.representative()}
    rows = [row for row in stored.read(stored.KERNELS)[1] if row.key in keys]
    assert {row.kernel for row in rows if splits(row)} == set(SPLIT)


@pytest.mark.nvcc
def test_a_store_that_is_split_is_seen() -> None:
    """nvcc gets a `post` whose stores of x_next are in four parts; what it is held to is the source without."""
    from mhc_tilelang.compiler.cuda_source import generate
    from mhc_tilelang.perf.inspect import matrix
    from mhc_tilelang.perf.inspect.compiler import compile_source

    [subject] = matrix.subjects(matrix.STUDIED, ["post"])
    code = generate("post", subject.launch.parameters, matrix.MAIN).code
    store = re.compile(r"\*\(uint4\*\)\((x_next \+ .*)\) = (.*);")
    parts = "; ".join(rf"((volatile uint*)(\1))[{k}] = ((uint*)&(\2))[{k}]" for k in range(4))
    damaged = store.sub(f"{parts};", code)
    assert damaged.count("\n") == code.count("\n")
    found = machine_accesses(code, compile_source(damaged, matrix.MAIN).listing, ["x", "layer_output", "x_next"])
    assert found == ({"x": {"128": 4}, "layer_output": {"128": 1}}, {"x_next": {"32": 16}})


@pytest.mark.nvcc
@pytest.mark.parametrize("kernel", ["aggregate", pytest.param("post_project", marks=pytest.mark.full)])
def test_line_numbers_change_no_instruction(kernel: str, tmp_path) -> None:
    """The code that is inspected is the code that ships."""
    from mhc_tilelang.compiler.cuda_source import generate
    from mhc_tilelang.perf.inspect import matrix
    from mhc_tilelang.perf.inspect.compiler import COMPILE_FLAGS, compile_source, nvcc_command, nvdisasm, output

    subject = matrix.subjects(matrix.STUDIED, [kernel])[0]
    code = generate(kernel, subject.launch.parameters, matrix.MAIN).code
    source, cubin = tmp_path / sass.SOURCE, tmp_path / "kernel.cubin"
    source.write_text(code)
    output([*nvcc_command(matrix.MAIN, tuple(COMPILE_FLAGS)), "-w", "-o", str(cubin), str(source)])
    instruction = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/.*$", re.MULTILINE)
    shipped = instruction.findall(output([nvdisasm().path, "-c", str(cubin)]))
    assert len(shipped) > 100
    assert instruction.findall(compile_source(code, matrix.MAIN).listing) == shipped
