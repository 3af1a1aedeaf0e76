"""JAX on exported kernels: examples/porting/jax, built from bundles of both kinds of stream.

Would catch: a kernel that is given another's buffers or sizes, partial sums in another order than PyTorch's operators
take, a gradient of another argument, results that depend on jit or on vmap, a library taken for another bundle's.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import numpy as np
import pytest
import torch
from differentiable import FUNCTIONS, gradients, requiring, upstream
from helpers import assert_same_bits

from mhc_tilelang import ops, reference
from mhc_tilelang.bundle import cpu_target, export, golden, workload
from mhc_tilelang.checking.comparison import numpy64
from mhc_tilelang.checking.inputs import Case, Inputs
from mhc_tilelang.checking.tolerance import UNIT_ROUNDOFF
from mhc_tilelang.compiler.cpu import build
from mhc_tilelang.compiler.kernel import dtype_name
from mhc_tilelang.spec import MHCSpec

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "porting" / "jax"
sys.path.insert(0, str(EXAMPLE))
from mhc_jax import Sublayer  # noqa: E402
from train import train  # noqa: E402

pytestmark = pytest.mark.skipif(which("cmake") is None, reason="no cmake")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ARGUMENTS = {"pre": ("x", "phi", "alpha", "bias"), "post": ("x", "layer_output", "h_post", "h_res")}
STREAMS = ("layer_input", "x_next", "x", "layer_output")
MANY = 1100  # tokens: two partial sums of g_phi, and more of alpha and bias than are added in one lane
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_function = pytest.mark.parametrize("function", [FUNCTIONS["pre"], FUNCTIONS["post"]], ids=lambda f: f.name)


def sublayer_functions(spec: MHCSpec, inputs: Inputs) -> Iterator[list[torch.Tensor]]:
    """Yield the results of the functions that JAX calls in a bundle."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in vars(inputs).items()}
    yield [*ops.pre(*(leaves[name] for name in ARGUMENTS["pre"]), spec)]
    yield [ops.post(*(leaves[name] for name in ARGUMENTS["post"]))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """Build a bundle in a folder for each dtype. cmake compiles the sources, so the export need not.

    With -O1: less than half the time, and the same bits.
    """
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "functions", sublayer_functions)
        patch.setattr(workload, "streams", lambda *_: [])
        patch.setattr(workload, "TOKEN_COUNTS", (1, MANY))
        patch.setattr(build, "FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in build.FLAGS))
        patch.setattr(cpu_target, "compile_library", lambda *_: [])
        patch.setattr(golden, "make", lambda *_: {})
        patch.setattr(golden, "write", lambda *_: None)
        for name, dtype in DTYPES.items():
            made[dtype] = tmp_path_factory.mktemp(name)
            export.export(MHCSpec(64), name, ["cpu"], made[dtype] / "bundle")
    include = f"-DXLA_FFI_INCLUDE={jax.ffi.include_dir()}"
    for place in made.values():
        configure = ["cmake", "-S", EXAMPLE, "-B", place / "build/jax", f"-DMHC_BUNDLE={place / 'bundle'}", include]
        for command in (configure, ["cmake", "--build", place / "build/jax", "--parallel", "2"]):
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return made


@pytest.fixture(scope="module")
def sublayers(folders: dict[torch.dtype, Path]) -> dict[torch.dtype, Sublayer]:
    """Return the functions of each dtype's build."""
    return {dtype: Sublayer(place / "bundle", place / "build/jax/libmhc_jax.so") for dtype, place in folders.items()}


def arrays(tensors: list[torch.Tensor]) -> list[jax.Array]:
    """Convert tensors to JAX arrays."""
    return [jnp.from_dlpack(tensor.detach().contiguous()) for tensor in tensors]


def tensors_of(results: list[jax.Array]) -> list[torch.Tensor]:
    """And back."""
    return [torch.from_dlpack(result) for result in results]


def call(mhc: Sublayer, name: str, given: list[jax.Array]) -> tuple[jax.Array, ...]:
    """The results of `pre` or `post`, always as a tuple."""
    results = getattr(mhc, name)(*given)
    return results if isinstance(results, tuple) else (results,)


def forward_and_backward(mhc: Sublayer, name: str, jit: bool = True):
    """A function of the arguments and of the gradients of results: the results, and the gradients of arguments."""

    def both(given, g_results):
        results, pull = jax.vjp(lambda *arguments: call(mhc, name, arguments), *given)
        return results, pull(g_results)

    return jax.jit(both) if jit else both


# Of the norm over all tokens, as in test_autograd: float32 rounds to 6e-8, sums of K = 256 terms and Sinkhorn's 39
# steps there and back add up to 16 or 9 times that as a random walk does, 1e-6; ten times more for room. What is a
# stream's is rounded once more, to its dtype.
SUMS = 1e-5


def tolerance(name: str, dtype: torch.dtype) -> float:
    return SUMS + (UNIT_ROUNDOFF[dtype_name(dtype)] if name in STREAMS else 0)


def assert_near(got: torch.Tensor, exact: np.ndarray, name: str, dtype: torch.dtype, scale: float | None = None):
    """Assert closeness in the norm; `scale` is that of what was summed where a sum may nearly cancel."""
    assert got.shape == exact.shape, name
    assert got.dtype == (dtype if name in STREAMS else torch.float32), name
    scale = np.linalg.norm(exact) if scale is None else scale
    assert np.linalg.norm(numpy64(got) - exact) <= tolerance(name, dtype) * scale, name


@every_function
@pytest.mark.parametrize(
    ("dtype", "jit"),
    [
        pytest.param(torch.bfloat16, True, id="bfloat16-jit"),
        pytest.param(torch.float32, False, id="float32-eager"),
        pytest.param(torch.bfloat16, False, id="bfloat16-eager", marks=pytest.mark.full),
        pytest.param(torch.float32, True, id="float32-jit", marks=pytest.mark.full),
    ],
)
def test_matches_float64(function, dtype, jit, sublayers):
    """Results and every gradient, of random upstream gradients."""
    case, name = Case(4, 64, dtype, 21), function.name
    inputs = {key: tensor for key, tensor in function.tensors(case, (3, 7)).items() if key in ARGUMENTS[name]}
    spec = {"spec": case.spec} if name == "pre" else {}
    exact = getattr(reference, name)(*map(numpy64, inputs.values()), **spec)
    exact = exact if isinstance(exact, tuple) else (exact,)
    g_results = upstream([torch.empty(e.shape, dtype=dtype if k == 0 else torch.float32) for k, e in enumerate(exact)])
    got, got_gradients = forward_and_backward(sublayers[dtype], name, jit)(
        arrays(inputs.values()), tuple(arrays(g_results))
    )
    names = ("layer_input", "h_post", "h_res") if name == "pre" else ("x_next",)
    for key, result, expected in zip(names, tensors_of(got), exact, strict=True):
        assert_near(result, expected, key, dtype)

    def backward64(at=slice(None)):
        taken = [numpy64(g)[at] for g in g_results]
        tokenwise = [numpy64(t)[at] if key not in ("phi", "alpha", "bias") else numpy64(t) for key, t in inputs.items()]
        return getattr(reference, f"{name}_backward")(*taken, *tokenwise, **spec)[: len(inputs)]

    for key, gradient, expected in zip(inputs, tensors_of(got_gradients), backward64(), strict=True):
        scale = None
        if key == "alpha":  # three sums over tokens that may nearly cancel
            scale = np.linalg.norm(
                [backward64((slice(i, i + 1), slice(j, j + 1)))[2] for i in range(3) for j in range(7)]
            )
        assert_near(gradient, expected, key, dtype, scale)


@every_function
@every_dtype
def test_same_bits_as_pytorch(function, dtype, sublayers):
    """Results and gradients, where partial sums are several; none for no token, whose parameters' gradients are 0."""
    both = forward_and_backward(sublayers[dtype], function.name)
    for num_tokens in (MANY, 0):
        case = Case(4, 64, dtype, num_tokens)
        inputs = requiring({k: t for k, t in function.tensors(case).items() if k in ARGUMENTS[function.name]})
        results = function.call(inputs, case.spec)
        g_results = upstream(results)
        expected = gradients(results, inputs, g_results).values()
        got, got_gradients = both(arrays(inputs.values()), tuple(arrays(g_results)))
        assert_same_bits(tensors_of(got), [result.detach() for result in results])
        assert_same_bits(tensors_of(got_gradients), list(expected))


def a_loss(mhc: Sublayer, x, phi, alpha, bias, weights):
    """A number that depends on every result of both functions, through a layer."""
    layer_input, h_post, h_res = mhc.pre(x, phi, alpha, bias)
    x_next = mhc.post(x, jnp.tanh(layer_input), h_post, h_res)
    return (x_next.astype(jnp.float32) * weights).sum()


def test_transformations(sublayers):
    """vmap is the leading dimension to the bit; recomputation and a transposed layout change no bit; gradients of what
    vmap shares add up.
    """
    mhc = sublayers[torch.bfloat16]
    tensors = FUNCTIONS["pre"].tensors(Case(4, 64, torch.bfloat16, 10), (2, 5))
    x, *parameters = arrays([tensors[name] for name in ARGUMENTS["pre"]])
    weights = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    results = tensors_of(mhc.pre(x, *parameters))
    mapped = jax.jit(jax.vmap(mhc.pre, in_axes=(0, None, None, None)))(x, *parameters)
    assert_same_bits(tensors_of(mapped), results)
    phi, *rest = parameters
    transposed = jax.jit(lambda x, phi, *rest: mhc.pre(x.swapaxes(0, 2), phi.T, *rest))
    assert_same_bits(tensors_of(transposed(x.swapaxes(0, 2), phi.T, *rest)), results)

    whole = jax.jit(jax.grad(lambda *a: a_loss(mhc, *a, weights), argnums=(0, 1, 2, 3)))(x, *parameters)
    again = jax.jit(jax.grad(jax.checkpoint(lambda *a: a_loss(mhc, *a, weights)), argnums=(0, 1, 2, 3)))
    assert_same_bits(tensors_of(again(x, *parameters)), tensors_of(whole))

    def of_each(x, *parameters):
        losses = jax.vmap(lambda x, w: a_loss(mhc, x, *parameters, w))(x, weights)
        return losses.sum()

    apart = jax.jit(jax.grad(of_each, argnums=(0, 1, 2, 3)))(x, *parameters)
    assert_same_bits(tensors_of(apart[:1]), tensors_of(whole[:1]))
    for got, expected in zip(apart[1:], whole[1:], strict=True):  # two sums of 5 tokens for one of 10
        scale = np.abs(np.asarray(expected)).max()
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=SUMS * scale)


