"""Bad arguments: refused by name, with what was expected and what came, before anything is compiled.

Would catch: an argument that is not looked at, a check after the first kernel, an error of PyTorch's in the
place of ours.
"""

import math
import warnings

import pytest
import torch
from refusals import (
    FUNCTIONS,
    PROJECTING,
    TOKEN_TENSORS,
    C,
    K,
    M,
    T,
    arguments_of,
    assert_refused,
    call,
    every_tensor,
    n,
    no_kernel,  # noqa: F401  a fixture
    not_dense,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import mhc_tilelang as mhc
from mhc_tilelang import MHCSpec, ops

pytestmark = pytest.mark.usefixtures("no_kernel")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_good_arguments_reach_a_kernel(function):
    """Tests the other tests: what they change is the only thing that is wrong."""
    with pytest.raises(pytest.fail.Exception, match="was asked for"):
        call(function)


@every_tensor
@pytest.mark.parametrize("value", [None, [[1.0]], 3])
def test_wrong_type(function, argument, value):
    if (argument, value) == ("norm_weight", None) or (function, argument, value) == ("post", "h_res", None):
        return  # its default
    assert_refused(TypeError, function, argument, ["expected a torch.Tensor, got"], **{argument: value})


@every_tensor
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64, torch.quint8])
def test_wrong_dtype(function, argument, dtype):
    tensor = arguments_of(function)[argument]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors are deprecated
        tensor = torch.quantize_per_tensor(tensor, 0.1, 0, dtype) if dtype == torch.quint8 else tensor.to(dtype)
    assert_refused(TypeError, function, argument, ["expected dtype", f"got {dtype}"], **{argument: tensor})


@every_tensor
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_reach_a_kernel(function, argument, dtype):
    """Each argument by itself, the others float32."""
    with pytest.raises(pytest.fail.Exception, match="was asked for"):
        call(function, **{argument: arguments_of(function)[argument].to(dtype)})


@pytest.mark.parametrize("function", ["post", "post_pre", "post_head"])
def test_a_layer_of_the_other_sixteen_bits(function):
    """A layer's dtype is x's or float32: nothing is converted from one 16-bit format to the other."""
    changed = {"x": arguments_of(function)["x"].bfloat16(), "layer_output": torch.zeros(T, C).half()}
    parts = ["expected dtype torch.bfloat16 or torch.float32, got torch.float16"]
    assert_refused(TypeError, function, "layer_output", parts, **changed)


@every_tensor
def test_not_dense(function, argument):
    """Before a shape, a stride or the dispatcher is asked, each of which fails in PyTorch's own words."""
    for kind, value in not_dense(arguments_of(function)[argument]).items():
        assert_refused(ValueError, function, argument, ["expected a dense tensor", kind], **{argument: value})


@every_tensor
def test_wrong_shape(function, argument):
    """Each dimension one element short."""
    tensor = arguments_of(function)[argument]
    for axis in range(tensor.ndim):
        short = tensor.narrow(axis, 0, tensor.shape[axis] - 1).contiguous()
        if (argument == "h" and (function == "expand" or axis == 0)) or (argument in ("x", "logits") and axis == 0):
            continue  # any C will do for h, and the first tensor says how many tokens there are
        if function == "collapse" or (function, argument) == ("aggregate", "x"):
            if axis == 1 and function == "aggregate":  # any n and C will do to collapse
                assert_refused(ValueError, function, "h_pre", ["expected", "got [6, 4]"], x=short)
            continue
        if (function, argument) == ("post", "x"):
            blamed = "h_post" if axis == 1 else "layer_output"  # n = 3 is not h_post's, nor C = 63 layer_output's
            assert_refused(ValueError, function, blamed, ["expected", "got"], x=short)
            continue
        leading = axis == 0 and (function, argument) in TOKEN_TENSORS
        got = short.shape[:1] if leading else short.shape
        assert_refused(ValueError, function, argument, ["expected", f"got {list(got)}"], **{argument: short})


@pytest.mark.parametrize("function", PROJECTING)
def test_transposed_phi(function):
    phi = arguments_of(function)["phi"].T.contiguous()
    rows = n if "head" in function else M
    parts = [f"expected shape [{rows}, {K}], got [{K}, {rows}]", "transposed?"]
    assert_refused(ValueError, function, "phi", parts, phi=phi)


@pytest.mark.parametrize("function", PROJECTING)
def test_spec_of_other_sizes(function):
    """The spec rules: x is what disagrees."""
    for spec in (MHCSpec(65), MHCSpec(64, num_streams=2)):
        if function == "expand_pre":  # h has no streams: phi is what disagrees in their number
            argument = "h" if spec.hidden_size != C else "phi"
            assert_refused(ValueError, function, argument, ["expected shape", "got"], spec=spec)
            continue
        wanted = f"expected shape [..., {spec.num_streams}, {spec.hidden_size}], got [{T}, {n}, {C}]"
        assert_refused(ValueError, function, "x", [wanted], spec=spec)


def test_stream_and_channel_axes_swapped():
    wanted = "expected shape [..., 4, 64], got [6, 64, 4]"
    assert_refused(ValueError, "pre", "x", [wanted], x=torch.zeros(T, C, n))


@pytest.mark.parametrize("function", PROJECTING)
def test_spec_is_no_spec(function):
    for spec in (None, {"hidden_size": 64}, 64, MHCSpec):
        assert_refused(TypeError, function, "spec", ["expected an MHCSpec, got"], spec=spec)


