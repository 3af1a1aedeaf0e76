"""Compiled kernels by family and sizes: their last argument checks, what is compiled, how often, what is kept on disk.

Would catch: an index out of bounds by a wrong size, a compilation per batch size, a cache that needs what it
spares, two processes that read each other's half-written files.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import CPU
from helpers_backward import BACKWARD

from mhc_tilelang import compiler, ops
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.cli import doctor
from mhc_tilelang.compiler import disk_cache
from mhc_tilelang.compiler.cpu import build
from mhc_tilelang.errors import CompilerError
from mhc_tilelang.kernels import plans

CASE = Case(2, 64, torch.bfloat16, 5)
CALL = """
import sys, torch
from mhc_tilelang import ops
x, h_res = torch.ones(5, 2, 64), torch.eye(2).repeat(5, 1, 1)
x_next = ops.post(x, torch.ones(5, 64), torch.ones(5, 2), h_res)
assert (x_next == 2).all()
print("loaded:", *[m for m in ("tilelang", "tvm") if m in sys.modules])
"""


@pytest.fixture
def cold(monkeypatch, tmp_path):
    """An empty cache, on disk and in this process; its directory."""
    monkeypatch.setenv(disk_cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(compiler, "_kernels", {})
    return tmp_path


def post_kernel():
    tile = plans.channel_tile(64, 2, "cpu")
    sizes = {"num_streams": 2, "hidden_size": 64, "dtype": "bfloat16", "layer_dtype": "bfloat16"}
    return compiler.kernel("post", "cpu", **sizes, tile=tile)


def post_buffers():
    inputs = Inputs.of(CASE, CPU)
    buffers = {name: getattr(inputs, name) for name in ("x", "layer_output", "h_post", "h_res")}
    return {**buffers, "x_next": torch.empty_like(inputs.x)}


def run_python(code, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("PATH", "CXX")}
    environment = {**kept, "PATH": os.environ["PATH"], **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["x", "layer_output", "h_post", "h_res", "x_next"])
def test_kernel_refuses_wrong_buffers(name):
    """Size, rank, dtype, device and layout of every buffer, by its name: the code itself would read anything."""
    kernel, good = post_kernel(), post_buffers()
    tensor = good[name]
    wrong = {
        "shape": [tensor.narrow(axis, 0, size - 1).contiguous() for axis, size in enumerate(tensor.shape) if axis]
        + [tensor[0], tensor[None]],
        "dtype": [tensor.double(), tensor.to(torch.float16)],
        "contiguous": [torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)[..., 0]],
        "device": [tensor.to("meta")] if name != "x" else [],
    }
    kernel(**good)
    for what, tensors in wrong.items():
        for bad in tensors:
            with pytest.raises(ValueError, match=rf"^post: {name}: expected {what} .*, got "):
                kernel(**{**good, name: bad})


@pytest.mark.parametrize("name", ["layer_output", "h_post", "h_res", "x_next"])
def test_kernel_refuses_other_token_counts(name):
    """One token less than x has, in any of the others."""
    kernel, good = post_kernel(), post_buffers()
    with pytest.raises(ValueError, match=rf"^post: {name}: expected shape \(5, .*\), got \(4, "):
        kernel(**{**good, name: good[name][:4]})


def test_kernel_refuses_other_arguments():
    """One that it does not have, and one missing."""
    kernel, good = post_kernel(), post_buffers()
    with pytest.raises(TypeError, match=r"unknown arguments \['comb'\]"):
        kernel(**good, comb=good["h_res"])
    with pytest.raises((TypeError, KeyError), match="h_res"):
        kernel(**{name: tensor for name, tensor in good.items() if name != "h_res"})


def test_one_compilation_for_all_token_counts(cold, monkeypatch):
    """Every kernel of the functions compiles once. Catches a token or split count that is compiled in."""
    built = []
    monkeypatch.setattr(build, "build", lambda *args, build=build.build: (built.append(args[0]), build(*args))[1])
    for num_tokens in (1, 0, 3, 64, 127, 1000):
        case = replace(CASE, num_tokens=num_tokens)
        i = Inputs.of(case, CPU)
        ops.expand(i.h, 2)
        ops.pre(i.x, i.phi, i.alpha, i.bias, case.spec)
        ops.post(i.x, i.layer_output, i.h_post, i.h_res)
        ops.sinkhorn(i.logits)
        ops.head(i.x, i.phi[:2], i.alpha[:1], i.bias[:2], case.spec)
    expected = ["aggregate", "coefficients", "expand", "head_coefficients", "post", "project", "project", "sinkhorn"]
    assert sorted(built) == expected  # project once per row count: coefficients' and head's


def test_one_compilation_for_all_token_counts_of_a_backward(cold, monkeypatch):
    """Backward kernels too; sums of up to 16 blocks of tokens have one lane, those of more 16: two kernels."""
    built = []
    monkeypatch.setattr(build, "build", lambda *args, build=build.build: (built.append(args[0]), build(*args))[1])
    for num_tokens in (1, 0, 3, 64, 127, 1100):
        for function in BACKWARD.values():
            function(function.arguments(replace(CASE, num_tokens=num_tokens)))
    families = [name.removesuffix("_aggregated") for name in BACKWARD]
    assert sorted(built) == sorted([*families, "sum_partials", "sum_partials"])


def test_second_process_needs_neither_tilelang_nor_compiler(cold):
    """The files on disk suffice: no import of seconds, no g++ on the machine."""
    first = run_python(CALL)
    assert first.returncode == 0, first.stderr
    assert "compil" in first.stderr
    second = run_python(CALL)
    assert second.returncode == 0, second.stderr
    assert second.stdout.strip() == "loaded:"
    assert "compil" not in second.stderr
    without_compiler = run_python(CALL, PATH="")
    assert without_compiler.returncode == 0, without_compiler.stderr
    assert without_compiler.stdout.strip() == "loaded:"


def test_changed_sizes_are_another_file(cold):
    """Catches a hash that leaves a parameter out."""
    hashes = {
        build.kernel_hash("sinkhorn_backward", {"num_streams": n, "capacity": capacity, "block": block}, checked)
        for n in (2, 4)
        for capacity in (20, 40)
        for block in (32, 64)
        for checked in (False, True)
    }
    assert len(hashes) == 2 * 2 * 2 * 2


def test_no_compiler(cold, monkeypatch):
    """Nothing cached, nothing to build with: what was looked for, and what to install."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CompilerError, match=r"no C\+\+ compiler: looked for g\+\+.*install"):
        post_kernel()
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(CompilerError, match="/nowhere/g"):
        post_kernel()
    monkeypatch.setenv("CXX", "'g++")  # a quotation without an end
    with pytest.raises(CompilerError, match=r"looked for 'g\+\+\."):
        post_kernel()
    monkeypatch.setenv("CXX", " ")
    with pytest.raises(CompilerError, match=r"looked for g\+\+, "):
        post_kernel()


