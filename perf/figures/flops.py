"""Floating-point operations of a kernel, from sizes alone: the roofline's other axis. Without torch.

Counted are the operations of the kernels' formulas: an fma is two; a maximum, exp, rsqrt, reciprocal and division are
one each; a sigmoid is three (exp, sum, reciprocal); a division by a sum is a multiplication by its reciprocal. Partial
sums, phi's halves and what is recomputed because tiles overlap are left out, so this is work asked for, not work done.
"""

from __future__ import annotations

from ..calls.cases import BOUNDARY_STEP, KERNELS, POST_PRE, POST_PRE_BACKWARD, POST_PRE_DELAYED, SUBLAYER_INPUT

SINKHORN_ITERS = 20  # of MHCSpec, which `bench` measures with


def flops(kernel: str, num_streams: int, hidden_size: int | None, num_tokens: int) -> int:
    """Return the operations of one call. `hidden_size` is C; None for Sinkhorn, which never sees a channel.

    Raises KeyError for a kernel that is not measured.
    """
    return per_token(num_streams, hidden_size or 0)[kernel] * num_tokens


def per_token(num_streams: int, hidden_size: int) -> dict[str, int]:
    """Return the operations per token of every kernel."""
    n, C = num_streams, hidden_size
    M, K = n * n + 2 * n, n * C
    forward = (
        0,  # expand copies
        2 * M * K + 2 * K,  # x·phi and Σx²
        3 + 3 * M + 8 * n + sinkhorn(n),  # s; alpha·(x·phi·s) + bias; the gates; h_res
        sinkhorn(n),
        2 * n * C,  # Σ_i h_pre[i]·x[i]
        (2 * n + 1) * K,  # h_post[j]·layer_output, then n fmas
    )
    backward = (
        (n - 1) * C,  # the sum over streams
        4 * M * K + 2 * K,  # g_x = g_dots·phi + ρ·x, g_phi = g_dots·x
        4 + 9 * M + 18 * n + sinkhorn_backward(n),  # z again and five products a row; the gates; h_res; ρ
        sinkhorn_backward(n),
        2 * n * C,  # n dots over channels
        4 * (n * n + n) * C,  # two sums over streams, n² + n dots over channels
    )
    names = (*KERNELS, *(f"{kernel}_backward" for kernel in KERNELS))
    counts = dict(zip(names, (*forward, *backward), strict=True))
    before = sum(counts[kernel] for kernel in SUBLAYER_INPUT.split("+"))
    boundary = counts["post"] + before
    parts = ("aggregate", "coefficients", "project", "post")
    # The gradient of x_next is a sum of three: what came in, through phi, and h_pre·g_layer_input.
    boundary_backward = sum(counts[f"{kernel}_backward"] for kernel in parts) + 3 * n * C
    return {
        **counts,
        SUBLAYER_INPUT: before,
        POST_PRE: boundary,
        POST_PRE_DELAYED: boundary,
        POST_PRE_BACKWARD: boundary_backward,
        BOUNDARY_STEP: boundary + boundary_backward,
    }


def softmax(n: int) -> int:
    """exp(z − max) / Σ exp(…), over the columns of n × n."""
    return 2 * n * (n - 1) + 3 * n * n + n


def normalize(n: int) -> int:
    """P / (Σ P + eps): sums, eps, reciprocals, products."""
    return n * (n - 1) + 2 * n + n * n


def sinkhorn(n: int, iters: int = SINKHORN_ITERS) -> int:
    """Count a softmax + eps, then every other half of an iteration."""
    return softmax(n) + n * n + (2 * iters - 1) * normalize(n)


def sinkhorn_backward(n: int, iters: int = SINKHORN_ITERS) -> int:
    """Count the forward again; H = g·P; a step back H −= P·ΣH, P *= d; at last S again and the softmax's gradient."""
    step = n * (n - 1) + 3 * n * n
    last = softmax(n) + 3 * n * n + n * (n - 1) + 2 * n * n
    return sinkhorn(n, iters) + n * n + (2 * iters - 1) * step + last