@every_tensor
def test_two_devices(function, argument):
    """The meta device stands in for a second one. The first tensor's device is the call's."""
    tensor = arguments_of(function)[argument].to("meta")
    if argument in ("h", "logits") or function == "collapse":
        return  # a single tensor: see test_device_without_kernels
    if argument == "x":  # the first one: it may be blamed for what it is, or the second for being elsewhere
        second = {"post": "layer_output", "aggregate": "h_pre"}.get(function, "phi")
        with pytest.raises(ValueError, match=rf"^{function}: {second}: expected device meta, got cpu$"):
            call(function, x=tensor)
    else:
        assert_refused(ValueError, function, argument, ["expected device cpu, got meta"], **{argument: tensor})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_device_without_kernels(function):
    """Every tensor on a device of another make: fake ones, which need no such machine."""
    first = next(iter(arguments_of(function)))
    with FakeTensorMode():
        moved = {
            k: torch.empty(v.shape, device="xpu") if isinstance(v, torch.Tensor) else v
            for k, v in arguments_of(function).items()
        }
        assert_refused(ValueError, function, first, ["cpu or cuda or meta", "got xpu:0"], **moved)


@every_tensor
def test_not_contiguous(function, argument):
    """Refused, not copied: a copy of the wide stream would cost more than the kernel."""
    tensor = arguments_of(function)[argument]
    if tensor.numel() == 1:
        return  # one element lies contiguous at any stride
    strided = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)[..., 0]
    parts = ["expected a contiguous tensor, got strides", str(tuple(strided.stride())), ".contiguous()"]
    assert_refused(ValueError, function, argument, parts, **{argument: strided})


@every_tensor
def test_tangents(function, argument):
    """Forward mode: a tangent must not be dropped without a word."""
    tensor = arguments_of(function)[argument]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensor, torch.ones_like(tensor))
        assert_refused(mhc.GradientError, function, argument, ["tangent"], **{argument: dual})


@pytest.mark.parametrize(("function", "argument"), TOKEN_TENSORS)
@pytest.mark.parametrize("leading", [(), (1,), (5,), (7,), (2, 3), (6, 1)])
def test_leading_dimensions_that_disagree(function, argument, leading):
    """Neither broadcast nor regrouped: [2, 3] tokens are not [6]."""
    tensor = torch.zeros(*leading, *arguments_of(function)[argument].shape[1:])
    parts = [f"expected leading dimensions [{T}], got {list(leading)}"]
    assert_refused(ValueError, function, argument, parts, **{argument: tensor})


@pytest.mark.parametrize("num_streams", [0, 9, 16, -4])
def test_stream_counts_without_kernels(num_streams):
    parts = ["(1, 2, 3, 4, 5, 6, 7, 8)", f"got {num_streams}"]
    assert_refused(ValueError, "expand", "num_streams", parts, num_streams=num_streams)
    if num_streams > 0:
        sized = torch.zeros(T, num_streams, num_streams)
        assert_refused(ValueError, "sinkhorn", "logits", parts, logits=sized)
        assert_refused(ValueError, "post", "x", parts, x=torch.zeros(T, num_streams, C))


@pytest.mark.parametrize("num_streams", [4.0, "4", None, True])
def test_stream_count_is_no_integer(num_streams):
    assert_refused((TypeError, ValueError), "expand", "num_streams", ["expected", "got"], num_streams=num_streams)


def test_matrices_that_are_not_square():
    parts = ["expected square matrices [..., n, n], got [6, 4, 2]"]
    assert_refused(ValueError, "sinkhorn", "logits", parts, logits=torch.zeros(T, 4, 2))


@pytest.mark.parametrize(("function", "argument"), [("expand", "h"), ("post", "x"), ("sinkhorn", "logits")])
def test_too_few_dimensions(function, argument):
    assert_refused(ValueError, function, argument, ["expected shape [...", "got []"], **{argument: torch.zeros(())})


@pytest.mark.parametrize(("function", "changed"), [("expand", {"h": (T, 0)}), ("post", {"x": (T, n, 0)})])
def test_no_channels(function, changed):
    """C = 0 is no hidden size, as MHCSpec says."""
    [(argument, shape)] = changed.items()
    more = {"layer_output": torch.zeros(T, 0)} if function == "post" else {}
    tensor = torch.zeros(*shape)
    parts = ["expected", f"got {list(shape)}"]
    assert_refused(ValueError, function, argument, parts, **{argument: tensor}, **more)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"iters": 0}, ValueError),
        ({"iters": -1}, ValueError),
        ({"iters": 2.0}, TypeError),
        ({"iters": None}, TypeError),
        ({"eps": -1e-6}, ValueError),
        ({"eps": math.nan}, ValueError),
        ({"eps": math.inf}, ValueError),
        ({"eps": "0"}, TypeError),
    ],
)
def test_sinkhorn_constants(changed, error):
    [(argument, value)] = changed.items()
    with pytest.raises(error, match=rf"{argument}: expected .*, got .*{value}"):
        call("sinkhorn", **changed)


def test_sinkhorn_names_its_own_arguments():
    """Not those of the spec that checks them."""
    with pytest.raises(ValueError, match="sinkhorn: iters: expected 1 to"):
        ops.sinkhorn(torch.zeros(1, 2, 2), iters=10**12)
    with pytest.raises(TypeError, match="sinkhorn: eps: expected float"):
        ops.sinkhorn(torch.zeros(1, 2, 2), eps="small")
