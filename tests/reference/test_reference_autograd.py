"""Every gradient against PyTorch's autograd in float64, of the equations written in their plainest form.

The forward here is written anew: where PyTorch and `reference` agree on a gradient, they agree on the function too.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mhc_tilelang import reference

HIDDEN_SIZE, NUM_TOKENS = 7, 5
PAPER = {"sinkhorn_eps": 0.0, "pre_eps": 0.0, "rms_eps": 1e-20}
DEEPSEEK = {"sinkhorn_eps": 1e-6, "pre_eps": 1e-6, "rms_eps": 1e-6}
LARGE = {"sinkhorn_eps": 1e-1, "pre_eps": 1e-1, "rms_eps": 1e-1}


def expand(h, num_streams):
    return torch.stack([h] * num_streams, dim=-2)


def sinkhorn(logits, iters, eps):
    matrix = torch.softmax(logits, dim=-2) + eps
    matrix = matrix / (matrix.sum(dim=-1, keepdim=True) + eps)
    for _ in range(iters - 1):
        matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(dim=-1, keepdim=True) + eps)
    return matrix


def normalize(x, rms_eps):
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + rms_eps)


def gate_head(x, phi, alpha, bias, norm_weight, spec):
    x_norm = norm_weight * normalize(x.flatten(-2), spec.rms_eps)
    return torch.sigmoid(alpha * (x_norm @ phi.T) + bias) + spec.pre_eps


def coefficients(x, phi, alpha, bias, norm_weight, spec):
    n = spec.num_streams
    dots = (norm_weight * normalize(x.flatten(-2), spec.rms_eps)) @ phi.T
    z_pre = alpha[0] * dots[..., :n] + bias[:n]
    z_post = alpha[1] * dots[..., n : 2 * n] + bias[n : 2 * n]
    z_res = alpha[2] * dots[..., 2 * n :] + bias[2 * n :]
    h_res = sinkhorn(z_res.unflatten(-1, (n, n)), spec.sinkhorn_iters, spec.sinkhorn_eps)
    return torch.sigmoid(z_pre) + spec.pre_eps, spec.post_scale * torch.sigmoid(z_post), h_res


def hc_coefficients(x, theta, alpha, bias, norm_weight, spec):
    n = spec.num_streams
    x_norm = norm_weight * normalize(x, spec.rms_eps)
    h_pre = alpha[0] * torch.tanh(x_norm @ theta[0]) + bias[:n]
    h_post = alpha[1] * torch.tanh(x_norm @ theta[1]) + bias[n : 2 * n]
    h_res = alpha[2] * torch.tanh(theta[2:] @ x_norm.mT) + bias[2 * n :].view(n, n)
    return h_pre, h_post, h_res


def aggregate(x, h_pre):
    return (h_pre[..., None] * x).sum(dim=-2)


def pre(x, *parameters, mappings=coefficients):
    h_pre, h_post, h_res = mappings(x, *parameters)
    return aggregate(x, h_pre), h_post, h_res


def post(x, layer_output, h_post, h_res):
    return h_res @ x + h_post[..., None] * layer_output[..., None, :]


def post_pre(x, layer_output, h_post, h_res, *parameters):
    x_next = post(x, layer_output, h_post, h_res)
    return x_next, *pre(x_next, *parameters)


def delayed_pre(x, h_pre, *parameters):
    own_pre, h_post, h_res = coefficients(x, *parameters)
    return aggregate(x, h_pre), h_post, h_res, own_pre


def delayed_post_pre(x, layer_output, h_post, h_res, h_pre, *parameters):
    x_next = post(x, layer_output, h_post, h_res)
    return x_next, *delayed_pre(x_next, h_pre, *parameters)


def expand_pre(h, *parameters):
    x = expand(h, parameters[-1].num_streams)
    return x, *pre(x, *parameters)


def post_head(x, layer_output, h_post, h_res, *parameters):
    x_next = post(x, layer_output, h_post, h_res)
    return x_next, aggregate(x_next, gate_head(x_next, *parameters))


PARAMETERS = ("phi", "alpha", "bias", "norm_weight")
HEAD_PARAMETERS = ("head_phi", "head_alpha", "head_bias", "norm_weight")
HC_PARAMETERS = ("theta", "alpha", "bias", "hc_norm_weight")
MAPPED = ("x", "layer_output", "h_post", "h_res")
# The function, its differentiable arguments, and its constants.
EQUATIONS = {
    "expand": (expand, ("h",), ("num_streams",)),
    "sinkhorn": (sinkhorn, ("logits",), ("iters", "eps")),
    "coefficients": (coefficients, ("x", *PARAMETERS), ("spec",)),
    "aggregate": (aggregate, ("x", "h_pre"), ()),
    "pre": (pre, ("x", *PARAMETERS), ("spec",)),
    "post": (post, MAPPED, ()),
    "post_pre": (post_pre, (*MAPPED, *PARAMETERS), ("spec",)),
    "delayed_pre": (delayed_pre, ("x", "h_pre", *PARAMETERS), ("spec",)),
    "delayed_post_pre": (delayed_post_pre, (*MAPPED, "h_pre", *PARAMETERS), ("spec",)),
    "expand_pre": (expand_pre, ("h", *PARAMETERS), ("spec",)),
    "post_head": (post_head, (*MAPPED, *HEAD_PARAMETERS), ("spec",)),
    "head_coefficients": (gate_head, ("x", *HEAD_PARAMETERS), ("spec",)),
    "head": (lambda x, *rest: aggregate(x, gate_head(x, *rest)), ("x", *HEAD_PARAMETERS), ("spec",)),
    "rms_norm": (lambda u, weight, eps: weight * normalize(u, eps), ("h", "rms_norm_weight"), ("eps",)),
    "residual": (torch.add, ("h", "layer_output"), ()),
    "hc_coefficients": (hc_coefficients, ("x", *HC_PARAMETERS), ("spec",)),
    "hc_pre": (lambda x, *rest: pre(x, *rest, mappings=hc_coefficients), ("x", *HC_PARAMETERS), ("spec",)),
}


def make_spec(n, constants):
    return SimpleNamespace(num_streams=n, hidden_size=HIDDEN_SIZE, sinkhorn_iters=20, post_scale=2.0, **constants)


def random_like(tensor, seed):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_tensors(n, std, seed=0):
    """One of everything that a function takes, with logits of the given std."""
    T, C, K, M = NUM_TOKENS, HIDDEN_SIZE, n * HIDDEN_SIZE, n * n + 2 * n
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, mean=0.0):
        return (mean + scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    return {
        "h": normal(T, C),
        "x": normal(T, n, C, scale=3.0),
        "layer_output": normal(T, C),
        "h_pre": normal(T, n),
        "h_post": normal(T, n),
        "h_res": normal(T, n, n),
        "logits": normal(T, n, n, scale=std),
        "phi": normal(M, K, scale=std / K**0.5),
        "alpha": normal(3, scale=0.1, mean=1.0),
        "bias": normal(M),
        "norm_weight": normal(K, scale=0.3, mean=1.0),
        "head_phi": normal(n, K, scale=std / K**0.5),
        "head_alpha": normal(1, scale=0.1, mean=1.0),
        "head_bias": normal(n),
        "theta": normal(n + 2, C, scale=C**-0.5),
        "hc_norm_weight": normal(C, scale=0.3, mean=1.0),
        "weight": normal(C, C),
        "rms_norm_weight": normal(C, scale=0.3, mean=1.0),
    }


def assert_gradients_close(actual, expected, names):
    """Assert 1e-12 of the largest entry: some hundred roundings of 1e-16 each. The worst case here is 2e-14."""
    for name, a, e in zip(names, actual, expected, strict=True):
        assert e.abs().max() > 0, name
        np.testing.assert_allclose(a, e.numpy(), rtol=0, atol=1e-12 * float(e.abs().max()), err_msg=name)


@pytest.mark.parametrize("constants", [PAPER, DEEPSEEK, LARGE], ids=["paper", "deepseek", "large-eps"])
@pytest.mark.parametrize("std", [2.0, 6.0])
@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("name", EQUATIONS)
def test_gradients_are_autograds(name, n, std, constants):
    """Outputs and gradients, with random upstream gradients: catches a forward and backward wrong together."""
    function, arguments, constant_names = EQUATIONS[name]
    spec = make_spec(n, constants)
    known = {"num_streams": n, "iters": spec.sinkhorn_iters, "eps": spec.sinkhorn_eps, "spec": spec}
    rest = [known[key] for key in constant_names]
    tensors = make_tensors(n, std)
    inputs = [tensors[key] for key in arguments]

    outputs = function(*inputs, *rest)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [random_like(output, seed) for seed, output in enumerate(outputs)]
    expected = torch.autograd.grad(outputs, inputs, upstream)

    arrays = [tensor.detach().numpy() for tensor in inputs]
    if "spec" in constant_names:  # before norm_weight
        arrays.insert(-1, spec)
        rest = []
    results = getattr(reference, name)(*arrays, *rest)
    results = results if isinstance(results, tuple) else (results,)
    for result, output in zip(results, outputs, strict=True):
        np.testing.assert_allclose(result, output.detach().numpy(), rtol=1e-10, atol=1e-12)

    gradients = getattr(reference, name + "_backward")(*(g.numpy() for g in upstream), *arrays, *rest)
    assert_gradients_close(gradients if isinstance(gradients, tuple) else (gradients,), expected, arguments)


def test_gradients_go_back_through_a_whole_stream():
    """expand, pre, three layers with a boundary between each two, post, head: every gradient, by hand in reverse.

    Catches a boundary's backward that hands on the gradients of the wrong sublayer, or that takes back only one of
    the two uses of x_next, however right it is by itself.
    """
    n, depth = 4, 3
    spec = make_spec(n, DEEPSEEK)
    sublayers = [make_tensors(n, 2.0, seed) for seed in range(depth)]
    last = make_tensors(n, 2.0, depth)
    leaves = [last["h"], *(last[key] for key in HEAD_PARAMETERS)]
    leaves += [tensors[key] for tensors in sublayers for key in PARAMETERS]

    x = expand(last["h"], n)
    for tensors in sublayers:
        layer_input, h_post, h_res = pre(x, *(tensors[key] for key in PARAMETERS), spec)
        x = post(x, torch.tanh(layer_input @ tensors["weight"]), h_post, h_res)
    h = aggregate(x, gate_head(x, *(last[key] for key in HEAD_PARAMETERS), spec))
    g_h = random_like(h, seed=9)
    expected = torch.autograd.grad(h, leaves, g_h)

    def arguments(tensors, names):
        phi, alpha, bias, norm_weight = (tensors[key].detach().numpy() for key in names)
        return phi, alpha, bias, spec, norm_weight

    parameters = [arguments(tensors, PARAMETERS) for tensors in sublayers]
    weights = [tensors["weight"].detach().numpy() for tensors in sublayers]
    embedding = last["h"].detach().numpy()

    x = reference.expand(embedding, n)
    layer_input, h_post, h_res = reference.pre(x, *parameters[0])
    boundaries = []
    for weight, following in zip(weights[:-1], parameters[1:], strict=True):
        boundaries.append((x, np.tanh(layer_input @ weight), h_post, h_res, *following))
        x, layer_input, h_post, h_res = reference.post_pre(*boundaries[-1])
    mapped = x, np.tanh(layer_input @ weights[-1]), h_post, h_res

    g_x, *g_last = reference.head_backward(g_h.numpy(), reference.post(*mapped), *arguments(last, HEAD_PARAMETERS))
    g_x, g_layer_output, g_h_post, g_h_res = reference.post_backward(g_x, *mapped)
    g_layer_input = (g_layer_output * (1 - mapped[1] ** 2)) @ weights[-1].T
    g_parameters = []
    for boundary, weight in zip(reversed(boundaries), reversed(weights[:-1]), strict=True):
        g_x, g_layer_output, g_h_post, g_h_res, *g_own = reference.post_pre_backward(
            g_x, g_layer_input, g_h_post, g_h_res, *boundary
        )
        g_layer_input = (g_layer_output * (1 - boundary[1] ** 2)) @ weight.T
        g_parameters = [*g_own, *g_parameters]
    first_stream = boundaries[0][0]
    g_x_pre, *g_own = reference.pre_backward(g_layer_input, g_h_post, g_h_res, first_stream, *parameters[0])
    g_embedding = reference.expand_backward(g_x + g_x_pre, embedding, n)
    names = ["h", *HEAD_PARAMETERS, *PARAMETERS * depth]
    assert_gradients_close([g_embedding, *g_last, *g_own, *g_parameters], expected, names)
