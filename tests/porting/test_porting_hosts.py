"""Hosts without Python: built from a bundle with a compiler and cmake alone, they run its golden vectors.

Would catch: a bundle that is not self-contained, a header or index that a host cannot use, a host that calls wrong
results right.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers_bundle import make, small_bundle

from mhc_tilelang.bundle import export
from mhc_tilelang.compiler.toolchain import find_nvcc
from mhc_tilelang.spec import MHCSpec

PORTING = Path(__file__).resolve().parents[2] / "examples" / "porting"
NEITHER = {"PATH": "/usr/bin:/bin"}  # no virtual environment, no PYTHONPATH

needs_cmake = pytest.mark.skipif(shutil.which("cmake", path=NEITHER["PATH"]) is None, reason="no cmake of the system")


def call(*command: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a program in an environment of nothing but the system's programs."""
    words = [str(word) for word in command]
    return subprocess.run(words, env={**NEITHER, **more}, capture_output=True, text=True, check=False)


def c_host(bundle: Path, build: Path) -> Path:
    """The C host, built for a bundle."""
    done = call("cmake", "-S", PORTING / "c", "-B", build, f"-DMHC_BUNDLE={bundle}")
    assert done.returncode == 0, done.stderr
    done = call("cmake", "--build", build)
    assert done.returncode == 0, done.stdout + done.stderr
    return build / "mhc_golden"


