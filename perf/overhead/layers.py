"""One transformer layer, and the four connections that it is run under.

A layer begins and ends where layers meet in a model whose stream is a `ResidualStream`: with the write of the sublayer
before it, which its first read merges, and with its own last write, which waits. So each of its two sublayers has one
boundary, which mHC's kernels run as one operator, `post_pre`; the other connections merge, then read.

The sublayers are the same objects under each connection, and the mHC connections share their parameters, so that
whatever differs in time is the connection. Parameters are random: with those that training starts from, h_res
would be close to symmetric, and a check would miss its transpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...checking import plain_torch
from ...modules.connections import Connection, HyperConnection, ResidualConnection, UnconstrainedHyperConnection
from ...spec import MHCSpec
from ..sizes import LayerSizes

RESIDUAL, HC, EAGER, KERNELS = "residual", "hc", "mhc_eager", "mhc_kernels"
KINDS = (RESIDUAL, HC, EAGER, KERNELS)
WAITING = ("layer_output", "h_post", "h_res")  # of a write that waits


class Attention(nn.Module):
    """[B, S, C] -> [B, S, C]: RMSNorm, causal attention, projection."""

    def __init__(self, sizes: LayerSizes, **factory: object) -> None:
        super().__init__()
        C, A = sizes.hidden_size, sizes.attention_width
        self.num_heads = sizes.num_heads
        self.norm = nn.RMSNorm(C, **factory)  # type: ignore[arg-type]
        self.qkv = nn.Linear(C, 3 * A, bias=False, **factory)
        self.out = nn.Linear(A, C, bias=False, **factory)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(u)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """[B, S, C] -> [B, S, C]: RMSNorm, SwiGLU."""

    def __init__(self, sizes: LayerSizes, **factory: object) -> None:
        super().__init__()
        C, width = sizes.hidden_size, sizes.ffn_width
        self.norm = nn.RMSNorm(C, **factory)  # type: ignore[arg-type]
        self.up = nn.Linear(C, 2 * width, bias=False, **factory)
        self.down = nn.Linear(width, C, bias=False, **factory)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(self.norm(u)).chunk(2, -1)
        out: torch.Tensor = self.down(F.silu(gate) * up)
        return out


class EagerConnection(HyperConnection):
    """mHC in plain torch, with the parameters of the connection it is made from."""

    def __init__(self, connection: HyperConnection) -> None:
        super().__init__(connection.spec, connection.sublayer)
        self.phi, self.alpha, self.bias = connection.phi, connection.alpha, connection.bias

    def forward(self, x: torch.Tensor, *waiting: torch.Tensor, expands: bool = False) -> tuple[torch.Tensor, ...]:
        if waiting or expands:
            raise ValueError("EagerConnection: expected the merge or the expansion before the read, got both")
        tokens, leading = x.flatten(0, -3), x.shape[:-2]
        outputs = plain_torch.pre(tokens, self.phi, self.alpha, self.bias, self.spec)
        layer_input, h_post, h_res = (output.unflatten(0, leading) for output in outputs)
        return layer_input, h_post, h_res

    @staticmethod
    def merge(
        x: torch.Tensor, layer_output: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x_next, as `HyperConnection.merge`."""
        assert h_res is not None
        tokens = (t.flatten(0, x.ndim - 3) for t in (x, layer_output, h_post, h_res))
        return plain_torch.post(*tokens).unflatten(0, x.shape[:-2])


