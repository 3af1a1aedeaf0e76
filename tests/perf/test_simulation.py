"""The simulated pipeline stage, against sums and schedules done by hand.

Would catch: a task left out or counted twice, a link that compute waits for where it should not, a bubble of the wrong
size, an assumption that is accepted and ignored, a solved value that does not give the target.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from mhc_tilelang.perf.memory.estimate import stage_of as memory_stage_of
from mhc_tilelang.perf.overhead.model import DEVICES, FORMS, RESIDUAL, predict
from mhc_tilelang.perf.overhead.report import PAPER
from mhc_tilelang.perf.simulation.costs import Assumptions, Costs, costs, forms
from mhc_tilelang.perf.simulation.overhead import overhead, pipeline_of, sensitivity, solve, step_overhead
from mhc_tilelang.perf.simulation.pipeline import Pipeline
from mhc_tilelang.perf.simulation.stage import COMPUTE, EXPERTS, PAIRS, Stage, stage_of
from mhc_tilelang.perf.simulation.streams import Span, Task, busy, makespan, run
from mhc_tilelang.perf.sizes import MODELS, NUM_LAYERS

# Attention, FFN and their gradients are 1 to 4, so that a sum tells which are in it.
COSTS = Costs(1.0, 2.0, 0.5, 3.0, 4.0, 1.5, 0.25, 0.375, 0.125, 0.75, 3, 0.1, 0.05)
FREE = {"connection": 0.0, "connection_backward": 0.0, "experts": 0.0, "send": 0.0, "block": 0}


def critical_path(spans: list[Span]) -> float:
    """The longest chain of tasks that wait for each other, streams left out."""
    tasks = {span.task.name: span.task for span in spans}
    ends: dict[str, float] = {}

    def end(name: str) -> float:
        if name not in ends:
            ends[name] = tasks[name].seconds + max(map(end, tasks[name].after), default=0.0)
        return ends[name]

    return max(map(end, tasks))


# Streams


def test_streams_run_in_order_and_wait() -> None:
    """b waits for a on another stream; c for b on its own; both occupies two streams and waits for both."""
    tasks = [
        Task("a", ("x",), 2.0),
        Task("b", ("y",), 1.0, ("a",)),
        Task("c", ("y",), 1.0),
        Task("both", ("x", "y"), 3.0),
        Task("d", ("x",), 0.5, ("later",)),
        Task("later", ("y",), 1.0),
    ]
    times = {span.task.name: (span.start, span.end) for span in run(tasks)}
    assert times == {"a": (0, 2), "b": (2, 3), "c": (3, 4), "both": (4, 7), "d": (8, 8.5), "later": (7, 8)}


@pytest.mark.parametrize(
    ("tasks", "named"),
    [
        ([Task("a", ("x",), 1.0, ("b",)), Task("b", ("x",), 1.0)], "got a waiting"),
        ([Task("a", ("x",), 1.0, ("absent",))], "got a waiting"),
        ([Task("a", ("x",), 1.0), Task("a", ("y",), 1.0)], "every name once"),
    ],
)
def test_what_cannot_run_is_refused(tasks: list[Task], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        run(tasks)


# Costs


@pytest.mark.parametrize("model", MODELS)
def test_one_stage_without_overlap_is_the_sum_of_the_parts(model: str) -> None:
    """A whole model on one device with free experts takes what `bench overhead`'s model says, layer by layer."""
    given = Assumptions(model=model, stages=1, overlapped=False, recompute=False, expert_bandwidth=1e30)
    for form in FORMS.keys() & forms().keys():
        layer = predict(MODELS[model], DEVICES["H200"], "training", sequence=4096)
        plain = 4096 * NUM_LAYERS[model] * layer.seconds
        assert stage_of(given, plain=True).period() == pytest.approx(plain)
        assert overhead(replace(given, form=form)) == pytest.approx(layer.overhead[form])
        assert step_overhead(replace(given, form=form)) == pytest.approx(layer.overhead[form])


def test_forms_are_those_of_the_kernels() -> None:
    """Forms move the kernels' vectors at n = 4, forward and backward; three of them are `model`'s."""
    found = {name: (form.forward(4), form.backward(4)) for name, form in forms().items()}
    assert (found["fused boundary"], found["kernel by kernel"]) == ((14, 20), (18, 40))
    assert len(FORMS.keys() & found.keys()) == 3


