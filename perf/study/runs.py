"""One training run of `study train`: a kind of connection and a seed, everything else equal.

A seed fixes the layers' first weights and every batch; connections start without random numbers. So runs of a seed
differ in their connections alone, and are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ...diagnostics import Report, watch
from .model import GPT, WARMUP, Sizes, Text, windows

CLIP = 1.0
EVALUATED = 16  # windows of held-out text, the same for all runs
SAMPLED = 256  # tokens of these whose mappings are looked at


@dataclass(frozen=True)
class Evaluation:
    """The state after a number of steps: the held-out loss, and what a watch saw meanwhile."""

    step: int
    loss: float
    forward_gain: float
    backward_gain: float
    activation_ratio: float


@dataclass
class Run:
    """The losses (nats per byte) and gradient norms of all steps, and the evaluations."""

    kind: str
    seed: int
    parameters: int
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)


def train(
    kind: str,
    seed: int,
    sizes: Sizes,
    text: Text,
    device: torch.device,
    every: int,
    after_step: Callable[[], object] = lambda: None,
) -> Run:
    """Train and evaluate, at the start and at regular intervals; the gradient norm is that before clipping."""
    torch.manual_seed(seed)
    model = GPT(kind, sizes).to(device)
    optimizer = model.optimizer(sizes.rate)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    run = Run(kind, seed, sum(parameter.numel() for parameter in model.parameters()))
    batches = torch.Generator().manual_seed(seed)
    run.evaluations.append(evaluate(model, sizes, text, 0))
    for step in range(1, sizes.steps + 1):
        starts = torch.randint(len(text.training) - sizes.context, (sizes.batch,), generator=batches)
        loss = loss_of(model, text.training, starts, sizes)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        warmup.step()
        run.losses.append(loss.item())
        run.gradient_norms.append(norm.item())
        if step % every == 0 or step == sizes.steps:
            run.evaluations.append(evaluate(model, sizes, text, step))
        after_step()
    return run


def loss_of(model: GPT, data: torch.Tensor, starts: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """Cross entropy in nats per byte."""
    device = model.token.weight.device
    inputs, targets = (t.to(device) for t in windows(data, starts, sizes.context))
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: GPT, sizes: Sizes, text: Text, step: int) -> Evaluation:
    """Return the loss on evenly spaced windows of the held-out text, under a watch."""
    starts = torch.linspace(0, len(text.held_out) - sizes.context - 1, EVALUATED).long()
    with watch(model, tokens=SAMPLED) as report:
        loss = loss_of(model, text.held_out, starts, sizes).item()
    forward, backward = (worst(report, f"composite_{way}_gain") for way in ("forward", "backward"))
    return Evaluation(step, loss, forward, backward, activation_ratio(report))


def worst(report: Report, column: str) -> float:
    """Return the largest value over depth; not a number if one is none."""
    values = torch.tensor([float(row[column] or 0.0) for row in report.rows], dtype=torch.float64)
    return values.max().item()


def activation_ratio(report: Report) -> float:
    """Return the stream's root mean square as the last sublayer reads it, over that as the first one does."""
    first, last = (
        torch.tensor([float(value or 0.0) for name, value in row.items() if name.startswith("stream_rms_")])
        for row in (report.rows[0], report.rows[-1])
    )
    return (last.square().mean() / first.square().mean()).sqrt().item()