def test_compiler_that_fails(cold, monkeypatch, tmp_path):
    """The compiler's own words are shown, and nothing half-built is left for the next call to find."""
    script = tmp_path / "broken-g++"
    script.write_text("#!/bin/sh\necho 'out of cheese' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(CompilerError, match="out of cheese"):
        post_kernel()
    assert not list(tmp_path.rglob("*.so"))
    monkeypatch.delenv("CXX")
    post_kernel()(**post_buffers())


def test_two_processes_at_once(cold):
    """Both compile the same kernel into an empty cache. Catches a file that is read before it is whole."""
    arguments = [sys.executable, "-c", CALL]
    running = [subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
    files = sorted(path.name.partition("-")[0] + path.suffix for path in cold.glob("cpu-*/*"))
    assert files == ["post.cpp", "post.json", "post.so"]


def test_two_threads_at_once(cold, monkeypatch):
    """One compilation, and both get the kernel."""
    from concurrent.futures import ThreadPoolExecutor

    built = []
    monkeypatch.setattr(build, "build", lambda *args, build=build.build: (built.append(args[0]), build(*args))[1])
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: post_kernel(), range(2))
    assert first is second
    assert built == ["post"]


def test_cache_directory(monkeypatch, tmp_path):
    """$MHC_TILELANG_CACHE, else under $XDG_CACHE_HOME, else under ~/.cache, else an error that names the first."""
    monkeypatch.setenv(disk_cache.VARIABLE, str(tmp_path / "named"))
    assert disk_cache.location() == tmp_path / "named"
    monkeypatch.delenv(disk_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk_cache.location() == tmp_path / "mhc-tilelang"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert disk_cache.location() == tmp_path / ".cache" / "mhc-tilelang"
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError))
    with pytest.raises(CompilerError, match=r"without one.*\$MHC_TILELANG_CACHE"):
        disk_cache.location()
    assert "$MHC_TILELANG_CACHE" in doctor.cache_row().hint


