"""The delayed form of `pre` and `post_pre` (DeepSeek-V4.1): the aggregate takes the h_pre of the sublayer before.

    layer_input[c] = Σ_i h_pre[i] · x[i, c]     h_pre given: computed at the sublayer before, of an earlier x
    h_pre_next, h_post, h_res = coefficients(x)   h_pre_next for the sublayer after

The first sublayer has none before it and takes stream 0 (`first_pre`). All else is as in the ordinary form.

Backward. The h_pre given and the one returned are two: the first has the aggregate's gradient, and the gradient of the
second goes into `coefficients_backward`, with those of the other mappings.
"""

import numpy as np
from numpy.typing import ArrayLike

from ._inputs import Array, Spec, as_float64, as_gradient
from .coefficients import coefficients, coefficients_backward
from .post import post, post_backward
from .pre import aggregate, aggregate_backward


def first_pre(x: ArrayLike) -> Array:
    """Return the h_pre of a first sublayer, [..., n] of a stream [..., n, C]: 1 for stream 0, 0 for the others."""
    h_pre = np.zeros(as_float64("x", x, (..., "n", "C")).shape[:-1])
    h_pre[..., 0] = 1.0
    return h_pre


def delayed_pre(
    x: ArrayLike,
    h_pre: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> tuple[Array, Array, Array, Array]:
    """`aggregate` with h_pre [..., n], and `coefficients`, whose arguments the others are.

    Returns:
        layer_input [..., C]; h_post [..., n] and h_res [..., n, n] for the `post` of the same sublayer; h_pre_next
        [..., n] for the sublayer after.
    """
    h_pre_next, h_post, h_res = coefficients(x, phi, alpha, bias, spec, norm_weight)
    return aggregate(x, h_pre), h_post, h_res, h_pre_next


def delayed_pre_backward(
    g_layer_input: ArrayLike | None,
    g_h_post: ArrayLike | None,
    g_h_res: ArrayLike | None,
    g_h_pre_next: ArrayLike | None,
    x: ArrayLike,
    h_pre: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> tuple[Array, Array, Array, Array, Array, Array | None]:
    """`aggregate_backward` and `coefficients_backward`; g_x is the sum of both.

    Args:
        g_layer_input: [..., C], or None.
        g_h_post, g_h_pre_next: [..., n], or None.
        g_h_res: [..., n, n], [out, in], or None.
        x, h_pre, phi, alpha, bias, spec, norm_weight: as for `delayed_pre`.

    Returns:
        g_x [..., n, C], g_h_pre [..., n], and g_phi, g_alpha, g_bias and g_norm_weight as `coefficients_backward` does.
    """
    g_x_direct, g_h_pre = aggregate_backward(g_layer_input, x, h_pre)
    g_x, *g_parameters = coefficients_backward(g_h_pre_next, g_h_post, g_h_res, x, phi, alpha, bias, spec, norm_weight)
    return g_x_direct + g_x, g_h_pre, *g_parameters  # type: ignore[return-value]


def delayed_post_pre(
    x: ArrayLike,
    layer_output: ArrayLike,
    h_post: ArrayLike,
    h_res: ArrayLike,
    h_pre: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> tuple[Array, Array, Array, Array, Array]:
    """x_next = post(x, layer_output, h_post, h_res), then delayed_pre(x_next, h_pre, phi, …).

    x, layer_output, h_post, h_res and h_pre [..., n] come from the sublayer that ends; phi, alpha, bias and norm_weight
    belong to the one that begins. This h_pre is the h_pre_next of the one that ends.

    Returns:
        x_next [..., n, C]; layer_input [..., C], h_post [..., n], h_res [..., n, n] and h_pre_next [..., n] of the
        sublayer that begins.
    """
    x_next = post(x, layer_output, h_post, h_res)
    return x_next, *delayed_pre(x_next, h_pre, phi, alpha, bias, spec, norm_weight)


def delayed_post_pre_backward(
    g_x_next: ArrayLike | None,
    g_layer_input: ArrayLike | None,
    g_h_post_next: ArrayLike | None,
    g_h_res_next: ArrayLike | None,
    g_h_pre_next: ArrayLike | None,
    x: ArrayLike,
    layer_output: ArrayLike,
    h_post: ArrayLike,
    h_res: ArrayLike,
    h_pre: ArrayLike,
    phi: ArrayLike,
    alpha: ArrayLike,
    bias: ArrayLike,
    spec: Spec,
    norm_weight: ArrayLike | None = None,
) -> tuple[Array, Array, Array, Array, Array, Array, Array, Array, Array | None]:
    """`delayed_pre_backward` at x_next, then `post_backward` of g_x_next and what comes back through x_next.

    Args:
        g_x_next: [..., n, C], or None; what reaches x_next from beyond the sublayer that begins.
        g_layer_input, g_h_post_next, g_h_res_next, g_h_pre_next: gradients of the other results, or None.
        x, layer_output, h_post, h_res, h_pre, phi, alpha, bias, spec, norm_weight: as for `delayed_post_pre`.

    Returns:
        g_x, g_layer_output, g_h_post, g_h_res and g_h_pre in the shapes of what they belong to; g_phi, g_alpha, g_bias
        and g_norm_weight as `coefficients_backward` does.
    """
    x_next = post(x, layer_output, h_post, h_res)
    g_outside = as_gradient("g_x_next", g_x_next, x_next.shape)
    g_inside, g_h_pre, *g_parameters = delayed_pre_backward(
        g_layer_input, g_h_post_next, g_h_res_next, g_h_pre_next, x_next, h_pre, phi, alpha, bias, spec, norm_weight
    )
    g_mapped = post_backward(g_outside + g_inside, x, layer_output, h_post, h_res)
    return *g_mapped, g_h_pre, *g_parameters  # type: ignore[return-value]
