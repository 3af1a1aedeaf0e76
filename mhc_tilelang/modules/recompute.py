"""Recomputation (Section 4.3.2): of a block of sublayers, keep the stream at its start and what the layers returned.

    stream = mhc.ResidualStream(h, recompute=mhc.recompute_length(num_sublayers))

The backward needs the stream x of every sublayer, n·C a token, and the layer saves its input u, another C. Within a
block of L_r sublayers neither is kept: the first backward step that asks for one recomputes all of them by one kernel
(`kernels.replay`), from the block's first x, the layers' outputs F, and the coefficients, with the bits that they had.
Layers run once. Of L sublayers the graph keeps

    n·C·⌈L / L_r⌉ + C·L        a token: x at every block's start, and every F; and the embedding, C

beside the coefficients (4·(n² + 2n) bytes) and whatever else layers save. For the time that the backward spends in a
block there are, recomputed, n·C·(L_r − 1) + C·L_r.

**How.** After every operator, and at every write for the layer's graph, the nodes that were made meanwhile are walked,
and where one saved the storage of an x or u of the block, a pair of hooks is registered on that `SavedTensor`: it packs
a `Handle`, which says what to recompute. There are no hooks around the user's code, so nothing is left behind by an
exception. A handle owns its block, which holds no node of the graph: what the graph drops, goes.

What is kept after all: an input that its layer changed in place; one that the layer saved for more than its output, as
for an auxiliary loss; that of a checkpointed layer, which needs it to run again; one that is held by other code; one
that a connection normalised whose weights FSDP2 shards; what a hook of a connection or a head has replaced, and what
was read or merged from what a hook has replaced. No value depends on any of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from .. import launch
from ..arguments import check_streams
from ..ops_quantized import Quantized
from .blocks import Block, Watched, Workspace
from .connections import HyperConnection
from .saved import PLAIN, is_untouched, nodes, saved_by, sequence_number

COMPILED = (
    "ResidualStream: recompute: expected a stream outside of torch.compile, got compiled code; compile the layers"
)
# Nodes of the operators that read, and how many tensors they save, h_pre last but one. One that saves more aggregates
# in some way that is not known here.
EXPANDS = "expand_preBackward"
PRE, BOUNDARY = ("preBackward", "pre_quantizedBackward"), ("post_preBackward", "post_pre_quantizedBackward")
IDENTITY_PRE, IDENTITY_BOUNDARY = "identity_preBackward", "identity_post_preBackward"
READS = {EXPANDS: 6, **dict.fromkeys(PRE, 8), **dict.fromkeys(BOUNDARY, 12), IDENTITY_PRE: 7, IDENTITY_BOUNDARY: 10}
# Where an h_pre and the norm's weight are; identity connections have no norm.
GIVEN = {EXPANDS: (), **dict.fromkeys(PRE, (4, 5)), **dict.fromkeys(BOUNDARY, (7, 8))}
GIVEN |= {IDENTITY_PRE: (4,), IDENTITY_BOUNDARY: (6,)}
# x and what is mixed with it come first.
MERGES = ("postBackward", *BOUNDARY, "post_headBackward", "identity_postBackward", IDENTITY_BOUNDARY)
HOOKED = "BackwardHookFunctionBackward"  # a module's full backward hooks: views of its results


def recompute_length(num_sublayers: int, num_streams: int = 4) -> int:
    """L_r*, the length of blocks that needs the least memory: argmin of n·C·⌈L/L_r⌉ + (n + 2)·C·L_r.

    Args:
        num_sublayers: L; attention and MLP count one each. In a pipeline those of a stage: a block does not cross it.
        num_streams: n.

    Returns:
        About √(n·L/(n + 2)); of lengths that need the same, the shortest, which makes least again at a time.
    """
    if isinstance(num_sublayers, bool) or not isinstance(num_sublayers, int):
        raise TypeError(f"recompute_length: num_sublayers: expected an int, got {type(num_sublayers).__name__}")
    if num_sublayers < 1:
        raise ValueError(f"recompute_length: num_sublayers: expected at least 1, got {num_sublayers}")
    check_streams("recompute_length", "num_streams", num_streams)
    n = num_streams
    return min(range(1, num_sublayers + 1), key=lambda length: n * -(-num_sublayers // length) + (n + 2) * length)


def make_recorder(recompute: int | None, h: torch.Tensor, kind: str) -> Recorder | None:
    """Return the recorder of a ResidualStream of h; None unless `recompute` is a block's length.

    Raises ValueError, TypeError, RuntimeError where it cannot be.
    """
    if recompute is None:
        return None
    if isinstance(recompute, bool) or not isinstance(recompute, int):
        raise TypeError(f"ResidualStream: recompute: expected None or an int, got {type(recompute).__name__}")
    if recompute < 1:
        raise ValueError(f"ResidualStream: recompute: expected at least 1 sublayer a block, got {recompute}")
    if kind != "mhc":
        raise ValueError(f"ResidualStream: recompute: expected None for connections of kind {kind!r}, got {recompute}")
    if torch.compiler.is_compiling():
        raise RuntimeError(COMPILED)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("ResidualStream: recompute: expected None within torch.func, whose graphs take no hooks")
    if not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"):
        raise RuntimeError(
            f"ResidualStream: recompute: expected a PyTorch that shows saved tensors, got {torch.__version__}"
        )
    if type(h) not in PLAIN:
        raise TypeError(f"ResidualStream: h: expected a plain torch.Tensor for recompute, got {type(h).__name__}")
    return Recorder(recompute)


class Recorder:
    """Follows one stream: begins its blocks, and registers handles for what is not to be kept.

    A method is called after what it is named for has happened.

    Args:
        length: L_r, at least 1.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._workspace = Workspace()
        self._block: Block | None = None  # none where nothing has a gradient
        self._sublayer = 0  # of the block, at the stream as it stands
        self._x: Watched | None = None
        self._inputs: dict[str, Watched] = {}  # of the layer, by their names in blocks
        self._since = 0  # sequence number of the first node after the last read or write

    def read(
        self,
        connection: HyperConnection,
        x: torch.Tensor,
        result: torch.Tensor | Quantized,
        given_pre: torch.Tensor | None = None,
    ) -> None:
        """`connection` read x, to make a layer's input, the `result`; with `given_pre` in the delayed form."""
        if torch.compiler.is_compiling():
            raise RuntimeError(COMPILED)
        layer_input = result.layer_input if isinstance(result, Quantized) else result
        if layer_input is not None and layer_input.requires_grad:
            reading, own_pre = _own_pre_of(layer_input, self._since)
            if self._block is None or self._sublayer == self._length or not self._stands_at(x):
                self._block, self._sublayer = Block(Watched(x), self._workspace), 0
            weight: Any = connection.rms_norm_weight
            # A sharded weight is so again by now, and still so when its layer asks for the input.
            is_plain = weight is None or type(weight) in PLAIN
            can_be_made = is_plain and _is_read_from(layer_input, x, given_pre, weight)
            self._x, self._inputs = Watched(x), {}
            self._register(layer_input)
            if can_be_made:
                self._inputs = {"u": Watched(layer_input)}
                self._block.h_pre[self._sublayer] = Watched(own_pre if given_pre is None else given_pre)
                if reading == EXPANDS:
                    self._block.makers[self._sublayer] = _of_equal_streams
                if connection.rms_norm_eps is not None:  # C numbers, as they are now
                    norm = {"weight": weight.detach().clone(), "eps": connection.rms_norm_eps}
                    self._block.makers[self._sublayer] = partial(launch.aggregate_norm, **norm)
                    if isinstance(result, Quantized):
                        self._inputs |= {"values": Watched(result.values), "scales": Watched(result.scales)}
                        self._block.quantizers[self._sublayer] = partial(
                            launch.aggregate_quantized, power_of_two=connection.ue8m0, **norm
                        )
        else:
            self._block = self._x = None
        self._since = sequence_number()

    def written(self, layer_output: torch.Tensor) -> None:
        """The layer of the last read has run."""
        self._register(layer_output, **self._inputs)
        self._inputs = {}
        self._since = sequence_number()

    def merged(self, x: torch.Tensor, mixed: Iterable[torch.Tensor], x_next: torch.Tensor) -> None:
        """A layer's output, h_post and h_res, if there is one, were `mixed` with x, which made x_next."""
        mixed = tuple(mixed)
        if self._block is None or not self._stands_at(x) or not _is_merged_from(x_next, x, *mixed):
            self._block = self._x = None
            return
        self._register(x_next)
        self._block.written.append(tuple(map(Watched, mixed)))
        self._sublayer += 1
        self._x = Watched(x_next)
        if self._sublayer < self._length:  # otherwise x_next starts a block, and stays
            self._register(x_next)

    def reduced(self, result: torch.Tensor) -> None:
        """The stream was reduced to `result`."""
        self._register(result)

    def _stands_at(self, x: torch.Tensor) -> bool:
        """Whether x is the stream that was last seen, unchanged."""
        known = self._x
        return known is not None and known.is_unchanged and known.tensor.data_ptr() == x.data_ptr()

    def _register(self, result: torch.Tensor, **layer_inputs: Watched) -> None:
        """Handles for the stream, unless it starts the block, and for the layer's inputs, where the graph of `result`
        saved them since the last read or write.
        """
        if self._block is None:
            return
        candidates = [*[("x", self._x)] * (self._sublayer > 0), *layer_inputs.items()]
        wanted = {one.storage: (name, one) for name, one in candidates if one and one.is_unchanged and one.storage}
        if not wanted:
            return
        for node in nodes([result], self._since):
            for saved in filter(is_untouched, saved_by(node)):
                name, original = wanted.get(saved.data.untyped_storage().data_ptr(), ("", None))
                if original is not None and saved.data.dtype == original.tensor.dtype:
                    self._block.forget(saved, (name, self._sublayer), original.tensor)


