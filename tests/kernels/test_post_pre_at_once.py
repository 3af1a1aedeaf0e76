"""The boundary in one launch, executed as CUDA: the bits of three launches in any order of blocks, its counters, and
faults planted in how threads and blocks hand over to each other.

Would catch: a sum that depends on who came last, work that no block does or two do, a counter that is not set back, a
launch that hangs where blocks find no room, and, on the executor, what is read before its writer has released it.
"""

import os
import re
from dataclasses import dataclass, replace

import pytest
import torch
from damaged import damaged
from helpers import CPU, assert_same_bits, map_tokens

from mhc_tilelang import launch
from mhc_tilelang.checking.families.identity import of_identity
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.compiler.simt import SimtError, executing
from mhc_tilelang.launch import beside, workspace

MAIN = Case(4, 144, torch.bfloat16, 37)  # three chunks, three tiles, the last of each a part of one
WIDTHS = (40, 2560, 7168)  # below a chunk; eight groups; 28
ALL, FEW, ONE = 64, 2, 1  # blocks that are on the device at a time


def arguments(inputs, case=MAIN):
    return inputs.x, inputs.layer_output, inputs.h_post, inputs.h_res, inputs.phi, inputs.alpha, inputs.bias, case.spec


# Every other form: its case, whether H_res is the identity, whether layer_input is aggregated with a given h_pre.
FORMS = [
    pytest.param(Case(4, 144, torch.bfloat16, 21), True, False, id="identity"),
    # four rows, as many of padding
    pytest.param(Case(2, 144, torch.float16, 21), True, False, id="identity, two streams"),
    pytest.param(Case(4, 144, torch.float16, 21), False, False, id="float16"),
    pytest.param(Case(2, 144, torch.bfloat16, 21), False, False, id="two streams"),
    pytest.param(Case(4, 144, torch.bfloat16, 21), True, True, id="delayed identity", marks=pytest.mark.full),
    pytest.param(Case(2, 144, torch.float16, 21), False, True, id="delayed, two streams in float16"),
]


def at_once(inputs, resident=ALL, seed=0, polls=8, case=MAIN, delayed=False):
    """All results, in the order of `Boundary`, of one launch."""
    return run_at_once(inputs, resident, seed, polls, case, delayed)[0]


def run_at_once(inputs, resident=ALL, seed=0, polls=8, case=MAIN, delayed=False):
    """The same, and the bytes of x_next that were read again, for notes."""
    x_next, layer_input = (torch.full_like(t, torch.nan) for t in (inputs.x, inputs.layer_output))
    small = [torch.full_like(t, torch.nan) for t in (inputs.h_pre, inputs.h_post, inputs.h_res)]
    with executing(parallel_blocks=resident, seed=seed) as launches:
        out = (x_next, layer_input, *small)
        given = inputs.h_pre if delayed else None
        projected = launch.post_pre_at_once(*arguments(inputs, case), h_pre=given, out=out, polls=polls)
    assert [launched.family for launched in launches] == ["post_pre"]
    h_pre, h_post, h_res = small
    found = x_next, layer_input, h_post, h_res, h_pre, projected
    return found, launches[0].counts.tensors["x_next"].read_bytes


def separate(inputs, case=MAIN, delayed=False):
    with executing() as launches:
        schedule = launch.boundary_schedule(inputs.x, 24, one_launch=False)
        found = launch.post_pre(*arguments(inputs, case), h_pre=inputs.h_pre if delayed else None, schedule=schedule)
    assert [launched.family for launched in launches] == ["split_phi", "post_project", LAST[delayed]]
    return found


LAST = ("coefficients_aggregate", "coefficients")  # of three launches; of the delayed form


def counters_are_zero():
    return not any(kept.any() for kept in workspace._kept.values())


@pytest.fixture(scope="module")
def inputs():
    return Inputs.of(MAIN, CPU)


@pytest.fixture(scope="module")
def expected(inputs):
    return separate(inputs)


@pytest.fixture(scope="module")
def expected_delayed(inputs):
    return separate(inputs, delayed=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("resident", "polls"), [(ALL, 8), (FEW, 8), (FEW, 1), (ONE, 2), (ALL, 0)])
