"""Sinkhorn-Knopp: a matrix of logits made doubly stochastic.

Equation (9), in the kernels' form Eq. 19: M⁰ = exp(logits), M^t = rows(columns(M^{t-1})), t = 1 … iters.
h_res[j, i] is the weight of input stream i in output stream j; a column sums over j, a row over i:

    P = exp(z − max_j z) ; P = P / Σ_j P + eps          columns, as a softmax
    P = P / (Σ_i P + eps)                               rows
    iters − 1 times:  P = P / (Σ_j P + eps) ;  P = P / (Σ_i P + eps)

With eps = 0 this is Eq. (9): the maximum only keeps exp in range and cancels in the first division. Then nothing holds
a row up that lies far below the largest of each of its columns (104 in float32): its softmax is 0, its sum is 0, and
0 / 0 no number, though its ratios are ordinary ones. So for eps = 0 the row's own maximum is taken out as well, before
exp, which it does not change either:

    D[j, i] = z[j, i] − max_j z[j, i] ;  w[i] = 1 / Σ_j exp D[j, i] ;  r[j] = max_i D[j, i]
    P = exp(D − r) · w ;  P = P / Σ_i P                 the first columns and rows

w lies in [1/n, 1] and the largest exp of a row is 1: that sum lies in [1/n, n]. So does every later one. With S the
softmax, which is at most 1 and has column sums of 1, rows first divide by Σ_i S ≤ n, so a column of P still sums to 1/n
or more; a matrix of row sums 1, its columns divided by at most n, keeps row sums of 1/n or more; the other way round
as well. A lone step can no longer divide by 0, however far apart the logits are, and each raises or lowers an entry
by a factor of n at most. What stays lost is an entry that is below 2^-149 times its row after the first iteration: it
is 0 from there on, where the others could have raised it to n^(2·iters − 2) times as much.

One token is one thread. Its n × n matrix lives in that thread's registers through all iterations: no
shuffle, no shared memory, no barrier; n² values are read and written once. The token is the last index of
every fragment, so neighbouring threads hold neighbouring tokens, and on a CPU it is the vector axis. A
division is a multiplication by the reciprocal: n divisions a step instead of n².
"""

import tilelang.language as T


def a_token_a_thread(*shape: int) -> T.Fragment:
    """The layout of a fragment [..., block] that gives a token to a thread; TileLang finds it too, after seconds."""
    if len(shape) == 2:
        return T.Fragment(shape, lambda k, t: (t, k))
    return T.Fragment(shape, lambda a, b, t: (t, a * shape[1] + b))


def iterations(count):
    """A loop nvcc must not unroll: iterations depend on each other, so unrolled code is only longer.

    At n = 8 the backward takes 167 registers this way, and took 199 unrolled.
    """
    return T.unroll(count, unroll_factor=1)


@T.macro
def normalize(P, scale, num_streams, block, sinkhorn_eps, axis):
    """P /= Σ P + sinkhorn_eps, the sum over j (axis 0: columns) or over i (axis 1: rows)."""
    T.reduce_sum(P, scale, dim=axis)
    for k, t in T.Parallel(num_streams, block):
        scale[k, t] = 1.0 / (scale[k, t] + sinkhorn_eps)
    for j, i, t in T.Parallel(num_streams, num_streams, block):
        P[j, i, t] *= scale[i if axis == 0 else j, t]


@T.macro
def softmax(P, scale, num_streams, block):
    """P = exp(P − max_j P) / Σ_j exp(…)."""
    T.reduce_max(P, scale, dim=0)
    for j, i, t in T.Parallel(num_streams, num_streams, block):
        P[j, i, t] = T.exp(P[j, i, t] - scale[i, t])
    T.reduce_sum(P, scale, dim=0)
    for i, t in T.Parallel(num_streams, block):
        scale[i, t] = 1.0 / scale[i, t]
    for j, i, t in T.Parallel(num_streams, num_streams, block):
        P[j, i, t] *= scale[i, t]


@T.macro
def softmax_columns(P, scale, num_streams, block, sinkhorn_eps):
    """The first step: a softmax, + sinkhorn_eps."""
    softmax(P, scale, num_streams, block)
    for j, i, t in T.Parallel(num_streams, num_streams, block):
        P[j, i, t] += sinkhorn_eps


@T.macro
def first_iteration_without_eps(P, scale, num_streams, block):
    """The first columns and rows for eps = 0, of logits P: D, w, r as above."""
    weights = T.alloc_fragment((num_streams, block), T.float32)
    T.annotate_layout({weights: a_token_a_thread(num_streams, block)})
    T.reduce_max(P, scale, dim=0)
    for j, i, t in T.Parallel(num_streams, num_streams, block):
        P[j, i, t] -= scale[i, t]
    T.clear(weights)
    for j in T.unroll(num_streams):
        for i, t in T.Parallel(num_streams, block):
            weights[i, t] += T.exp(P[j, i, t])
    T.reduce_max(P, scale, dim=1)
    for i, t in T.Parallel(num_streams, block):
        weights[i, t] = 1.0 / weights[i, t]
    for j, i, t in T.Parallel(num_streams, num_streams, block):
        P[j, i, t] = T.exp(P[j, i, t] - scale[j, t]) * weights[i, t]
    normalize(P, scale, num_streams, block, 0.0, axis=1)


@T.macro
def first_iteration(P, scale, num_streams, block, sinkhorn_eps):
    """The first columns and rows, of logits P."""
    if sinkhorn_eps == 0:
        first_iteration_without_eps(P, scale, num_streams, block)
    else:
        softmax_columns(P, scale, num_streams, block, sinkhorn_eps)
        normalize(P, scale, num_streams, block, sinkhorn_eps, axis=1)


@T.macro
def sinkhorn_inplace(P, num_streams, block, iters, sinkhorn_eps):
    """Turn the logits P [n, n, block], a fragment with the tokens last, into h_res."""
    scale = T.alloc_fragment((num_streams, block), T.float32)
    T.annotate_layout({scale: a_token_a_thread(num_streams, block)})
    first_iteration(P, scale, num_streams, block, sinkhorn_eps)
    for _ in iterations(iters - 1):
        normalize(P, scale, num_streams, block, sinkhorn_eps, axis=0)
        normalize(P, scale, num_streams, block, sinkhorn_eps, axis=1)


def sinkhorn_kernel(num_streams: int, block: int):
    """logits [T, n, n] -> h_res [T, n, n], float32; `block` tokens a block, one thread each."""
    n = num_streams
    num_tokens = T.dynamic("num_tokens")

    @T.prim_func
    def sinkhorn(
        logits: T.Tensor[(num_tokens, n, n), T.float32],
        h_res: T.Tensor[(num_tokens, n, n), T.float32],
        iters: T.int32,
        sinkhorn_eps: T.float32,
    ):
        with T.Kernel(T.ceildiv(num_tokens, block), threads=block) as tile:
            P = T.alloc_fragment((n, n, block), T.float32)
            T.annotate_layout({P: a_token_a_thread(n, n, block)})
            for j, i, t in T.Parallel(n, n, block):
                P[j, i, t] = T.if_then_else(tile * block + t < num_tokens, logits[tile * block + t, j, i], 0.0)
            sinkhorn_inplace(P, n, block, iters, sinkhorn_eps)
            for j, i, t in T.Parallel(n, n, block):
                if tile * block + t < num_tokens:
                    h_res[tile * block + t, j, i] = P[j, i, t]

    return sinkhorn
