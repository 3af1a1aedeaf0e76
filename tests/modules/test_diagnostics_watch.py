"""A watch over a running model: it sees what passes, changes nothing, and warns.

Would catch: x_next or a waiting write's h_res taken for the connection's own, values or gradients that change, hooks
that stay, steps counted twice, a model that explodes without a warning.
"""

from __future__ import annotations

import csv
import math
import warnings

import pytest
import torch
from models import normal, randomize
from test_connections import process_group  # noqa: F401  # a fixture
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import mhc_tilelang as mhc
from mhc_tilelang import diagnostics
from mhc_tilelang.diagnostics import Thresholds, watch

SPEC = mhc.MHCSpec.deepseek_v4(hidden_size=64)
KINDS = ("mhc", "hc", "residual")
DEPTH = 3


class Model(torch.nn.Module):
    """Linear layers between connections; `fused` is how a ResidualStream runs them, else a function of x each."""

    def __init__(self, kind="mhc", fused=True, spec=SPEC):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.fused = kind, fused
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(DEPTH))
        self.connections = torch.nn.ModuleList(randomize(mhc.connection(kind, spec, i), seed=i) for i in range(DEPTH))

    def forward(self, h):
        stream = mhc.ResidualStream(h, SPEC.num_streams, self.kind)
        for connection, layer in zip(self.connections, self.layers, strict=True):
            stream.write(layer(stream.read(connection)))
            if not self.fused:
                _ = stream.x
        return stream.reduce("sum")