def _own_pre_of(layer_input: torch.Tensor, since: int) -> tuple[str, torch.Tensor]:
    """Return the node of the operator that read, and the h_pre of the sublayer, which it saved."""
    for node in nodes([layer_input], since):
        if len(getattr(node, "_raw_saved_tensors", ())) == READS.get(node.name()):
            h_pre = node._raw_saved_tensors[-2]
            if not is_untouched(h_pre):
                raise RuntimeError(
                    "ResidualStream.read: recompute: expected no saved-tensor hooks around the stream, got some; an "
                    "activation checkpoint, or offloading, belongs around the layer alone"
                )
            tensor: torch.Tensor = h_pre.data
            return node.name(), tensor
    raise RuntimeError(COMPILED)


def _maker(result: torch.Tensor) -> Any:
    """Return the node that a result comes from unchanged, not counting a module's backward hooks; else None."""
    node, place = result.grad_fn, result.output_nr
    while node is not None and node.name() == HOOKED:
        node, place = node.next_functions[place]
    return None if node is None or result._version else node


def _is_merged_from(x_next: torch.Tensor, *mixed: torch.Tensor) -> bool:
    """Whether an operator made x_next of these: hooks of a module can replace what it takes, and what it gives."""
    node = _maker(x_next)
    return node is not None and node.name() in MERGES and _saved_these(node._raw_saved_tensors, mixed)


def _is_read_from(layer_input: torch.Tensor, x: torch.Tensor, *given: torch.Tensor | None) -> bool:
    """Whether an operator made the layer's input of the stream x and what was given: an h_pre, and a norm's weight."""
    node: Any = _maker(layer_input)
    if node is None or node.name() not in READS:
        return False
    saved = node._raw_saved_tensors
    # Only `pre` is given the stream, the others make it.
    has_x = _saved_these(saved, (x,)) if node.name() in (*PRE, IDENTITY_PRE) else _maker(x) is node
    places = GIVEN[node.name()]
    return has_x and _saved_these([saved[place] for place in places], given[: len(places)])


def _saved_these(saved: Iterable[Any], tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether the first of what a node saved are these tensors, lying where they do."""
    return all(
        one.data is None if tensor is None else is_untouched(one) and one.data.data_ptr() == tensor.data_ptr()
        for one, tensor in zip(saved, tensors, strict=False)
    )


def _of_equal_streams(x: torch.Tensor, h_pre: torch.Tensor) -> torch.Tensor:
    """Return the first layer's input as `expand_pre` makes it, from one stream and the sum of h_pre."""
    return launch.aggregate(x[:, :1].contiguous(), launch.total_h_pre(h_pre))
