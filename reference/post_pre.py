"""The boundary between two sublayers, the unit of fusion: `post` of the one, `pre` of the next.

Backward. x_next leaves the boundary and is read by `pre` inside it, so the gradient that `post` has to take back
is the sum of the one from outside and the one of `pre`.
"""

from numpy.typing import ArrayLike

from ._inputs import Array, Spec, as_gradient
from .post import post, post_backward
from .pre import pre, pre_backward


def post_pre(
    x: ArrayLike,
    layer_output: ArrayLike,
    h_post: ArrayLike,
    h_res: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> tuple[Array, Array, Array, Array]:
    """x_next = post(x, layer_output, h_post, h_res), then pre(x_next, phi, alpha, bias, spec, norm_weight).

    x, layer_output, h_post and h_res belong to the sublayer that ends; phi, alpha, bias and norm_weight to
    the one that begins.

    Returns:
        x_next [..., n, C], and layer_input [..., C], h_post [..., n], h_res [..., n, n] of the next sublayer.
    """
    x_next = post(x, layer_output, h_post, h_res)
    return x_next, *pre(x_next, phi, alpha, bias, spec, norm_weight)


def post_pre_backward(
    g_x_next: ArrayLike | None,
    g_layer_input: ArrayLike | None,
    g_h_post_next: ArrayLike | None,
    g_h_res_next: ArrayLike | None,
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
    """`pre_backward` at x_next, then `post_backward` of g_x_next and what `pre` adds to it.

    Args:
        g_x_next: [..., n, C], or None; what reaches x_next from beyond the next `pre`.
        g_layer_input: [..., C], or None.
        g_h_post_next: [..., n], or None; of the h_post that `post_pre` returns.
        g_h_res_next: [..., n, n], [out, in], or None; of the h_res that it returns.
        x, layer_output, h_post, h_res, phi, alpha, bias, spec, norm_weight: as for `post_pre`.

    Returns:
        g_x [..., n, C], g_layer_output [..., C], g_h_post [..., n] and g_h_res [..., n, n] of the sublayer that
        ends; g_phi, g_alpha, g_bias and g_norm_weight of the one that begins, as `coefficients_backward` does.
    """
    x_next = post(x, layer_output, h_post, h_res)
    g_x_next = as_gradient("g_x_next", g_x_next, x_next.shape)
    g_x_pre, g_phi, g_alpha, g_bias, g_norm_weight = pre_backward(
        g_layer_input, g_h_post_next, g_h_res_next, x_next, phi, alpha, bias, spec, norm_weight
    )
    g_mapped = post_backward(g_x_next + g_x_pre, x, layer_output, h_post, h_res)
    return *g_mapped, g_phi, g_alpha, g_bias, g_norm_weight
