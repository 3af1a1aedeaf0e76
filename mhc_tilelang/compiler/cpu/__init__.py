"""The CPU target: TileLang's GPU kernels, run by the processor.

    emit       a kernel's TIR -> C++ source, one pass
    outline    a large kernel's loop nests as functions, which compile in a fraction of the time
    tile_ops   T.copy, T.fill, T.reduce, T.gemm as loops
    views      tiles that are read in place instead of copied
    runtime.h  16-bit floats, exp, the matrix product of a tile
    build      C++ source -> a callable, through the system's compiler and a cache on disk

`build` imports the others, and with them tilelang, only when something is not in the cache.
"""
