"""transformers' models with hyper-connections on these kernels: `replace(model)`, and `restore(model)`.

    model = AutoModelForCausalLM.from_pretrained(...)
    mhc.integrations.transformers.replace(model)

runs, in place, the connections before every attention and MLP, the mixing after them, and the head by our operators. A
replaced module stays the object of the class that it was; its instance gets a `forward` of ours. Parameters, state
dicts, `save_pretrained` and optimizers see no difference, and what renames classes (`fully_shard`, parametrizations,
subclasses) does not reach it. accelerate keeps its hooks in the same place: ours goes beneath them.

Whatever else decides what a module runs (another `forward` on the instance or in its class) is refused by name. Hooks
see the arguments and results that they see in transformers: a layer fuses with its second connection only where calling
that module would run our forward and nothing else. A hook on a connection's `input_norm`, which the kernels contain, is
refused.

Results are those of the eager modules to float32 rounding in a float32 model. In a bfloat16 model these kernels round
less: transformers rounds post, comb and each product to bfloat16, and here the streams are combined in float32. The res
rows of `fn` are permuted to [out, in] in every call, a copy of M·n·C elements.

The forward of a decoder layer is restated in `families`, for it mixes the streams in between; its signature is checked.
Tested with transformers 5.24.0, accelerate 1.15.0, peft 0.21.2.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib import metadata
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import modeling_layers
from transformers.utils import deprecation

from .. import ops
from ..convert.tensors import swapped_rows
from ..errors import ConversionError
from ..spec import MHCSpec
from . import families
from .families import Family

SITES = ("attn_hc", "ffn_hc")  # a decoder layer's connections
WRAPPERS = (modeling_layers, deprecation)  # what transformers puts around its forwards


def replace(model: nn.Module) -> tuple[str, ...]:
    """Run a model's hyper-connections by these kernels from here on, in place. Idempotent.

    Args:
        model: any module with DeepSeek-V4's or GLM-5.3's connections in it, whole models and single layers alike.

    Returns:
        The names of the modules that run these kernels now.

    Raises:
        ValueError: there is nothing to replace, or a connection has a number of streams or constants without kernels.
        ConversionError: a module runs something other than transformers' own forward, under accelerate's hook at most;
            a hook on an `input_norm` would never be called; a parameter is sharded to another shape; or the installed
            transformers' decoder layer is not the one that is restated here.

    Nothing has been replaced then.
    """
    found = _find("replace", model)
    for family in {_family(module) for module in found.values()}:
        _check_version(family)
    for name, module in found.items():
        try:
            _check_replaceable(module)
        except (ConversionError, TypeError, ValueError) as error:
            raise type(error)(f"replace: {name or type(module).__name__}: {error}") from None
    for name, module in found.items():
        setattr(module, _slot(module), partial(_forward_of(module), module, name))
    return tuple(found)


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undo `replace`: transformers' own modules again, with the parameters and the hooks that they have now.

    Returns:
        The names of the modules that were restored.

    Raises:
        ValueError: there are none.
        ConversionError: a `forward` was put over ours, other than accelerate's. Nothing has been restored then.
    """
    found = _find("restore", model)
    for name, module in found.items():
        try:
            _check_instance(module)
        except ConversionError as error:
            raise ConversionError(f"restore: {name or type(module).__name__}: {error}") from None
    replaced = {name: module for name, module in found.items() if _is_ours(vars(module).get(_slot(module)))}
    if not replaced:
        raise ValueError(
            f"restore: model: expected a module that replace has met, got {type(model).__name__} with none"
        )
    for module in replaced.values():
        if _slot(module) == "forward":
            del module.forward
        else:
            setattr(module, _slot(module), MethodType(type(module).forward, module))
    return tuple(replaced)


