"""Host time: what a call of a public function takes on the host, with kernels that return at once.

Python, torch and the allocation of results; on a CPU also the call of a kernel, on a GPU not that of the driver. In
time of the calling thread, which other work on the machine moves less than a clock on the wall.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ... import compiler, ops, ops_quantized
from ...compiler.kernel import Kernel
from ..calls import cases
from ..calls.every_call import Given

ROUNDS, CALLS = 9, 50
Calls = dict[str, Callable[[Given], object]]
# The public function of a row of `bench`, for those that have one.
PUBLIC: Calls = {
    "expand": lambda s: ops.expand(s.h, s.spec.num_streams),
    "expand_backward": lambda s: ops.collapse(s.x),
    "coefficients": lambda s: ops.coefficients(s.x, *_parameters(s)),
    "sinkhorn": lambda s: ops.sinkhorn(s.logits, s.spec.sinkhorn_iters, s.spec.sinkhorn_eps),
    "aggregate": lambda s: ops.aggregate(s.x, s.h_pre),
    "post": lambda s: ops.post(*_mixed(s)),
    cases.SUBLAYER_INPUT: lambda s: ops.pre(s.x, *_parameters(s)),
    cases.POST_PRE: lambda s: ops.post_pre(*_mixed(s), *_parameters(s)),
    cases.POST_PRE_DELAYED: lambda s: ops.post_pre(*_mixed(s), *_parameters(s), h_pre=s.h_pre),
    cases.POST_PRE_QUANTIZED: lambda s: ops_quantized.post_pre_quantized(
        *_mixed(s), *_parameters(s), rms_norm_weight=s.weight, rms_norm_eps=s.eps
    ),
}


def host_seconds(kernel: str, given: Given) -> float | None:
    """Return the host time of one call in seconds, the median of rounds; None if no public function runs just this."""
    call = PUBLIC.get(kernel)
    if call is None:
        return None
    with returning_at_once():
        for _ in range(CALLS):
            call(given)
        return statistics.median(_round(call, given) for _ in range(ROUNDS))


@contextmanager
def returning_at_once() -> Iterator[None]:
    """Have kernels compute nothing within this block. Prepared calls are prepared anew before and after it."""
    kernels, load = compiler._kernels, compiler._load

    def idle(family: str, target: str, parameters: dict[str, Any]) -> Kernel:
        found = kernels.get((family, target, *parameters.items())) or load(family, target, parameters)
        return replace(found, launch=lambda *_: None, native=found.native and _idle_like(found.native))

    compiler._kernels, compiler._load = {}, idle
    try:
        yield
    finally:
        compiler._kernels, compiler._load = kernels, load


def _idle_like(native: Any) -> Any:
    """Return a C function that takes the same arguments and does nothing with them."""
    function = ctypes.CDLL(None)["abs"]
    function.argtypes, function.restype = native.argtypes, None
    return function


def _round(call: Callable[[Given], object], given: Given) -> float:
    start = time.thread_time_ns()
    for _ in range(CALLS):
        call(given)
    return (time.thread_time_ns() - start) / CALLS / 1e9


def _parameters(given: Given) -> tuple[Any, ...]:
    return given.phi, given.alpha, given.bias, given.spec


def _mixed(given: Given) -> tuple[Any, ...]:
    return given.x, given.layer_output, given.h_post, given.h_res