def test_bits_are_those_of_three_launches(inputs, expected, resident, polls, seed):
    """Whoever waits, gives up or comes last; a second launch finds the counters at zero."""
    found, read_again = run_at_once(inputs, resident, seed, polls)
    assert_same_bits(found, expected)
    assert counters_are_zero()
    assert read_again > 0 if resident == ONE else read_again == 0 or polls < 8 or resident == FEW


@pytest.mark.parametrize("resident", [ALL, FEW, ONE])
def test_bits_of_the_delayed_form_are_those_of_three_launches(inputs, expected_delayed, resident):
    """Where no block waits for another: whoever comes last."""
    for seed in range(3):
        found, read_again = run_at_once(inputs, resident, seed, delayed=True)
        assert_same_bits(found, expected_delayed)
        assert counters_are_zero()
        assert read_again == 0


@dataclass(frozen=True)
class OtherNumbers(Case):
    """A case whose constants differ from each other."""

    @property
    def spec(self):
        numbers = {"sinkhorn_iters": 7, "sinkhorn_eps": 3e-4, "pre_eps": 2e-3, "rms_eps": 0.1, "post_scale": 1.5}
        return replace(super().spec, **numbers)


def test_constants(inputs):
    """Catches one that is taken for another."""
    case = OtherNumbers(*vars(MAIN).values())
    assert_same_bits(at_once(inputs, case=case), separate(inputs, case))


@pytest.mark.parametrize("resident", [FEW, pytest.param(ALL, marks=pytest.mark.full)])
@pytest.mark.parametrize(("case", "identity", "delayed"), FORMS)
def test_other_forms(case, identity, delayed, resident):
    """Catches rows of phi that are not there taken for such, and a low half that is scaled and not scaled back."""
    inputs = Inputs.of(case, CPU)
    given = of_identity(case, inputs) if identity else inputs
    parameters = (given.phi, given.alpha, given.bias, case.identity if identity else case.spec)
    mixed = (given.x, given.layer_output, given.h_post, *(() if identity else (given.h_res,)))
    run = launch.identity_post_pre if identity else launch.post_pre
    with executing(parallel_blocks=resident, seed=1) as launches:
        found, expected = (
            run(
                *(*mixed, *parameters),
                h_pre=given.h_pre if delayed else None,
                schedule=launch.boundary_schedule(given.x, len(given.phi), one_launch=one),
            )
            for one in (True, False)
        )
    last = "gates" if delayed and identity else LAST[delayed]
    assert [each.family for each in launches] == ["post_pre", "split_phi", "post_project", last]
    assert_same_bits(found, expected)


@pytest.mark.full
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width):
    case = Case(4, width, torch.bfloat16, 19)
    inputs = Inputs.of(case, CPU)
    assert_same_bits(at_once(inputs, FEW, 1, 3, case), separate(inputs, case))


def test_a_real_width():
    """20 chunks in four groups; some blocks wait in vain."""
    case = Case(4, 1280, torch.bfloat16, 17)
    inputs = Inputs.of(case, CPU)
    assert_same_bits(at_once(inputs, 15, 1, 40, case), separate(inputs, case))


