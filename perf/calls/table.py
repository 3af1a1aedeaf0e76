"""The table of calls: which function of `launch`, its bytes, what it takes and gives. Loads no torch.

A name that a call takes is its function's parameter; `every_call.Given` has what is passed, under the same name or, in
`name=source`, under another. A new kernel is a row here: from it follow what is built, audited, executed, profiled,
tuned, and what its launches are on a target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

REPLAYED = 4  # sublayers of the block that is replayed where its traffic is counted: L_r* of the paper's 3B model
# The projection's backward as pre's backward calls it: g_x also gets h_pre · g_layer_input.
AGGREGATED = "project_backward_aggregated"
MIXING = ("x", "layer_output", "h_post", "h_res")
PARAMETERS = ("phi", "alpha", "bias")
FORWARD_RESULTS = ("x_next", "layer_input", "h_post_next", "h_res_next")
GRADIENTS = tuple(f"g_{name}" for name in (*MIXING, *PARAMETERS))
MIXED, MAPPED = " ".join(MIXING), " ".join(PARAMETERS)
SINKHORN = "iters=spec.sinkhorn_iters eps=spec.sinkhorn_eps"
HEAD = "phi=head_phi alpha=head_alpha bias=head_bias"
GATES = "phi=gate_phi alpha=gate_alpha bias=gate_bias spec=case.identity"
OF_GATES = GATES.partition(" ")[2]
UPSTREAM = "g_x_next=g_x g_layer_input=g_h g_h_post_next=g_h_post g_h_res_next=g_h_res"


def saved(forward: str) -> str:
    """Return the sources of what a boundary's backward takes from the forward named `forward` in `Given`."""
    return f"x_next={forward}.x_next h_pre={forward}.h_pre projected={forward}.projected"


@dataclass(frozen=True)
class Call:
    """A call of a function of `launch`.

    Attributes:
        elements: of stream dtype, read and written per token, in units of C, for n streams.
        takes: its parameters, `name` or `name=source`, as one text.
        gives: names of its results, of the first where not all are of interest.
        launch: the function's name, unless it is the call's.
        buffers: into how many of the first results `out` has it write; None for all that `gives` names.
        float8: what is written besides in float8, in units of C.
    """

    elements: Callable[[int], tuple[int, int]]
    takes: str
    gives: str
    launch: str = ""
    buffers: int | None = None
    float8: int = 0

    @property
    def sources(self) -> dict[str, str]:
        """Per parameter, where `Given` has it."""
        pairs = (word.partition("=") for word in self.takes.split())
        return {name: source or name for name, _, source in pairs}

    @property
    def results(self) -> tuple[str, ...]:
        """The names of `gives`."""
        return tuple(self.gives.split())


def no_stream(_: int) -> tuple[int, int]:
    """Return the stream elements, read and written, of a call that never touches the stream: none."""
    return 0, 0


