"""The walk through machine code: trip counts, guards, lanes that part ways, addresses, and time by the control bits.

Would catch: a loop that runs once too often or as often as a constant in its compare says, whatever it starts from; an
unknown branch that is taken as known; both sides of a divergent branch counted once or a lane's register changed by the
other side; a line loaded twice counted as two round trips; waits, stalls and cp.async groups left out of the time.
"""

from collections import Counter

import numpy as np
import pytest
import sass

from mhc_tilelang.errors import MHCError
from mhc_tilelang.perf.predict.block import walk_block
from mhc_tilelang.perf.predict.instructions import results
from mhc_tilelang.perf.predict.listing import parse
from mhc_tilelang.perf.predict.registers import Registers
from mhc_tilelang.perf.predict.schedule import cycles
from mhc_tilelang.perf.predict.walk import Argument, Entry, walk

ENTRY = Entry("sm_90a", (Argument("x", "buffer"), Argument("num_tokens", "int32", 7)), (10, 1, 1), (64, 1, 1))
LOOP = """
    MOV R0, {start}
.L_x_1:
    FADD R5, R5, R5
    IADD3 R0, R0, {step}, RZ
    ISETP.NE.AND P0, PT, R0, {end}, PT
    @P0 BRA `(.L_x_1)
    EXIT
"""


def times(text, entry=ENTRY, warp=0):
    code = sass.code(text)
    found = walk(code, entry)
    return Counter(code[index].kind for index, _ in found.of_warp(warp)), found


@pytest.mark.parametrize(("start", "step", "end", "trips"), [("RZ", "0x1", "0x5", 5), ("0x80", "-0x20", "0x20", 3)])
def test_a_loop_runs_as_often_as_its_counter_says(start, step, end, trips):
    counted, found = times(LOOP.format(start=start, step=step, end=end))
    assert counted["FADD"] == trips
    assert not found.undecided


def test_a_loop_over_a_runtime_size_runs_that_often():
    text = LOOP.replace("MOV R0, {start}", "LDC R9, c[0x0][0x218]\n    MOV R0, RZ").replace("{end}", "R9")
    counted, _ = times(text.format(step="0x1"))
    assert counted["FADD"] == 7


def test_a_counter_that_was_spilled_comes_back():
    """nvdisasm says so in a remark behind the operands, which is none of them."""
    remark = '                          (*"SpillRefill"*)'
    start = f"LDC R1, c[0x0][0x28]\n    MOV R9, 0x5\n    STL [R1+0x8], R9 {remark}\n    MOV R0, RZ"
    text = LOOP.replace("MOV R0, {start}", start)
    text = text.replace("    ISETP", f"    LDL R7, [R1+0x8] {remark}\n    ISETP")
    counted, found = times(text.format(step="0x1", end="R7"))
    assert counted["FADD"] == 5
    assert not found.undecided


def test_a_loop_without_end_is_an_error(monkeypatch):
    monkeypatch.setattr("mhc_tilelang.perf.predict.walk.MAX_STEPS", 1000)
    with pytest.raises(MHCError, match="expected a warp to end within 1000 instructions"):
        times(LOOP.format(start="RZ", step="0x0", end="0x5"))


@pytest.mark.parametrize(("compare", "eps", "skipped"), [("NEU", 0.0, False), ("NEU", 1e-6, True), ("EQ", 1e-6, False)])
def test_a_branch_on_a_float_of_the_launch_is_decided(compare, eps, skipped):
    """As on Sinkhorn's eps, whose two forms are both in the code; one on what is computed with it is not."""
    entry = Entry("sm_90a", (Argument("eps", "float32", eps),), (1, 1, 1), (32, 1, 1))
    text = f"""
    LDC R1, c[0x0][0x210]
    FADD R2, R1, R1
    FSETP.{compare}.AND P0, PT, {{}}, RZ, PT
    @P0 BRA `(.L_x_1)
    MUFU.RCP R3, R2
.L_x_1:
    EXIT
"""
    counted, found = times(text.format("R1"), entry)
    assert (counted["MUFU"], dict(found.undecided)) == (int(not skipped), {})
    assert all(times(text.format(operand), entry)[1].undecided for operand in ("R2", "-R1"))


