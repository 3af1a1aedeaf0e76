"""A bundle's kernels as JAX functions on the CPU: `pre` and `post` of a sublayer, with their gradients.

Needs jax, a bundle, and the library that CMakeLists.txt builds from it; neither torch nor tilelang.

Each kernel is one `jax.ffi.ffi_call`. Everything between kernels, partial sums included, is a buffer of XLA's, so that
the C++ side allocates nothing. Which kernels make up a function, and how its sums are parted, is what
`mhc_tilelang/launch*.py` does: the results are those of the PyTorch operators to the bit.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from functools import cache
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

TOKENS_PER_PARTIAL, MAX_PARTIALS = 512, 8  # of g_phi: other numbers are as right, in other bits
FEW_PARTIALS = 16  # are added in one lane, more in 16
CONSTANTS = ("sinkhorn_eps", "pre_eps", "rms_eps", "post_scale")  # of the bundle's spec, which kernels take as numbers

Arrays = tuple[jax.Array, ...]


@cache
def register(library: Path) -> tuple[str, str]:
    """Load a library; returns the name by which XLA now knows its handler, and the manifest that it was built from."""
    loaded, name = ctypes.CDLL(str(library)), f"mhc_call:{library}"
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(loaded.mhc_call), platform="cpu")
    return name, (ctypes.c_char * 64).in_dll(loaded, "mhc_manifest").value.decode()


class Sublayer:
    """The functions of one model. T, n, C, M and K are those of docs/conventions.md; leading dimensions are any.

    Streams are in the bundle's dtype, everything else is float32. Each function can be jitted, mapped and
    differentiated once, in reverse mode.

    Args:
        bundle: what `mhc-tilelang export --arch cpu` wrote, not `--forward-only` if gradients are asked for.
        library: what CMakeLists.txt built from it.
        threads: how many OpenMP threads a kernel may run; as many as there are cores unless given. Moves no bit.

    Raises:
        ValueError: the library was built from another bundle, or no thread may run.
    """

    def __init__(self, bundle: str | Path, library: str | Path, threads: int | None = None) -> None:
        content = (Path(bundle) / "manifest.json").read_bytes()
        manifest, made_from = json.loads(content), hashlib.sha256(content).hexdigest()
        self._target, built_from = register(Path(library).resolve())
        if built_from != made_from:
            raise ValueError(f"{library}: expected one built from {bundle} ({made_from}), got one from {built_from}")
        spec = manifest["spec"]
        self.num_streams, self.hidden_size = spec["num_streams"], spec["hidden_size"]
        self.constants = {"iters": spec["sinkhorn_iters"], **{name: spec[name] for name in CONSTANTS}}
        self.rows = self.num_streams * (self.num_streams + 2)
        self.dtype = jnp.dtype(manifest["dtype"])
        self.threads = (os.cpu_count() or 1) if threads is None else threads
        if self.threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        self._kernels = {kernel["name"]: kernel for kernel in manifest["targets"]["cpu"]["kernels"]}
        self._pre = jax.custom_vjp(lambda *arguments: self._pre_forward(*arguments)[0])
        self._pre.defvjp(self._pre_forward, self._pre_backward)
        self._post = jax.custom_vjp(lambda *arguments: self._post_forward(*arguments)[0])
        self._post.defvjp(self._post_forward, self._post_backward)

    def pre(self, x: jax.Array, phi: jax.Array, alpha: jax.Array, bias: jax.Array) -> Arrays:
        """x [..., n, C], phi [M, K], alpha [3], bias [M]
        -> layer_input [..., C], h_post [..., n], h_res [..., n, n].

        Raises TypeError for another dtype, ValueError for another shape.
        """
        n, size, leading = self.num_streams, self.hidden_size, x.shape[:-2]
        check("pre", "x", x, self.dtype, (*leading, n, size))
        parameters = {"phi": (phi, (self.rows, n * size)), "alpha": (alpha, (3,)), "bias": (bias, (self.rows,))}
        for name, (array, shape) in parameters.items():
            check("pre", name, array, jnp.float32, shape)
        results = self._pre(x.reshape(prod(leading), n, size), phi, alpha, bias)
        return tuple(result.reshape(*leading, *result.shape[1:]) for result in results)

    def post(self, x: jax.Array, layer_output: jax.Array, h_post: jax.Array, h_res: jax.Array) -> jax.Array:
        """x [..., n, C], layer_output [..., C], h_post [..., n], h_res [..., n, n] -> x_next [..., n, C].

        Raises TypeError for another dtype, ValueError for another shape.
        """
        n, size, leading = self.num_streams, self.hidden_size, x.shape[:-2]
        check("post", "x", x, self.dtype, (*leading, n, size))
        check("post", "layer_output", layer_output, self.dtype, (*leading, size))
        check("post", "h_post", h_post, jnp.float32, (*leading, n))
        check("post", "h_res", h_res, jnp.float32, (*leading, n, n))
        flat = (
            array.reshape(prod(leading), *array.shape[len(leading) :]) for array in (x, layer_output, h_post, h_res)
        )
        return self._post(*flat).reshape(x.shape)

    def _pre_forward(self, x: jax.Array, phi: jax.Array, alpha: jax.Array, bias: jax.Array) -> tuple[Arrays, Arrays]:
        project = f"project_rows{self.rows}"
        chunks = -(-self.hidden_size // self._plan(project)["channels"])  # all in one split, which leaves one slab
        sizes = {"num_tokens": x.shape[0], "num_slabs": 1, "chunks_per_split": chunks}
        (partial,) = self._call(project, sizes, x=x, phi=phi)
        h_pre, h_post, h_res, projected = self._call(
            f"coefficients_rows{self.rows}", sizes, partial=partial, alpha=alpha, bias=bias
        )
        (layer_input,) = self._call("aggregate", sizes, x=x, h_pre=h_pre)
        return (layer_input, h_post, h_res), (x, phi, alpha, bias, h_pre, projected)

    def _pre_backward(self, saved: Arrays, gradients: Arrays) -> Arrays:
        x, phi, alpha, bias, h_pre, projected = saved
        g_layer_input, g_h_post, g_h_res = gradients
        num_tokens, mappings = x.shape[0], "coefficients_backward_has_g_h_pre_has_g_h_post_has_g_h_res"
        block = self._kernel(mappings)["parameters"]["block"]
        sizes = {"num_tokens": num_tokens, "num_partials": -(-num_tokens // block)}
        (g_h_pre,) = self._call("aggregate_backward", sizes, g_layer_input=g_layer_input, x=x)
        g_projected, partial = self._call(
            mappings,
            sizes,
            g_h_pre=g_h_pre,
            g_h_post=g_h_post,
            g_h_res=g_h_res,
            projected=projected,
            alpha=alpha,
            bias=bias,
        )
        g_alpha, g_bias = jnp.split(self._sum(partial), [alpha.size])

        project = f"project_backward_rows{self.rows}_needs_g_x_needs_g_phi_has_g_layer_input"
        tile = self._plan(project)["tokens"]
        tokens = -(-max(TOKENS_PER_PARTIAL, -(-num_tokens // MAX_PARTIALS)) // tile) * tile
        num_splits = -(-num_tokens // tokens)
        sizes |= {"tokens_per_split": tokens, "num_splits": num_splits}
        g_x, partial = self._call(
            project, sizes, g_projected=g_projected, x=x, phi=phi, h_pre=h_pre, g_layer_input=g_layer_input
        )
        g_phi = partial if num_splits == 1 else self._sum(partial.reshape(num_splits, phi.size))
        return g_x, g_phi.reshape(phi.shape), g_alpha, g_bias

    def _post_forward(self, *arguments: jax.Array) -> tuple[jax.Array, Arrays]:
        names = ("x", "layer_output", "h_post", "h_res")
        sizes = {"num_tokens": arguments[0].shape[0]}
        (x_next,) = self._call("post", sizes, **dict(zip(names, arguments, strict=True)))
        return x_next, arguments

    def _post_backward(self, saved: Arrays, g_x_next: jax.Array) -> Arrays:
        x, layer_output, h_post, h_res = saved
        gradients = self._call(
            "post_backward_needs_g_x_needs_g_layer_output_needs_g_mappings",
            {"num_tokens": x.shape[0]},
            g_x_next=g_x_next,
            x=x,
            layer_output=layer_output,
            h_post=h_post,
            h_res=h_res,
        )
        return tuple(g.reshape(array.shape) for g, array in zip(gradients, saved, strict=True))

    def _sum(self, partial: jax.Array) -> jax.Array:
        """[partials, elements] -> [elements]."""
        num_partials, num_elements = partial.shape
        lanes = 1 if num_partials <= FEW_PARTIALS else 16
        sizes = {"num_partials": num_partials, "num_elements": num_elements}
        return self._call(f"sum_partials_lanes{lanes}", sizes, partial=partial)[0]

    def _call(self, name: str, sizes: dict[str, int], **inputs: jax.Array) -> Arrays:
        """The outputs of a kernel. Inputs have as many elements as it reads; a kernel's [C, 1] is a function's [C]."""
        kernel = self._kernel(name)
        shapes = {b["name"]: tuple(sizes.get(extent, extent) for extent in b["shape"]) for b in kernel["buffers"]}
        outputs = [b for b in kernel["buffers"] if b["role"] == "out"]
        results = [jax.ShapeDtypeStruct(shapes[b["name"]], b["dtype"]) for b in outputs]
        numbers = [{**self.constants, **sizes}[number] for number in (*kernel["sizes"], *kernel["scalars"])]
        if 0 in map(sizes.get, kernel["sizes"]):  # no launch: no token has no outputs, and sums over tokens are zero
            return tuple(jnp.zeros(result.shape, result.dtype) for result in results)
        operands = [inputs[b["name"]].reshape(shapes[b["name"]]) for b in kernel["buffers"] if b["role"] == "in"]
        # Under vmap a kernel runs once for each: partial sums are laid out with tokens innermost.
        call = jax.ffi.ffi_call(self._target, results, vmap_method="sequential")
        return tuple(
            call(
                *operands,
                kernel=name,
                roles="".join(b["role"][0] for b in kernel["buffers"]),
                numbers=np.array(numbers, np.float64),
                threads=np.int64(self.threads),
            )
        )

    def _kernel(self, name: str) -> dict:
        if name not in self._kernels:
            raise ValueError(f"expected a bundle with the kernel {name}, got one with {', '.join(self._kernels)}")
        return self._kernels[name]

    def _plan(self, name: str) -> dict[str, int]:
        return self._kernel(name)["parameters"]["plan"]


def check(function: str, name: str, array: jax.Array, dtype: jnp.dtype, shape: tuple[int, ...]) -> None:
    """Raise TypeError or ValueError where an argument is not of this dtype and shape."""
    if array.dtype != dtype:
        raise TypeError(f"{function}: {name}: expected {jnp.dtype(dtype)}, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{function}: {name}: expected shape {list(shape)}, got {list(array.shape)}")
