"""A sublayer on numpy arrays: the kernels read and write the arrays' own memory, through DLPack.

python examples/porting/numpy_dlpack.py

float32 arrays pass as they are. numpy has no bfloat16; ml_dtypes adds one that DLPack does not know, so its bits go
over as int16 and are viewed again on the other side. Arrays must be writable and contiguous.
"""

import ml_dtypes
import numpy as np
import torch

import mhc_tilelang as mhc
from mhc_tilelang import reference

spec = mhc.MHCSpec.deepseek_v4(hidden_size=192)
n, C, T = spec.num_streams, spec.hidden_size, 64
random = np.random.default_rng(0)


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """Return a tensor on the array's memory."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def normal(*shape: int, std: float = 1.0) -> np.ndarray:
    return random.normal(0, std, shape).astype(np.float32)


phi = normal(spec.num_coefficients, spec.stream_size, std=spec.stream_size**-0.5)
alpha, bias = np.ones(3, np.float32), normal(spec.num_coefficients)
weight = normal(C, C, std=C**-0.5)
# Of the norm: what float32 sums of n·C products leave, and one rounding to bfloat16.
roundings = {np.dtype(np.float32): 1e-6, np.dtype(ml_dtypes.bfloat16): 2.0**-8}

for dtype, tolerance in roundings.items():
    x = normal(T, n, C).astype(dtype)
    layer_input, x_next = np.empty((T, C), dtype), np.empty_like(x)
    h_post, h_res = np.empty((T, n), np.float32), np.empty((T, n, n), np.float32)

    parameters = (tensor_of(phi), tensor_of(alpha), tensor_of(bias), spec)
    buffers = (tensor_of(layer_input), tensor_of(h_post), tensor_of(h_res))
    assert buffers[0].data_ptr() == layer_input.ctypes.data  # nothing was copied
    mhc.pre(tensor_of(x), *parameters, out=buffers)
    layer_output = (layer_input.astype(np.float32) @ weight).astype(dtype)  # any layer, in numpy
    mhc.post(tensor_of(x), tensor_of(layer_output), *buffers[1:], out=tensor_of(x_next))

    exact_input, exact_post, exact_res = reference.pre(x, phi, alpha, bias, spec)
    exact_next = reference.post(x, layer_output, exact_post, exact_res)
    for name, got, exact in (("layer_input", layer_input, exact_input), ("x_next", x_next, exact_next)):
        error = np.linalg.norm(got.astype(np.float64) - exact) / np.linalg.norm(exact)
        print(f"{dtype.name:9} {name:12} {got.shape!s:14} error against float64 {error:.1e}, at most {tolerance:.1e}")
        assert error <= tolerance
