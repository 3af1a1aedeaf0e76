"""ResidualStream: the residual stream of a model, which its layers read and write through connections.

    stream = mhc.ResidualStream(h, num_streams=4)
    for connection, layer in zip(connections, layers):
        stream.write(layer(stream.read(connection)))
    h = stream.reduce("sum")

Reads and writes take turns. A write waits for the next read or reduction, which merges it first: between two
mHC sublayers the merge of the one and the read of the next are one operator, `post_pre`; after the last one the merge
and a reduction by a `HyperHead` are one, `post_head`. The embedding waits too: its expansion and the first read are
one, `expand_pre`. Values are those of the functions called one after the other, to the bit, but for the first read: its
mappings differ in their last bits from those of `pre` after `expand`, as they do where `x` is looked at before it.
Gradients are rounded less often than those of the functions. What waits is merged or expanded in the grad mode that it
was handed over in, and is refused if it was changed in the meantime.

Connections whose spec has delayed_pre read with the h_pre of the connection that read before, the first with stream 0;
the stream hands it on. All connections of a stream are delayed or none is.

A plain residual has no streams of its own: it keeps the tensor that it was given, reads hand it out, and a sum
returns it. So layers that work in place on their input change it there, and nowhere else.

With `recompute=L` only the stream at the start of every L sublayers is kept; the backward recomputes the others:

    stream = mhc.ResidualStream(h, recompute=mhc.recompute_length(num_sublayers))

Activation checkpointing runs a region again in the backward pass, when a stream from outside the region has
moved on. So checkpoint the layer alone, or a region that makes its own stream, or a function of x:

    stream.write(checkpoint(layer, stream.read(connection), use_reentrant=False))

    def sublayer(x):
        layer_input, *mappings = connection(x)
        return connection.merge(x, layer(layer_input), *mappings)

A recomputation that uses a stream of the forward pass is refused.

Between pipeline stages the wide stream crosses, as a plain tensor, and each stage has a stream of its own:

    return stream.hand_over()                                     the end of a stage
    stream = mhc.ResidualStream.from_streams(x)                   the beginning of the next; delayed: (x, h_pre)
"""

from __future__ import annotations

from typing import Any

import torch

from .. import launch, ops
from ..arguments import Arguments, check_streams, sizes_of
from .connections import Connection, HyperConnection, HyperHead, check_kind
from .overlap import SideStream
from .recompute import make_recorder
from .stream_arguments import check_h_pre, check_layer_output, check_reduction, check_spec, check_stream_dtype
from .stream_state import backward_pass, has_own_forward, has_own_merge, in_modes, is_delayed, modes, version