def embeddings():
    return normal(2, 5, 64, seed=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_watching_changes_nothing(kind, fused):
    """Values and every gradient, to the bit."""
    results = []
    for watched in (False, True):
        model, h = Model(kind, fused), embeddings().requires_grad_()
        if watched:
            with watch(model, tokens=3) as report:
                out = model(h)
                out.backward(normal(*out.shape, seed=4))
            assert len(report.rows) == DEPTH
        else:
            out = model(h)
            out.backward(normal(*out.shape, seed=4))
        results.append([out, h.grad, *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["mhc", "hc"])
def test_rows_are_what_passed(kind, fused):
    """Rows equal those computed by hand. Catches x_next or the waiting write's h_res in the wrong place."""
    model, h = Model(kind, fused), embeddings()
    with watch(model, tokens=10) as report, torch.no_grad():
        model(h)
    x, mappings, streams = mhc.expand(h, 4), [], []
    with torch.no_grad():
        for connection, layer in zip(model.connections, model.layers, strict=True):
            streams.append(x.flatten(0, 1))
            layer_input, h_post, h_res = connection(x)
            mappings.append(h_res.flatten(0, 1))
            x = connection.merge(x, layer(layer_input), h_post, h_res)
    h_res = torch.stack(mappings)
    # A fused read may differ in the last bits of float32; a wrong sample or matrix by more than 0.1.
    torch.testing.assert_close(report.h_res, h_res, rtol=0, atol=1e-5)
    single, composite = diagnostics.amax_gain(h_res), diagnostics.composite_gains(h_res)
    rows, columns = diagnostics.sum_deviation(h_res)
    for depth, row in enumerate(report.rows):
        assert (row["step"], row["depth"], row["kind"]) == (0, depth, kind)
        assert row["name"] == f"connections.{depth}"
        expected = {
            "forward_gain": single.forward[depth].mean(),
            "backward_gain": single.backward[depth].mean(),
            "composite_forward_gain": composite.forward[depth].mean(),
            "composite_backward_gain": composite.backward[depth].mean(),
            "row_deviation": rows[depth].max(),
            "column_deviation": columns[depth].max(),
            "entropy": diagnostics.row_entropy(h_res[depth]).mean(),
            "entry_saturation": diagnostics.entry_saturation(h_res[depth]).mean(),
        }
        for i in range(4):
            expected[f"stream_rms_{i}"] = streams[depth][:, i].square().mean().sqrt()
        if kind == "mhc":
            parameters = (getattr(model.connections[depth], name) for name in ("phi", "alpha", "bias"))
            logits = diagnostics.res_logits(streams[depth], *parameters, SPEC)
            expected["logit_saturation"] = diagnostics.logit_saturation(logits).mean()
        else:
            assert row["logit_saturation"] is None
        for name, value in expected.items():
            assert row[name] == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("fused", [True, False])
def test_the_delayed_form_is_told_apart(fused):
    """It returns one mapping more, the last. Catches outputs counted from the end."""
    model, h = Model(fused=fused, spec=mhc.MHCSpec.deepseek_v4(64, delayed_pre=True)), embeddings()
    with torch.no_grad():
        with watch(model, tokens=10) as report:
            model(h)
        x = mhc.expand(h, 4)
        h_pre = mhc.first_pre(x)
        for depth, (connection, layer) in enumerate(zip(model.connections, model.layers, strict=True)):
            rms = x.square().mean((0, 1, 3)).sqrt().tolist()
            assert [report.rows[depth][f"stream_rms_{i}"] for i in range(4)] == pytest.approx(rms, rel=1e-4)
            layer_input, h_post, h_res, h_pre = connection(x, h_pre)
            torch.testing.assert_close(report.h_res[depth], h_res.flatten(0, 1), rtol=0, atol=1e-5)
            x = connection.merge(x, layer(layer_input), h_post, h_res)


def test_a_plain_residual_gains_nothing():
    model = Model("residual")
    with watch(model) as report:
        model(embeddings())
    assert {row["composite_forward_gain"] for row in report.rows} == {1.0}
    assert report.rows[0]["stream_rms_0"] == pytest.approx(float(embeddings().square().mean().sqrt()), rel=1e-6)
    assert "stream_rms_1" not in report.rows[0]


def hooks_of(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_hooks_go_and_a_broken_step_is_dropped():
    """After the block, and after an exception out of it; a step that an exception ended leaves no row."""
    model = Model("hc")
    with pytest.raises(KeyError), watch(model):
        raise KeyError
    assert not any(hooks_of(model))
    broken = torch.nn.Linear(64, 23)
    with watch(model) as report:
        whole, model.layers[1] = model.layers[1], broken
        with pytest.raises(ValueError, match="layer_output"):
            model(embeddings())
        model.layers[1] = whole
        model(embeddings())
    assert [(row["step"], row["depth"]) for row in report.rows] == [(1, 0), (1, 1), (1, 2)]
    assert not any(hooks_of(model))


def test_every_and_tokens():
    """The first step of three; evenly spaced tokens; other token counts; none at all."""
    model = Model("hc")
    with watch(model, every=3, tokens=2) as report:
        for step in range(5):
            model(normal(1, 6 + step, 64))
    assert [row["step"] for row in report.rows] == [0] * DEPTH + [3] * DEPTH
    assert report.h_res.shape == (DEPTH, 2, 4, 4)
    h = normal(6, 64)
    with torch.no_grad(), watch(model, tokens=2) as report:
        model(h)
    expected = model.connections[0](mhc.expand(h, 4))[2][[0, 3]]
    assert torch.equal(report.h_res[0], expected)
    with watch(model) as report:
        model(normal(0, 64))
        model(normal(1, 64))
    assert {row["step"] for row in report.rows} == {1}


def test_steps_without_a_model_around():
    """Connections in a list, called by hand: a second call of the same begins a step."""
    connections = torch.nn.ModuleList(mhc.connection("hc", SPEC, i) for i in range(2))
    with watch(connections) as report:
        for _ in range(3):
            stream = mhc.ResidualStream(embeddings(), 4, "hc")
            for connection in connections:
                stream.write(stream.read(connection))
    assert [(row["step"], row["depth"]) for row in report.rows] == [(s, d) for s in range(3) for d in range(2)]


def test_recomputation_is_no_step():
    """Activation checkpointing runs connections again in the backward pass."""
    model = Model("mhc")

    def sublayer(connection, layer, x):
        layer_input, *mappings = connection(x)
        return connection.merge(x, layer(layer_input), *mappings)

    with watch(model.connections) as report:
        x = mhc.expand(embeddings().requires_grad_(), 4)
        for connection, layer in zip(model.connections, model.layers, strict=True):
            x = checkpoint(sublayer, connection, layer, x, use_reentrant=False)
        x.backward(normal(*x.shape))
    assert [row["depth"] for row in report.rows] == [0, 1, 2]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_other_modes(mode):
    model = Model("mhc")
    with watch(model) as report:
        with mode():
            model(embeddings())
        with torch.autocast("cpu", torch.bfloat16):
            model(embeddings())
    assert len(report.rows) == 2 * DEPTH
    assert all(math.isfinite(row["composite_backward_gain"]) for row in report.rows)


def test_compiled_code_is_not_watched():
    """And computes what it did."""
    model, h = Model("hc"), embeddings()
    expected = model(h)
    with watch(model) as report:
        out = torch.compile(model, backend="eager")(h)
    torch.testing.assert_close(out, expected)
    assert report.rows == []


def test_transforms_are_not_watched():
    """torch.func's tensors must not outlive their transform."""
    model, h = Model("hc"), embeddings()
    layer_input = torch.func.vmap(lambda x: model.connections[0](x)[0])
    expected = layer_input(mhc.expand(h, 4))
    with watch(model) as report:
        assert torch.equal(layer_input(mhc.expand(h, 4)), expected)
        parameters = dict(model.named_parameters())
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (h,)).square().sum())(parameters)
    assert report.rows == []


@pytest.mark.usefixtures("process_group")
def test_sharded_connections():
    """FSDP2 gathers parameters for the call alone; the watch looks before they are gone."""
    model = Model("mhc")
    for connection in model.connections:
        fully_shard(connection)
    fully_shard(model)  # a root is not sharded again after its forward pass, which connections must not be
    with watch(model) as report:
        model(embeddings())
    assert all(row["logit_saturation"] is not None for row in report.rows)


@pytest.mark.gpu
def test_rows_from_a_gpu():
    """They arrive without a wait at every step, are the CPU's, and warn when they are read at the latest."""
    model, found = exploding(), []
    with watch(model) as expected:
        model(embeddings())
    model.cuda()
    with watch(model, warn=Thresholds(), on_warning=found.append) as report:
        for _ in range(3):
            model(embeddings().cuda())
    assert len(report.rows) == 3 * DEPTH
    assert len(found) == 1
    for row, other in zip(report.rows[2 * DEPTH :], expected.rows, strict=True):
        assert row["composite_forward_gain"] == pytest.approx(other["composite_forward_gain"], rel=1e-4)


# Warnings and files


def exploding():
    """Every stream takes 1.5 times the sum of all: HC gains a factor of 6 a sublayer."""
    model = Model("hc")
    with torch.no_grad():
        for connection in model.connections:
            connection.alpha.zero_()
            connection.bias[8:] = 1.5
    return model


def test_an_exploding_model_warns_once_until_it_recovers():
    model = exploding()
    limits = Thresholds(composite_gain=10, stream_rms=1e6)
    with watch(model, warn=limits) as report:
        with pytest.warns(mhc.MHCWarning, match=r"step 0: composite_\w+_gain of connections\.[02] is 216, beyond 10"):
            model(embeddings())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(embeddings())
            with torch.no_grad():
                for connection in model.connections:
                    connection.bias[8:] = torch.eye(4).flatten()
            model(embeddings())
    assert [finding.step for finding in report.findings] == [0, 1]
    assert report.findings[0].value == pytest.approx(216)


def test_a_callback_takes_the_place_of_warnings():
    """The callback gets the quantities that have a limit."""
    model, found = exploding(), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with watch(model, warn=Thresholds(sum_deviation=1, composite_gain=None), on_warning=found.append):
            model(embeddings())
    assert [(finding.quantity, finding.value) for finding in found] == [("row_deviation", 5.0)]


def test_what_is_no_number_is_found():
    model, found = exploding(), []
    with torch.no_grad():
        model.connections[1].bias[8] = math.nan
    with watch(model, warn=Thresholds(), on_warning=found.append) as report:
        model(embeddings())
    assert [finding.name for finding in found] == ["connections.1"]
    assert math.isnan(report.findings[0].value)


def test_initial_mhc_gives_no_warning():
    model = Model("mhc")
    for connection in model.connections:
        connection.reset_parameters()
    limits = Thresholds(composite_gain=1.5, sum_deviation=0.01, logit_saturation=0.1, stream_rms=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with watch(model, warn=limits) as report:
            model(embeddings())
    assert report.findings == []


def test_csv_and_dict(tmp_path):
    """The CSV has a line a row, with the dict's numbers; an error names the file."""
    model = Model("hc")
    with watch(model) as report:
        model(embeddings())
    path = tmp_path / "health.csv"
    report.to_csv(path)
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    columns = report.to_dict()
    assert list(lines[0]) == list(columns)
    assert [float(line["composite_forward_gain"]) for line in lines] == columns["composite_forward_gain"]
    assert {line["logit_saturation"] for line in lines} == {""}
    with pytest.raises(mhc.MHCError, match="cannot write"):
        report.to_csv(tmp_path / "absent" / "health.csv")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "watch: model: expected a torch.nn.Module, got int"),
        ({"model": torch.nn.Linear(2, 2)}, ValueError, "watch: model: expected a module with HyperConnection"),
        ({"every": 0}, ValueError, "watch: every: expected an int of at least 1, got 0"),
        ({"tokens": True}, ValueError, "watch: tokens: expected an int"),
        ({"warn": 3.0}, TypeError, "watch: warn: expected Thresholds or None, got float"),
        ({"on_warning": print}, ValueError, "watch: on_warning: expected with warn"),
    ],
)
def test_bad_arguments_of_a_watch(arguments, error, message):
    with pytest.raises(error, match=message), watch(**{"model": mhc.ResidualConnection(), **arguments}):
        pass