CALLS: dict[str, Call] = {
    "expand": Call(lambda n: (1, n), "h num_streams=spec.num_streams", "x"),
    "project": Call(lambda n: (n, 0), "x phi plan", "partial"),
    "coefficients": Call(no_stream, "partial alpha bias spec plan", "h_pre h_post h_res"),
    "head_coefficients": Call(
        no_stream,
        "partial=head_partial alpha=head_alpha bias=head_bias spec plan=head_plan",
        "h_pre projected",
        buffers=0,
    ),
    "sinkhorn": Call(no_stream, f"logits {SINKHORN}", "h_res"),
    "aggregate": Call(lambda n: (n, 1), "x h_pre", "layer_input"),
    "post": Call(lambda n: (n + 1, n), MIXED, "x_next"),
    "replay": Call(
        lambda n: (n + REPLAYED - 1, n * (REPLAYED - 1) + REPLAYED),
        "x written h_pre=asked",
        "streams layer_inputs",
        buffers=0,
    ),
    "aggregate_norm": Call(lambda n: (n, 1), "x h_pre weight eps", "layer_input"),
    "aggregate_quantized": Call(lambda n: (n, 0), "x h_pre weight eps", "values scales", float8=1),
    "expand_backward": Call(lambda n: (n, 1), "g_x", "g_h"),
    "project_backward": Call(lambda n: (n, n), "g_projected x phi", "g_x g_phi"),
    AGGREGATED: Call(
        lambda n: (n + 1, n), "g_projected x phi h_pre g_layer_input=g_h", "g_x g_phi", "project_backward"
    ),
    "coefficients_backward": Call(
        no_stream, "g_h_pre g_h_post g_h_res projected alpha bias spec", "g_projected g_alpha g_bias"
    ),
    "head_coefficients_backward": Call(
        no_stream,
        "g_h_pre projected=head_projected alpha=head_alpha bias=head_bias spec",
        "g_projected g_alpha g_bias",
        buffers=0,
    ),
    "sinkhorn_backward": Call(no_stream, f"g_h_res logits {SINKHORN}", "g_logits"),
    "aggregate_backward": Call(lambda n: (n + 1, 0), "g_layer_input=g_h x", "g_h_pre"),
    "aggregate_gradients": Call(lambda n: (n + 1, n), "g_layer_input=g_h x h_pre", "g_x g_h_pre"),
    "aggregate_norm_backward": Call(
        lambda n: (n + 1, 1), "g_layer_input=g_h x h_pre weight eps", "g_u g_h_pre g_weight", buffers=0
    ),
    "post_backward": Call(lambda n: (2 * n + 1, n + 1), f"g_x_next=g_x {MIXED}", "g_x g_layer_output g_h_post g_h_res"),
    "post_pre": Call(lambda n: (2 * n + 1, n + 1), f"{MIXED} {MAPPED} spec", " ".join(FORWARD_RESULTS), buffers=5),
    "post_pre_delayed": Call(
        lambda n: (n + 1, n + 1), f"{MIXED} {MAPPED} spec h_pre", " ".join((*FORWARD_RESULTS, "h_pre_next")), "post_pre"
    ),
    "post_pre_quantized": Call(
        lambda n: (2 * n + 1, n),
        f"{MIXED} {MAPPED} spec weight eps",
        "x_next values scales h_post_next h_res_next h_pre_next",
        float8=1,
    ),
    "post_head": Call(lambda n: (2 * n + 1, n + 1), f"{MIXED} {HEAD} spec", "x_next h"),
    "gates": Call(no_stream, f"partial=gate_partial plan=gate_plan {OF_GATES}", "h_pre h_post"),
    "gates_backward": Call(
        no_stream, f"g_h_pre g_h_post projected=gate_projected {OF_GATES}", "g_projected g_alpha g_bias", buffers=0
    ),
    "identity_post_pre": Call(
        lambda n: (2 * n + 1, n + 1), f"x layer_output h_post {GATES}", "x_next layer_input h_post_next h_pre_next"
    ),
    "identity_post_pre_backward": Call(
        lambda n: (3 * n + 3, n + 1),
        f"g_x_next=g_x g_layer_input=g_h g_h_post_next=g_h_post x layer_output h_post {GATES} {saved('without_res')}",
        "g_x g_layer_output g_h_post",
        buffers=0,
    ),
    "expand_pre": Call(lambda n: (2, n + 1), f"h {MAPPED} spec", "x layer_input h_post h_res h_pre"),
    "post_pre_backward": Call(
        lambda n: (3 * n + 3, n + 1),
        f"{UPSTREAM} {MIXED} {MAPPED} {saved('after')} spec",
        " ".join(GRADIENTS),
        buffers=2,
    ),
    "post_pre_delayed_backward": Call(
        lambda n: (2 * n + 2, n + 1),
        f"{UPSTREAM} g_h_pre_next=g_h_pre {MIXED} {MAPPED} "
        "x_next=delayed.x_next h_pre projected=delayed.projected spec is_delayed",
        " ".join(GRADIENTS),
        "post_pre_backward",
        buffers=2,
    ),
    "post_head_backward": Call(
        lambda n: (3 * n + 3, n + 1),
        f"g_x_next=g_x g_output=g_h {MIXED} {HEAD} {saved('last')} spec",
        " ".join(GRADIENTS),
        buffers=0,
    ),
    "expand_pre_backward": Call(
        lambda n: (n + 4, 2),
        f"g_x g_layer_input=g_h g_h_post g_h_res h {MAPPED} h_pre=first.h_pre projected=first.projected spec",
        "g_h g_phi g_alpha g_bias",
        buffers=0,
    ),
}
