"""Measurements of the kernels: `mhc-tilelang bench`, `mhc-tilelang traffic`.

    command    the options, and the order of things: check, measure, report
    cases      which kernels at which sizes
    traffic    bytes that each kernel has to move, from sizes alone
    workloads  a kernel ready to run: inputs, preallocated outputs, what to compare with
    baselines  the same in plain torch, every form verified before it is timed
    stream_forms, token_forms   those forms, for kernels that read the stream and kernels that do not
    timing     interleaved rounds, clocks, quartiles
    machine    the last-level cache, the processor's and the GPU's
    bench      one case measured        report   the table, the JSON

Bytes counted from the kernels' code:

    traffic_command, traffic_report   the options; the tables, the sums, the JSON
    launches   which kernels a call launches, how compiled, on which target
    audited    the traffic of a call
    audit      the traffic of a kernel, from its TIR

Imports the package and nothing imports it but the command line. `command`, `cases`, `traffic`, `report`,
`traffic_command`, `traffic_report` and `launches` load no torch.
"""
