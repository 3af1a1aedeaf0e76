"""Large CPU kernels as several functions, and what tracing a large kernel costs and says.

Would catch: a nest that is given another array, number or offset than it used, two nests that differ and share a
function, a small kernel that is torn apart, results that depend on it; two kernels whose progress lines are the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_tilelang.bundle.workload import kernels_of
from mhc_tilelang.compiler import tracing
from mhc_tilelang.compiler.cpu import build, outline
from mhc_tilelang.compiler.cpu import emit as emitting
from mhc_tilelang.compiler.cpu.types import Array
from mhc_tilelang.kernels import boundary_plans
from mhc_tilelang.kernels.projection_plans import projection_plan
from mhc_tilelang.spec import MHCSpec

N, TOKENS, C = 2, 37, 80
ROWS = N * N + 2 * N
ARRAYS = {name: Array(name, "float32", (64,), False) for name in ("left", "right", "other")}


def boundary(n: int = N, size: int = C) -> dict[str, Any]:
    plan = boundary_plans.boundary_backward_plan(n * n + 2 * n, n, size, "bfloat16", "cpu")
    sizes = {"num_streams": n, "hidden_size": size, "dtype": "bfloat16", "layer_dtype": "bfloat16", "plan": plan}
    return {**sizes, "has_g_x_next": True, "has_g_layer_input": True, "needs_g_h_pre": True}


def nest(target: str, source: str, step: str, var: str) -> list[str]:
    return [
        f"  for (int64_t {var} = 0; {var} < 64; ++{var}) {{",
        f"    {target}[{var}] = {source}[{var}] * {step};",
        "  }",
    ]


def test_nests_that_are_alike_share_a_function() -> None:
    """Whatever their variables are called; one of another shape, constant or type of number has its own."""
    alike = [nest("left", "right", "first", "i"), nest("right", "other", "second", "j")]
    others = [nest("left", "left", "first", "i"), nest("left", "right", "2", "i"), nest("left", "right", "third", "i")]
    lines = ["  const float third = 1.0f;", *(line for body in (*alike, *others) for line in body)]
    places = [(1 + 3 * k, 4 + 3 * k) for k in range(5)]
    functions = outline.outline("k", lines, places, ARRAYS, ["int64_t first", "int64_t second"])
    assert len(functions) == 4
    calls = [re.fullmatch(r"  (\w+)\((.*)\);", line).groups() for line in lines[1:]]
    assert calls[0][0] == calls[1][0]
    assert len({name for name, _ in calls}) == 4
    assert [given for _, given in calls] == [
        "left, right, first", "right, other, second", "left, first", "left, right", "left, right, third",
    ]  # fmt: skip
    shared = next(text for text in functions if f" {calls[0][0]}(" in text)
    assert "(float* __restrict a0, float* __restrict a1, int64_t s2)" in shared
    assert "a0[v0] = a1[v0] * s2;" in shared
    assert "float s2" in next(text for text in functions if f" {calls[4][0]}(" in text)


def test_offsets_that_differ_are_given() -> None:
    """Nests of two streams share a function; those whose bound differs, or a constant that is no offset, do not."""
    bodies = [
        [f"  for (int64_t i = 0; i < {bound}; ++i) {{", f"    left[i * 4 + {a}] = right[i + 9] + {b};", "  }"]
        for bound, a, b in ((64, 0, "1"), (64, 3, "1"), (32, 3, "1"), (64, 3, "2"))
    ]
    lines = [line for body in bodies for line in body]
    functions = outline.outline("k", lines, [(3 * k, 3 * k + 3) for k in range(4)], ARRAYS, [])
    assert lines == [
        "  k_tile_0(left, right, 0);", "  k_tile_0(left, right, 3);", "  k_tile_1(left, right);",
        "  k_tile_2(left, right);",
    ]  # fmt: skip
    assert "(float* __restrict a0, float* __restrict a1, int64_t k0)" in functions[0]
    assert "a0[v0 * 4 + k0] = a1[v0 + 9] + 1;" in functions[0]
    assert "a0[v0 * 4 + 3] = a1[v0 + 9] + 2;" in functions[2]


def test_only_large_kernels_are_outlined() -> None:
    for family, parameters, split in (
        ("boundary_backward", boundary(4, 2560), True),
        ("project", {"num_streams": 4, "hidden_size": 2560, "dtype": "bfloat16",
                     "plan": projection_plan(24, 4, 2560, "bfloat16", "cpu")}, False),
    ):  # fmt: skip
        source = emitting.emit(tracing.trace(family, parameters))
        assert ("_tile_0(" in source) is split, family
        body = source[source.index('extern "C"') :]
        assert len(body.splitlines()) < 2 * outline.LONG


def test_an_outlined_kernel_leaves_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of `boundary_backward`, delayed, with a tail in tokens and channels; every output starts as NaN."""
    func = tracing.trace("boundary_backward", boundary())
    signature = tracing.signature_of(func)
    sizes = {"num_tokens": TOKENS, "num_ranges": 1}
    torch.manual_seed(0)
    given = {}
    for buffer in signature.buffers:
        shape = [sizes.get(extent, extent) for extent in buffer.shape]
        given[buffer.name] = torch.randn(shape).to(getattr(torch, buffer.dtype))
    written = ("g_x", "g_layer_output", "partial_phi", "partial_mixing")
    results = []
    for long in (outline.LONG, 10**9):
        monkeypatch.setattr(emitting, "LONG", long)
        source, library = tmp_path / f"{long}.cpp", tmp_path / f"{long}.so"
        source.write_text(emitting.emit(func))
        build.run_compiler(source, library)
        for name in written:
            given[name] = torch.full_like(given[name], float("nan"))
        launch_library(library, func, given, signature, sizes)
        results.append([given[name] for name in written])
        assert ("_tile_0(" in source.read_text()) is (long == outline.LONG)
    for name, one, other in zip(written, *results, strict=True):
        assert not one.isnan().any(), name
        assert torch.equal(one, other), name