def spec(module: Any) -> MHCSpec:
    """Return the sizes and constants of a hyper-connection, or of a head with weights.

    Raises ConversionError where the projection has no two dimensions, as flattened or partitioned parameters.
    """
    n, is_head = module.hc_mult, _kind(module) is _family(module).head
    phi = module.hc_fn if is_head else module.fn
    if phi.ndim != 2:
        name = "hc_fn" if is_head else "fn"
        raise ConversionError(
            f"{name}: expected [M, n·C], got {list(phi.shape)}: gather it, or replace before sharding"
        )
    constants = {"num_streams": n, "rms_eps": module.input_norm.eps}
    if _family(module).is_identity and not is_head:
        gates = {"pre_eps": module.hc_eps, "post_eps": module.hc_eps, "post_scale": module.hc_post_magnitude}
        return MHCSpec.hy4(phi.shape[1] // n, **gates, **constants)
    if is_head:
        return MHCSpec(phi.shape[1] // n, pre_eps=module.eps, **constants)
    eps = {"pre_eps": module.hc_eps, "sinkhorn_eps": module.hc_eps}
    return MHCSpec(phi.shape[1] // n, sinkhorn_iters=module.hc_sinkhorn_iters, **eps, **constants)


# What replaced modules run: functions of the module, its name and the arguments of transformers' forward.


def _connection(module: Any, name: str, hidden_streams: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """hidden_streams [B, S, n, C] -> post [B, S, n], comb [B, S, n, n], collapsed [B, S, C], as transformers' own.

    An identity connection has no comb.

    post and comb are float32. comb is a view, but not for hooks, which may write into it: FSDP2's warns of views.
    """
    collapsed, post, *mapping = ops.pre(hidden_streams.contiguous(), *_projection(module, name))
    if not mapping:
        return post, collapsed
    [h_res] = mapping
    return post, h_res.mT.contiguous() if _has_hooks(module) else h_res.mT, collapsed


def _head(module: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    """x [B, S, n, C] -> [B, S, C]."""
    if _family(module).head_is_mean:
        return ops.collapse(x.contiguous(), mean=True)
    _check_norm(module, name)
    parameters = (module.hc_fn.float(), module.hc_scale.float(), module.hc_base.float(), spec(module))
    return ops.head(x.contiguous(), *parameters)


def _layer(module: Any, name: str, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """hidden_states [B, S, n, C] -> the same of the next layer; its connections fused at the boundary between them."""
    if module.gradient_checkpointing and module.training:
        # transformers checkpoints in a wrapper around the forward of a class: run ours as that of one, on this module.
        kind = _checkpointed(_family(module).layer)  # type: ignore[arg-type]
        view = object.__new__(kind)
        view.__dict__ = vars(module)
        return kind.forward(view, hidden_states, *args, name=name, **kwargs)
    return _mix(module, hidden_states, *args, name=name, **kwargs)


def _mix(module: Any, hidden_states: torch.Tensor, *args: Any, name: str, **kwargs: Any) -> Any:
    attention, mlp, returned = _family(module).sublayers(module, *args, **kwargs)
    *mappings, collapsed = module.attn_hc(hidden_states)
    waiting = (hidden_states.contiguous(), *_ours(attention(collapsed), *mappings))
    if _runs_ours_alone(module.ffn_hc, hidden_states.device):
        projection = _projection(module.ffn_hc, f"{name}.ffn_hc")
        hidden_states, collapsed, post, *h_res = ops.post_pre(*waiting, *projection)
        mappings = [post, *(one.mT for one in h_res)]
    else:
        hidden_states = ops.post(*waiting)
        *mappings, collapsed = module.ffn_hc(hidden_states)
    return returned(ops.post(hidden_states, *_ours(mlp(collapsed), *mappings)))


@cache
def _checkpointed(layer: type[nn.Module]) -> Any:
    """Return a subclass with our forward, which transformers wraps as it does every one."""
    return type("_Layer", (layer,), {"forward": _mix})


def _projection(module: Any, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, MHCSpec]:
    _check_norm(module, name)
    phi, bias = module.fn.float(), module.base.float()
    if not _family(module).is_identity:
        phi, bias = (swapped_rows(parameter, module.hc_mult) for parameter in (phi, bias))
    return phi, module.scale.float(), bias, spec(module)


def _ours(
    layer_output: torch.Tensor, post: torch.Tensor, comb: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the arguments of `post`; our own comb is a view of h_res and not copied."""
    return layer_output.contiguous(), post.contiguous(), None if comb is None else comb.mT.contiguous()


# What decides which forward a module runs: its class, its instance, and accelerate's hook on the instance.


def _find(function: str, model: nn.Module) -> dict[str, nn.Module]:
    found = {name: module for name, module in model.named_modules() if families.of_module(module)}
    if not found:
        wanted = ", ".join(f"{parts['prefix']}HyperConnection" for parts in families.KNOWN.values())
        raise ValueError(
            f"{function}: model: expected a module with {wanted}, a head or a layer of theirs, got "
            f"{type(model).__name__} with none"
        )
    return found


def _family(module: nn.Module) -> Family:
    return families.of_module(module)[0]  # type: ignore[index]


def _kind(module: nn.Module) -> type[nn.Module]:
    return families.of_module(module)[1]  # type: ignore[index]


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    """Return the forward of a replaced module."""
    family, kind = families.of_module(module)  # type: ignore[misc]
    return {family.connection: _connection, family.head: _head, family.layer: _layer}[kind]


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, partial) and forward.func in (_connection, _head, _layer)


def _is_theirs(forward: Any, kind: type[nn.Module]) -> bool:
    """Whether this function is the forward that transformers defines for the class, in its wrappers or not."""
    while any(getattr(forward, "__globals__", None) is vars(wrapper) for wrapper in WRAPPERS):
        forward = getattr(forward, "__wrapped__", None)
    defined = getattr(forward, "__globals__", None) is vars(sys.modules[kind.__module__])
    return defined and forward.__qualname__ == f"{kind.__name__}.forward"


def _slot(module: nn.Module) -> str:
    """Return the instance's attribute for the module's own forward: the one that accelerate's hook calls, if any."""
    own = vars(module)
    forward = own.get("forward")
    hooked = isinstance(forward, partial) and getattr(forward.func, "__module__", None) == "accelerate.hooks"
    return "_old_forward" if hooked and "_hf_hook" in own else "forward"


def _check_class(module: nn.Module, kind: type[nn.Module], place: str = "forward") -> None:
    """Raise where the module's class has a forward that is not transformers' own for it."""
    forward = type(module).forward
    if not _is_theirs(forward, kind):
        got = f"{getattr(forward, '__module__', '?')}.{getattr(forward, '__qualname__', repr(forward))}"
        raise ConversionError(f"{place}: expected transformers' {kind.__name__}.forward, got {got}")


def _check_instance(module: nn.Module) -> None:
    """Raise where the instance has a forward that is neither ours nor its class's, which accelerate leaves behind."""
    forward = vars(module).get(_slot(module))
    bound = isinstance(forward, MethodType) and forward.__self__ is module
    if not (forward is None or _is_ours(forward) or (bound and _is_theirs(forward.__func__, _kind(module)))):
        raise ConversionError(
            f"forward: expected that of its class, under accelerate's hook at most, got another on the instance, "
            f"{forward!r}: remove it; after replace it can be put over ours"
        )


def _check_norm(module: Any, name: str) -> None:
    """Raise where a hook expects the call of a connection's norm, which the kernels contain."""
    norm, kind = module.input_norm, _family(module).norm
    if "forward" in vars(norm) or _has_hooks(norm) or not isinstance(norm, kind):
        place, held = f"{name}.input_norm".lstrip("."), "hooks" if _has_hooks(norm) else f"forward {norm.forward!r}"
        raise ConversionError(
            f"{place}: expected a {kind.__name__} without hooks, for it is part of the kernel and never called, got "
            f"{type(norm).__name__} with {held}"
        )


def _check_replaceable(module: Any) -> None:
    """Raise where our forward would not be what runs, or not what transformers' forward would have given."""
    _check_class(module, _kind(module))
    _check_instance(module)
    family, kind = families.of_module(module)  # type: ignore[misc]
    if kind is family.head and family.head_is_mean:
        return
    if kind is not family.layer:
        _check_norm(module, "")
        _check_class(module.input_norm, family.norm, "input_norm: forward")
        spec(module)
        return
    for site in SITES:
        connection = getattr(module, site)
        if not any(isinstance(part, family.connection) for part in connection.modules()):
            wanted, got = family.connection.__name__, type(connection).__name__
            raise ConversionError(f"{site}: expected a {wanted} or what wraps one, got {got}")


def _has_hooks(module: nn.Module) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _runs_ours_alone(module: Any, device: torch.device) -> bool:
    """Whether a call of this connection would be our forward alone, unseen by any hook: a layer may fuse with it.

    FSDP2 gathers parameters in hooks, accelerate in the forward that it puts over ours. One hook of accelerate's does
    nothing: `device_map`'s, where the weights are on the streams' device; those that it offloads are on meta.
    """
    own = vars(module)
    if _has_hooks(module) or _has_any_global_hook():
        return False
    if _slot(module) == "_old_forward" and (
        type(own["_hf_hook"]).__name__ != "AlignDevicesHook" or module.fn.device != device
    ):
        return False
    return _is_ours(own.get(_slot(module)))


def _check_version(family: Family) -> None:
    parameters = tuple(inspect.signature(family.layer.forward).parameters)
    if parameters != family.parameters:
        raise ConversionError(
            f"replace: transformers {metadata.version('transformers')}: expected {family.layer.__name__}.forward with "
            f"the parameters {', '.join(family.parameters)}, as in 5.24.0, got {', '.join(parameters)}"
        )
