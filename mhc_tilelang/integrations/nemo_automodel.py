"""NeMo Automodel's DeepSeek-V4.1 and V4 (`nemo_automodel` 0.7) on these kernels: `replace(model)`, `restore(model)`.

    mhc.integrations.nemo_automodel.replace(model)

runs, in place, its hyper-connections by our operators, forward and backward. V4.1's modules have three parts, all of
which are replaced: the coefficients, `collapse` (with the coefficients of the sublayer before) and `expand`. V4's give
the coefficients alone; its blocks mix the streams themselves. A replaced module stays the object of its class, with its
parameters: the instance gets the functions.

Their `comb` is h_res transposed; the res rows of `fn` are permuted to [out, in] in every call. Results are theirs to
float32 rounding; bfloat16 streams are combined in float32 and rounded once, as theirs, without a float32 copy of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v4.layers import DeepseekV4HyperConnection
from nemo_automodel.components.models.deepseek_v41.layers import DeepseekV41HyperConnection, DeepseekV41Mix
from torch import nn

from .. import ops
from ..convert.tensors import swapped_rows
from ..errors import ConversionError
from ..spec import MHCSpec

KNOWN = (DeepseekV41HyperConnection, DeepseekV4HyperConnection)


def replace(model: nn.Module) -> tuple[str, ...]:
    """Run a model's hyper-connections by these kernels from here on, in place. Idempotent.

    Returns:
        The names of the modules that run these kernels now.

    Raises:
        ValueError: there is nothing to replace, or a connection has a number of streams or constants without kernels.
        ConversionError: a connection's class has a forward of its own. Nothing has been replaced then.
    """
    found = _find("replace", model)
    for name, module in found.items():
        kind = _kind(module)
        if type(module).forward is not kind.forward:
            got = type(module).__name__
            raise ConversionError(f"replace: {name}: forward: expected {kind.__name__}'s, got {got}'s")
        spec(module)
    for module in found.values():
        module.forward = partial(_coefficients, module)
        if isinstance(module, DeepseekV41HyperConnection):
            module.collapse, module.expand = collapse, expand
    return tuple(found)


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undo `replace`: their own functions again."""
    found = _find("restore", model)
    for module in found.values():
        for name in ("forward", "collapse", "expand"):
            vars(module).pop(name, None)
    return tuple(found)


def spec(module: Any) -> MHCSpec:
    """Return the sizes and constants of one of their connections."""
    delayed = isinstance(module, DeepseekV41HyperConnection)
    n = module.streams if delayed else module.hc_mult
    eps = module.eps if delayed else module.hc_eps
    return MHCSpec(
        module.fn.shape[1] // n,
        num_streams=n,
        sinkhorn_iters=module.iterations if delayed else module.hc_sinkhorn_iters,
        sinkhorn_eps=eps,
        pre_eps=eps,
        rms_eps=module.norm_eps,
    )


def collapse(hidden_states: torch.Tensor, pre_mix: torch.Tensor) -> torch.Tensor:
    """hidden_states [B, S, n, C], pre_mix [B, S, n] -> [B, S, C], as their `collapse`."""
    return ops.aggregate(hidden_states.contiguous(), pre_mix.contiguous())


def expand(output: torch.Tensor, residual: torch.Tensor, mix: DeepseekV41Mix) -> torch.Tensor:
    """output [B, S, C], residual [B, S, n, C] -> the next streams, as their `expand`."""
    mappings = (mix.post.contiguous(), mix.comb.mT.contiguous())
    return ops.post(residual.contiguous(), output.contiguous(), *mappings).to(output.dtype)


def _coefficients(module: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """hidden_states [B, S, n, C] -> pre, post [B, S, n], comb [B, S, n, n], float32."""
    of_module = spec(module)
    phi, bias = (swapped_rows(tensor.float(), of_module.num_streams) for tensor in (module.fn, module.base))
    x = hidden_states.contiguous()
    h_pre, h_post, h_res = ops.coefficients(x, phi, module.scale.float(), bias, of_module)
    made = (h_pre, h_post, h_res.mT)
    return DeepseekV41Mix(*made) if isinstance(module, DeepseekV41HyperConnection) else made


def _find(function: str, model: nn.Module) -> dict[str, Any]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, KNOWN)}
    if not found:
        wanted = ", ".join(kind.__name__ for kind in KNOWN)
        raise ValueError(f"{function}: model: expected a module with {wanted}, got {type(model).__name__} with none")
    return found


def _kind(module: nn.Module) -> type[nn.Module]:
    return next(kind for kind in KNOWN if isinstance(module, kind))