class ResidualStream:
    """The stream of one forward pass. Make one per call of the model, from the embedding.

    Args:
        h: [..., C], bfloat16, float16 or float32, which is the stream's dtype from here on.
        num_streams: n. A plain residual has one stream whatever it says.
        connection: the kind of connection that will read: "mhc", "hc" or "residual".
        recompute: sublayers a block, where the backward shall make streams and layer inputs again instead of keeping
            them; `recompute_length` has the length that needs least memory. For "mhc" only, outside of torch.compile
            and of saved-tensor hooks: compile or checkpoint the layers. See `recompute`. No value depends on it.
            Not together with overlap.
        overlap: on a GPU, merge a write as soon as it is made, on a CUDA stream of high priority beside the current
            one, so that it runs while the model does something else before the next read. True takes one stream per
            device; or give a stream. Values are the same to the bit; the next read is then a `pre` of its own instead
            of half a `post_pre`. On a CPU, which has no streams, writes wait as ever. Not under torch.compile.
        overlap_coefficients: on a GPU, and for connections with delayed_pre, make a sublayer's coefficients (Sinkhorn)
            on a CUDA stream beside the current one while its layer runs, which does not wait for them; the write does.
            True or a stream, as in overlap; values are the same to the bit. Each read needs its write. Not together
            with recompute.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, dtype or size; the message names it.
        RuntimeError: a read, write or reduction out of turn, or one by an activation checkpoint's recomputation.
    """

    def __init__(
        self,
        h: torch.Tensor,
        num_streams: int = 4,
        connection: str = "mhc",
        *,
        recompute: int | None = None,
        overlap: torch.cuda.Stream | bool = False,
        overlap_coefficients: torch.cuda.Stream | bool = False,
    ) -> None:
        (self._hidden_size,) = sizes_of("ResidualStream", "h", h, ("C",))
        check_stream_dtype("ResidualStream", "h", h)
        check_streams("ResidualStream", "num_streams", num_streams)
        check_kind("ResidualStream", "connection", connection)
        self._kind = connection
        self._num_streams = 1 if connection == "residual" else num_streams
        self._x = ops.expand(h, num_streams) if connection == "hc" else h
        self._is_expanded = connection != "mhc"  # there the first read, or look, does it
        if not self._is_expanded:
            Arguments("ResidualStream").tensor("h", h, (self._hidden_size,), batched=True)
        self._begin(recompute, overlap, overlap_coefficients)

    @classmethod
    def from_streams(
        cls,
        x: torch.Tensor,
        h_pre: torch.Tensor | None = None,
        *,
        connection: str = "mhc",
        recompute: int | None = None,
        overlap: torch.cuda.Stream | bool = False,
        overlap_coefficients: torch.cuda.Stream | bool = False,
    ) -> ResidualStream:
        """Go on with what another part of the model handed over: the beginning of a pipeline stage.

        Args:
            x: [..., n, C], bfloat16, float16 or float32; for a plain residual [..., C]. Contiguous.
            h_pre: [..., n]: with delayed_pre, what the last sublayer left for the next one. Without it, a
                delayed connection is refused; with it, any other.
            connection: as for the class.
            recompute: as for the class.
            overlap: as for the class.
            overlap_coefficients: as for the class.
        """
        function = "ResidualStream.from_streams"
        check_kind(function, "connection", connection)
        sizes = sizes_of(function, "x", x, ("C",) if connection == "residual" else ("n", "C"))
        check_stream_dtype(function, "x", x)
        if connection != "residual":
            check_streams(function, "x", sizes[0])
        if h_pre is not None:
            h_pre = check_h_pre(function, h_pre, x, connection)
        stream = cls.__new__(cls)
        stream._kind, stream._x, stream._is_expanded = connection, x, True
        stream._num_streams, stream._hidden_size = (1, *sizes)[-2:]
        stream._begin(recompute, overlap, overlap_coefficients)
        stream._delayed, stream._h_pre = h_pre is not None, h_pre
        return stream

    def _begin(
        self,
        recompute: int | None,
        overlap: torch.cuda.Stream | bool,
        overlap_coefficients: torch.cuda.Stream | bool,
    ) -> None:
        """Initialise a stream of which nothing is read or written yet."""
        for name, given in (("overlap", overlap), ("overlap_coefficients", overlap_coefficients)):
            if recompute is not None and given is not False:
                raise ValueError(f"ResidualStream: {name}: expected False beside recompute={recompute}, got {given}")
        self._recorder = make_recorder(recompute, self._x, self._kind)
        self._given = (version(self._x), *modes())  # as of the layer's output
        self._side = SideStream.of(self._x, overlap)
        self._overlaps_coefficients = overlap_coefficients is not False
        self._coefficients = SideStream.of(self._x, overlap_coefficients, "overlap_coefficients")
        self._merged_early: torch.Tensor | None = None  # on the side stream, and not waited for
        self._reader: tuple[Connection, tuple[torch.Tensor, ...]] | None = None  # and its mappings, until merged
        self._layer_output: torch.Tensor | None = None
        self._delayed: bool | None = None  # whether connections are, from the first read on
        self._h_pre: torch.Tensor | None = None  # what a delayed connection read last left for the next one
        self._written = (0, True, False)  # version of the layer's output, grad mode, inference mode
        self._backward_pass = backward_pass()

    def read(self, connection: Connection) -> Any:
        """Return the next layer's input, [..., C] in the stream's dtype, after merging a waiting write; a `Quantized`
        from a connection that is `quantized`.
        """
        self._check_turn("read", writes=False)
        self._check_connection(connection)
        self._delayed = is_delayed(connection)
        if self._coefficients is None:
            layer_input, mappings, given_pre = self._call(connection)
        else:
            with launch.coefficients_on(self._coefficients.stream):
                layer_input, mappings, given_pre = self._call(connection)
        if self._delayed:
            self._h_pre = mappings.pop()
        if self._recorder:
            self._recorder.read(connection, self._x, layer_input, *given_pre)  # type: ignore[arg-type]
        self._reader = connection, tuple(mappings)
        return layer_input

    def _call(self, connection: Connection) -> tuple[Any, list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """Return the layer's input, the mappings, and what a delayed connection aggregated with."""
        read: Any = connection  # which takes more than x where it is HyperConnection, or delayed
        if self._can_fuse(connection):
            _, layer_output, written = self._waiting_write()
            x, given_pre = self._x, self._given_pre()
            self._x, layer_input, *mappings = read(x, layer_output, *written, *given_pre)
            self._reader = self._layer_output = None
            if self._recorder:
                self._recorder.merged(x, (layer_output, *written), self._x)
        elif self._reads_embedding(connection):
            given_pre = ()
            self._x, layer_input, *mappings = read(self._embedding(), expands=True)
            self._is_expanded = True
        else:
            self._merge()
            given_pre = self._given_pre()
            layer_input, *mappings = read(self._x, *given_pre)
        return layer_input, mappings, given_pre

    def write(self, layer_output: torch.Tensor, *, overlap: bool = True) -> None:
        """Hand back what the layer made of the input that was read.

        Args:
            layer_output: [..., C] in the stream's dtype or float32; in a float32 stream bfloat16 or float16 too, as
                layers return under autocast. Read as it is, and rounded with the stream, once.
            overlap: False leaves this write to the next read, in a stream whose writes are merged beside it.
        """
        self._check_turn("write", writes=True)
        if self._coefficients is not None:
            self._coefficients.join()
        check_layer_output(layer_output, self._x, self._kind)
        self._layer_output = layer_output
        self._written = (version(layer_output), *modes())
        if self._recorder:
            self._recorder.written(layer_output)
        if self._side is not None and overlap:
            connection, mappings = self._reader  # type: ignore[misc]
            self._merged_early = self._side.run(connection.merge, self._x, layer_output, *mappings)

    def hand_over(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the streams for the model's next part, a pipeline stage: [..., n, C], for a plain residual [..., C].

        With delayed_pre a tuple: the streams, and the h_pre [..., n] that its first sublayer aggregates with.
        Merges a waiting write first. Between a read and its write there is nothing to hand over.
        """
        self._check_turn("hand_over", writes=False)
        return self.x if self._h_pre is None else (self.x, self._h_pre)

    def reduce(self, reduction: str | HyperHead = "sum") -> torch.Tensor:
        """Return the streams as one, [..., C] in the stream's dtype, after merging a waiting write.

        Args:
            reduction: "sum"; "mean", GLM-5.3's head; or a `HyperHead`. Each is computed in float32 and rounded once.
                The sum and the mean of a plain residual are x itself.

        The stream stays as it is: it can be read on, for outputs between layers.
        """
        self._check_turn("reduce", writes=False)
        check_reduction(reduction, self._kind, self._sizes())
        if isinstance(reduction, HyperHead):
            if self._can_fuse(reduction):
                _, layer_output, written = self._waiting_write()
                boundary: Any = reduction
                x = self._x
                self._x, output = boundary(x, layer_output, *written)
                self._reader = self._layer_output = None
                if self._recorder:
                    self._recorder.merged(x, (layer_output, *written), self._x)
            else:
                output = reduction(self.x)
            if self._recorder:
                self._recorder.reduced(output)
            return output
        x = self.x
        if self._kind == "residual":
            return x
        return ops.collapse(x) if reduction == "sum" else ops.collapse(x, mean=True)

    @property
    def x(self) -> torch.Tensor:
        """The stream as the last write left it: [..., n, C], for a plain residual [..., C].

        To look at; merges a waiting write, which changes no value. Between a read and its write it is what was read.
        """
        self._check_pass("x")
        self._merge()
        return self._x

    def _merge(self) -> None:
        """Expand the embedding if it waits; merge the waiting write, if there is one."""
        if not self._is_expanded:
            self._x = in_modes(self._given[1:], ops.expand, self._embedding(), self._num_streams)
            self._is_expanded = True
        if self._has_waiting_write():
            connection, layer_output, mappings = self._waiting_write()
            x = self._x
            if self._side is not None and self._merged_early is not None:
                self._x, self._merged_early = self._side.wait_for(self._merged_early), None
            else:
                self._x = in_modes(self._written[1:], connection.merge, x, layer_output, *mappings)
            self._reader = self._layer_output = None
            if self._recorder:
                self._recorder.merged(x, (layer_output, *mappings), self._x)

    def _can_fuse(self, reader: Connection | HyperHead) -> bool:
        """Whether a write waits that the reader can merge in its own operator."""
        waits = self._has_waiting_write() and self._merged_early is None
        return waits and self._written[1:] == modes() and self._is_plain(reader)

    def _is_plain(self, reader: Connection | HyperHead) -> bool:
        """Whether the merge that waits and the read are those of this package: a class of yours keeps its methods."""
        writer = self._reader[0] if self._reader else None
        return has_own_merge(writer) and has_own_forward(reader)

    def _reads_embedding(self, connection: Connection) -> bool:
        """Whether this read takes up the embedding as it waits: not one that is delayed, or has the layer's norm."""
        waits = not self._is_expanded and self._given[1:] == modes()
        if not waits or self._delayed or not has_own_forward(connection):
            return False
        return isinstance(connection, HyperConnection) and not connection.rms_norm()

    def _embedding(self) -> torch.Tensor:
        """Return the h that waits to be expanded."""
        if version(self._x) != self._given[0]:
            raise RuntimeError(
                "ResidualStream: h: expected it as it was given, got one that was changed in place since; "
                "give a clone, or change it after the first read"
            )
        return self._x

    def _given_pre(self) -> tuple[torch.Tensor, ...]:
        """Return the h_pre that a delayed connection aggregates with; nothing for others."""
        if not self._delayed:
            return ()
        return (ops.first_pre(self._x) if self._h_pre is None else self._h_pre,)

    def _has_waiting_write(self) -> bool:
        return self._reader is not None and self._layer_output is not None

    def _waiting_write(self) -> tuple[Connection, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the connection that read, the layer's output, the mappings: waiting until merged, whatever fails."""
        assert self._reader is not None
        assert self._layer_output is not None
        (connection, mappings), layer_output = self._reader, self._layer_output
        if version(layer_output) != self._written[0]:
            raise RuntimeError(
                "ResidualStream: layer_output: expected it as it was written, got one that was changed in place since; "
                "write a clone, or change it after the next read or reduce"
            )
        return connection, layer_output, mappings

    def _sizes(self) -> tuple[int, int]:
        return self._num_streams, self._hidden_size

    def _check_turn(self, call: str, *, writes: bool) -> None:
        self._check_pass(call)
        reading = self._reader is not None and self._layer_output is None
        if writes and not reading:
            raise RuntimeError(f"ResidualStream.{call}: expected read(connection) before it, got a {call}")
        if reading and not writes:
            raise RuntimeError(
                f"ResidualStream.{call}: expected write(layer_output) for the read before it, got a {call}"
            )

    def _check_pass(self, call: str) -> None:
        current = backward_pass()
        if None not in (current, self._backward_pass) and current != self._backward_pass:
            raise RuntimeError(
                f"ResidualStream.{call}: expected a stream of this pass, got one of the forward pass in an activation "
                "checkpoint's recomputation; checkpoint the layer alone, or a region that makes its own stream"
            )

    def _check_connection(self, connection: Connection) -> None:
        kind = getattr(connection, "kind", type(connection).__name__)
        if kind != self._kind:
            raise TypeError(f"ResidualStream.read: connection: expected one of kind {self._kind!r}, got {kind!r}")
        check_spec("read", "connection", connection, self._sizes())
        delayed = is_delayed(connection)
        if self._delayed not in (None, delayed):
            raise ValueError(
                f"ResidualStream.read: connection: expected a spec with delayed_pre={self._delayed}, as those before "
                f"have, got {delayed}"
            )
        if self._overlaps_coefficients and (not delayed or connection.spec.is_identity):  # type: ignore[union-attr]
            raise ValueError(
                "ResidualStream.read: connection: expected a spec with delayed_pre for overlap_coefficients, got one "
                "whose layer waits for its coefficients, or that has no Sinkhorn"
            )
        if self._recorder and not (has_own_forward(connection) and has_own_merge(connection)):
            raise TypeError(
                "ResidualStream.read: connection: expected HyperConnection's own forward and merge for recompute, got "
                f"{type(connection).__name__}"
            )
