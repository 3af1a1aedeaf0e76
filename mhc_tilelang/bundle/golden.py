"""Golden vectors: for every kernel its inputs, the results in float64, and how far off a result may be.

A result is what the kernel's own code gives in float64 (`float64.h`): the CPU lowering's C++ of the target's kernel,
compiled with doubles for floats. Where a kernel rounds to 16 bits, it is rounded. So a golden vector says whether a
port runs the kernel as it is; whether the kernel is right is what `mhc-tilelang check` says.

The tolerance is the spread of results when every operation rounds 16 times as coarsely as float32, in RUNS runs: a
float32 kernel with another order of sums, or an exp of a few ULPs, is well within; a product in TF32 or bfloat16 is
512 or 4096 times as coarse and is not. One ULP of the stored dtype comes on top, as a share of the value:

    |got − expected| ≤ atol + rtol · |expected|              atol = rtol = 0 where nothing is rounded

Kernels written thread by thread (`kernels.warps`) have no such form and no golden vector: a model's run takes their
results from the executor of generated CUDA code, so that the kernels behind them have their inputs.

Inputs are those that the kernels get when a model of a few tokens runs; a kernel that only many tokens need gets
random ones. Of an output of many elements every STEP-th is kept, STEP having no divisor in common with its sizes.

All arrays lie in golden/vectors.npz, equal ones once, and none compressed: numpy loads them by name, and a host without
numpy finds an array's bytes at its offset in the file.
"""

from __future__ import annotations

import ctypes
import io
import json
import math
import struct
import subprocess
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from .. import compiler
from ..compiler.cpu.build import cxx
from ..compiler.kernel import Kernel
from ..errors import CompilerError
from ..spec import MHCSpec
from . import manifest, workload
from .described import OUTPUT, UNUSED, Described, key_of

AMPLITUDE = 16 * 2.0**-24
RUNS = 3
ULP = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}
RANDOM_SIZE = 37  # of the run-time sizes of a kernel that a model of five tokens does not launch
SEED = 1234
MANY = 1 << 15  # elements of an output that are kept, about
ARRAYS = "golden/vectors.npz"
HERE = Path(__file__).parent
PASSED: dict[str, Any] = {
    "int64_t": ctypes.c_int64,
    "float": lambda value: ctypes.c_double(ctypes.c_float(value).value),  # as a mhc::real is: the double in it
}


class Recorder:
    """Computes kernels in float64 as a model launches them, and keeps the first call of each."""

    def __init__(
        self,
        kernels: Sequence[Described],
        target: str,
        arrays: dict[str, Any],
        scratch: Path,
        tick: Callable[[], object],
    ) -> None:
        self.kernels = {key_of(kernel.family, kernel.parameters): kernel for kernel in kernels}
        self.target, self.arrays, self.scratch, self.tick = target, arrays, scratch, tick
        self.names = {manifest.sha256(array.tobytes()): name for name, array in arrays.items()}
        self.vectors: dict[str, dict[str, Any]] = {}

    def load(self, family: str, parameters: dict[str, Any]) -> Kernel:
        """Return a kernel as `compile.emulating` asks for it."""
        kernel = self.kernels[key_of(family, parameters)]
        if is_by_threads(kernel):
            return self.executed(kernel)
        library = compile_float64(kernel, self.scratch)

        def launch(tensors: Sequence[torch.Tensor], sizes: dict[str, int], scalars: list[float]) -> None:
            numbers = {**sizes, **dict(zip(kernel.signature.scalars, scalars, strict=True))}
            if kernel.name in self.vectors:
                evaluate(library, kernel, tensors, numbers)
            else:
                self.vectors[kernel.name] = self.record(library, kernel, tensors, numbers)
                self.tick()

        return Kernel(family, kernel.signature, launch)

    def executed(self, kernel: Described) -> Kernel:
        """Return a kernel written by threads, as the executor runs its CUDA code."""
        from ..compiler.simt.launch import launch
        from ..compiler.simt.target import load_or_generate

        source, signature = load_or_generate(kernel.family, kernel.parameters, self.target)
        self.tick()

        def run(tensors: Sequence[torch.Tensor], sizes: dict[str, int], scalars: list[float]) -> None:
            pairs = zip(signature.buffers, tensors, strict=True)
            used = {buffer.name: tensor for buffer, tensor in pairs if buffer.name in source.arguments}
            launch(source, self.target, used, {**sizes, **dict(zip(signature.scalars, scalars, strict=True))})

        return Kernel(kernel.family, signature, run)

    def record(
        self, library: ctypes.CDLL, kernel: Described, tensors: Sequence[torch.Tensor], numbers: Mapping[str, float]
    ) -> dict[str, Any]:
        """Compute a call, and keep its arrays."""
        exact = evaluate(library, kernel, tensors, numbers)
        rounds = library.mhc_operations() > 0
        spread = dict.fromkeys(exact, 0.0)
        for seed in range(RUNS if rounds else 0):
            coarse = evaluate(library, kernel, [t.clone() for t in tensors], numbers, AMPLITUDE, seed + 1)
            for name, values in coarse.items():
                spread[name] = max(spread[name], float(np.abs(values - exact[name]).max(initial=0.0)))
        buffers = []
        for buffer, role, tensor in zip(kernel.signature.buffers, kernel.roles, tensors, strict=True):
            facts: dict[str, Any] = {"name": buffer.name, "dtype": buffer.dtype, "role": role}
            step = step_of(tensor.numel()) if role == OUTPUT else 1
            facts |= {"shape": list(tensor.shape), "array": None, "step": step, "atol": 0.0, "rtol": 0.0}
            if role != UNUSED:
                facts["array"] = self.keep(f"{self.target}.{kernel.name}.{buffer.name}", tensor.flatten()[::step])
            if role == OUTPUT and rounds:
                facts |= {"atol": spread[buffer.name], "rtol": ULP[buffer.dtype]}
            buffers.append(facts)
        return {"kernel": kernel.name, "numbers": dict(numbers), "buffers": buffers}

    def keep(self, name: str, tensor: torch.Tensor) -> str:
        """Return an array's name: that of the first one that is equal to the bit."""
        array = bits_of(tensor).copy()
        known = self.names.setdefault(manifest.sha256(array.tobytes()), name)
        if known == name:
            self.arrays[name] = array
        return known


