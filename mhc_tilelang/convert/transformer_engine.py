"""TransformerEngine's mHC functions (from its source and its tests' references; its Triton kernels are not run here).

    x            [s, b, C, n]   streams innermost: `convert.swapped_streams` of ours
    phi          [24, n·C]      columns for x flattened as [C, n]; res rows as [in, out], for it computes x @ H_res
    alpha        [3]
    beta         [1, 24]        bias, res as [in, out]
    norm_weight  [n·C]          in newer versions, columns as phi's; optional here

n is 4. Its Sinkhorn has no eps and its h_pre none; to the mean square it adds float32's machine epsilon. Its logits lie
as [in, out] and their rows are normalised first: DeepSeek's convention, and a `HyperConnection` computes the same. It
has no module, so no state dict of its own: the keys are its functions' arguments.
"""

from __future__ import annotations

from ..spec import MHCSpec
from . import state as checks
from .state import Converted, State
from .tensors import swapped_columns, swapped_rows

NAMES = ("phi", "alpha", "beta")
OPTIONAL = ("norm_weight",)
NUM_STREAMS = 4
ROWS = NUM_STREAMS**2 + 2 * NUM_STREAMS


def spec(hidden_size: int, **changes: float) -> MHCSpec:
    """Return its constants: 4 streams, 20 iterations, rms_eps 2^-23 and no other eps."""
    constants = {"sinkhorn_eps": 0.0, "pre_eps": 0.0, "rms_eps": 2.0**-23}
    return MHCSpec(hidden_size, NUM_STREAMS, **{**constants, **changes})  # type: ignore[arg-type]


def import_state(state: State) -> Converted:
    """phi, alpha, beta and maybe norm_weight -> phi, alpha, bias of a `HyperConnection`, and norm_weight if it came.

    A `HyperConnection` has no norm weight: multiply it into phi, or pass it to `mhc.pre`.
    """
    function = "transformer_engine.import_state"
    checks.take(function, state, NAMES, OPTIONAL)
    phi, alpha, beta = (state[name] for name in NAMES)
    checks.check_shape(function, "beta", beta, (1, ROWS))
    checks.check_shape(function, "alpha", alpha, (3,))
    checks.check_projection(function, "phi", phi, ROWS, NUM_STREAMS)
    channels = phi.shape[1] // NUM_STREAMS
    for name in OPTIONAL:
        if name in state:
            checks.check_shape(function, name, state[name], (phi.shape[1],))
    weights = {name: swapped_columns(state[name], channels) for name in OPTIONAL if name in state}
    rows = swapped_rows(swapped_columns(phi, channels), NUM_STREAMS)
    return {"phi": rows, "alpha": alpha, "bias": swapped_rows(beta[0], NUM_STREAMS), **weights}


def export_state(state: State) -> Converted:
    """phi, alpha, bias of a `HyperConnection` with 4 streams, maybe norm_weight -> phi, alpha, beta, norm_weight."""
    function = "transformer_engine.export_state"
    n = checks.ours(function, state, OPTIONAL)
    if n != NUM_STREAMS:
        raise ValueError(f"{function}: bias: expected {ROWS} coefficients, of {NUM_STREAMS} streams, got {n} streams")
    phi = state["phi"]
    for name in OPTIONAL:
        if name in state:
            checks.check_shape(function, name, state[name], (phi.shape[1],))
    weights = {name: swapped_columns(state[name], n) for name in OPTIONAL if name in state}
    columns = swapped_columns(swapped_rows(phi, n), n)
    return {"phi": columns, "alpha": state["alpha"], "beta": swapped_rows(state["bias"], n).unsqueeze(0), **weights}
