"""DeepSeek's TileKernels (`tile-kernels`): the released TileLang kernels of mHC, bfloat16.

The kernels are called as the package's own operators call them, with outputs allocated beforehand. Its top-level
import fails with tilelang 0.1.15 on parts that have nothing to do with mHC, so `tile_kernels.mhc` is imported alone.

On a CPU its kernels run through our CPU target where that takes them. They were written for a GPU, so that says
how the target does, not how good they are. Traps, all met here: the post multiplier defaults to 1 and the iterations
to 10; `fn` is rounded to TF32 before the product; gradients of x are added to what is there; stores that hang over
the last token are clipped by tilelang's GPU lowering alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module, util
from types import ModuleType
from typing import Any

import torch

from ..calls.cases import POST_PRE, SUBLAYER_INPUT
from . import deepseek_calls as calls
from .compiled import compiled
from .deepseek_calls import Kernels
from .peer import Call, Function, Inputs, Outputs, Peer, UnsupportedError

PACKAGE = "tile_kernels"
ON_CPU = "its GPU kernels on our CPU target, which shows what that makes of them, not how fast they are"
TF32 = "its product takes phi in TF32"
# 11 bits: each element of phi is off by 2^-12 at most and 1.4e-4 in the mean. Where the result is rounded to a stream
# of bfloat16, a relative difference of δ has some elements round the other way, which makes √(δ · 2^-8) of it.
TF32_ALLOWED, TF32_STREAM_ALLOWED = 1e-3, 3e-3


def load(device: torch.device) -> Peer:
    """Import `tile_kernels.mhc` and bind its kernels on this device."""
    factories = import_factories()

    def kernels(module: str, factory: str, *parameters: Any) -> Callable[..., Any]:
        return compiled(getattr(factories(module), factory), device, *parameters)

    peer = declare(kernels)
    return peer if device.type == "cuda" else replace(peer, note=ON_CPU)


def import_factories() -> Callable[[str], ModuleType]:
    """Return an importer of `tile_kernels.mhc` modules; if the package itself fails, an empty one takes its place."""
    try:
        import_module(PACKAGE)
    except Exception:  # of parts that are not needed here
        spec = util.find_spec(PACKAGE)
        if spec is None or spec.submodule_search_locations is None:
            raise UnsupportedError(f"package {PACKAGE} has no folder") from None
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
        empty = ModuleType(PACKAGE)
        empty.__path__ = list(spec.submodule_search_locations)
        sys.modules[PACKAGE] = empty
    import_module(f"{PACKAGE}.mhc")
    return lambda module: import_module(f"{PACKAGE}.mhc.{module}")


def declare(kernels: Kernels) -> Peer:
    """Return the functions, over these kernels."""

    def function(name: str, bind: Callable[[Kernels, Inputs, Outputs], Call], **rounding: Any) -> Function:
        return Function(name, partial(bind, kernels), **rounding)

    tf32: dict[str, Any] = {"allowed": TF32_ALLOWED, "because": TF32}
    tf32_stream = {**tf32, "allowed": TF32_STREAM_ALLOWED}
    return Peer(
        {
            "expand": function("expand_to_mhc", calls.expand),
            "project": function("mhc_pre_norm_fn, product", calls.project, **tf32),
            "coefficients": function("norm, split_mixes, sinkhorn", calls.coefficients),
            "sinkhorn": function("sinkhorn_normalize", calls.sinkhorn),
            "aggregate": function("mhc_pre_apply_mix", calls.pre),
            SUBLAYER_INPUT: function("mhc_pre_big_fuse", calls.sublayer_input, **tf32_stream),
            "post": function("mhc_post", calls.post),
            POST_PRE: function("mhc_post, mhc_pre_big_fuse", calls.post_pre, **tf32_stream),
            "expand_backward": function("expand_to_mhc, backward", calls.expand_backward),
            "project_backward": function("mhc_pre_norm_fn, product, backward", calls.project_backward, **tf32_stream),
            "sinkhorn_backward": function("sinkhorn_normalize, backward", calls.sinkhorn_backward),
            "post_backward": function("mhc_post_bwd", calls.post_backward),
        },
        left_out={
            "coefficients_backward": "spread over three operators, with sums in torch between",
            "aggregate_backward": "its kernel adds up g_x too, which is another amount of work",
        },
    )