def launch_library(library: Path, func: Any, given: dict[str, Any], signature: Any, sizes: dict[str, int]) -> None:
    """Call a compiled `boundary_backward` on two threads."""
    import ctypes

    function = getattr(ctypes.CDLL(str(library)), func.attrs["global_symbol"])
    pointers = [ctypes.c_void_p(given[buffer.name].data_ptr()) for buffer in signature.buffers]
    numbers = [ctypes.c_int64(number) for number in (*(sizes[name] for name in signature.sizes), TOKENS)]
    function(*pointers, *numbers, ctypes.c_int(2))


def test_parsing_once_changes_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and macros have the TIR of those that are parsed at every use. Catches what stays of another closure."""
    from tilelang.language.eager import builder

    once = [tracing.trace(*each).script(show_meta=True) for each in parsed_twice()]
    assert builder.mutate.__module__ == tracing.__name__
    [parse] = [cell.cell_contents for cell in builder.mutate.__closure__ if callable(cell.cell_contents)]
    monkeypatch.setattr(builder, "mutate", parse)
    assert [tracing.trace(*each).script(show_meta=True) for each in parsed_twice()] == once


def parsed_twice() -> list[tuple[str, dict[str, Any]]]:
    """Several kinds of reductions, and a family at two sizes."""
    constants = [{"num_streams": n, "capacity": 20, "block": 64} for n in (4, 2)]
    return [("boundary_backward", boundary()), *(("sinkhorn_backward", each) for each in constants)]


def test_progress_lines_tell_kernels_apart() -> None:
    """Lines of all kernels of a model differ, for either target: the rows of phi, what is left out, the tile."""
    for target in ("cpu", "sm_90a"):
        kernels = kernels_of(MHCSpec(2560), "bfloat16", target)
        lines = [f"{family} {tracing.sizes_of(parameters)}" for family, parameters in kernels]
        assert len(set(lines)) == len(lines)
        [project, *_] = [line for line in lines if line.startswith("project ")]
        assert "hidden_size=2560, dtype=bfloat16, rows=24" in project
