"""Shared parts of the kernel tests: cases named by the path they take, and checks that every function must pass.

The comparisons with float64 and their bounds are those of `mhc_tilelang.checking`; nothing is derived twice.
A `call` maps (Inputs, Case) to a tuple of outputs.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from mhc_tilelang.checking.comparison import compare, numpy64
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.checking.run import CHECKS
from mhc_tilelang.compiler.kernel import dtype_name

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STREAMS = (2, 4, 8)
# Of a stream, and of a layer's output beside it.
MIXED_DTYPES = [
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    pytest.param(torch.float32, torch.float16, marks=pytest.mark.full),
    pytest.param(torch.float16, torch.float32, marks=pytest.mark.full),
]
# Hidden sizes by the path they take on a CPU, where a tile has up to 1024 channels and a chunk up to 256.
WIDTHS = {
    "one-channel": 1,
    "below-a-vector": 7,
    "part-of-a-chunk": 64,
    "chunk-and-odd-tail": 333,
    "chunks-and-tail": 1000,
    "tile-hangs-over": 1031,
    "two-tiles": 1280,
    "many-chunks": 2560,
    "four-full-tiles": 4096,
}
TOKENS = {"no-token": 0, "one-token": 1, "few-tokens": 3, "below-a-block": 63, "blocks-and-tail": 4097}
FULL_WIDTHS = (1, 7, 64, 192, 333, 1000, 1280, 2560, 4096)
TOKEN_FIELDS = ("h", "x", "layer_output", "h_pre", "h_post", "h_res", "logits")


def named(path, case, marks=()):
    sizes = f"n{case.num_streams}-C{case.hidden_size}-{dtype_name(case.dtype)}-T{case.num_tokens}"
    return pytest.param(case, id=f"{path}-{sizes}", marks=marks)


def is_built(case):
    """Whether CI builds a case of the cross of n and dtype: each n once, each dtype once. The others are `full`."""
    return (case.num_streams, case.dtype) in {(4, torch.bfloat16), (8, torch.float32), (2, torch.float16)}


def every_n_and_dtype(tokens, path="every-n-and-dtype"):
    """The cross of n and dtype at one width."""
    cases = [Case(n, 192, dtype, tokens) for n in STREAMS for dtype in DTYPES]
    return [named(path, case, () if is_built(case) else pytest.mark.full) for case in cases]


def crosses():
    """Every n and dtype at one width; the other widths, then the token counts, at n = 4 in bfloat16."""
    bf16 = torch.bfloat16
    thin = every_n_and_dtype(127)
    thin += [named(path, Case(4, width, bf16, 63)) for path, width in WIDTHS.items()]
    thin += [named(path, Case(4, 64, bf16, tokens)) for path, tokens in TOKENS.items()]
    thin += [named("beyond-65535-tokens", Case(4, 1, bf16, 65_537))]
    return thin + [
        named("full-cross", Case(n, width, dtype, 63, seed=1), pytest.mark.full)
        for n in STREAMS
        for dtype in DTYPES
        for width in FULL_WIDTHS
    ]


def assert_matches_float64(kernel, case, inputs=None):
    """Every output of a check is within its derived bound."""
    for comparison, verdict in verdicts(kernel, case, inputs):
        assert verdict.passed, (comparison.output, verdict)


def verdicts(kernel, case, inputs=None):
    """(comparison, verdict) of every output of one check."""
    comparisons = CHECKS[kernel](case, inputs or Inputs.of(case, CPU))
    return [(comparison, compare(comparison)) for comparison in comparisons]


def map_tokens(inputs, change):
    """Inputs with `change` applied to every tensor that has a token dimension."""
    return replace(inputs, **{name: change(getattr(inputs, name)) for name in TOKEN_FIELDS})


def replace_launch(monkeypatch, name, replacement):
    """Replace a function of `launch` wherever the package calls it from."""
    for path, module in list(sys.modules.items()):
        if path.partition(".launch")[:2] == ("mhc_tilelang", ".launch") and hasattr(module, name):
            monkeypatch.setattr(module, name, replacement)


def assert_same_bits(got, expected):
    """Equal to the bit and in dtype; NaN equals NaN. `expected` may differ in shape: both are flattened."""
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[g.element_size()]
        torch.testing.assert_close(g.flatten().view(integers), e.flatten().view(integers), rtol=0, atol=0)


def assert_leading_dimensions_are_tokens(call, case):
    """Rank 0, 2 and 3 in front give the flat call's bits, in those shapes. Catches a lost or hard-wired axis."""
    case = replace(case, num_tokens=6)
    inputs = Inputs.of(case, CPU)
    flat = call(inputs, case)
    for leading in ((2, 3), (2, 1, 3), (1, 6)):
        shaped = call(map_tokens(inputs, lambda t, leading=leading: t.view(*leading, *t.shape[1:])), case)
        assert [o.shape for o in shaped] == [(*leading, *f.shape[1:]) for f in flat]
        assert_same_bits(shaped, flat)
    one = call(map_tokens(inputs, lambda t: t[4]), case)
    assert [o.shape for o in one] == [f.shape[1:] for f in flat]
    assert_same_bits(one, [f[4] for f in flat])
    none = call(map_tokens(inputs, lambda t: t[:0].view(2, 0, *t.shape[1:])), case)
    assert [o.shape for o in none] == [(2, 0, *f.shape[1:]) for f in flat]


