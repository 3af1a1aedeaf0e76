"""CUDA builds without a GPU: what nvcc makes of every kernel, and a page to study each. `mhc-tilelang inspect`.

    matrix           which kernels are built, at which sizes: from `perf.calls.launches`, so all of them ship
    row              one build as a row of facts
    built            many of them, on all cores; kept on disk
    compiler         nvcc as tilelang calls it, ptxas's report, nvdisasm
    sass             what machine code consists of: instructions, barriers, accesses by width
    source_accesses  how wide the generated source reads and writes each buffer
    machine_accesses how wide the machine code does, line by line of that source
    fragments        whether tilelang gave every fragment room for all its elements
    occupancy        blocks that fit a multiprocessor, and what limits them
    faults           what must not be: spills, narrow accesses to the stream, atomics

    command, table   the sub-command, what it prints
    stored           rows on disk; those in perf/results/inspect are what docs/kernels is made from
    explain, pages   the page of a kernel; all of docs/kernels
    terminal         a page for a terminal, with a legend
    tile_kernels     TileKernels' kernels, built the same way

Loads neither torch nor tilelang until something is built.
"""