def test_replay_moves_the_elements_that_the_kernel_moves() -> None:
    """A block of L_r: n + L_r − 1 read, n·(L_r − 1) + L_r written."""
    given = Assumptions(bandwidth_share=1.0)
    cost = costs(given, plain=False)
    unit = 4096 * 2560 * 2 / DEVICES["H200"].bandwidth
    for length in (1, 2, 5):
        assert cost.replay(length) == pytest.approx((4 + length - 1 + 4 * (length - 1) + length) * unit)
    assert cost.block == memory_stage_of(30, 4, 8).papers_length
    assert costs(replace(given, recompute=False), plain=False).block == costs(given, plain=True).block == 0


def test_blocks_end_where_a_stage_ends() -> None:
    """Seven sublayers in blocks of three: the last one is short."""
    assert COSTS.blocks(7) == pytest.approx({2: 0.25, 5: 0.25, 6: 0.05})


# The stage


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("own_stream", [False, True])
def test_every_task_runs_once_in_either_order(layers: int, own_stream: bool) -> None:
    """Both orders do the same work, overlapped or not; catches a task that one of them forgets."""
    waits, overlaps = (Stage(layers, COSTS, overlapped, own_stream).spans(1) for overlapped in (False, True))
    assert {s.task.name: s.task.seconds for s in waits} == {s.task.name: s.task.seconds for s in overlaps}
    whole = COSTS.forward(layers) + COSTS.backward(layers) + 2 * COSTS.send
    assert sum(span.task.seconds for span in waits) == pytest.approx(whole)


@pytest.mark.parametrize("layers", [1, 3])
def test_without_overlap_a_pair_is_the_sum_of_its_tasks(layers: int) -> None:
    expected = COSTS.forward(layers) + COSTS.backward(layers) + 2 * COSTS.send
    assert Stage(layers, COSTS, False, False).period() == pytest.approx(expected)


def test_overlap_hides_communication() -> None:
    """Links that are quicker than what runs beside them cost nothing; in the steady state only compute is left."""
    stage = Stage(3, COSTS, True, False)
    silent = Stage(3, replace(COSTS, experts=0.0, send=0.0), True, False)
    assert stage.period() == pytest.approx(silent.period())
    assert silent.period() == pytest.approx(silent.costs.forward(3) + silent.costs.backward(3))


def test_a_slow_link_is_what_is_left() -> None:
    """Experts that take longer than all compute: four ways a layer, nothing else. The same of the stages' link."""
    assert Stage(3, replace(COSTS, experts=1e3), True, False).period() == pytest.approx(4 * 3 * 1e3, rel=0.02)
    assert Stage(3, replace(COSTS, send=1e3), True, False).period() == pytest.approx(1e3)


def test_connections_on_a_stream_of_their_own_cost_nothing_while_they_are_short() -> None:
    """Short beside the attention's weight gradient, which runs while a boundary backward and one forward do."""
    stage = Stage(3, replace(COSTS, connection=0.2, connection_backward=0.2, block=0), True, True)
    bare = Stage(3, replace(COSTS, **FREE), True, False)
    assert stage.period() == pytest.approx(bare.period())


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("own_stream", [False, True])
def test_a_stage_takes_at_least_its_critical_path_and_its_busiest_stream(overlapped: bool, own_stream: bool) -> None:
    spans = Stage(3, COSTS, overlapped, own_stream).spans(PAIRS)
    total = makespan(spans)
    assert total >= critical_path(spans)
    assert total >= busy(spans, COMPUTE)
    assert total >= busy(spans, EXPERTS)


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("name", [field.name for field in fields(Costs) if field.name not in ("block", "replay_once")])
def test_no_cost_that_grows_makes_a_stage_faster(name: str, overlapped: bool) -> None:
    """And every one counts: enough of it makes the stage slower."""
    periods = [
        Stage(2, replace(COSTS, **{name: factor * getattr(COSTS, name)}), overlapped, False).period()
        for factor in (0.0, 0.5, 1.0, 2.0, 100.0)
    ]
    assert periods == sorted(periods)
    assert periods[-1] > periods[0]


