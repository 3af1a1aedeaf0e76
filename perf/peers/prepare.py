"""Load the peers that are asked for, and verify a call before anything of it is timed.

What a peer raises is its own affair: it is reported in one line, and the measurement goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

import torch

from ...errors import LoweringError
from ..measure.timing import Statistics
from ..torch_forms.baselines import TOLERANCE, relative_errors
from . import PEERS
from .peer import Peer, UnsupportedError


@dataclass(frozen=True)
class Loaded:
    """A peer that was asked for; `peer` is None and `skipped` says why where it cannot run."""

    name: str
    version: str = ""
    peer: Peer | None = None
    skipped: str = ""


@dataclass(frozen=True)
class Compared:
    """A peer's call on one case: either skipped for a reason, or run and compared; timed only where it agrees.

    Attributes:
        function: the peer's name of what was called.
        error: its largest relative difference from the kernel's outputs; `output` is where.
        tolerance: the largest that counts as the same function; `because` says what the peer rounds, if it does.
    """

    peer: str
    function: str = ""
    skipped: str = ""
    output: str = ""
    error: float | None = None
    tolerance: float | None = None
    because: str = ""
    run: Callable[[], object] | None = None

    @property
    def name(self) -> str:
        return f"peer: {self.peer}"


@dataclass(frozen=True)
class PeerResult:
    """Result of a peer's call; `time` is None where it was skipped or differs."""

    call: Compared
    time: Statistics | None


def load(names: Iterable[str], device: torch.device) -> list[Loaded]:
    """Import the peers and look at their versions."""
    return [load_one(name, device) for name in names]


def load_one(name: str, device: torch.device) -> Loaded:
    """Load one peer, or say why it cannot be."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Loaded(name, skipped=f"not installed (pip install {name})")
    try:
        module = import_module(f"{__package__}.{PEERS[name]}")
        return Loaded(name, version, module.load(device))
    except UnsupportedError as error:
        return Loaded(name, version, skipped=str(error))
    except Exception as error:  # importing someone else's package can raise anything
        return Loaded(name, version, skipped=f"does not import: {brief(error)}")


def compare(
    loaded: Loaded, kernel: str, arguments: Mapping[str, Any], expected: Mapping[str, torch.Tensor]
) -> Compared:
    """Bind the peer's function to the kernel's arguments, run it once and compare with what the kernel wrote."""
    assert loaded.peer is not None
    try:
        function = loaded.peer.function(kernel)
        outputs = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
        call = function.bind(arguments, outputs)
        errors = relative_errors(lambda: call.convert(call.run()), outputs, expected)
    except UnsupportedError as error:
        return Compared(loaded.name, skipped=str(error))
    except LoweringError as error:
        return Compared(loaded.name, skipped=f"our CPU target does not know {brief(error, with_type=False)}")
    except Exception as error:  # and so can calling it
        return Compared(loaded.name, skipped=f"fails: {brief(error)}")
    tolerances = {name: max(TOLERANCE[tensor.dtype], function.allowed) for name, tensor in expected.items()}
    # NaN first, then whatever exceeds its tolerance most
    output = max(errors, key=lambda name: (errors[name] != errors[name], errors[name] / tolerances[name]))
    agrees = errors[output] <= tolerances[output]
    return Compared(
        loaded.name,
        function.name,
        output=output,
        error=errors[output],
        tolerance=tolerances[output],
        because=function.because,
        run=call.run if agrees else None,
    )


def brief(error: Exception, with_type: bool = True) -> str:
    """Return an exception in one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 160 else text[:157] + "..."
    return f"{type(error).__name__}: {text}" if with_type else text