def test_a_branch_on_loaded_data_is_undecided():
    _, found = times("""
        LDC.64 R2, c[0x0][0x210]
        LDG.E R4, desc[UR4][R2.64]
        ISETP.GT.AND P0, PT, R4, RZ, PT
        @P0 BRA `(.L_x_1)
        FADD R5, R5, R5
    .L_x_1:
        EXIT
    """)
    assert list(found.undecided) == [3]


def test_a_branch_around_a_slow_path_is_taken():
    counted, found = times("""
        FCHK P0, R0, R3
        @!P0 BRA `(.L_x_1)
        CALL.REL.NOINC `(.L_x_2)
    .L_x_1:
        EXIT
    .L_x_2:
        FADD R5, R5, R5
        RET.REL.NODEC R6 `(.L_x_1)
    """)
    assert counted["CALL"] == 0
    assert not found.undecided


def test_lanes_that_part_ways_issue_both_sides_and_keep_their_registers():
    counted, found = times("""
        S2R R0, SR_TID.X
        MOV R1, 0x1
        ISETP.GE.AND P0, PT, R0, 0x10, PT
        @P0 BRA `(.L_x_1)
        MOV R1, 0x3
        FADD R5, R5, R5
    .L_x_1:
        MOV R2, RZ
    .L_x_2:
        FMUL R6, R6, R6
        IADD3 R2, R2, 0x1, RZ
        ISETP.LT.AND P1, PT, R2, R1, PT
        @P1 BRA `(.L_x_2)
        EXIT
    """)
    assert counted["FADD"] == 1  # of the first half
    assert counted["FMUL"] == 3  # the second half leaves after one
    assert not found.undecided


