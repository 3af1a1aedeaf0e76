"""A real stream: the bytes of a text, embedded and carried through eight mHC sublayers with small MLPs.

The kernels' run rounds to the stream's dtype wherever the contract says so; the reference run is float64 from
end to end. What is compared is the head's output, and the tolerance is the derived growth of roundings.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from .. import ops, reference
from ..compiler.kernel import dtype_name
from ..errors import MHCError
from ..spec import MHCSpec
from . import plain_torch, tolerance
from .comparison import Array, numpy64
from .run import Row

NUM_SUBLAYERS = 8
HIDDEN_SIZE = 128
MAX_TOKENS = 1024


@dataclass(frozen=True)
class Sublayer:
    """The parameters of one connection and of the MLP inside it, float32."""

    phi: torch.Tensor
    alpha: torch.Tensor
    bias: torch.Tensor
    up: torch.Tensor  # [2C, C]
    down: torch.Tensor  # [C, 2C]


def default_text() -> Path:
    """Return a text that every Python installation has: the source of its argparse module."""
    return Path(sysconfig.get_path("stdlib")) / "argparse.py"


def read_tokens(path: Path) -> torch.Tensor:
    """Return the first bytes of a file, as token ids 0 … 255.

    Raises MHCError for a file that cannot be read or is empty.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TOKENS)
    except OSError as error:
        raise MHCError(f"cannot read --text {path}: {error.strerror or error}") from error
    if not content:
        raise MHCError(f"--text {path}: expected a text, got an empty file")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).long()


def check_stream(tokens: torch.Tensor, dtype: torch.dtype, device: torch.device) -> Row:
    """Run the stream twice and compare the ends.

    Every rounding to the stream's dtype changes a value by U/√3 of it (root mean square of a uniform error),
    independently: three a sublayer (layer_input, layer_output, x_next), one for the embedding, one for the
    head. They add like the root and the mixing, which is doubly stochastic, does not amplify them; a sublayer
    passes on what its layer makes of an error, at most as much again. The coefficients' own error, 1e-5 a
    sublayer at most, matters for float32 only.
    """
    spec = MHCSpec.deepseek_v4(HIDDEN_SIZE)
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(256, HIDDEN_SIZE, generator=generator)
    sublayers = [random_sublayer(spec, generator) for _ in range(NUM_SUBLAYERS + 1)]  # the last one's phi: head

    h = embedding[tokens].to(device, dtype)
    on_device = [Sublayer(*(tensor.to(device) for tensor in vars(sublayer).values())) for sublayer in sublayers]
    with torch.no_grad():
        got, plain = (numpy64(run_stream(h, on_device, spec, functions)) for functions in (ops, plain_torch))
    expected = run_reference(numpy64(h), sublayers, spec)

    roundings = 3 * NUM_SUBLAYERS + 2
    unit = tolerance.UNIT_ROUNDOFF[dtype_name(dtype)]
    allowed = 2 * np.sqrt(roundings / 3) * unit + NUM_SUBLAYERS * 1e-5
    error, torch_error = (float(np.linalg.norm(end - expected) / np.linalg.norm(expected)) for end in (got, plain))
    sizes = (dtype_name(dtype), spec.num_streams, HIDDEN_SIZE, len(tokens))
    return Row("real stream", *sizes, error, float(allowed), torch_error, bool(error <= allowed))


def random_sublayer(spec: MHCSpec, generator: torch.Generator) -> Sublayer:
    """Logits of standard deviation 1.4, so that h_res is far from symmetric; an MLP that keeps its input's size."""

    size = spec.hidden_size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Sublayer(
        phi=normal(spec.num_coefficients, spec.stream_size) / spec.stream_size**0.5,
        alpha=torch.ones(3),
        bias=normal(spec.num_coefficients),
        up=normal(2 * size, size) / size**0.5,
        down=normal(size, 2 * size) / size**0.5,
    )


def mlp(layer_input: torch.Tensor, sublayer: Sublayer) -> torch.Tensor:
    """Apply the layer: float32 inside, one rounding at the end."""
    return (torch.relu(layer_input.float() @ sublayer.up.T) @ sublayer.down.T).to(layer_input.dtype)


def run_stream(h: torch.Tensor, sublayers: list[Sublayer], spec: MHCSpec, functions: ModuleType) -> torch.Tensor:
    """Run the stream by the functions of `ops` or of `plain_torch`."""
    x = functions.expand(h, spec.num_streams)
    *layers, last = sublayers
    for sublayer in layers:
        layer_input, h_post, h_res = functions.pre(x, sublayer.phi, sublayer.alpha, sublayer.bias, spec)
        x = functions.post(x, mlp(layer_input, sublayer), h_post, h_res)
    n = spec.num_streams
    return functions.head(x, last.phi[:n].contiguous(), last.alpha[:1], last.bias[:n], spec)


def run_reference(h: Array, sublayers: list[Sublayer], spec: MHCSpec) -> Array:
    """Run the sublayers in numpy float64."""
    *layers, last = sublayers
    exact = [
        reference.Sublayer(partial(mlp_float64, layer), numpy64(layer.phi), numpy64(layer.alpha), numpy64(layer.bias))
        for layer in layers
    ]
    *_, end = reference.stream_steps(h, exact, spec)
    n = spec.num_streams
    return reference.head(end.x_next, numpy64(last.phi[:n]), numpy64(last.alpha[:1]), numpy64(last.bias[:n]), spec)


def mlp_float64(layer: Sublayer, layer_input: Array) -> Array:
    """Apply the layer in float64."""
    return np.maximum(layer_input @ numpy64(layer.up).T, 0) @ numpy64(layer.down).T
