"""Measurements and models: a folder a command, over `calls`.

    calls        every call of the kernels, once: sizes, inputs, what runs, what it launches
    torch_forms  the same calls in plain torch, every form verified before it is timed
    measure      interleaved rounds, clocks, quartiles; the machine's caches

    bench        `mhc-tilelang bench`: prepared, checked, measured, reported
    overhead     `bench overhead`: one layer with mHC beside a plain residual; the model of it on a device
    stored       stored results: `bench report`, `bench compare`
    traffic      `traffic`: bytes counted from the kernels' code
    memory       `memory`: what a backward needs kept, with and without recomputation
    simulation   `simulate`: a pipeline stage, overlapped, with mHC and with a plain residual
    study        `study`: gain over depth, training, Sinkhorn
    inspect      `inspect`: what nvcc makes of every kernel, and a page to study each
    predict      `predict`: what a kernel takes on a GPU that is not here, from its machine code
    peers        other implementations, verified and timed beside the kernels
    gpu          what `on_gpu.sh` runs on a GPU: builds, counters, the tuner
    figures      pictures, and the numbers and excerpts of pages

    options, sizes   what several commands' options name: dtypes, models

Imports the package, and nothing imports it but the command line. Commands and reports, `options`, `sizes`,
`calls.table`, `calls.cases` and `traffic.formulas` load no torch.
"""
