"""Sums over blocks of tokens, added up: the last step of every parameter's gradient.

    total[e] = Σ_p partial[p, e]

A kernel that sums over tokens writes a partial sum for each block of them. Which tokens share a block is a function
of the sizes, and here the blocks are added in a fixed order: block p belongs to lane p mod `lanes`, a lane adds its
blocks ascending, then the lanes are added. So there are no atomics, and the bits are the same at every call. Several
lanes are for many short rows (a row a warp of tokens), where one thread an element would wait for each load in turn.
"""

import tilelang.language as T


def sum_partials_kernel(lanes: int, block: int, threads: int):
    """partial [partials, elements] -> total [elements], float32; `block` elements a block, whose threads share out the
    lanes of them.
    """
    num_partials = T.dynamic("num_partials")
    num_elements = T.dynamic("num_elements")

    @T.prim_func
    def sum_partials(
        partial: T.Tensor[(num_partials, num_elements), T.float32],
        total: T.Tensor[(num_elements,), T.float32],
    ):
        with T.Kernel(T.ceildiv(num_elements, block), threads=threads) as tile:
            acc = T.alloc_fragment((lanes, block), T.float32)
            sums = T.alloc_fragment((block,), T.float32)
            first = tile * block
            T.clear(acc)
            for step in T.serial(T.ceildiv(num_partials, lanes)):
                for lane, e in T.Parallel(lanes, block):
                    if step * lanes + lane < num_partials and first + e < num_elements:
                        acc[lane, e] += partial[step * lanes + lane, first + e]
            T.reduce_sum(acc, sums, dim=0)
            for e in T.Parallel(block):
                if first + e < num_elements:
                    total[first + e] = sums[e]

    return sum_partials