def is_by_threads(kernel: Described) -> bool:
    """Tell whether a kernel is thread-level code, which the CPU lowering does not take."""
    from ..kernels.warps import PASS_CONFIGS_ATTR

    return PASS_CONFIGS_ATTR in (kernel.func.attrs or {})


def step_of(elements: int) -> int:
    """1 where all elements of an output are kept; else a step that visits every channel, stream and token alike."""
    step = 1
    while elements > step * MANY or math.gcd(step, elements) > 1:
        step += 1
    return step


def make(
    kernels: Sequence[Described],
    spec: MHCSpec,
    dtype: str,
    target: str,
    forward_only: bool,
    rms_norm_eps: float | None,
    arrays: dict[str, Any],
    tick: Callable[[], object],
) -> list[dict[str, Any]]:
    """Make the golden vectors of a target's kernels, add their arrays to `arrays`; a tick per kernel."""
    with TemporaryDirectory(prefix="mhc-golden-") as scratch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        recorder = Recorder(kernels, target, arrays, Path(scratch), tick)
        with compiler.emulating(workload.emulator(target, recorder.load)):
            workload.run(spec, workload.inputs_of(spec, dtype), forward_only, torch.randn_like, rms_norm_eps)
        for kernel in kernels:
            recorded = kernel.name in recorder.vectors or is_by_threads(kernel)
            if not recorded and not kernel.signature.scalars:
                recorder.load(kernel.family, kernel.parameters)(**random_arguments(kernel))
    return [recorder.vectors[kernel.name] for kernel in kernels if kernel.name in recorder.vectors]


