"""Detection of the convention that foreign code follows, from what it computes.

    probe = mhc.convert.probe(num_streams=4, hidden_size=64)
    mhc.convert.orientation(foreign, probe)                    # a Convention
    mhc.convert.orientation(foreign, probe, expected="deepseek")   # the same, or a ConversionError

`foreign` takes the probe and returns the next stream x_next. It is given the residual logits as n·n numbers and makes a
matrix of them with the Sinkhorn of the code in question, which that code then mixes the streams with. A transposed
matrix changes no shape; the probe's logits are far from symmetric, and few iterations leave what was normalised first
far from 1, so that each convention gives another stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import torch

from .. import reference
from ..arguments import check_streams
from ..errors import ConversionError
from .conventions import COLUMNS, CONVENTIONS, IN_OUT, INNERMOST, OUT_IN, OUTERMOST, ROWS, Convention, known_as

TOLERANCE = 2e-2  # what bfloat16, in streams and coefficients, explains
CLEARANCE = 4  # the next convention is this many times as far off, and no closer than what float32 explains
FLOAT32 = 1e-3
EPSILONS = (0.0, 1e-6)  # of Sinkhorn, in the field


@dataclass(frozen=True)
class Probe:
    """Inputs on which conventions differ. float32, on the CPU.

    Attributes:
        x: [tokens, n, C], the stream; `x.mT` is it with streams innermost.
        layer_output: [tokens, C].
        bias: [M], the biases pre n, post n, res n·n. With phi = 0 they are the logits of every token, so that a
            whole connection can be probed: give it these as they are, in its own parameter.
        h_post: [n], 2σ of the post biases.
        sinkhorn_iters: number of iterations for the foreign code.
    """

    x: torch.Tensor
    layer_output: torch.Tensor
    bias: torch.Tensor
    sinkhorn_iters: int
    h_post: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        n = self.num_streams
        object.__setattr__(self, "h_post", 2 * torch.sigmoid(self.bias[n : 2 * n]))

    @property
    def num_streams(self) -> int:
        """n."""
        return self.x.shape[-2]

    @property
    def logits(self) -> torch.Tensor:
        """[n, n], the res biases row by row, whatever rows are in the foreign code."""
        return self.bias[2 * self.num_streams :].view(self.num_streams, self.num_streams)


def probe(num_streams: int = 4, hidden_size: int = 64, sinkhorn_iters: int = 2, num_tokens: int = 8) -> Probe:
    """Return the inputs for `orientation`; the same at every call.

    Args:
        num_streams: n.
        hidden_size: C, at least 1 and not n, or the place of the streams cannot be told by shape.
        sinkhorn_iters: the foreign code's iterations. The fewer the clearer; 20, where it has no choice, need float32.
        num_tokens: T, at least 1; a batch of one sequence is `x[None]`.
    """
    check_streams("probe", "num_streams", num_streams)
    for name, value in (("hidden_size", hidden_size), ("sinkhorn_iters", sinkhorn_iters), ("num_tokens", num_tokens)):
        if type(value) is not int or value < 1:
            raise ValueError(f"probe: {name}: expected an int of at least 1, got {value!r}")
    if hidden_size == num_streams:
        raise ValueError(f"probe: hidden_size: expected another number than num_streams, got {hidden_size}")
    n, generator = num_streams, torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, n, hidden_size, generator=generator)
    layer_output = torch.randn(num_tokens, hidden_size, generator=generator)
    gates = torch.randn(2 * n, generator=generator)
    # Nearly triangular: as far from symmetric as it gets, and what was normalised first converges slowly.
    above, below = torch.ones(n, n).triu(1), torch.ones(n, n).tril(-1)
    res = above - 11 * below + torch.rand(n, n, generator=torch.Generator().manual_seed(0))
    return Probe(x, layer_output, torch.cat((gates, res.flatten())), sinkhorn_iters)


def orientation(foreign: Callable[[Probe], torch.Tensor], probe: Probe, expected: str | None = None) -> Convention:
    """Detect the convention of a foreign implementation's streams and residual mapping.

    Args:
        foreign: probe -> x_next, any dtype: [tokens, n, C] or, for streams innermost, [tokens, C, n]; packed
            [tokens, n·C], and with leading dimensions of 1, as well. x_next[j] = Σ_i H_res[j, i] · x[i] +
            h_post[j] · layer_output.
        probe: the result of `probe()`.
        expected: a name in `CONVENTIONS`.

    Returns:
        The convention. `.connection` is the class here that computes the same; res "[in, out]" means that res rows
        are to be swapped (`swapped_rows`).

    Raises:
        ConversionError: it is none of the conventions, or cannot be told from another, or is not what was expected.
        ValueError: x_next has another number of elements, or `expected` is no name.
    """
    if expected is not None and expected not in CONVENTIONS:
        raise ValueError(f"orientation: expected: expected one of {', '.join(CONVENTIONS)}, got {expected!r}")
    x_next = foreign(probe)
    if not isinstance(x_next, torch.Tensor):
        raise TypeError(f"orientation: foreign: expected it to return a torch.Tensor, got {type(x_next).__name__}")
    if x_next.numel() != probe.x.numel():
        raise ValueError(
            f"orientation: foreign: expected x_next of {probe.x.numel()} elements, as x {list(probe.x.shape)}, "
            f"got {list(x_next.shape)}"
        )
    errors = {convention: _error(x_next, convention, probe) for convention in _candidates(x_next, probe)}
    best, second = sorted(errors, key=errors.__getitem__)[:2]
    if not errors[best] <= TOLERANCE:
        distances = "; ".join(f"{convention}: {error:.2g}" for convention, error in errors.items())
        raise ConversionError(
            f"orientation: foreign: expected x_next of one convention to {TOLERANCE}, got relative errors {distances}"
        )
    if errors[second] < max(CLEARANCE * errors[best], FLOAT32):
        raise ConversionError(
            f"orientation: foreign: expected conventions that the probe tells apart, got two: {best} "
            f"({errors[best]:.2g}) and {second} ({errors[second]:.2g}); use fewer iterations or more streams"
        )
    if expected is not None and CONVENTIONS[expected] != best:
        raise ConversionError(
            f"orientation: foreign: expected {expected} ({CONVENTIONS[expected]}), got {known_as(best)} ({best})"
            + (": H_res is transposed" if best.res != CONVENTIONS[expected].res else "")
        )
    return best


def _candidates(x_next: torch.Tensor, probe: Probe) -> list[Convention]:
    """Return every convention whose x_next can have this shape."""
    shapes = {OUTERMOST: probe.x.shape[-2:], INNERMOST: probe.x.mT.shape[-2:]}
    fitting = [streams for streams, shape in shapes.items() if x_next.shape[-2:] == shape]
    return [Convention(*parts) for parts in product(fitting or shapes, (OUT_IN, IN_OUT), (ROWS, COLUMNS))]


def _error(x_next: torch.Tensor, convention: Convention, probe: Probe) -> float:
    """Return x_next's error against the convention's, relative to what mixing contributes; the better of two eps."""
    got = x_next.detach().to("cpu", torch.float64)
    errors = []
    for eps in EPSILONS:
        exact, mixed = _sublayer(convention, probe, eps)
        exact = exact.mT if convention.streams == INNERMOST else exact
        errors.append(float((got.reshape(exact.shape) - exact).norm() / mixed.norm()))
    return min(error if error == error else float("inf") for error in errors)


def _sublayer(convention: Convention, probe: Probe, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x_next and its mixed part [tokens, n, C] in float64, streams outermost."""
    logits = probe.logits.double()
    h_res = _sinkhorn(logits if convention.res == OUT_IN else logits.T, convention.last, probe.sinkhorn_iters, eps)
    mixed = h_res @ probe.x.double()
    return mixed + probe.h_post.double().unsqueeze(-1) * probe.layer_output.double().unsqueeze(-2), mixed


def _sinkhorn(logits: torch.Tensor, last: str, iters: int, eps: float) -> torch.Tensor:
    """H_res [out, in] of logits [out, in]; with last "rows" it is `mhc.sinkhorn`."""
    logits = logits if last == ROWS else logits.T
    h_res = torch.from_numpy(reference.sinkhorn(logits.numpy(), iters, eps))
    return h_res if last == ROWS else h_res.T
