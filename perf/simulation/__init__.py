"""A simulated pipeline stage: what mHC adds to it, and under which assumptions that is the paper's 6.7 %. No torch.

    streams    tasks on streams that run them in the order of issue: when each starts and ends
    costs      the assumptions, and the seconds of every task that they come to
    measured   seconds of the connections from a stored benchmark instead
    stage      a forward and a backward micro-batch on one stage, overlapped as in DualPipe or one after the other
    pipeline   1F1B over all stages
    overhead   the overhead; what it becomes when one assumption changes; what has to be assumed for a given one
    command, report, figure     `mhc-tilelang simulate`

A model, every number of it: nothing here was measured, unless a stored benchmark is given.
"""
