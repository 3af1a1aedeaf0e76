"""Other frameworks' weights and tensors to this package's conventions, and back.

    state = mhc.convert.deepseek.import_state({"fn": fn, "scale": scale, "base": base})
    connection.load_state_dict(state)                         connection = mhc.HyperConnection(spec)

    deepseek             TileKernels' tensors, and the released DeepSeek-V4 checkpoints
    transformers         Hugging Face's deepseek_v4
    liger                Liger-Kernel
    transformer_engine   NVIDIA's TransformerEngine: streams innermost
    megatron             Megatron-LM
    lucidrains           hyper-connections, static mHC and unconstrained HC

    conventions          what differs: which way the res rows lie, what Sinkhorn normalises last, where streams are
    orientation          tells the conventions of foreign code apart, from what it computes
    rows_first           `RowsFirstConnection`, for code whose Sinkhorn takes rows first
    tensors              the permutations        state   the checks of state dicts

A framework's module has `import_state` (theirs to ours) and `export_state` (ours to theirs) for one sublayer, a `spec`
with its constants and, where a checkpoint of a whole model has names of its own, `import_model` and `export_model`.
"Ours" is what `HyperConnection.state_dict()` gives: phi [M, K], alpha [3], bias [M], res rows as [out, in]. An import
and the export of its result return the same bits; lucidrains' norm weight, which is absorbed, is the exception. dtypes
stay what they are (loading a state dict into a `HyperConnection` makes them float32); what needs no permutation is the
tensor that came or a view of it.

Errors: `ConversionError` for keys that are missing or unknown, and for weights that no weights of ours are equal to.
ValueError for a wrong shape, TypeError for what is no tensor. Everything is checked before anything is converted.
"""

from __future__ import annotations

from ..errors import ConversionError
from . import deepseek, liger, lucidrains, megatron, transformer_engine, transformers
from .conventions import CONVENTIONS, Convention
from .orientation import Probe, orientation, probe
from .rows_first import RowsFirstConnection
from .tensors import comb, swapped_columns, swapped_rows, swapped_streams

__all__ = [
    "CONVENTIONS",
    "Convention",
    "ConversionError",
    "Probe",
    "RowsFirstConnection",
    "comb",
    "deepseek",
    "liger",
    "lucidrains",
    "megatron",
    "orientation",
    "probe",
    "swapped_columns",
    "swapped_rows",
    "swapped_streams",
    "transformer_engine",
    "transformers",
]