# The pipeline


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (4, 4), (4, 9), (6, 2)])
def test_the_bubble_of_1f1b(stages: int, micro_batches: int) -> None:
    """(p − 1) / (m + p − 1) of a step without sends, fewer micro-batches than stages included."""
    spans = (pipeline := Pipeline(stages, micro_batches, 1.0, 2.5, 0.0, True)).spans()
    assert makespan(spans) == pytest.approx((micro_batches + stages - 1) * 3.5)
    assert 1 - pipeline.ideal / makespan(spans) == pytest.approx((stages - 1) / (micro_batches + stages - 1))
    assert makespan(spans) >= critical_path(spans)


def test_at_most_as_many_micro_batches_in_flight_as_1f1b_promises() -> None:
    """p − s at stage s: what the memory model counts at the first stage."""
    spans = Pipeline(4, 9, 1.0, 2.0, 0.1, True).spans()
    for stage in range(4):
        own = [s for s in spans if s.task.name[0] in "FB" and s.task.name.endswith(f" {stage}")]
        events = sorted((s.start, 1) if s.task.name[0] == "F" else (s.end, -1) for s in own)
        flight = [sum(change for _, change in events[: k + 1]) for k in range(len(events))]
        assert max(flight) == 4 - stage


def test_sends_cost_less_when_overlapped() -> None:
    """And at least their way through all stages and back."""
    free, overlapped, waits = (
        makespan(Pipeline(4, 8, 1.0, 2.0, send, overlap).spans())
        for send, overlap in ((0.0, True), (0.2, True), (0.2, False))
    )
    assert free + 2 * 3 * 0.2 <= overlapped <= waits


# Overhead


def test_every_assumption_matters() -> None:
    """Each field changed alone changes the stage or the step; catches one that is accepted and ignored."""
    given = Assumptions(overlapped=False)
    changes = {
        "model": "3b",
        "device": "A100",
        "num_streams": 2,
        "form": "unfused HC",
        "stages": 4,
        "micro_batches": 8,
        "bandwidth_share": 0.5,
        "flops_share": 0.5,
        "expert_bandwidth": 1e11,
        "send_bandwidth": 1e10,
        "expert_copies": 2,
        "overlapped": True,
        "recompute": False,
    }
    assert {field.name for field in fields(Assumptions)} == {*changes, "own_stream", "measured"}  # tested apart
    before = overhead(given), step_overhead(given)
    for name, value in changes.items():
        after = replace(given, **{name: value})
        assert (overhead(after), step_overhead(after)) != pytest.approx(before, rel=1e-6), name


@pytest.mark.parametrize("model", ["3b", "27b"])
def test_what_is_solved_for_gives_the_target(model: str) -> None:
    given = Assumptions(model=model)
    found = list(solve(given, PAPER))
    assert any(one.value is not None for one in found)
    for one in found:
        if one.value is None:
            assert min(one.at_ends) > PAPER or max(one.at_ends) < PAPER
        else:
            assert one.knob.turn(given, one.value / one.knob.scale) == pytest.approx(PAPER, abs=1e-5)


def test_sensitivity_has_the_expected_signs() -> None:
    """More traffic costs more; a free stream and no recomputation cost less; a slow link to experts hides mHC."""
    changes = {one.what: one.overhead for one in sensitivity(Assumptions())}
    base = changes["as assumed"]
    assert changes["connections: single-pass floor"] < base < changes["connections: unfused HC"]
    assert changes["all kept, nothing recomputed"] < base < changes["communication waits"]
    assert changes["experts' link: 40 GB/s"] < base
    assert changes["connections cost no compute"] == pytest.approx(0.0, abs=1e-9)


def test_a_plain_residual_has_no_overhead() -> None:
    """mHC of one stream that moves what a residual moves, nothing recomputed, sends C: no difference is left."""
    given = Assumptions(num_streams=1, recompute=False)
    pair = [stage_of(given, plain=plain) for plain in (False, True)]
    moved = replace(
        pair[0].costs, connection=pair[1].costs.connection, connection_backward=pair[1].costs.connection_backward
    )
    assert moved == pair[1].costs
    assert RESIDUAL.elements(1, "training") == 6
    assert pipeline_of(given, plain=True).send == pipeline_of(given, plain=False).send
