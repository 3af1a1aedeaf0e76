"""The boundary between two sublayers, the unit of fusion: `post` of the one, `pre` of the next."""

from numpy.typing import ArrayLike

from ._inputs import Array, Spec
from .post import post
from .pre import pre


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
