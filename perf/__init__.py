"""Measurements: `mhc-tilelang bench`, of the kernels and of a layer with them, and `mhc-tilelang traffic`.

    command    the options, and the order of things: check, measure, report; which other measurements there are
    cases      which kernels at which sizes
    traffic    bytes that each kernel has to move, from sizes alone
    workloads  a kernel ready to run: inputs, preallocated outputs, what to compare with
    baselines  the same in plain torch, every form verified before it is timed
    stream_forms, token_forms   those forms, for kernels that read the stream and kernels that do not
    backward_*_forms, backward_autograd   the same for the backward kernels
    peers      other implementations, verified and timed beside the kernels
    timing     interleaved rounds, clocks, quartiles
    machine    the last-level cache, the processor's and the GPU's
    ready      what is measured is compiled on all cores and checked, before anything is timed
    bench      one case measured        report   the table, the JSON

A whole layer:

    overhead_command   the options of `bench overhead`
    sizes      one layer, of the models that mHC was published with
    model      what mHC adds to it on a device, predicted from FLOPs and traffic
    layers     that layer in torch, under four connections
    overhead   it is checked and measured        overhead_report   the tables, the JSON

Stored results:

    stored, stored_json   as data, and from the JSON
    compare    ratios of two runs
    report_command, figures, figures_kernels, figures_sublayer, flops   Markdown and pictures

Bytes counted from the kernels' code:

    traffic_command, traffic_report   the options; the tables, the sums, the JSON
    calls      every call, ready to run on a device
    launches   which kernels a call launches, how compiled, on which target
    audited    the traffic of a call
    audit      the traffic of a kernel, from its TIR

Models of what was not measured:

    memory, memory_command, memory_report, memory_figure   what a backward needs kept, with and without recomputation
    memory_measured   the same counted in a forward pass's graph
    simulation  a pipeline stage, overlapped, with mHC and with a plain residual
    pictures    `--out` of these commands

Experiments:

    study      `mhc-tilelang study`: gain over depth, training, Sinkhorn

CUDA without a GPU:

    inspect    what nvcc makes of every kernel, and a page to study each
    simt       executes the generated CUDA source on the CPU, thread by thread

Imports the package and nothing imports it but the command line. Commands and reports, `options`, `cases`, `traffic`,
`sizes` and `model` load no torch.
"""