def test_a_token_keeps_its_bits_in_any_batch(inputs, expected):
    """Also catches sums of one, two or four quads of tokens that differ."""
    for first, size in ((0, 1), (7, 5), (15, 17), (36, 1)):
        batch = map_tokens(inputs, lambda t, first=first, size=size: t[first : first + size])
        *got, projected = at_once(batch, FEW)
        assert_same_bits(got, [each[first : first + size] for each in expected[:-1]])
        assert_same_bits([projected], [expected.projected[:, first : first + size]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_token(inputs, expected, value):
    others = [token for token in range(37) if token != 21]
    damaged_inputs = map_tokens(inputs, torch.clone)
    damaged_inputs.x[21, 2, 100] = value
    *got, projected = at_once(damaged_inputs, FEW)
    assert_same_bits([each[others] for each in got], [each[others] for each in expected[:-1]])
    assert not torch.isfinite(projected[:, 21]).all()


def test_what_is_chosen_for_few_tokens(inputs, expected):
    """One launch by default; not for a layer in float32, nor where a row starts on 8 bytes."""
    with executing() as launches:
        found = launch.post_pre(*arguments(inputs))
        launch.post_pre(*arguments(inputs), h_pre=inputs.h_pre)
        x, layer_output, *rest = arguments(inputs)
        shifted = torch.empty(layer_output.numel() + 4, dtype=layer_output.dtype)[4:].view_as(layer_output)
        out = (x, layer_output, inputs.h_pre, inputs.h_post, inputs.h_res)
        for other in (layer_output.float(), shifted):
            assert launch.post_pre_at_once(x, other, *rest, out=out) is None
        with pytest.raises(ValueError, match="one_launch: expected a stream that is projected by warps"):
            launch.boundary_schedule(x.float(), 24, one_launch=True)
    assert [launched.family for launched in launches] == ["post_pre"] * 2
    assert_same_bits(found, expected)


def test_no_tokens(inputs):
    """Launch nothing, and fail at nothing."""
    none = map_tokens(inputs, lambda t: t[:0])
    with executing() as launches:
        for given in (None, none.h_pre):
            found = launch.post_pre(*arguments(none), h_pre=given)
            assert (found.x_next.shape, found.projected.shape) == ((0, 4, 144), (25, 0))
    assert [launched.family for launched in launches] == []


def test_coefficients_beside_the_layer_are_a_launch_of_their_own(inputs, expected_delayed, monkeypatch):
    """Where they are asked for on a side stream, one launch would bring them back before the layer."""
    monkeypatch.setattr(beside, "asked", lambda: "a side stream")
    monkeypatch.setattr(beside, "coefficients_beside", lambda *given, out: launch.coefficients(*given, out=out)[3])
    with executing() as launches:
        found = launch.post_pre(*arguments(inputs), h_pre=inputs.h_pre)
    assert [launched.family for launched in launches] == ["split_phi", "post_project", "coefficients"]
    assert_same_bits(found, expected_delayed)


# ---- planted faults: one source has them all, each under a number of `polls` of its own; of the delayed form, which
# has no such argument, under one in the environment

PLANTED = "PLANTED_FAULT"
FIRST_FAULT = 100
SYNCHRONIZATION = r"__syncthreads\(\);|tl::cp_async_wait<\d+>\(\);"
BARRIERS = [f"without barrier or wait {k}" for k in range(8)]
RACE = "race between blocks"
# What the source has instead of what, with `IS` for whether it is this fault; where it is found; as what.
FAULTS = {
    "arrives relaxed": (r", 1, 4\)", ", 1, IS ? 0 : 4)", ALL, RACE),
    "arrives without release": (r", 1, IS_0 \? 0 : 4\)", ", 1, IS_0 ? 0 : IS ? 2 : 4)", ALL, RACE),
    "arrives without acquire": (r"IS_1 \? 2 : 4\)", "IS_1 ? 2 : IS ? 3 : 4)", ALL, RACE),
    "leaves without acquire": (r"leaving, 4\)", "leaving, IS ? 3 : 4)", FEW, RACE),
    "leaves without release": (r"leaving, IS_3 \? 3 : 4\)", "leaving, IS_3 ? 3 : IS ? 2 : 4)", FEW, RACE),
    "polls relaxed": (r"\]\)\), 2\);", "])), IS ? 0 : 2);", ALL, RACE),
    "waits without end": (r"\(0 < patience\)", "(0 < patience || IS)", FEW, "deadlock"),
    "waits for one more than comes": (
        *(r"& 1023\) < 3\) && \(0 < patience \|\| IS_6\)", "& 1023) < 3 + IS) && (0 < patience || IS_6 || IS)"),
        *(ALL, "deadlock"),
    ),
    "takes one more token": (r"inside = \(\(token < num_tokens\)", "inside = ((token < num_tokens + IS)", ALL, ""),
    "leaves no note": (r"(sync\[[^;=]*\] = 1;)", r"if (!IS) \1", FEW, "bits"),
    "sets no counter back": (r"(sync\[[^;=]*\] = 0;\s*\}\s*\}\s*\}\s*)$", r"if (!IS) \1", ALL, "counters"),
}


# The same of the delayed form, whose blocks leave when they have arrived.
DELAYED_BARRIERS = BARRIERS[:5]
DELAYED_FAULTS = {
    **{name: FAULTS[name] for name in ("arrives relaxed", "arrives without release", "arrives without acquire")},
    "takes one more token": FAULTS["takes one more token"],
    "ends before all have come": (r"& 1023\) == 3\)", "& 1023) == 3 - IS)", ALL, RACE),
    "ends twice": (r"(told\)\[1\] = condval_1;)", r"\1 if (IS) { ((int*)told)[1] = (seen & 1023) > 1; }", ALL, RACE),
    "sets no counter back": (r"(sync\[[^;=]*\] = 0;)", r"if (!IS) \1", ALL, "counters"),
}


def number(name, faults):
    """0 of no fault."""
    return FIRST_FAULT + [*BARRIERS, *faults].index(name) if name else 0


def plant(code):
    """All faults in one source, of either form, none of which is there but for its number."""
    delayed = "leaving" not in code
    barriers, faults = (DELAYED_BARRIERS, DELAYED_FAULTS) if delayed else (BARRIERS, FAULTS)
    found = list(re.finditer(SYNCHRONIZATION, code))
    assert len(found) == len(barriers)
    for k, place in reversed(list(enumerate(found))):
        at = number(barriers[k], faults)
        code = f"{code[: place.start()]}if (polls != {at}) {{ {place[0]} }}{code[place.end() :]}"
    for k, (name, (pattern, replacement, *_)) in enumerate(faults.items()):
        code, count = re.subn(pattern, replacement.replace("IS ", f"IS_{k} ").replace("IS)", f"IS_{k})"), code, count=1)
        assert count == 1, name
    for k, name in reversed(list(enumerate(faults))):
        code = code.replace(f"IS_{k}", f"(polls == {number(name, faults)})")
    return f'#include <cstdlib>\n#define polls std::atoi(std::getenv("{PLANTED}"))\n{code}' if delayed else code


@pytest.fixture(scope="module")
def planted():
    with damaged("post_pre", plant):
        yield


def outcome(inputs, expected, name, resident, delayed=False):
    """What is found: kinds of findings, "bits", "counters", or nothing."""
    polls = number(name, DELAYED_FAULTS if delayed else FAULTS)
    os.environ[PLANTED] = str(polls)
    try:
        found = at_once(inputs, resident, polls=polls, delayed=delayed)
    except SimtError as error:
        workspace._kept.clear()
        return ", ".join(sorted(error.kinds))
    if not counters_are_zero():
        workspace._kept.clear()
        return "counters"
    same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected, strict=True))
    return "" if same else "bits"


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.usefixtures("planted")
def test_planted_faults_are_found(inputs, expected, name):
    *_, resident, kind = FAULTS[name]
    found = outcome(inputs, expected, name, resident)
    assert found
    assert kind in found


