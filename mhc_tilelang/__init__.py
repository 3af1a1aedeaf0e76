"""The mHC kernels for PyTorch.

    spec = mhc.MHCSpec.deepseek_v4(hidden_size=2560)
    stream = mhc.ResidualStream(h, spec.num_streams)
    stream.write(layer(stream.read(connection)))          connection = mhc.HyperConnection(spec, sublayer=0)
    h = stream.reduce("sum")

    modules    what a model uses: connections, the stream, recomputation, overlap, pipeline stages
    ops        the functions; they check with `arguments` and `ops_arguments` and call `operators`; ops_quantized
    operators  what autograd and torch.compile see; they run kernels through `launch`
    launch     where a launch is decided: plans, outputs, the kernels of a call
    compiler   (kernel family, sizes, target) -> a kernel, something to call: the CPU's lowering, CUDA, an executor
    spec       the sizes and constants
    kernels    the TileLang code          reference   the same in numpy float64
    convert    other frameworks' weights and conventions      integrations   other frameworks' models
    checking   `mhc-tilelang check`       perf        `mhc-tilelang bench`
    bundle     `mhc-tilelang export`: kernels ahead of time, and loading them
    diagnostics   numbers of a model's mappings, and a watch over one that runs
    cli, errors

Importing this package loads neither TileLang nor PyTorch: `mhc-tilelang --help` and `mhc-tilelang doctor`
pass through here, and doctor must be able to say that one of them is missing. Names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import convert, diagnostics, integrations
    from .errors import BundleError, CompilerError, GradientError, MHCError, MHCWarning
    from .modules.connections import (
        HyperConnection,
        HyperHead,
        ResidualConnection,
        UnconstrainedHyperConnection,
        connection,
    )
    from .modules.pipeline import wire_bytes
    from .modules.recompute import recompute_length
    from .modules.residual_stream import ResidualStream
    from .modules.saved import saved_bytes
    from .ops import (
        coefficients,
        collapse,
        expand,
        expand_pre,
        first_pre,
        head,
        post,
        post_head,
        post_pre,
        pre,
        sinkhorn,
    )
    from .ops_quantized import Quantized, post_pre_quantized, pre_quantized
    from .spec import MHCSpec

__all__ = [
    "BundleError",
    "CompilerError",
    "GradientError",
    "HyperConnection",
    "HyperHead",
    "MHCError",
    "MHCSpec",
    "MHCWarning",
    "Quantized",
    "ResidualConnection",
    "ResidualStream",
    "UnconstrainedHyperConnection",
    "aggregate",
    "coefficients",
    "collapse",
    "connection",
    "convert",
    "diagnostics",
    "expand",
    "expand_pre",
    "first_pre",
    "head",
    "integrations",
    "post",
    "post_head",
    "post_pre",
    "post_pre_quantized",
    "pre",
    "pre_quantized",
    "recompute_length",
    "saved_bytes",
    "sinkhorn",
    "wire_bytes",
]

_HOMES = {
    "MHCSpec": "spec",
    "MHCError": "errors",
    "CompilerError": "errors",
    "BundleError": "errors",
    "GradientError": "errors",
    "MHCWarning": "errors",
    "HyperConnection": "modules.connections",
    "HyperHead": "modules.connections",
    "ResidualConnection": "modules.connections",
    "UnconstrainedHyperConnection": "modules.connections",
    "connection": "modules.connections",
    "Quantized": "ops_quantized",
    "ResidualStream": "modules.residual_stream",
    "post_pre_quantized": "ops_quantized",
    "pre_quantized": "ops_quantized",
    "recompute_length": "modules.recompute",
    "saved_bytes": "modules.saved",
    "wire_bytes": "modules.pipeline",
}
_PACKAGES = ("convert", "diagnostics", "integrations")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    value = getattr(import_module(f".{_HOMES.get(name, 'ops')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
