"""The small GPT of `study train`, on bytes. Attention and SwiGLU are those of `bench overhead`'s layer.

`examples/gpt.py` is a model of the same shape for readers, who import `mhc_tilelang` only and change it as they
like; results that were stored must not change with it.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import MHCError
from ...modules.connections import connection
from ...modules.residual_stream import ResidualStream
from ...spec import MHCSpec
from ..overhead.layers import Attention, FeedForward
from ..sizes import LayerSizes

WARMUP = 20  # steps, of the learning rate


@dataclass(frozen=True)
class Sizes:
    """A model and its training."""

    width: int
    depth: int  # layers, of two sublayers each
    heads: int
    context: int
    batch: int
    steps: int
    rate: float


class GPT(nn.Module):
    """Bytes [B, S] -> logits [B, S, 256], under a connection of any kind; n = 4 streams.

    Of "identity" the streams are mHC's, and the spec is Hy4's.
    """

    def __init__(self, kind: str, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        layer = LayerSizes(width, sizes.heads, 8 * width // 3, width // sizes.heads)
        self.kind, self.spec = kind, MHCSpec.deepseek_v4(width)
        if kind == "identity":
            self.kind, self.spec = "mhc", MHCSpec.hy4(width)
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(sizes.context, width)
        self.layers = nn.ModuleList(make(layer) for _ in range(sizes.depth) for make in (Attention, FeedForward))
        self.norm, self.unembed = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)
        self.connections = nn.ModuleList(connection(self.kind, self.spec, i) for i in range(2 * sizes.depth))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pass the embedding through every sublayer, then take the mean of the streams."""
        stream = ResidualStream(
            self.token(tokens) + self.position.weight[: tokens.shape[1]], self.spec.num_streams, self.kind
        )
        for reader, layer in zip(self.connections, self.layers, strict=True):
            stream.write(layer(stream.read(reader)))  # type: ignore[arg-type]
        logits: torch.Tensor = self.unembed(self.norm(stream.reduce("mean")))
        return logits

    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        """AdamW; weight decay for the layers' matrices, none for connections, norms and embeddings."""
        decayed = [weight for weight in self.layers.parameters() if weight.ndim > 1]
        chosen = set(decayed)
        rest = [parameter for parameter in self.parameters() if parameter not in chosen]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, rate, (0.9, 0.95), 1e-8, 0.1)


@dataclass(frozen=True)
class Text:
    """Bytes, of which the last tenth is held out from training."""

    name: str
    training: torch.Tensor
    held_out: torch.Tensor


def read_text(path: Path | None, context: int) -> Text:
    """Return a file's bytes; by default those of the modules of Python's standard library, in the order of their names.

    Raises MHCError for a file that cannot be read or is too short.
    """
    name = path.name if path else f"the modules of Python {sysconfig.get_python_version()}'s standard library"
    paths = [path] if path else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    try:
        content = b"".join(one.read_bytes() for one in paths)
    except OSError as error:
        raise MHCError(f"study train: cannot read --text {path}: {error.strerror or error}") from error
    needed = 10 * (context + 2)
    if len(content) < needed:
        raise MHCError(f"study train: --text: expected at least {needed} bytes, got {len(content)} in {name}")
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    split = len(data) - len(data) // 10
    return Text(name, data[:split], data[split:])


def windows(data: torch.Tensor, starts: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [B, S], int64, from where each window starts."""
    window = data[starts.unsqueeze(1) + torch.arange(context + 1)].long()
    return window[:, :-1], window[:, 1:]