@pytest.mark.parametrize("name", BARRIERS)
@pytest.mark.usefixtures("planted")
def test_dropped_synchronization_is_found(inputs, expected, name):
    """With all blocks on the device, a few, or one: a block that has it to itself is through before the next one comes,
    which then finds all that it wrote, barrier or not; and notes are left only where there is no room.
    """
    assert any(outcome(inputs, expected, name, resident) for resident in (ALL, FEW, ONE))


@pytest.mark.usefixtures("planted")
def test_without_a_fault_the_planted_source_passes(inputs, expected):
    """And a wait without end does where all find room."""
    assert_same_bits(at_once(inputs, FEW, polls=FIRST_FAULT - 1), expected)
    assert outcome(inputs, expected, "waits without end", ALL) == ""


@pytest.mark.parametrize("name", [*DELAYED_BARRIERS, *DELAYED_FAULTS])
@pytest.mark.usefixtures("planted")
def test_planted_faults_of_the_delayed_form_are_found(inputs, expected_delayed, name):
    *_, kind = DELAYED_FAULTS.get(name, ("",))
    found = outcome(inputs, expected_delayed, name, ALL, delayed=True)
    assert found
    assert kind in found


@pytest.mark.usefixtures("planted")
def test_without_a_fault_the_planted_delayed_form_passes(inputs, expected_delayed):
    assert outcome(inputs, expected_delayed, "", ALL, delayed=True) == ""
