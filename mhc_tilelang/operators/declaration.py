"""An operator from one declaration: its out-variant, backward, fakes, autograd and DTensor placements are derived.

    post = Declaration("post", "x layer_output h_post h_res", "x_next", forward, backward)

What a tensor's name says holds for every operator: its dimensions behind those of the tokens, whether it has the
stream's dtype or is float32, and how it lies on a device mesh. `NAME_next` is like NAME, a gradient g_NAME too.

    X(inputs, constants) -> results, kept                        allocates, then `forward` writes
    X_out(inputs, constants, *, results)                         `forward` writes into buffers; no gradient
    X_backward(g_results, inputs, saved, constants, needs_inputs) -> a gradient an input, empty unless needed

`forward(*inputs, *constants, out=buffers)` and `backward(g, inputs, saved, constants, needs)` launch; their tensors are
contiguous, with all leading dimensions flattened to tokens.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from ..kernels.plans import num_scales
from . import prepared, sharding
from .library import (
    check_buffers,
    define,
    define_backward,
    define_out,
    differentiate,
    flat,
)

# Dimensions behind those of the tokens. Streams have the stream's dtype, a layer_output its own; mappings are float32.
# A layer's input in float8 has a scale for every group of channels, G of them, and no gradient.
STREAMS = {"x": "nC", "x_next": "nC", "h": "C", "layer_input": "C", "layer_output": "C", "output": "C"}
MAPPINGS = {"h_pre": "n", "h_post": "n", "h_res": "nn", "logits": "nn"}
MAPPINGS |= {f"{name}_next": dimensions for name, dimensions in MAPPINGS.items()}
QUANTIZED = {"values": "C", "scales": "G"}
DIMENSIONS = STREAMS | MAPPINGS | QUANTIZED
PARAMETERS = ("phi", "alpha", "bias", "rms_norm_weight")
PROJECTED = "projected"  # [rows of phi + 1, T], which a projection keeps for its backward

Tensors = tuple[torch.Tensor, ...]
Optionals = Sequence[torch.Tensor | None]


class Declaration:
    """An operator X with X_out and, where it has a backward, X_backward, registered; call it as X.

    Args:
        name: X.
        inputs: names of its tensors, "?" behind those that may be None.
        results: names of what a caller gets. One with "?" is a result only where the input h_pre is given.
        forward: writes the results into `out`, and returns a tuple of what is kept, or None.
        backward: gives a flat gradient an input, None for those that are not needed or zero.
        constants: the schema of what follows the tensors.
        kept: names of what is returned behind the results, for the backward alone.
        saved: names of the results and of those kept that the backward takes.
        aligned: names of the results whose buffers a GPU writes in whole vectors, as a function of the inputs.
        shortcut: another operator's gradients where those of some results are all there is; None for "as ever".
    """

    def __init__(
        self,
        name: str,
        inputs: str,
        results: str,
        forward: Callable[..., Tensors | None],
        backward: Callable[..., Optionals] | None = None,
        *,
        constants: str = "",
        kept: str = "",
        saved: str = "",
        aligned: Callable[[Any], str] = lambda _: "",
        shortcut: Callable[[Any, Any, Any], Optionals | None] | None = None,
    ) -> None:
        self.name, self.aligned, self.shortcut = name, aligned, shortcut
        self._forward, self._backward = forward, backward
        declared = inputs.split()
        self.inputs = tuple(one.removesuffix("?") for one in declared)
        self.results = tuple(one.removesuffix("?") for one in results.split())
        self.optional = next((one[:-1] for one in results.split() if one.endswith("?")), None)
        self.kept = tuple(kept.split())
        self.saved = tuple(saved.split())
        self._named = _tuple_of(self.inputs)
        self._named_results = _tuple_of(self.results)
        self._named_saved = _tuple_of(self.saved)
        self._saved_places = [(*self.results, *self.kept).index(one) for one in self.saved]
        # The h_pre of the delayed form says whether the optional result is one.
        self._h_pre = self.inputs.index("h_pre") if self.optional else None

        taken = ", ".join(f"Tensor{'?' if one.endswith('?') else ''} {one.removesuffix('?')}" for one in declared)
        given = f"{taken}, {constants}" if constants else taken
        returned = (*self.results, *self.kept)
        self._single = len(returned) == 1
        self._one_buffer = len(self.results) == 1
        self.operator = define(f"{name}({given}) -> {_signature(returned)}", self._run, self._fake)
        buffers = ", ".join(
            f"Tensor({chr(97 + k)}!){'? ' + one + '=None' if one == self.optional else ' ' + self._buffer(one)}"
            for k, one in enumerate(self.results)
        )
        self.operator_out = define_out(f"{name}_out({given}, *, {buffers}) -> ()", self._run_out)
        sharding.RESULTS[name] = "".join("d" if one == PROJECTED else "t" for one in returned)
        if backward is not None:
            gradients = ", ".join(f"Tensor? g_{one}" for one in self.results)
            saves = "".join(f", Tensor {one}" for one in self.saved)
            needs = ", ".join(f"bool needs_{one}" for one in self.inputs)
            given = f"{gradients}, {taken}{saves}{', ' + constants if constants else ''}, {needs}"
            self.operator_backward = define_backward(
                f"{name}_backward({given}) -> {_signature([f'g_{one}' for one in self.inputs])}",
                self._run_backward,
                self._fake_backward,
            )
            sharding.RESULTS[f"{name}_backward"] = "".join("g" if one in PARAMETERS else "t" for one in self.inputs)
            self.function = differentiate(self.operator, self._differentiate, self._setup_context)

    def __call__(self, *arguments: Any) -> Any:
        """X, of one result, as another's backward has it: nothing is left to check."""
        inputs, constants = arguments[: len(self.inputs)], arguments[len(self.inputs) :]
        ready = None if torch.is_grad_enabled() else self.prepared(constants, inputs)
        return self.operator(*arguments) if ready is None else ready(*inputs)[0]

    def prepared(self, constants: tuple, inputs: Optionals) -> prepared.Prepared | None:
        """Return the prepared call for X of these, None if no operator like it has run."""
        return prepared.find(prepared.describe((self.name, constants), inputs) if prepared.possible() else None)

    def gradients(self, g_results: Optionals, taken: Optionals, constants: tuple, needs: tuple[bool, ...]) -> Optionals:
        """X_backward of what it takes, inputs and saved: a gradient an input, None unless needed."""
        tensors, ready = (*g_results, *taken), None
        if not torch.is_grad_enabled() and prepared.possible():
            ready = prepared.find(prepared.describe((self.name, constants, needs), tensors))
        if ready is not None:
            found: Optionals = ready(*tensors)
            return found
        given = self.operator_backward(*tensors, *constants, *needs)
        given = given if isinstance(given, tuple) else (given,)
        return [gradient if need else None for gradient, need in zip(given, needs, strict=True)]

    def public(self, inputs: Optionals) -> tuple[str, ...]:
        """The names of the results for these inputs."""
        return self.results[:-1] if self._h_pre is not None and inputs[self._h_pre] is None else self.results

    def shape(self, name: str, num_streams: int, hidden_size: int) -> tuple[int, ...]:
        """A result's dimensions behind those of the tokens."""
        sizes = {"n": num_streams, "C": hidden_size, "G": num_scales(hidden_size)}
        return tuple(sizes[dimension] for dimension in DIMENSIONS[name])

    def dtype(self, name: str, stream: torch.dtype) -> torch.dtype:
        """A result's dtype beside a stream of another."""
        return torch.float8_e4m3fn if name == "values" else stream if name in STREAMS else torch.float32

    def write(self, inputs: Optionals, constants: tuple, buffers: Sequence[torch.Tensor]) -> None:
        """X_out into the buffers of `public`, in order."""
        named = {self._buffer(one): buffer for one, buffer in zip(self.results, buffers, strict=False)}
        self.operator_out(*inputs, *constants, **named)

    def _buffer(self, name: str) -> str:
        """A result's name among the arguments of X_out."""
        return "out" if self._one_buffer else name

    def _allocate(self, names: Sequence[str], inputs: Optionals, constants: tuple) -> list[torch.Tensor]:
        first: Any = inputs[0]
        *leading, last = first.shape
        if self.inputs[0] == "h":  # how many streams is not in it
            num_streams = inputs[1].shape[1] // last if len(inputs) > 1 else constants[0]  # type: ignore[union-attr]
        else:
            num_streams = leading.pop()
        allocated = []
        for name in names:
            if name == PROJECTED:
                rows = inputs[self.inputs.index("phi")].shape[0]  # type: ignore[union-attr]
                shape: tuple[int, ...] = (rows + 1, prod(leading))
            else:
                shape = (*leading, *self.shape(name, num_streams, last))
            allocated.append(first.new_empty(shape, dtype=self.dtype(name, first.dtype)))
        return allocated

    def _fake(self, *arguments: Any) -> Any:
        count = len(self.inputs)
        results = self._allocate((*self.results, *self.kept), arguments[:count], arguments[count:])
        return results[0] if self._single else tuple(results)

    def _run(self, *arguments: Any) -> Any:
        inputs, constants = arguments[: len(self.inputs)], arguments[len(self.inputs) :]
        results = prepared.run((self.name, constants), inputs, self.compute, constants)
        return results[0] if self._single else results

    def compute(self, constants: tuple, *inputs: Any) -> Tensors:
        """Compute the results of X, as a tuple, from tensors below autograd."""
        results = self._allocate(self.results, inputs, constants)
        kept = self._write(inputs, constants, results)
        leading = inputs[0].shape[: inputs[0].ndim - len(DIMENSIONS[self.inputs[0]])]
        named = zip(self.kept, kept, strict=True)
        return (*results, *(_unflat(t, (*leading, *t.shape[1:])) if one in DIMENSIONS else t for one, t in named))

    def fill(self, constants: tuple, *tensors: Any) -> Tensors:
        """Write the results of inputs into the buffers of `public`, which come behind them."""
        inputs, buffers = tensors[: len(self.inputs)], tensors[len(self.inputs) :]
        missing = self._allocate(self.results[len(buffers) :], inputs, constants)
        self._write(inputs, constants, (*buffers, *missing))
        return ()

    def _run_out(self, *arguments: Any, **buffers: torch.Tensor | None) -> None:
        count = len(self.inputs)
        inputs, constants = arguments[:count], arguments[count:]
        named = {one: buffers.get(self._buffer(one)) for one in self.results}
        shown = {"out" if self._one_buffer else f"out[{k}] ({one})": named[one] for k, one in enumerate(self.results)}
        vectors = self.aligned(self._named(*inputs)).split()
        whole = tuple(key for key, one in zip(shown, self.results, strict=True) if one in vectors)
        given = {key: buffer for key, buffer in shown.items() if buffer is not None}
        operands = {one: t for one, t in zip(self.inputs, inputs, strict=True) if t is not None}
        check_buffers(self.name, given, operands, tuple(key for key in whole if key in given))
        self.fill(constants, *inputs, *given.values())

    def _write(self, inputs: Optionals, constants: tuple, results: Optionals) -> Tensors:
        out = flatten(self.results, results)
        return self._forward(*flatten(self.inputs, inputs), *constants, out=out[0] if len(out) == 1 else out) or ()

    def _split(self, arguments: tuple) -> tuple[tuple, tuple, tuple]:
        """Arguments of X_backward: tensors, which are gradients of the results, inputs, saved; constants; needs."""
        needs = len(arguments) - len(self.inputs)
        tensors = len(self.results) + len(self.inputs) + len(self.saved)
        return arguments[:tensors], arguments[tensors:needs], arguments[needs:]

    def _fake_backward(self, *arguments: Any) -> Any:
        tensors, _, needs = self._split(arguments)
        inputs = tensors[len(self.results) :]
        found = tuple(
            _absent(inputs[0] if tensor is None else tensor) if not need else tensor.new_empty(tensor.shape)
            for tensor, need in zip(inputs, needs, strict=False)
        )
        return found if len(found) > 1 else found[0]

    def _run_backward(self, *arguments: Any) -> Any:
        tensors, constants, needs = self._split(arguments)
        inputs, what = tensors[len(self.results) :], (self.name, constants, needs)
        gradients = prepared.run(what, tensors, self._compute_backward, (constants, needs))
        found = tuple(
            _absent(inputs[0] if tensor is None else tensor) if gradient is None else gradient
            for gradient, tensor in zip(gradients, inputs, strict=False)
        )
        return found if len(found) > 1 else found[0]

    def _compute_backward(self, constants_and_needs: tuple[tuple, tuple], *tensors: Any) -> list[torch.Tensor | None]:
        """X_backward, None for what is not needed, from tensors below autograd."""
        assert self._backward is not None
        constants, needs = constants_and_needs
        first, last = len(self.results), len(self.results) + len(self.inputs)
        inputs = tensors[first:last]
        found = self._backward(
            self._named_results(*flatten(self.results, tensors[:first])),
            self._named(*flatten(self.inputs, inputs)),
            self._named_saved(*flatten(self.saved, tensors[last:])),
            constants,
            self._named(*needs),
        )
        shaped: list[torch.Tensor | None] = []
        for gradient, tensor, need in zip(found, inputs, needs, strict=True):
            if not need:
                shaped.append(None)
            elif gradient is None:
                shaped.append(tensor.new_zeros(tensor.shape))
            else:
                shaped.append(_unflat(gradient, tensor.shape))
        return shaped

    def _setup_context(self, ctx: Any, inputs: Optionals, output: Any) -> None:
        returned = output if isinstance(output, tuple) else (output,)
        quantized = [result for result, one in zip(returned, self.results, strict=False) if one in QUANTIZED]
        ctx.mark_non_differentiable(*quantized, *returned[len(self.public(inputs)) :])
        ctx.save_for_backward(*inputs, *[returned[place] for place in self._saved_places])

    def _differentiate(self, ctx: Any, *g_returned: torch.Tensor | None) -> Optionals:
        count = len(self.inputs)
        gradients, needs = g_returned[: len(self.results)], ctx.needs_input_grad[1:]
        if all(g is None for g in gradients):
            return [None] * count
        saved = ctx.saved_tensors  # once: to unpack them again may recompute them again
        if self.shortcut is not None:
            inputs = self._named(*saved[:count])
            found = self.shortcut(self._named_results(*gradients), inputs, self._named(*needs))
            if found is not None:
                return [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
        return self.gradients(gradients, saved, ctx.constants, needs)


def flatten(names: Sequence[str], tensors: Optionals) -> list[Any]:
    """Contiguous, and leading dimensions flattened to tokens; parameters and what is projected have none."""
    return [
        None if t is None else flat(t, len(DIMENSIONS[one])) if one in DIMENSIONS else t.contiguous()
        for one, t in zip(names, tensors, strict=True)
    ]


def _tuple_of(names: Sequence[str]) -> Any:
    """A type of tuples whose items have these names."""
    return namedtuple("_Named", names)


def _signature(names: Sequence[str]) -> str:
    """The results of a schema."""
    return "Tensor" if len(names) == 1 else f"({', '.join(f'Tensor {one}' for one in names)})"


def _unflat(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A fresh tensor with its leading dimensions back, which is no view to anyone: an operator returns none."""
    return torch.ops.aten._unsafe_view(tensor, shape)


def _absent(like: torch.Tensor) -> torch.Tensor:
    """The gradient that is not needed: a schema has no optional results."""
    return like.new_empty(0)