def assert_views_can_start_anywhere(call, case):
    """Every tensor one element into its buffer gives the aligned call's bits. Catches an aligned vector load."""

    def misaligned(tensor):
        buffer = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
        view = buffer[1:].view(tensor.shape)
        view.copy_(tensor)
        assert view.data_ptr() % (2 * tensor.element_size()) != 0
        return view

    inputs = Inputs.of(case, CPU)
    shifted = Inputs(**{name: misaligned(tensor) for name, tensor in vars(inputs).items()})
    assert_same_bits(call(shifted, case), call(inputs, case))


def assert_special_values_stay_in_their_token(call, reference, case, field, value):
    """One NaN or infinity in one token: NaN and infinities appear where IEEE arithmetic puts them, no other bit moves.

    `reference` is the float64 function with call's signature. Catches a maximum that swallows NaN, a masked
    or padded lane that is multiplied into a neighbour, and a clamp that makes infinity finite.
    """
    inputs = Inputs.of(case, CPU)
    clean = call(inputs, case)
    token = case.num_tokens // 2
    tensor = getattr(inputs, field).clone()
    tensor[token].view(-1)[tensor[token].numel() // 2] = value
    spoilt = replace(inputs, **{field: tensor})
    with np.errstate(invalid="ignore", over="ignore"):
        expected = reference(spoilt, case)
    for got, before, exact in zip(call(spoilt, case), clean, expected, strict=True):
        assert not np.isfinite(exact[token]).all()
        for special in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(special(numpy64(got)), special(exact))
        others = torch.arange(case.num_tokens) != token
        assert_same_bits([got[others]], [before[others]])


def run_lowered(func, folder, **arguments):
    """Compile a traced function for the CPU in `folder`, every index checked, and call it; returns its C++ source."""
    from mhc_tilelang.compiler.cpu import build
    from mhc_tilelang.compiler.cpu.emit import emit
    from mhc_tilelang.compiler.tracing import signature_of

    source, library = folder / "kernel.cpp", folder / f"kernel{len(list(folder.iterdir()))}.so"
    source.write_text(emit(func, checked=True))
    build.run_compiler(source, library)
    build.bind(library, "kernel", func.attrs["global_symbol"], signature_of(func))(**arguments)
    return source.read_text()


def fma32(a, b, c):
    """a·b + c in float32 with one rounding, on float32 arrays.

    The product is exact in float64 (24 + 24 bits). The sum is rounded to odd there: where two-sum finds it
    inexact, its last bit is set. 53 ≥ 24 + 2 bits, so rounding that to float32 gives the rounding of the
    exact sum (Boldo and Melquiond 2008), subnormal results included.
    """
    product, c = np.float64(a) * np.float64(b), np.float64(c)
    product, c = np.broadcast_arrays(product, c)
    total = product + c
    back = total - product
    with np.errstate(over="ignore", invalid="ignore"):
        error = (product - (total - back)) + (c - back)
        inexact = np.isfinite(total) & (error != 0)
        even = (total.view(np.int64) & 1) == 0
        odd = np.where(inexact & even, np.nextafter(total, np.copysign(np.inf, error)), total)
        return odd.astype(np.float32)
