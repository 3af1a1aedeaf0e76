"""Kernel times on a GPU that is not here, with a known error: `mhc-tilelang predict`.

A block is walked through the machine code; its integer registers are computed at the sizes of the call, so trip
counts, guards and addresses are facts. The control bits give its own cycles and the round trips to memory that nothing
hides. A small queueing model puts the resident blocks on an SM, waves and bytes on top; no constant belongs to a
kernel.

    listing        instructions with operands and control bits, from `nvdisasm -hex`
    registers, instructions    what integer instructions compute, over the lanes of a warp
    walk           the warps of a block on their way through the code; schedule: in time, as the control bits say
    block          what a block does: the features that the model takes
    model          the queueing network, waves, bytes: features and constants -> µs, terms, regime, advice
    devices        the constants of each device, each with its source
    published, fit, report    where B200's constants are from, how far off the model is, TileKernels predicted

    launched       one launch of ours: built, walked, held to its TIR; barriers: counted in its source
    predicted      a call: an interval, a regime, one sentence; command, figure: the sub-command, its pictures

Needs nvcc for a prediction, nothing but numpy for a validation. Loads neither torch nor tilelang until something is
built.
"""
