"""Health of a model's mappings: measures of tensors, and a watch over a model that runs.

with mhc.diagnostics.watch(model, every=10, warn=mhc.diagnostics.Thresholds(composite_gain=10)) as report:
    train(model)
report.to_csv("health.csv")

measures   functions of h_res, of logits and of streams: gains, sums, spectral norm, saturation, entropy
watching   `watch`: the hooks, and what makes a step
report     `Report`, its rows and CSV; `Thresholds`, and the warnings that they give
"""

from .measures import (
    Gain,
    amax_gain,
    composite,
    composite_gains,
    entry_saturation,
    logit_saturation,
    res_logits,
    row_entropy,
    spectral_norm,
    stream_rms,
    sum_deviation,
)
from .report import Finding, Report, Thresholds
from .watching import watch

__all__ = [
    "Finding",
    "Gain",
    "Report",
    "Thresholds",
    "amax_gain",
    "composite",
    "composite_gains",
    "entry_saturation",
    "logit_saturation",
    "res_logits",
    "row_entropy",
    "spectral_norm",
    "stream_rms",
    "sum_deviation",
    "watch",
]
