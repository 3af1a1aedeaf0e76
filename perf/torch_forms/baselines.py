"""Plain torch, as the kernels' competitor: which forms there are, how they run, and that they are right.

A kernel is measured against the fastest form, not against the one that comes to mind first. A form is a
function that takes a kernel's arguments and writes its results into preallocated outputs; it runs eagerly,
under torch.compile, or both. Every form computes in float32 and rounds once, like the kernels: a form that
rounds phi or a product on the way is faster and not a baseline. `verify` refuses such a form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from ...errors import MHCError

EAGER, COMPILED = "eager", "compiled"
FAST = "fast"
MODES = {FAST: (EAGER,), "eager": (EAGER,), "all": (EAGER, COMPILED)}  # the values of --baselines

PIECE = 1 << 18  # elements that are compared at a time: 1 MiB in float32

NOTHING: Mapping[str, float] = MappingProxyType({})

# Largest difference from the kernel's output, relative to its norm. Two float32 computations of one value
# differ in their last bits, so a few elements of a 16-bit output round the other way: 2e-5 in bfloat16, 5e-6 in
# float16. Products rounded to the stream's dtype are 3e-3 and 4e-4 off, phi rounded to bfloat16 2e-3, to TF32
# 2e-4. An e4m3 number that rounds the other way is up to an eighth off, as happens to one of 1e5 where float32 numbers
# differ by 1e-6, and to one of 30 where they were rounded to bfloat16 before.
TOLERANCE = {torch.bfloat16: 2e-4, torch.float16: 1e-4, torch.float32: 5e-5, torch.float8_e4m3fn: 2e-3}


@dataclass(frozen=True)
class Form:
    """One way to write a kernel in torch, and where it is worth running.

    On a device that it is `beaten_on`, its eager mode was more than 5 % behind the fastest eager form in every stored
    result: `fast` baselines leave it out there.

    Where it `binds`, the function does once, untimed, what a backward may expect to find done, and returns what is
    timed; such a form is eager, or compiles by itself.
    """

    name: str
    function: Callable[..., Any]
    modes: tuple[str, ...] = (EAGER, COMPILED)
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    binds: bool = False
    beaten_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class Baseline:
    """A form that has been bound to its arguments, run and verified; `error` is its distance from the kernel.

    `parts` are the forms that it is put together from, if it is.
    """

    form: str
    mode: str
    run: Callable[[], object]
    error: float
    parts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.mode}: {self.form}"


def prepare(
    kernel: str,
    forms: tuple[Form, ...],
    modes: tuple[str, ...],
    arguments: Mapping[str, Any],
    expected: Mapping[str, torch.Tensor],
    allowed: Mapping[str, float] = NOTHING,
) -> list[Baseline]:
    """Bind, compile and verify the forms that apply; `arguments` hold what they read, `expected` what they write.

    `allowed` has the largest difference by output, where that is more than TOLERANCE.
    The outputs, new tensors of the expected shapes, are shared: one form runs at a time.
    """
    outputs = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    torch.compiler.reset()  # else shapes met before count against torch.compile's limit of recompilations
    baselines = []
    for form in forms:
        for mode in modes:
            if mode in form.modes:
                run = bind(form, mode, {**arguments, **outputs})
                error = verify(f"{kernel}, {mode}: {form.name}", run, outputs, expected, allowed)
                baselines.append(Baseline(form.name, mode, run, error))
    return baselines


def applicable(forms: tuple[Form, ...], device: torch.device, dtype: str, baselines: str = "eager") -> tuple[Form, ...]:
    """Return the forms for this device and stream dtype; `fast` ones without those that are beaten there."""
    found = (form for form in forms if device.type in form.devices and dtype in form.dtypes)
    return tuple(form for form in found if baselines != FAST or device.type not in form.beaten_on)


def bind(form: Form, mode: str, arguments: Mapping[str, Any]) -> Callable[[], object]:
    """Return the form as something to call. torch.compile compiles at the first call, for these very shapes."""
    function = form.function
    if form.binds:
        run: Callable[[], object] = function(**arguments)
        return run
    if mode == COMPILED:
        function = torch.compile(function, fullgraph=True, dynamic=False)
    return lambda: function(**arguments)


def verify(
    name: str,
    run: Callable[[], object],
    outputs: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    allowed: Mapping[str, float] = NOTHING,
) -> float:
    """Run a form into outputs full of NaN and compare; its largest error, or an MHCError if that is too large."""
    errors = relative_errors(run, outputs, expected)
    for key, error in errors.items():
        tolerance = max(TOLERANCE[expected[key].dtype], allowed.get(key, 0.0))
        if not error <= tolerance:  # NaN is refused too
            raise MHCError(
                f"baseline {name}: expected {key} within {tolerance:.0e} of the kernel's, got {error:.1e}; "
                "it is not timed, nor is anything else"
            )
    return max(errors.values())


def relative_errors(
    run: Callable[[], object], outputs: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Run a form into outputs full of NaN; how far each is from the kernel's."""
    for output in outputs.values():
        output.fill_(float("nan"))
    run()
    return {name: relative_error(outputs[name], wanted) for name, wanted in expected.items()}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """‖got − expected‖ / ‖expected‖.

    A piece at a time: a whole stream in float32 is fresh memory, whose page faults cost more than the arithmetic.
    """
    pieces = zip(got.flatten().split(PIECE), expected.flatten().split(PIECE), strict=True)
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    pairs = ((one.float(), other.float()) for one, other in pieces)  # float8 has no norms
    norms = [torch.stack((norm(one - other), norm(other))) for one, other in pairs]
    difference, size = torch.stack(norms).norm(dim=0)
    return float(difference / size)
