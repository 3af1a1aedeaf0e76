"""`mhc-tilelang check`: every kernel against the float64 reference, and a real stream through eight sublayers.

    inputs       random arguments that make an error visible
    tolerance    how far a float32 kernel may be from float64, derived
    plain_torch  the same functions in plain torch, whose error stands beside the kernels'
    comparison   what a check is: what a kernel computed, what it should have, how far it may be off
    families     the checks, a family a file
    run          which cases are run; rows of results
    real_stream  the bytes of a text through sublayers with small MLPs
    command      the command line

Imports the package and the reference; the tests and `perf` import this.
"""
