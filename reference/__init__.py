"""The forward of mHC in numpy float64: what every kernel is validated against, and what the formulas mean.

It follows the paper (arXiv 2512.24880; "Eq." is its numbering throughout) and imports nothing but numpy.
Arguments of any float dtype become float64, and nothing is rounded to a narrower dtype afterwards. Names,
shapes and conventions are those of `mhc_tilelang`.

A family a file: `expand`, `projection` (Eq. 14, 15), `coefficients` (16 to 18), `sinkhorn` (9, 19), `pre` and
`post` (3), `post_pre`, `head`, `residual` (1), `hyper_connections` (5), and `stream`, which carries an
embedding through many sublayers (4).
"""

from .coefficients import (
    alpha_per_row,
    coefficients,
    compute_logits,
    gate_post,
    gate_pre,
    split_groups,
)
from .expand import expand
from .head import head, head_coefficients
from .hyper_connections import hc_coefficients, hc_post, hc_pre, normalize_streams
from .post import post
from .post_pre import post_pre
from .pre import aggregate, pre
from .projection import absorb_norm_weight, project, rms_scale
from .residual import residual, residual_coefficients
from .sinkhorn import sinkhorn
from .stream import Step, Sublayer, run_stream, stream_steps

__all__ = [
    "Step",
    "Sublayer",
    "absorb_norm_weight",
    "aggregate",
    "alpha_per_row",
    "coefficients",
    "compute_logits",
    "expand",
    "gate_post",
    "gate_pre",
    "hc_coefficients",
    "hc_post",
    "hc_pre",
    "head",
    "head_coefficients",
    "normalize_streams",
    "post",
    "post_pre",
    "pre",
    "project",
    "residual",
    "residual_coefficients",
    "rms_scale",
    "run_stream",
    "sinkhorn",
    "split_groups",
    "stream_steps",
]