def test_a_guarded_access_touches_the_lanes_that_its_guard_lets_through():
    text = """
        S2R R0, SR_TID.X
        LDC.64 R2, c[0x0][0x210]
        ISETP.NE.AND P0, PT, R0, RZ, PT
        @!P0 IMAD.WIDE.U32 R4, R0, 0x10, R2
        @!P0 LDG.E.128 R8, desc[UR4][R4.64+0x80]
        EXIT
    """
    accesses = [[access for _, access in times(text)[1].of_warp(warp) if access] for warp in (0, 1)]
    assert [(a.buffer, a.lanes, a.width, a.lines) for a in accesses[0]] == [(0, 1, 16, ((1 << 40) // 128 + 1,))]
    assert accesses[1] == []


def test_carries_reach_the_upper_half_of_an_address():
    _, found = times("""
        LDC.64 R2, c[0x0][0x210]
        IADD3 R4, P0, R2, -0x80, RZ
        IADD3.X R5, R3, -0x1, RZ, P0, !PT
        LDG.E R8, desc[UR4][R4.64+0x100]
        EXIT
    """)
    [access] = [access for _, access in found.of_warp(0) if access]
    assert (access.buffer, access.lines) == (0, ((1 << 40) // 128 + 1,))


@pytest.mark.parametrize(
    ("line", "given", "expected"),
    [
        ("SHF.R.S32.HI R0, RZ, 0x4, R1", {"R1": 0xFFFFFF00}, 0xFFFFFFF0),
        ("SHF.L.U64.HI R0, R1, 0x2, R2", {"R1": 0xC0000000, "R2": 1}, 7),
        ("SHF.R.S64 R0, R1, 0x4, R2", {"R1": 0x10, "R2": 0xFFFFFFFF}, 0xF0000001),
        ("SHF.R.U64 R0, R1, 0x24, R2", {"R1": 0, "R2": 0xFFFFFFFF}, 0x0FFFFFFF),
        ("LEA.HI.X R0, R1, R2, R3, 0x2, P0", {"R1": 0x80000000, "R2": 5, "R3": 1, "P0": True}, 4 + 2 + 5 + 1),
        ("LOP3.LUT R0, R1, 0xf, R2, 0xf8, !PT", {"R1": 0x30, "R2": 0x1F}, 0x3F),
        ("PRMT R0, R1, 0x7610, R2", {"R1": 0x1234, "R2": 0x56780000}, 0x56781234),
        ("IMAD R0, R1, -0x40, R2", {"R1": 2, "R2": 0x100}, 0x80),
        ("IMAD.HI.U32 R0, R1, R2, RZ", {"R1": 0xAAAAAAAB, "R2": 9}, 6),
        ("VIADDMNMX R0, R1, R2, 0x10, PT", {"R1": 0xFFFFFFFF, "R2": 4}, 3),
        ("SGXT R0, R1, 0x8", {"R1": 0x1F0}, 0xFFFFFFF0),
        ("HFMA2 R0, -RZ, RZ, 0, 5.9604644775390625e-08", {}, 1),
        ("P2R R0, PR, R1, 0xa", {"R1": 0xF0F, "P0": None, "P1": True, "P3": False}, 0xF07),
        ("SEL R0, R1, 0x3, P0", {"R1": 9, "P0": False}, 3),
    ],
)
def test_integer_instructions(line, given, expected):
    [step] = sass.code(line)
    registers = Registers({}.get, dict(given))
    assert results(step, registers)["R0"] == expected


def test_lanes_are_computed_one_by_one():
    [step] = sass.code("IMAD.WIDE.U32 R4, R0, R1, R2")
    lanes = np.arange(32).astype(object) << 26
    registers = Registers({}.get, {"R0": lanes, "R1": 0x30, "R2": 5, "R3": 1})
    found = results(step, registers)
    low, high = found["R4"], found["R5"]
    expected = [(int(lane) * 0x30 + (1 << 32) + 5) for lane in lanes]
    assert (np.asarray(low) == [value & 0xFFFFFFFF for value in expected]).all()
    assert (np.asarray(high) == [value >> 32 for value in expected]).all()


def test_wide_sums_carry():
    wide = sass.code("IMAD.WIDE.U32 R4, P0, R0, R1, R2")[0]
    top = 0xFFFFFFFF
    for lanes in (top, np.full(32, top, dtype=object)):
        values = results(wide, Registers({}.get, {"R0": lanes, "R1": top, "R2": 0xFFFFFFFF, "R3": 0x2}))
        whole = top * top + (0x2 << 32 | 0xFFFFFFFF)
        expected = [whole & top, whole >> 32 & top, bool(whole >> 64)]
        assert [np.asarray(values[name]).flat[0] for name in ("R4", "R5", "P0")] == expected


def test_packed_predicates_come_back():
    [step] = sass.code("R2P PR, R4.B1, 0x6")
    written = results(step, Registers({}.get, {"R4": 0x0400}))
    assert written == {"P1": False, "P2": True}


@pytest.mark.parametrize(("a", "b"), [(20, 7), (1000003, 128), (4096, 4096), (5, 9), (0xFFFFFFF0, 3)])
def test_a_division_of_runtime_sizes(a, b):
    """nvcc divides so: by a float's reciprocal, one step of Newton's, then corrections."""
    registers = Registers({}.get, {"R4": a, "R5": b})
    steps = """
        I2F.U32.RP R6, R5
        MUFU.RCP R6, R6
        VIADD R2, R6, 0xffffffe
        F2I.FTZ.U32.TRUNC.NTZ R3, R2
        IADD3 R7, RZ, -R3, RZ
        IMAD R7, R7, R5, RZ
        MOV R2, RZ
        IMAD.HI.U32 R3, R3, R7, R2
        IMAD.HI.U32 R3, R3, R4, RZ
        IADD3 R8, -R3, RZ, RZ
        IMAD R2, R5, R8, R4
        ISETP.GE.U32.AND P0, PT, R2, R5, PT
        SEL R9, R5, RZ, P0
        SEL R10, 0x1, RZ, P0
        IADD3 R2, R2, -R9, RZ
        IADD3 R3, R3, R10, RZ
        ISETP.GE.U32.AND P1, PT, R2, R5, PT
        SEL R10, 0x1, RZ, P1
        IADD3 R3, R3, R10, RZ
    """
    for step in sass.code(steps):
        for name, value in results(step, registers).items():
            registers.write(name, value)
    assert registers.word("R3") == a // b


def test_an_instruction_that_is_not_known_leaves_its_results_unknown():
    [step] = sass.code("FOO.64 P1, R4, R0")
    assert results(step, Registers({}.get, {"R4": 1, "R5": 1})) == {"P1": None, "R4": None, "R5": None}


CHAIN = """
    LDC.64 R2, c[0x0][0x210]
    LDG.E R4, desc[UR4][R2.64]      | wr=0
    LDG.E R5, desc[UR4][R2.64+{far}] | wr=1 wait={first}
    FADD R6, R4, R5                 | wait=3
    EXIT
"""


def trips(text):
    code = sass.code(text)
    steps = walk(code, ENTRY).of_warp(0)
    return (cycles(code, steps, 1200) - cycles(code, steps, 600)) / 600


def test_round_trips_are_those_that_wait_for_each_other():
    assert trips(CHAIN.format(far="0x80", first=0)) == pytest.approx(1)
    assert trips(CHAIN.format(far="0x80", first=1)) == pytest.approx(2)


def test_a_line_that_was_loaded_is_not_fetched_again():
    assert trips(CHAIN.format(far="0x40", first=1)) == pytest.approx(1)


def test_groups_of_cp_async_are_waited_for_in_order():
    text = """
        LDC.64 R2, c[0x0][0x210]
        LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64]
        LDGDEPBAR
        FADD R6, R6, R6 | stall=15
        LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64+0x1000]
        LDGDEPBAR
        DEPBAR.LE SB0, {left}
        EXIT
    """
    code = [sass.code(text.format(left=left)) for left in ("0x0", "0x1", "0x2")]
    all_of_them, first, none = (cycles(each, walk(each, ENTRY).of_warp(0), 600) for each in code)
    assert all_of_them == pytest.approx(first + 16, abs=2)
    assert none < 100 < first


def test_a_stall_count_is_time():
    base, slow = (sass.code(f"FADD R1, R1, R1 | stall={stall}\nFADD R1, R1, R1\nEXIT") for stall in (4, 9))
    assert cycles(slow, walk(slow, ENTRY).of_warp(0), 600) - cycles(base, walk(base, ENTRY).of_warp(0), 600) == 5


def test_a_block_counts_every_warp_and_the_bytes_of_each_buffer():
    code = sass.code("""
        S2R R0, SR_TID.X
        LDC.64 R2, c[0x0][0x210]
        IMAD.WIDE.U32 R2, R0, 0x8, R2
        LDG.E.64 R4, desc[UR4][R2.64]  | wr=0
        BAR.SYNC.DEFER_BLOCKING 0x0    | wait=1
        MUFU.RCP R4, R4
        STG.E.64 desc[UR4][R2.64], R4
        EXIT
    """)
    found = walk_block(code, ENTRY)
    assert found.moved == {(0, "read"): 64 * 8, (0, "written"): 64 * 8}
    assert (found.block.warps, found.block.issued, found.block.special, found.block.barriers) == (2, 16, 2, 1)
    assert found.block.round_trips == pytest.approx(1)


def test_a_listing_without_encodings_is_refused():
    with pytest.raises(MHCError, match="nvdisasm -hex"):
        parse("        /*0000*/    EXIT ;\n")
