"""The sizes of one transformer layer, and those of the models that mHC was published with. Imports no torch.

A layer here is a plain one of the model's width, so that its work is known and runs anywhere:

    attention   causal, every head with keys and values of its own; the models compress them (MLA), V4 also
                attends to a part of a long sequence only
    FFN         SwiGLU, dense, as wide as all experts that a token visits together; no routing, no communication

Sources: the paper's table of models for 3b, 9b and 27b, whose experts are 6 routed and 2 shared; the published
configurations for V4, 6 routed and 1 shared, whose 512-wide heads come of low-rank projections and share one key:
heads of 128 with full projections come closest in parameters. With one embedding added, the layers of a model have
its published active parameters to 8 %, V4-Pro to 18 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import HIDDEN_SIZES

SEQUENCE = 4096  # tokens of a training sequence in the paper


@dataclass(frozen=True)
class LayerSizes:
    """One layer: C, the attention's heads and their width, the width of the SwiGLU."""

    hidden_size: int
    num_heads: int
    ffn_width: int
    head_size: int = 128

    @property
    def attention_width(self) -> int:
        """Channels of all heads together."""
        return self.num_heads * self.head_size

    @property
    def parameters(self) -> int:
        """Weights of the layer's matrices."""
        return 4 * self.hidden_size * self.attention_width + 3 * self.hidden_size * self.ffn_width


MODELS = {
    "3b": LayerSizes(HIDDEN_SIZES["3b"], 16, 8 * 896),
    "9b": LayerSizes(HIDDEN_SIZES["9b"], 24, 8 * 1280),
    "27b": LayerSizes(HIDDEN_SIZES["27b"], 32, 8 * 1536),
    "v4-flash": LayerSizes(HIDDEN_SIZES["v4-flash"], 64, 7 * 2048),
    "v4-pro": LayerSizes(HIDDEN_SIZES["v4-pro"], 128, 7 * 3072),
}

NUM_LAYERS = {"3b": 12, "9b": 18, "27b": 30, "v4-flash": 43, "v4-pro": 61}
