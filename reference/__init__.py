"""mHC in numpy float64, forward and backward: what every kernel is validated against, and what the formulas mean.

It follows the paper (arXiv 2512.24880; "Eq." is its numbering throughout) and imports nothing but numpy.
Arguments of any float dtype become float64, and nothing is rounded to a narrower dtype afterwards. Names,
shapes and conventions are those of `mhc_tilelang`.

A family a file: `expand`, `projection` (Eq. 14, 15), `coefficients` (16 to 18), `sinkhorn` (9, 19), `pre` and `post`
(3), `post_pre`, `delayed`, `head`, `expand_pre`, `post_head`, `rms_norm`, `quantization`, `residual` (1),
`hyper_connections` (5), `identity`, and `stream`, which carries an embedding through many sublayers (4).

What trains has its gradient beside it: X and X_backward. g_y is the gradient of a scalar loss by y.

    g_x, g_phi, ... = X_backward(g_out, ..., x, phi, ...)

takes the gradients of X's outputs in their order, each of which may be None for zero, then X's own arguments. It
returns the gradients of X's arguments in their order, a tuple if there are several. Those of parameters are summed
over tokens; that of an absent norm_weight is None. Each file derives its gradients where it begins.
"""

from .coefficients import (
    alpha_per_row,
    coefficients,
    coefficients_backward,
    compute_logits,
    compute_logits_backward,
    gate_post,
    gate_pre,
    split_groups,
)
from .delayed import delayed_post_pre, delayed_post_pre_backward, delayed_pre, delayed_pre_backward, first_pre
from .expand import collapse, collapse_backward, expand, expand_backward
from .expand_pre import expand_pre, expand_pre_backward
from .head import head, head_backward, head_coefficients, head_coefficients_backward
from .hyper_connections import (
    hc_coefficients,
    hc_coefficients_backward,
    hc_post,
    hc_post_backward,
    hc_pre,
    hc_pre_backward,
    normalize_streams,
    normalize_streams_backward,
)
from .identity import (
    gates,
    gates_backward,
    identity_post,
    identity_post_backward,
    identity_pre,
    identity_pre_backward,
)
from .post import post, post_backward
from .post_head import post_head, post_head_backward
from .post_pre import post_pre, post_pre_backward
from .pre import aggregate, aggregate_backward, pre, pre_backward
from .projection import (
    absorb_norm_weight,
    absorb_norm_weight_backward,
    project,
    project_backward,
    rms_scale,
    rms_scale_backward,
)
from .quantization import dequantize, quantize, round_e4m3
from .residual import residual, residual_backward, residual_coefficients
from .rms_norm import rms_norm, rms_norm_backward
from .sinkhorn import sinkhorn, sinkhorn_backward
from .stream import Step, Sublayer, run_stream, stream_steps

__all__ = [
    "Step",
    "Sublayer",
    "absorb_norm_weight",
    "absorb_norm_weight_backward",
    "aggregate",
    "aggregate_backward",
    "alpha_per_row",
    "coefficients",
    "coefficients_backward",
    "collapse",
    "collapse_backward",
    "compute_logits",
    "compute_logits_backward",
    "delayed_post_pre",
    "delayed_post_pre_backward",
    "delayed_pre",
    "delayed_pre_backward",
    "dequantize",
    "expand",
    "expand_backward",
    "expand_pre",
    "expand_pre_backward",
    "first_pre",
    "gate_post",
    "gate_pre",
    "gates",
    "gates_backward",
    "hc_coefficients",
    "hc_coefficients_backward",
    "hc_post",
    "hc_post_backward",
    "hc_pre",
    "hc_pre_backward",
    "head",
    "head_backward",
    "head_coefficients",
    "head_coefficients_backward",
    "identity_post",
    "identity_post_backward",
    "identity_pre",
    "identity_pre_backward",
    "normalize_streams",
    "normalize_streams_backward",
    "post",
    "post_backward",
    "post_head",
    "post_head_backward",
    "post_pre",
    "post_pre_backward",
    "pre",
    "pre_backward",
    "project",
    "project_backward",
    "quantize",
    "residual",
    "residual_backward",
    "residual_coefficients",
    "rms_norm",
    "rms_norm_backward",
    "rms_scale",
    "rms_scale_backward",
    "round_e4m3",
    "run_stream",
    "sinkhorn",
    "sinkhorn_backward",
    "split_groups",
    "stream_steps",
]