@pytest.mark.parametrize(
    "statement",
    [
        "import mhc_tilelang",
        "from mhc_tilelang import MHCSpec, CompilerError; MHCSpec.deepseek_v4(64)",
        "import mhc_tilelang.compiler",
        "import mhc_tilelang; dir(mhc_tilelang)",
    ],
)
def test_import_is_light(statement):
    """Neither torch nor tilelang. Catches a re-export that loads its module at once."""
    done = run_python(f"{statement}\nimport sys; print(*[m for m in ('torch', 'tilelang', 'tvm') if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_public_names_resolve():
    """Every name of `__all__` is what its module has; another one is an AttributeError."""
    import mhc_tilelang

    for name in mhc_tilelang.__all__:
        assert getattr(mhc_tilelang, name).__name__.removeprefix("mhc_tilelang.") == name  # of a package it is the path
    with pytest.raises(AttributeError, match="no_such_name"):
        mhc_tilelang.no_such_name  # noqa: B018


def test_missing_argument_is_named():
    """Not a KeyError."""
    with pytest.raises(TypeError, match=r"post: missing arguments \['h_post', 'h_res', 'x_next'\]"):
        post_kernel()(x=torch.empty(0), layer_output=torch.empty(0))


def test_unusable_cache_is_a_known_error(monkeypatch):
    """One line that names the folder and the variable, not a traceback."""
    monkeypatch.setenv(disk_cache.VARIABLE, "/proc/absent")
    monkeypatch.setattr(compiler, "_kernels", {})
    with pytest.raises(CompilerError, match=r"cannot keep kernels in /proc/absent.*MHC_TILELANG_CACHE"):
        post_kernel()


def test_cxx_may_have_arguments(cold, monkeypatch):
    """CXX="ccache g++" is how many set it."""
    monkeypatch.setenv("CXX", "env g++")
    post_kernel()


def test_a_damaged_kernel_is_rebuilt(cold):
    """A library cut off after a page would end the process by SIGBUS; JSON that is no object, in a TypeError.

    Each kind of damage is in test_disk_cache.
    """
    exec(CALL, {})
    for suffix, left in ((".so", 4096), (".json", None)):
        [damaged] = cold.rglob(f"post-*{suffix}")
        whole = damaged.read_bytes()
        damaged.unlink()  # a file of its own: this process has the whole one mapped, and ends by SIGBUS if that is cut
        damaged.write_bytes(b"null" if left is None else whole[:left])
        done = run_python(CALL)
        assert done.returncode == 0, (done.returncode, done.stderr)
        assert f"{damaged}: expected " in done.stderr
        assert damaged.read_bytes() == whole


def test_each_target_has_kernels_of_its_own(monkeypatch):
    """Some are compiled with the same on all of them. Catches a CPU's kernel that is handed out for a GPU's tensors."""
    monkeypatch.setattr(compiler, "_kernels", {})
    monkeypatch.setattr(compiler, "_load", lambda family, target, parameters: (family, target, parameters["lanes"]))
    for _ in range(2):
        for family in ("sum_partials", "boundary_sums"):
            for target in ("cpu", "sm_90a", "sm_100a"):
                for lanes in (1, 16):
                    assert compiler.kernel(family, target, lanes=lanes) == (family, target, lanes)
