"""Compile the CPU's kernels and keep them on disk.

A kernel's entry in the cache (`disk_cache`) is named by a hash of what it was made from: the sources of kernels and
lowering, the sizes, tilelang's version, the compiler's flags. So nothing stale is loaded, and a kernel that is found
needs neither tilelang nor a compiler (which compiler made it is not asked, or one would be needed to look). The
folder carries a hash of the processor's features, since `-march=native` code from one machine of a shared home may
not run on another.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import kernels
from ...errors import CompilerError
from ..disk_cache import Made, get_or_make, location, put
from ..json_input import fields
from ..kernel import Kernel, Signature
from ..toolchain import CXX_NAMES, Tool, find_cxx, output_of
from ..tracing import progress, signature_of, trace

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent
NUMBERS: dict[str, Any] = {"int32": ctypes.c_int64, "float32": ctypes.c_float}  # scalars as `emit` has them
# No flag here lets the compiler change a float32 result: contraction is off (fma is written out where it is
# meant), and errno and traps, which nothing reads, only keep loops from becoming vector code.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-shared",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]


def load(family: str, parameters: dict[str, Any], checked: bool = False) -> Kernel:
    """Return the kernel, from disk if it is there. `checked` builds stop the process on an index out of bounds."""
    name = entry_name(family, parameters, checked)

    def use(facts: dict[str, Any], library: Path) -> Kernel:
        symbol = fields(facts, {"symbol": str}, name)["symbol"]
        return bind(library, family, symbol, Signature.from_json(facts, name))

    return get_or_make(folder(), name, partial(build, family, parameters, checked, name), use)


def entry_name(family: str, parameters: dict[str, Any], checked: bool = False) -> str:
    """Return the name of a kernel's cache entry."""
    return f"{family}-{kernel_hash(family, parameters, checked)}"


def is_built(family: str, parameters: dict[str, Any]) -> bool:
    """Whether the cache has a kernel, sound or not."""
    return (location() / folder() / f"{entry_name(family, parameters)}.so").exists()


def build(family: str, parameters: dict[str, Any], checked: bool, name: str, scratch: Path) -> Made:
    """Trace, emit, compile: the library and what describes it. The source is left beside, for readers."""
    from .emit import emit

    with progress(family, "cpu", parameters):
        func = trace(family, parameters)
        cpp, library = scratch / f"{family}.cpp", scratch / f"{name}.so"
        cpp.write_text(emit(func, checked), encoding="utf-8")
        run_compiler(cpp, library, checked)
    put(cpp, scratch.parent / f"{name}.cpp")
    return {"symbol": str(func.attrs["global_symbol"]), **asdict(signature_of(func))}, library


def run_compiler(source: Path, library: Path, checked: bool = False) -> None:
    """Compile a library; a `checked` one without optimising it, which takes g++ a third as long."""
    tool = cxx()
    optimised = ["-O0"] if checked else []
    command = [tool.path, *tool.arguments, *flags(), *optimised, f"-I{HERE}", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompilerError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")


def bind(library: Path, name: str, symbol: str, signature: Signature) -> Kernel:
    """Bind a function of a compiled library as a Kernel. The library is loaded as it is: the caller has checked it."""
    import torch  # before the library: its OpenMP threads are the ones that the kernel runs on

    function = getattr(ctypes.CDLL(str(library)), symbol)
    numbers = [ctypes.c_int64] * len(signature.sizes) + [NUMBERS[dtype] for dtype in signature.scalars.values()]
    function.argtypes = [ctypes.c_void_p] * len(signature.buffers) + numbers + [ctypes.c_int]
    function.restype = None

    def launch(tensors: Sequence[torch.Tensor], sizes: dict[str, int], scalars: list[float]) -> None:
        pointers = [tensor.data_ptr() for tensor in tensors]
        function(*pointers, *sizes.values(), *scalars, torch.get_num_threads())

    return Kernel(name, signature, launch, function)


def folder() -> str:
    """Return the cache folder of this processor's kernels."""
    return f"cpu-{processor_hash()}"


def kernel_hash(family: str, parameters: dict[str, Any], checked: bool) -> str:
    """Return a hash of what a library is made from."""
    made_from = [family, repr(sorted(parameters.items())), str(checked), metadata.version("tilelang"), *flags()]
    return digest("\0".join([*made_from, sources_hash()]))


@cache
def sources_hash() -> str:
    """Return a hash of the sources of the kernels, of this folder, and of what describes a kernel to its caller."""
    files = [*Path(kernels.__file__).parent.glob("*.py"), *HERE.glob("*.py"), *HERE.glob("*.h")]
    files += [HERE.parent / "tracing.py", HERE.parent / "kernel.py"]
    return digest("\0".join(f"{path.name}\0{path.read_text(encoding='utf-8')}" for path in sorted(files)))


@cache
def processor_hash() -> str:
    """Return a hash of what `-march=native` depends on: the processor's model and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        facts = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    except OSError:
        facts = [output_of(["sysctl", "-n", "machdep.cpu"]), platform.processor()]
    return digest("\0".join([platform.machine(), *facts]))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def cxx() -> Tool:
    """Return the C++ compiler. Raises CompilerError that says what to install if there is none."""
    tool = find_cxx()
    if tool is None:
        wanted = os.environ.get("CXX", "").strip() or ", ".join(CXX_NAMES)
        raise CompilerError(
            f"no C++ compiler: looked for {wanted}. The CPU target builds its kernels with one: install g++ "
            "or clang++, or name it in $CXX"
        )
    return tool


@cache
def flags(march: str = "native") -> tuple[str, ...]:
    """Return the compiler's flags for this processor, or for another architecture of its kind."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    chosen = [f"-march={march}", "-mprefer-vector-width=512"] if x86 else [f"-mcpu={march}"]
    # Apple's clang has no OpenMP: the pragma is skipped and kernels run on one thread.
    parallel = [] if platform.system() == "Darwin" else ["-fopenmp"]
    return (*FLAGS, *chosen, *parallel)
