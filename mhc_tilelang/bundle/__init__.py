"""Kernels ahead of time: exported for a model and a target, used by hosts in any language, loaded without a compiler.

    workload     which kernels a model needs: what its forward and backward launch
    described    a kernel in words: its name, what it is compiled with, its arguments
    launch_size  grids and other expressions of run-time sizes, for Python and for C
    manifest     manifest.json: what a bundle holds, and the checks that it is whole
    headers      the C headers of a bundle
    cpu_target   C++ sources, CMakeLists.txt and the library
    cuda_target  CUDA sources and cubins
    golden       inputs and float64 results of every kernel; float64.h is the arithmetic they are made with
    export       a bundle as a whole
    load         `compile`'s kernels from a bundle, where $MHC_TILELANG_BUNDLE names one
    driver       launches a cubin through the CUDA driver
    verify       checks a bundle's files, and runs its kernels on the golden vectors
    command      `mhc-tilelang export`, and `warmup_command`

A bundle is a folder. `load` and what it imports need neither tilelang nor a compiler.
"""
