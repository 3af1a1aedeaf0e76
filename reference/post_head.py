"""The boundary after the last sublayer: `post`, then `head`.

Backward. x_next leaves the boundary and is read by `head` inside it, so the gradient that `post` has to take back is
the sum of the one from outside and the one of `head`.
"""

from numpy.typing import ArrayLike

from ._inputs import Array, Spec, as_gradient
from .head import head, head_backward
from .post import post, post_backward


def post_head(
    x: ArrayLike,
    layer_output: ArrayLike,
    h_post: ArrayLike,
    h_res: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """x_next = post(x, layer_output, h_post, h_res), then head(x_next, phi, alpha, bias, spec, norm_weight).

    Returns:
        x_next [..., n, C], and the head's h [..., C].
    """
    x_next = post(x, layer_output, h_post, h_res)
    return x_next, head(x_next, phi, alpha, bias, spec, norm_weight)


def post_head_backward(
    g_x_next: ArrayLike | None,
    g_h: ArrayLike | None,
    x: ArrayLike,
    layer_output: ArrayLike,
    h_post: ArrayLike,
    h_res: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> tuple[Array, Array, Array, Array, Array, Array, Array, Array | None]:
    """`head_backward` at x_next, then `post_backward` of g_x_next and what the head adds to it.

    Args:
        g_x_next: [..., n, C], or None; what reaches x_next from beyond the head.
        g_h: [..., C], or None.
        x, layer_output, h_post, h_res, phi, alpha, bias, spec, norm_weight: as for `post_head`.

    Returns:
        g_x [..., n, C], g_layer_output [..., C], g_h_post [..., n] and g_h_res [..., n, n] of the sublayer; g_phi,
        g_alpha, g_bias and g_norm_weight of the head, as `head_backward` does.
    """
    x_next = post(x, layer_output, h_post, h_res)
    g_x_next = as_gradient("g_x_next", g_x_next, x_next.shape)
    g_x_head, g_phi, g_alpha, g_bias, g_norm_weight = head_backward(g_h, x_next, phi, alpha, bias, spec, norm_weight)
    g_mapped = post_backward(g_x_next + g_x_head, x, layer_output, h_post, h_res)
    return *g_mapped, g_phi, g_alpha, g_bias, g_norm_weight
