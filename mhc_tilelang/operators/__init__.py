"""The functions as PyTorch operators, `torch.ops.mhc_tilelang.*`: what autograd and torch.compile see.

    declaration   X, X_out, X_backward, their fakes and X's autograd from one declaration
    expand, aggregate, sinkhorn, post, coefficients, pre, head, post_pre, expand_pre, post_head,
    quantized
                  a family a file: its declaration, and what its forward and backward launch
    library       how an operator is registered
    sharding      DTensor placements before and after each of them

X allocates its outputs, X_out writes into buffers and has no gradient, X_backward is an operator because
torch.compile traces a backward too. They take tensors with any leading dimensions, so that no view stands
between them and the caller's tensors, and with any strides: `ops` refuses those of a caller, but compilers and
autograd hand over what they like. Operators of functions that project return, after the function's outputs, what
their backward needs (`h_pre`, `projected`); `ops` drops that.

Importing this package registers all of them.
"""

from .aggregate import aggregate
from .coefficients import coefficients
from .expand import collapse, collapse_mean, expand
from .expand_pre import expand_pre
from .head import head
from .identity import gates, identity_post, identity_post_pre, identity_pre
from .post import post
from .post_head import post_head
from .post_pre import post_pre
from .pre import pre
from .quantized import post_pre_quantized, post_pre_quantized_alone, pre_quantized, pre_quantized_alone
from .sinkhorn import sinkhorn

__all__ = [
    "aggregate",
    "coefficients",
    "collapse",
    "collapse_mean",
    "expand",
    "expand_pre",
    "gates",
    "head",
    "identity_post",
    "identity_post_pre",
    "identity_pre",
    "post",
    "post_head",
    "post_pre",
    "post_pre_quantized",
    "post_pre_quantized_alone",
    "pre",
    "pre_quantized",
    "pre_quantized_alone",
    "sinkhorn",
]
