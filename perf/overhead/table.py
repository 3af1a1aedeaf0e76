"""The table of docs/overhead.md: every percentage that stands beside the paper's 6.7 %, and what it is of."""

from __future__ import annotations

from collections.abc import Callable

from ..predict.stored import TOKENS, connection
from ..simulation.costs import FUSED, Assumptions
from ..simulation.overhead import overhead, step_overhead
from ..sizes import MODELS, SEQUENCE
from ..stored.command import markdown_table
from ..stored.results import OverheadResults
from . import model
from .model import DEVICES, FORWARD, IN_MODE, LABELS, ONE_BY_ONE, OURS, SUBLAYERS, TRAINING
from .report import PAPER, percent

HEADERS = ["who", "of what", "against", "how", "adds"]
PLAIN = "a plain residual"
PAPERS_KERNELS, FLOOR, UNFUSED = "paper's kernels", "single-pass floor", "unfused HC"  # in `model.FORMS`

# Said elsewhere, with its source. The first has no layer inside, the second is not mHC, the third shows no data.
MHC_TRITON = "[mHC-triton](https://github.com/WithNucleusAI/mHC-triton)"
MARIN = "[marin 7409](https://github.com/marin-community/marin/issues/7409)"
USER = "[a user](https://github.com/Open-Superintelligence-Lab/5-dollar-llm/issues/98)"
TRITON_WHAT = "connections with no layer inside, C = 4096, 32,768 tokens, forward + backward; H100"
MARIN_WHAT = "training of small MoE models; identity hyper-connections, n = 4: no H_res, no Sinkhorn"
USER_WHAT = "training of a small model that is not named; RTX 4060"
OTHERS = [
    [MHC_TRITON, TRITON_WHAT, "simple residuals, no layer inside", "measured", "240 % (13.66 ms against 4.01)"],
    [MARIN, MARIN_WHAT, PLAIN, "measured", "width 512: 7.0 %; width 768: 10.2 %"],
    [USER, USER_WHAT, PLAIN, "said", "40 %; with kernels 6 %"],
]


def overheads(results: OverheadResults) -> str:
    """Return the table in Markdown, what was measured here first."""
    return markdown_table(HEADERS, [*measured_rows(results), *papers(), *layer(), *stage(), *OTHERS], "lllll")


def measured_rows(results: OverheadResults) -> list[list[str]]:
    """Return the rows of a stored layer, ours before plain torch."""
    over = {(row.connection, row.mode): row.overhead for row in results.rows}
    rows = []
    for label in (LABELS[kind] for kind in ("mhc_kernels", "mhc_eager", "hc")):
        what = f"one layer, {label}; {results.layer}; {results.facts.device}"
        numbers = [
            f"{IN_MODE[mode]} {percent(one.median / 100)} ({one.lower_quartile:.1f} to {one.upper_quartile:.1f})"
            for mode in (TRAINING, FORWARD)
            if (one := over[label, IN_MODE[mode]])
        ]
        rows.append(["**`bench overhead`**", what, PLAIN, "**measured here**", "; ".join(numbers)])
    return rows


def papers() -> list[list[str]]:
    """Return the claim, as both reports make it."""
    step = "whole training steps of an in-house model, n = 4, communication and recomputation overlapped"
    theirs = (PLAIN, "measured by its authors", percent(PAPER))
    return [
        ["[the paper](https://arxiv.org/abs/2512.24880)", f"{step}; model and hardware are not named", *theirs],
        ["DeepSeek-V4 report", "one overlapped 1F1B pipeline stage", *theirs],
    ]


def layer() -> list[list[str]]:
    """Return the table's rows of one layer, as `bench overhead` predicts it."""
    found = {
        name: model.predict(sizes, DEVICES["H200"], TRAINING, sequence=SEQUENCE).overhead
        for name, sizes in MODELS.items()
    }
    shares = {
        f"one layer, {form}; {SEQUENCE} tokens, forward + backward": {name: found[name][form] for name in MODELS}
        for form in (OURS, ONE_BY_ONE, PAPERS_KERNELS, FLOOR, UNFUSED)
    }
    rows = [modelled_row("bench overhead", what, share.__getitem__) for what, share in shares.items()]
    return [*rows, *predicted_rows()]


def predicted_rows() -> list[list[str]]:
    """Return the row of one layer, with kernel times of `mhc-tilelang predict` where it gives any."""
    numbers = []
    for name, sizes in MODELS.items():
        found = connection("H200", sizes.hidden_size, 4)
        if not isinstance(found, str):
            one = model.predict(sizes, DEVICES["H200"], TRAINING, sequence=SEQUENCE)
            times = [SUBLAYERS * (forward + backward) * 1e-6 / TOKENS for forward, backward in zip(*found, strict=True)]
            middle, low, high = (percent(one.with_connection(seconds)) for seconds in times)
            numbers.append(f"{name} {middle} ({low} to {high})")
    what = f"one layer, {OURS}, their times predicted from machine code; {SEQUENCE} tokens, forward + backward; H200"
    return [["`bench overhead`", what, PLAIN, "predicted", ", ".join(numbers) or "no answer"]]


def stage() -> list[list[str]]:
    """Return the table's rows of pipeline stages and of a whole step, as `simulate` gives them."""
    whole = f"one of eight pipeline stages, micro-batches of {SEQUENCE} tokens, streams recomputed, links overlapped"

    def steady(form: str, **assumed: bool) -> Callable[[str], float]:
        return lambda name: overhead(Assumptions(model=name, form=form, **assumed))  # type: ignore[arg-type]

    cases = {
        f"{whole}, {OURS}": steady(FUSED),
        **{f"{whole}, {form}": steady(form) for form in (PAPERS_KERNELS, FLOOR, UNFUSED)},
        f"such a stage that waits for links, {OURS}": steady(FUSED, overlapped=False),
        f"a whole 1F1B step of eight stages, {OURS}": lambda name: step_overhead(Assumptions(model=name)),
    }
    return [modelled_row("simulate", what, share) for what, share in cases.items()]


def modelled_row(command: str, what: str, share: Callable[[str], float]) -> list[str]:
    """Return a row with the share for each of the models."""
    numbers = ", ".join(f"{name} {percent(share(name))}" for name in MODELS)
    return [f"`{command}`", f"{what}; H200", PLAIN, "modelled", numbers]
