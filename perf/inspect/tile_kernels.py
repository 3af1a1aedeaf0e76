"""TileKernels' mHC kernels, built the way ours are: what a reader compares ours with.

Sizes, blocks and constants are those of the package's operators (`tile_kernels.modeling.mhc.ops`), n = 4 and bfloat16,
which is all that it takes; passes and flags are those of its kernels, which use the TMA and wgmma where tilelang finds
a place for them. It is no dependency: `pip install tile-kernels`.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

from ...errors import MHCError
from ...spec import MHCSpec
from .row import Row, measure_build

if TYPE_CHECKING:
    from ...compiler.cuda_source import CudaSource

PACKAGE = "tile-kernels"
NUM_STREAMS = 4
SPLIT_BLOCK, SINKHORN_BLOCKS = 32, (1, 32)  # tokens
NUM_SMS = 132
REGISTER_USAGE_LEVEL = "tl.ptxas_register_usage_level"

# Module and factory of each kernel, and ours that does the same work, or the part of it that is named.
KERNELS = {
    "expand_to_mhc_fwd": ("expand_kernel", "expand_to_mhc_fwd_tl", "expand"),
    "pre_norm_fn_fwd_mul": ("norm_fn_kernel", "_mhc_pre_norm_fn_fwd_mul", "project"),
    "pre_norm_fn_fwd_norm": ("norm_fn_kernel", "_mhc_pre_norm_fn_fwd_norm", "coefficients"),
    "pre_split_mixes_fwd": ("pre_split_mixes_kernel", "_mhc_pre_split_mixes_fwd", "coefficients"),
    "sinkhorn_fwd": ("sinkhorn_kernel", "_mhc_sinkhorn_fwd", "sinkhorn"),
    "pre_apply_mix_fwd": ("pre_apply_mix_kernel", "_mhc_pre_apply_mix_fwd", "aggregate"),
    "pre_big_fuse": ("pre_big_fuse_kernel", "_mhc_pre_big_fuse", "coefficients and pre"),
    "post_fwd": ("post_kernel", "_mhc_post_fwd", "post"),
    "head_compute_mix_fwd": ("head_compute_mix_kernel", "_mhc_head_compute_mix_fwd", "head_coefficients"),
    "expand_to_mhc_bwd": ("expand_kernel", "expand_to_mhc_bwd_tl", "expand_backward"),
    "pre_norm_fn_bwd_mul": ("norm_fn_kernel", "_mhc_pre_norm_fn_bwd_mul", "project_backward"),
    "pre_norm_fn_bwd_norm": ("norm_fn_kernel", "_mhc_pre_norm_fn_bwd_norm", "coefficients_backward"),
    "pre_split_mixes_bwd": ("pre_split_mixes_kernel", "_mhc_pre_split_mixes_bwd", "coefficients_backward"),
    "sinkhorn_bwd": ("sinkhorn_kernel", "_mhc_sinkhorn_bwd", "sinkhorn_backward"),
    "pre_apply_mix_bwd": ("pre_apply_mix_kernel", "_mhc_pre_apply_mix_bwd", "aggregate_backward"),
    "post_bwd": ("post_kernel", "_mhc_post_bwd", "post_backward"),
    "head_compute_mix_bwd": ("head_compute_mix_kernel", "_mhc_head_compute_mix_bwd", "head_coefficients_backward"),
}


def build(name: str, hidden_size: int, arch: str) -> Row:
    """Build one of KERNELS. Raises MHCError where the package is missing."""
    from .compiler import compile_source

    source, flags = source_of(name, hidden_size, arch)
    return Row(
        kernel=name,
        variant="",
        arch=arch,
        num_streams=NUM_STREAMS,
        hidden_size=hidden_size,
        dtype="bfloat16",
        stream_reads={},
        stream_writes={},
        truncated=[],
        **measure_build(source, compile_source(source.code, arch, flags), arch),
    )


def source_of(name: str, hidden_size: int, arch: str) -> tuple[CudaSource, tuple[str, ...]]:
    """Return the source of one of KERNELS under its own passes, and its own flags for nvcc."""
    from ...compiler.cuda_source import generate_from
    from .compiler import COMPILE_FLAGS

    module, factory_name, _ = KERNELS[name]
    factory = getattr(factories()(module), factory_name)
    configs = factory.pass_configs or {}
    source = generate_from(factory.get_tir(*parameters(name, hidden_size)), arch, configs)
    flags = [flag for flag in (factory.compile_flags or []) if flag not in COMPILE_FLAGS]
    if level := {key.value: value for key, value in configs.items()}.get(REGISTER_USAGE_LEVEL):
        flags.append(f"--ptxas-options=--register-usage-level={level}")
    return source, tuple(flags)


def parameters(name: str, hidden_size: int) -> tuple[Any, ...]:
    """Return the parameters that the package's operators compile a kernel with."""
    n, spec = NUM_STREAMS, MHCSpec(hidden_size, NUM_STREAMS)
    rows, constants = spec.num_coefficients, (spec.sinkhorn_iters, spec.sinkhorn_eps)
    epsilons = (spec.rms_eps, spec.pre_eps, spec.sinkhorn_eps)
    forward_tokens, backward_tokens = SINKHORN_BLOCKS
    chosen: dict[str, tuple[Any, ...]] = {
        "expand_to_mhc_fwd": (hidden_size, n),
        "expand_to_mhc_bwd": (hidden_size, n),
        "pre_norm_fn_fwd_mul": (rows, 1, spec.stream_size),
        "pre_norm_fn_bwd_mul": (rows, 1, spec.stream_size),
        "pre_norm_fn_fwd_norm": (rows, 1, spec.stream_size, spec.rms_eps, 1),
        "pre_norm_fn_bwd_norm": (rows, 1, spec.stream_size, spec.rms_eps),
        "pre_split_mixes_fwd": (n, spec.post_scale, spec.pre_eps, SPLIT_BLOCK),
        "pre_split_mixes_bwd": (n, spec.post_scale, SPLIT_BLOCK, NUM_SMS),
        "sinkhorn_fwd": (n, forward_tokens, *constants),
        "sinkhorn_bwd": (n, backward_tokens, *constants),
        "pre_big_fuse": (hidden_size, *epsilons, spec.post_scale, spec.sinkhorn_iters, 1, n),
        "head_compute_mix_fwd": (n, spec.pre_eps, SPLIT_BLOCK),
        "head_compute_mix_bwd": (n, SPLIT_BLOCK, NUM_SMS),
    }
    return chosen.get(name, (n, hidden_size))


def factories() -> Any:
    """Return the importer of the package's modules. Raises MHCError if the package is unsupported."""
    from ..peers.deepseek import import_factories
    from ..peers.peer import UnsupportedError

    versions()
    try:
        return import_factories()
    except UnsupportedError as error:
        raise MHCError(f"--peers: {PACKAGE}: {error}") from error


def versions() -> dict[str, str]:
    """Return the package's version. Raises MHCError where it is not installed."""
    try:
        return {PACKAGE: metadata.version(PACKAGE)}
    except metadata.PackageNotFoundError:
        raise MHCError(f"--peers: {PACKAGE} is not installed (pip install {PACKAGE})") from None