def test_each_host_has_a_build_folder_of_its_own() -> None:
    """Pages and heads of CMakeLists.txt name it: cmake refuses a folder that another source was built in."""
    pages = [*PORTING.glob("*/*.*"), *(PORTING.parents[1] / "docs" / "porting").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    said = set(re.findall(r"cmake -S (\S+) -B (\S+)", text))
    folders = dict(said)
    assert {Path(source).name for source in folders} == {"c", "cuda", "jax"}
    assert len(said) == len(folders) == len(set(folders.values()))
    assert {*re.findall(r"--build (\S+)", text), *re.findall(r"\bbuild/\w+", text)} == set(folders.values())


@needs_cmake
def test_the_c_host(tmp_path: Path) -> None:
    """0 where all agree; 1 for a changed expectation; 2 for a missing, cut or foreign file, which is named."""
    bundle = tmp_path / "bundle"
    shutil.copytree(small_bundle(), bundle)
    host = c_host(bundle, tmp_path / "build")
    done = call(host, bundle, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kernels: all within their tolerance" in done.stdout

    index, arrays = bundle / "golden/cpu/index.txt", bundle / "golden/vectors.npz"
    line = next(line for line in index.read_text().splitlines() if line.startswith("buffer x_next "))
    offset, content = int(line.split()[5]), arrays.read_bytes()
    arrays.write_bytes(content[:offset] + b"\0\0" + content[offset + 2 :])
    done = call(host, bundle)
    assert (done.returncode, done.stdout.count("WRONG")) == (1, 2), done.stdout
    arrays.write_bytes(content[:offset])
    done = call(host, bundle)
    assert (done.returncode, f"elements of x_next at {offset}, got 0" in done.stderr) == (2, True)
    arrays.unlink()
    done = call(host, bundle)
    assert (done.returncode, "got no such file" in done.stderr) == (2, True)
    index.write_text("mhc-golden 7 1\n")
    done = call(host, bundle)
    assert (done.returncode, "expected mhc-golden 2, got format 7" in done.stderr) == (2, True)
    assert call(host, tmp_path / "none").returncode == 2


@pytest.mark.full
@needs_cmake
@pytest.mark.parametrize("num_streams", [2, 4])
def test_the_c_host_runs_a_whole_model(num_streams: int, tmp_path: Path) -> None:
    """Every kernel of a model, forward and backward, with every compiler of the system."""
    bundle = tmp_path / "bundle"
    facts = export.export(MHCSpec(96, num_streams), "bfloat16", ["cpu"], bundle)
    done = call(c_host(bundle, tmp_path / "build"), bundle, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(facts['targets']['cpu']['kernels'])} kernels: all within" in done.stdout


FAKE_DRIVER = r"""
/* A driver whose kernels do nothing: what a host asks of it is printed, and memory is the host's. */
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
CUresult cuInit(unsigned f) { return 0; }
CUresult cuGetErrorName(CUresult r, const char **n) { *n = "CUDA_ERROR_FAKE"; return 0; }
CUresult cuDeviceGet(CUdevice *d, int k) { *d = k; return 0; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) { *v = 9; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = 0; return 0; }
CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
CUresult cuCtxSynchronize(void) { return 0; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = 0; return memcmp(image, "\177ELF", 4) ? 200 : 0; }
CUresult cuModuleUnload(CUmodule m) { return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *s) { *f = 0; printf("get %s\n", s); return 0; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { printf("set %d %d\n", a, v); return 0; }
CUresult cuMemAlloc(CUdeviceptr *p, size_t n) { *p = (CUdeviceptr)malloc(n); return 0; }
CUresult cuMemFree(CUdeviceptr p) { free((void *)p); return 0; }
CUresult cuMemcpyHtoD(CUdeviceptr d, const void *s, size_t n) { memcpy((void *)d, s, n); return 0; }
CUresult cuMemcpyDtoH(void *d, CUdeviceptr s, size_t n) { memcpy(d, (void *)s, n); return 0; }
CUresult cuMemsetD8(CUdeviceptr p, unsigned char v, size_t n) { memset((void *)p, v, n); return 0; }
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned x, unsigned y, unsigned z,
                        unsigned shared, CUstream s, void **p, void **e) {
  printf("launch %u %u %u, %u %u %u, tokens %d\n", gx, gy, gz, x, y, z, *(int *)p[2]);
  return 0;
}
"""


@pytest.mark.nvcc
def test_the_cuda_host_builds(tmp_path: Path) -> None:
    """nvcc builds it without a GPU; without a driver it says so; it loads the cubin, launches, and compares.

    A stand-in for the driver, whose kernels do nothing, leaves the outputs NaN: the host must call them wrong.
    """
    from mhc_tilelang import ops

    bundle = make(tmp_path / "bundle", ["sm_90a"], lambda spec, inputs: [[ops.expand(inputs.h, spec.num_streams)]])
    nvcc, host = find_nvcc().path, tmp_path / "host"
    sources = [PORTING / "cuda/main.cpp", PORTING / "golden.c"]
    flags = ["-std=c++17", '-DMHC_ARCH="sm_90a"', f"-I{PORTING}", f"-I{bundle / 'sm_90a'}", "-ldl"]
    done = call(nvcc, *flags, *sources, "-o", host, **with_path_of(nvcc))
    assert done.returncode == 0, done.stderr
    done = call(host, bundle)
    if done.returncode != 0:
        assert (done.returncode, "no GPU: nothing was run" in done.stderr) == (3, True), done.stderr

    (tmp_path / "driver.c").write_text(FAKE_DRIVER)
    options = ["-w", "-shared", "-Xcompiler", "-fPIC", tmp_path / "driver.c", "-o", tmp_path / "libcuda.so.1"]
    done = call(nvcc, *options, **with_path_of(nvcc))
    assert done.returncode == 0, done.stderr
    done = call(host, bundle, LD_LIBRARY_PATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "get expand_kernel" in done.stdout
    assert "launch 3 1 1, 32 1 1, tokens 3" in done.stdout
    assert "WRONG" in done.stdout
    for cubin in (bundle / "sm_90a").glob("*.cubin"):
        cubin.write_bytes(b"not a cubin")
    done = call(host, bundle, LD_LIBRARY_PATH=str(tmp_path))
    assert (done.returncode, "expected CUDA_SUCCESS, got CUDA_ERROR_FAKE" in done.stderr) == (2, True)


def with_path_of(nvcc: str) -> dict[str, str]:
    """nvcc finds its own parts beside itself, the C++ compiler on the PATH."""
    return {"PATH": f"{Path(nvcc).parent}:{NEITHER['PATH']}", "HOME": os.environ.get("HOME", "/")}


@pytest.mark.gpu
@pytest.mark.nvcc
def test_the_cuda_host_on_a_gpu(tmp_path: Path) -> None:
    """Every forward kernel of a bundle for the GPU at hand, within its tolerance."""
    import torch

    from mhc_tilelang.compiler import target_of

    arch = target_of(torch.device("cuda", 0))
    bundle = make(tmp_path / "bundle", [arch])
    nvcc, host = find_nvcc().path, tmp_path / "host"
    sources = [PORTING / "cuda/main.cpp", PORTING / "golden.c"]
    flags = ["-std=c++17", f'-DMHC_ARCH="{arch}"', f"-I{PORTING}", f"-I{bundle / arch}", "-ldl"]
    assert call(nvcc, *flags, *sources, "-o", host, **with_path_of(nvcc)).returncode == 0
    done = call(host, bundle, LD_LIBRARY_PATH=os.environ.get("LD_LIBRARY_PATH", ""))
    assert done.returncode == 0, done.stdout + done.stderr
