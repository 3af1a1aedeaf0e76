"""The functions as PyTorch operators, `torch.ops.mhc_tilelang.*`: what autograd and torch.compile see.

    library       how an operator is registered, and what the families share
    expand, sinkhorn, post, coefficients, pre, head, boundary, expand_pre, post_head
                  a family a file: X, X_out, X_backward, each with its fake, and X's autograd
    sharding      how DTensors lie before and after each of them

The file of expand has collapse too: each is the other's backward.

X allocates its outputs, X_out writes into buffers and has no gradient, X_backward is an operator because
torch.compile traces a backward too. They take tensors with any leading dimensions, so that no view stands
between them and the caller's tensors, and with any strides: `ops` refuses those of a caller, but compilers and
autograd hand over what they like. Operators of functions that project return, after the function's outputs, what
their backward needs (`h_pre`, `projected`); `ops` drops that.

Importing this package registers all of them.
"""

from . import boundary, coefficients, expand, expand_pre, head, post, post_head, pre, sinkhorn

__all__ = ["boundary", "coefficients", "expand", "expand_pre", "head", "post", "post_head", "pre", "sinkhorn"]
