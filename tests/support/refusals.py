"""Good arguments of every function, and what a test needs to see one of them refused before a kernel is asked for."""

import warnings

import pytest
import torch

from mhc_tilelang import MHCSpec, compiler, ops

SPEC = MHCSpec.deepseek_v4(64)
n, C, M, K, T = 4, 64, 24, 256, 6


def arguments_of(function):
    """Good arguments, by name."""
    x, phi, alpha, bias = torch.zeros(T, n, C), torch.zeros(M, K), torch.zeros(3), torch.zeros(M)
    projected = {"x": x, "phi": phi, "alpha": alpha, "bias": bias, "spec": SPEC, "norm_weight": torch.ones(K)}
    mixed = {"layer_output": torch.zeros(T, C), "h_post": torch.zeros(T, n), "h_res": torch.zeros(T, n, n)}
    return {
        "expand": {"h": torch.zeros(T, C), "num_streams": n},
        "collapse": {"x": x},
        "aggregate": {"x": x, "h_pre": torch.zeros(T, n)},
        "sinkhorn": {"logits": torch.zeros(T, n, n), "iters": 20, "eps": 1e-6},
        "coefficients": projected,
        "pre": projected,
        "head": {**projected, "phi": phi[:n], "alpha": alpha[:1], "bias": bias[:n]},
        "post": {"x": x, **mixed},
        "post_pre": {**projected, **mixed},
        "expand_pre": {"h": torch.zeros(T, C), **{name: v for name, v in projected.items() if name != "x"}},
        "post_head": {**projected, "phi": phi[:n], "alpha": alpha[:1], "bias": bias[:n], **mixed},
    }[function]


FUNCTIONS = ("expand", "collapse", "aggregate", "sinkhorn", "coefficients", "pre", "post", "post_pre", "head")
FUNCTIONS += ("expand_pre", "post_head")
PROJECTING = ("coefficients", "pre", "post_pre", "head", "expand_pre", "post_head")
TENSORS = [(f, name) for f in FUNCTIONS for name, v in arguments_of(f).items() if isinstance(v, torch.Tensor)]
TOKEN_TENSORS = [(f, name) for f in ("post", "post_pre", "post_head") for name in ("layer_output", "h_post", "h_res")]
TOKEN_TENSORS.append(("aggregate", "h_pre"))
every_tensor = pytest.mark.parametrize(("function", "argument"), TENSORS)


def call(function, **changed):
    return getattr(ops, function)(**{**arguments_of(function), **changed})


@pytest.fixture
def no_kernel(monkeypatch):
    """A call that gets as far as a kernel fails the test."""

    def refuse(family, *_, **__):
        pytest.fail(f"{family} was asked for")

    monkeypatch.setattr(compiler, "kernel", refuse)


def assert_refused(error, function, argument, parts, **changed):
    """The error's type, its beginning `function: argument`, and that it quotes expected and got."""
    with pytest.raises(error) as caught:
        call(function, **changed)
    message = str(caught.value)
    assert message.startswith((f"{function}: {argument}: ", f"{function}: {argument} "))
    for part in parts:
        assert part in message
    assert "\n" not in message


def not_dense(tensor):
    """The tensor in every layout but the dense one, by what the error calls it."""
    kinds = {
        "nested one of layout torch.jagged": lambda: torch.nested.nested_tensor([tensor, tensor], layout=torch.jagged),
        "nested one of layout torch.strided": lambda: torch.nested.nested_tensor([tensor, tensor]),
        "layout torch.sparse_coo": tensor.to_sparse,
        "layout torch._mkldnn": tensor.to_mkldnn,
    }
    if tensor.ndim >= 2:
        block = (1, 1)
        kinds |= {
            "layout torch.sparse_csr": lambda: tensor.reshape(-1, tensor.shape[-1]).to_sparse_csr(),
            "layout torch.sparse_csc": lambda: tensor.reshape(-1, tensor.shape[-1]).to_sparse_csc(),
            "layout torch.sparse_bsr": lambda: tensor.reshape(-1, tensor.shape[-1]).to_sparse_bsr(block),
            "layout torch.sparse_bsc": lambda: tensor.reshape(-1, tensor.shape[-1]).to_sparse_bsc(block),
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes, says PyTorch
        return {kind: make() for kind, make in kinds.items()}
