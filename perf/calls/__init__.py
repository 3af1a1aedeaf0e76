"""Every call of the kernels, once: sizes, inputs, what runs, what it launches. All other folders build on it.

table        what each call takes and gives
cases        which are measured at which sizes; neither loads torch
every_call   each call, ready to run on a device
launches     what it launches on a target, from sizes alone
workloads    a call with preallocated outputs, as `bench` times it
"""