def test_donated_arguments_are_not_overwritten_early(sublayers):
    """A donated stream may become x_next's memory only after it was read."""
    mhc = sublayers[torch.float32]
    tensors = FUNCTIONS["post"].tensors(Case(4, 64, torch.float32, 33))
    expected = mhc.post(*arrays(tensors.values()))
    donating = jax.jit(mhc.post, donate_argnums=0)
    given = [jnp.copy(array) for array in arrays(tensors.values())]
    assert_same_bits(tensors_of([donating(*given)]), tensors_of([expected]))
    assert given[0].is_deleted()


def test_what_is_refused(sublayers, folders):
    """Another dtype or shape, second derivatives, forward mode, an unknown kernel, another bundle's library."""
    mhc = sublayers[torch.bfloat16]
    tensors = FUNCTIONS["pre"].tensors(Case(4, 64, torch.bfloat16, 6))
    x, phi, alpha, bias = arrays([tensors[name] for name in ARGUMENTS["pre"]])
    with pytest.raises(TypeError, match="pre: x: expected bfloat16, got float32"):
        mhc.pre(x.astype(jnp.float32), phi, alpha, bias)
    with pytest.raises(ValueError, match=r"pre: phi: expected shape \[24, 256\], got \[256, 24\]"):
        mhc.pre(x, phi.T, alpha, bias)
    with pytest.raises(ValueError, match=r"post: layer_output: expected shape \[6, 64\], got \[3, 64\]"):
        mhc.post(x, x[:3, 0], alpha, bias)

    def loss(bias):
        return a_loss(mhc, x, phi, alpha, bias, 1.5)

    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda bias: jax.grad(loss)(bias).sum())(bias)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (bias,), (bias,))
    with pytest.raises(ValueError, match="expected a bundle with the kernel sinkhorn, got one with project_rows24"):
        mhc._kernel("sinkhorn")
    bundle, other = folders[torch.bfloat16] / "bundle", folders[torch.float32] / "build/jax/libmhc_jax.so"
    with pytest.raises(ValueError, match=r"libmhc_jax\.so: expected one built from .*bundle"):
        Sublayer(bundle, other)
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        Sublayer(bundle, folders[torch.bfloat16] / "build/jax/libmhc_jax.so", threads=0)


def test_the_example_trains(sublayers):
    """20 steps take it from worse than guessing, log 32 = 3.5, to near certainty. Catches wrong gradients."""
    losses = train(sublayers[torch.bfloat16])
    assert losses[0] > np.log(32)
    assert losses[-1] < 0.1


def test_the_page_runs(folders, monkeypatch):
    """The Python of docs/porting/jax.md, word for word, beside a bundle and its build."""
    monkeypatch.chdir(folders[torch.bfloat16])
    page = (ROOT / "docs" / "porting" / "jax.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(compile(code, "jax.md", "exec"), names)
    assert names["gradients"][0].shape == (24, 256)
