"""`watch`: forward hooks on a model's connections that keep a sample of what passes, and change nothing.

A connection's outputs differ in number: with a waiting write x_next comes first, the delayed form has one more at the
end. So they are told apart by their rank: h_res [..., n, n] and x_next [..., n, C] have one dimension more than the
rest, and h_res is the last of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..modules.connections import HyperConnection, ResidualConnection, UnconstrainedHyperConnection
from ..modules.stream_state import backward_pass
from .measures import res_logits, stream_rms
from .report import Call, Finding, Report, Thresholds

WATCHED = (HyperConnection, UnconstrainedHyperConnection, ResidualConnection)


@contextmanager
def watch(
    model: nn.Module,
    every: int = 1,
    tokens: int = 64,
    warn: Thresholds | None = None,
    on_warning: Callable[[Finding], None] | None = None,
) -> Iterator[Report]:
    """Keep an eye on the connections of a model while it runs; hooks are gone when the block is left.

        with mhc.diagnostics.watch(model, every=10, warn=mhc.diagnostics.Thresholds(composite_gain=10)) as report:
            ...

    Values and gradients are what they are without it. Nothing waits for the device until rows are asked for. A step is
    a call of `model`; outside of one, where its connections are called by hand, a connection's second call begins the
    next step. Not watched: recomputations in a backward pass, code compiled by torch.compile or run by torch.func's
    transforms, replayed CUDA graphs, and a step that an exception ends.

    Args:
        model: has connections of `mhc.connection`'s kinds, which read one stream a step, on one device.
        every: watch every n-th step, beginning with the first.
        tokens: number of tokens to look at, evenly spaced over a step's.
        warn: limits to warn of: an `MHCWarning` when one is crossed, again only after a step within it.
        on_warning: called with the `Finding` in the place of that warning.

    Returns:
        The `Report`, which can be read within the block and after it.

    Raises:
        TypeError, ValueError: an argument; a step whose connections see different tokens or numbers of streams.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"watch: model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, value in (("every", every), ("tokens", tokens)):
        if type(value) is not int or value < 1:
            raise ValueError(f"watch: {name}: expected an int of at least 1, got {value!r}")
    if warn is not None and not isinstance(warn, Thresholds):
        raise TypeError(f"watch: warn: expected Thresholds or None, got {type(warn).__name__}")
    if on_warning is not None and warn is None:
        raise ValueError("watch: on_warning: expected with warn, got it alone")
    connections: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, WATCHED)
    }
    if not connections:
        kinds = ", ".join(kind.__name__ for kind in WATCHED)
        raise ValueError(f"watch: model: expected a module with {kinds} in it, got {type(model).__name__} without")
    report = Report(warn, on_warning)
    watcher = _Watcher(report, every, tokens, connections)
    # First of all hooks, since FSDP's shard the parameters again.
    handles: list[Any] = [module.register_forward_hook(watcher.called, prepend=True) for module in connections]
    handles += [model.register_forward_pre_hook(watcher.begin), model.register_forward_hook(watcher.end)]
    try:
        yield report
    finally:
        for handle in handles:
            handle.remove()
    watcher.end_step()
    report.wait()


class _Watcher:
    """The hooks, and the step that is under way."""

    def __init__(self, report: Report, every: int, tokens: int, names: dict[nn.Module, str]) -> None:
        self._report, self._every, self._tokens, self._names = report, every, tokens, names
        self._step = 0
        self._inside = False  # of a call of the model
        self._seen: set[nn.Module] = set()
        self._calls: list[Call] = []

    def begin(self, *_: Any) -> None:
        """Begin a step, before a call of the model."""
        if not _runs_forward():
            return
        if self._inside:  # the call before ended with an exception
            self._calls.clear()
            self._inside = False
        self.end_step()
        self._inside = True

    def end(self, *_: Any) -> None:
        """End the step, after a call of the model."""
        if _runs_forward():
            self._inside = False
            self.end_step()

    def end_step(self) -> None:
        """Hand the step's calls to the report, if there are any."""
        calls, self._calls = self._calls, []
        if self._seen and not self._inside:
            if calls:
                with torch.no_grad():
                    self._report.add(self._step, calls)
            self._step += 1
            self._seen.clear()

    def called(self, module: nn.Module, inputs: tuple[Any, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        """Record a call of a connection, after it."""
        if not _runs_forward() or torch._C._functorch.is_functorch_wrapped_tensor(outputs[0]):
            return
        if not self._inside and module in self._seen:
            self.end_step()
        self._seen.add(module)
        if self._step % self._every == 0:
            with torch.no_grad():
                call = self._sample(module, inputs, outputs)
            if call.h_res.shape[0]:
                self._calls.append(call)

    def _sample(self, module: nn.Module, inputs: tuple[Any, ...], outputs: tuple[torch.Tensor, ...]) -> Call:
        name = self._names[module]
        if isinstance(module, ResidualConnection):
            x = self._some(inputs[0].unsqueeze(-2))
            return Call(name, module.kind, torch.ones_like(x[..., :1], dtype=torch.float32), stream_rms(x), None)
        assert isinstance(module, (HyperConnection, UnconstrainedHyperConnection))
        if module.spec.is_identity:
            given = outputs[0] if outputs[0].ndim > outputs[1].ndim else inputs[0]
            x = self._some(given if given.ndim > outputs[1].ndim else outputs[0])
            identity = torch.eye(x.shape[-2], device=x.device).expand(x.shape[0], -1, -1)
            return Call(name, module.kind, identity, stream_rms(x), None)
        rank = max(output.ndim for output in outputs)
        *streams, h_res = (output for output in outputs if output.ndim == rank)
        x = streams[0] if streams else inputs[0]
        x = self._some(x)
        logits = None
        if isinstance(module, HyperConnection) and not hasattr(module.phi, "full_tensor"):
            logits = res_logits(x, module.phi, module.alpha, module.bias, module.spec)
        return Call(name, module.kind, self._some(h_res).float().clone(), stream_rms(x), logits)

    def _some(self, tensor: torch.Tensor) -> torch.Tensor:
        """Evenly spaced tokens, [..., rows, columns] -> [T, rows, columns]."""
        *leading, rows, columns = tensor.shape
        flat = tensor.detach().reshape(math.prod(leading), rows, columns)
        return flat[:: max(1, flat.shape[0] // self._tokens)][: self._tokens]


def _runs_forward() -> bool:
    """Neither traced code nor a recomputation within a backward pass."""
    return backward_pass() == -1
