"""`mhc-tilelang traffic`: bytes that the kernels move, counted from their code.

audit        the traffic of a kernel, from its TIR
audited      that of a call        formulas   the same in units of C, as the README states it
"""
