"""The boundary before the first sublayer: `expand`, then `pre`.

Backward. x leaves the boundary and is read by `pre` inside it, so the gradient of h is the sum over the streams of the
one from outside and the one of `pre`.
"""

from numpy.typing import ArrayLike

from ._inputs import Array, ProjectionGradients, Spec, as_float64, as_gradient
from .expand import expand, expand_backward
from .pre import pre, pre_backward


def expand_pre(
    h: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> tuple[Array, Array, Array, Array]:
    """x = expand(h, n), then pre(x, phi, alpha, bias, spec, norm_weight).

    Args:
        h: the embedding, [..., C].
        phi, alpha, bias, spec, norm_weight: the first sublayer's, as for `coefficients`.

    Returns:
        x [..., n, C], and layer_input [..., C], h_post [..., n], h_res [..., n, n] of the first sublayer.
    """
    x = expand(as_float64("h", h, (..., spec.hidden_size)), spec.num_streams)
    return x, *pre(x, phi, alpha, bias, spec, norm_weight)


def expand_pre_backward(
    g_x: ArrayLike | None,
    g_layer_input: ArrayLike | None,
    g_h_post: ArrayLike | None,
    g_h_res: ArrayLike | None,
    h: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> ProjectionGradients:
    """`pre_backward` at x, then `expand_backward` of g_x and what `pre` adds to it.

    Args:
        g_x: [..., n, C], or None; what reaches x from beyond the first `pre`.
        g_layer_input: [..., C], or None.
        g_h_post: [..., n], or None.
        g_h_res: [..., n, n], [out, in], or None.
        h, phi, alpha, bias, spec, norm_weight: as for `expand_pre`.

    Returns:
        g_h [..., C]; g_phi, g_alpha, g_bias and g_norm_weight, as `coefficients_backward` does.
    """
    x = expand(as_float64("h", h, (..., spec.hidden_size)), spec.num_streams)
    g_x = as_gradient("g_x", g_x, x.shape)
    g_x_pre, g_phi, g_alpha, g_bias, g_norm_weight = pre_backward(
        g_layer_input, g_h_post, g_h_res, x, phi, alpha, bias, spec, norm_weight
    )
    return expand_backward(g_x + g_x_pre, h, spec.num_streams), g_phi, g_alpha, g_bias, g_norm_weight