def write(folder: Path, arrays: Mapping[str, Any], vectors: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Write `golden/vectors.npz`, and each target's `golden/TARGET/index.json` and `index.txt`."""
    (folder / ARRAYS).parent.mkdir()
    np.savez(folder / ARRAYS, **arrays)
    offsets = offsets_in(folder / ARRAYS)
    for target, index in vectors.items():
        for buffer in (buffer for vector in index for buffer in vector["buffers"]):
            buffer["offset"] = offsets.get(buffer["array"])
        place = folder / "golden" / target
        place.mkdir()
        (place / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        (place / "index.txt").write_text(as_text(index), encoding="utf-8")


def offsets_in(path: Path) -> dict[str, int]:
    """Return the offset of each array's bytes in an uncompressed .npz file."""
    offsets = {}
    with path.open("rb") as file, zipfile.ZipFile(path) as members:
        for member in members.infolist():
            file.seek(member.header_offset + 26)  # of the member's own header: the lengths of name and extra field
            name, extra = struct.unpack("<HH", file.read(4))
            file.seek(member.header_offset + 30 + name + extra)
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            offsets[member.filename.removesuffix(".npy")] = file.tell()
    return offsets


def random_arguments(kernel: Described) -> dict[str, torch.Tensor]:
    """Standard normal buffers of a kernel that no other launch of the model feeds."""
    sizes = dict.fromkeys(kernel.signature.sizes, RANDOM_SIZE) | {"num_tokens": workload.GOLDEN_TOKENS}
    shapes = {b.name: [sizes[d] if isinstance(d, str) else d for d in b.shape] for b in kernel.signature.buffers}
    return {b.name: torch.randn(shapes[b.name]).to(getattr(torch, b.dtype)) for b in kernel.signature.buffers}


def compile_float64(kernel: Described, scratch: Path) -> ctypes.CDLL:
    """Compile a kernel in float64."""
    from ..compiler.cpu.emit import emit

    code = emit(kernel.func.with_attr("global_symbol", kernel.symbol)).replace("runtime.h", "float64.h")
    source, library = scratch / f"{kernel.name}.cpp", scratch / f"{kernel.name}.so"
    source.write_text(code, encoding="utf-8")
    tool = cxx()
    flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{HERE}"]
    command = [tool.path, *tool.arguments, *flags, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompilerError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    found = ctypes.CDLL(str(library))
    found.mhc_operations.restype = ctypes.c_uint64
    found.mhc_arithmetic.argtypes = [ctypes.c_double, ctypes.c_uint64]
    return found


def evaluate(
    library: ctypes.CDLL,
    kernel: Described,
    tensors: Sequence[torch.Tensor],
    numbers: Mapping[str, float],
    amplitude: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Run a kernel in float64 on its tensors, write the results to its outputs; returned as they were before a last
    rounding to 16 bits.
    """
    arrays = [doubles_of(tensor) for tensor in tensors]
    function = getattr(library, kernel.symbol)
    passed = [PASSED[kind](numbers[name]) for name, kind in kernel.numbers.items()]
    function.argtypes = [ctypes.c_void_p] * len(arrays) + [type(number) for number in passed] + [ctypes.c_int]
    library.mhc_arithmetic(amplitude, seed)
    function(*(array.ctypes.data for array in arrays), *passed, 1)
    before = {}
    for buffer, role, tensor, array in zip(kernel.signature.buffers, kernel.roles, tensors, arrays, strict=True):
        if role == OUTPUT:
            before[buffer.name] = array[..., -1]
            tensor.copy_(torch.from_numpy(array[..., 0].copy()))
    return before


def doubles_of(tensor: torch.Tensor) -> Any:
    """Return a tensor as float64.h has it, with a last axis: of one double, of two for what is stored in 16 bits."""
    doubles = tensor.detach().double().numpy()[..., None]
    return np.ascontiguousarray(np.repeat(doubles, 1 if tensor.dtype == torch.float32 else 2, axis=-1))


def bits_of(tensor: torch.Tensor) -> Any:
    """Return a tensor as numpy has it; 16-bit floats as their bits."""
    tensor = tensor.detach().contiguous()
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.int16).numpy().view(np.uint16)


def arrays_of(content: bytes) -> Mapping[str, Any]:
    """Return the arrays of a vectors.npz."""
    loaded: Mapping[str, Any] = np.load(io.BytesIO(content))
    return loaded


def tensor_of(arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> torch.Tensor:
    """Return an input in its shape; of an output the elements that were kept, flat."""
    array = arrays[facts["array"]]
    bits = torch.from_numpy(array if array.dtype == np.float32 else array.view(np.int16))
    tensor = bits.view(getattr(torch, facts["dtype"]))
    return tensor if facts["role"] == OUTPUT else tensor.view(tuple(facts["shape"]))


def as_text(index: Sequence[Mapping[str, Any]]) -> str:
    """Format the index for a host without JSON: words with a space between them.

    mhc-golden 2 KERNELS
    kernel NAME BUFFERS NUMBERS
    number NAME VALUE
    buffer NAME DTYPE ROLE ELEMENTS OFFSET STEP ATOL RTOL          OFFSET is -1 for a buffer that is not touched
    """
    lines = [f"mhc-golden 2 {len(index)}"]
    for vector in index:
        lines.append(f"kernel {vector['kernel']} {len(vector['buffers'])} {len(vector['numbers'])}")
        lines += [f"number {name} {value}" for name, value in vector["numbers"].items()]
        for b in vector["buffers"]:
            elements, offset = math.prod(b["shape"]), -1 if b["offset"] is None else b["offset"]
            words = (b["name"], b["dtype"], b["role"], elements, offset, b["step"], repr(b["atol"]), repr(b["rtol"]))
            lines.append(" ".join(map(str, ("buffer", *words))))
    return "\n".join(lines) + "\n"