@dataclass(frozen=True)
class Layer:
    """The sublayers under one kind of connection, with the inputs and the upstream gradients that it is run with.

    `x` is the stream, `waiting` what the sublayer before wrote: its layer_output, and mHC's and HC's h_post and h_res.
    `upstream` has the gradients of what the layer leaves. A plain residual gets the first stream of what the others
    get.
    """

    sublayers: Sequence[nn.Module]
    connections: Sequence[Connection]
    x: torch.Tensor
    waiting: tuple[torch.Tensor, ...]
    upstream: tuple[torch.Tensor, ...]

    def forward(self) -> tuple[torch.Tensor, ...]:
        """x and what waits -> x_next, and what waits then."""
        x, waiting = self.x, self.waiting
        for sublayer, connection in zip(self.sublayers, self.connections, strict=True):
            x, layer_input, *mappings = merge_and_read(connection, x, waiting)
            waiting = (sublayer(layer_input), *mappings)
        return x, *waiting

    def inference(self) -> tuple[torch.Tensor, ...]:
        """Run the forward pass without a graph."""
        with torch.no_grad():
            return self.forward()

    def training(self) -> tuple[torch.Tensor, ...]:
        """Forward and backward -> the gradients of `leaves`."""
        return torch.autograd.grad(self.forward(), list(self.leaves().values()), self.upstream)

    def leaves(self) -> dict[str, torch.Tensor]:
        """Return the tensors that training computes gradients of: the layer's inputs and every weight."""
        return {"x": self.x, **dict(zip(WAITING, self.waiting, strict=False)), **self.weights()}

    def weights(self) -> dict[str, torch.Tensor]:
        """Return every weight of the sublayers, every parameter of the connections."""
        modules = {type(sublayer).__name__: sublayer for sublayer in self.sublayers}
        modules |= {f"connection {k}": c for k, c in enumerate(self.connections) if isinstance(c, nn.Module)}
        return {f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters()}


def merge_and_read(
    connection: Connection, x: torch.Tensor, waiting: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """x_next, layer_input and the mappings, as `ResidualStream` has them: fused where the connection can."""
    if isinstance(connection, HyperConnection) and type(connection).forward is HyperConnection.forward:
        results: tuple[torch.Tensor, ...] = connection(x, *waiting)
        return results
    x = connection.merge(x, *waiting)
    return x, *connection(x)


def make_layers(
    sizes: LayerSizes, num_tokens: int, sequence: int, num_streams: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Layer]:
    """Return the layer under each of `KINDS`."""
    generator = torch.Generator(device).manual_seed(0)
    spec = MHCSpec.deepseek_v4(sizes.hidden_size, num_streams=num_streams)
    factory = {"dtype": dtype, "device": device}
    sublayers = (Attention(sizes, **factory), FeedForward(sizes, **factory))
    kernels = [HyperConnection(spec, k, device) for k in range(2)]
    connections: dict[str, Sequence[Connection]] = {
        RESIDUAL: [ResidualConnection() for _ in range(2)],
        HC: [UnconstrainedHyperConnection(spec, k, device) for k in range(2)],
        EAGER: [EagerConnection(connection) for connection in kernels],
        KERNELS: kernels,
    }
    for module in (*sublayers, *kernels, *connections[HC]):
        randomize(module, generator)  # type: ignore[arg-type]
    leading, n = (num_tokens // sequence, sequence), num_streams

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*leading, *shape, generator=generator, dtype=dtype, device=device)

    def mapping(scale: float, *shape: int) -> torch.Tensor:
        return scale * torch.rand(*leading, *shape, generator=generator, device=device)

    wide, narrow = (n, sizes.hidden_size), (sizes.hidden_size,)
    taken: tuple[torch.Tensor, ...] = (normal(*wide), normal(*narrow), mapping(2.0, n), mapping(2.0 / n, n, n))
    of_mappings = (normal(*shape, dtype=torch.float32) for shape in ((n,), (n, n)))
    upstream: tuple[torch.Tensor, ...] = (normal(*wide), normal(*narrow), *of_mappings)

    def layer(kind: str) -> Layer:
        own, gradients = taken, upstream
        if kind == RESIDUAL:
            own, gradients = ((tensors[0][..., 0, :].contiguous(), tensors[1]) for tensors in (own, gradients))
        x, *waiting = (tensor.detach().requires_grad_() for tensor in own)
        return Layer(sublayers, connections[kind], x, tuple(waiting), gradients)

    return {kind: layer(kind) for kind in KINDS}


def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Matrices that keep their input's size, alpha 1, normal biases; norms stay as they are."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            elif name == "bias":
                parameter.normal_(generator=generator)
            elif name == "alpha":
                parameter.fill_(1.0)
