"""Every call of the kernels, once: sizes, inputs, what runs, what it launches. All other folders build on it.

cases        which calls at which sizes; loads no torch
every_call   each call, ready to run on a device
launches     what it launches on a target, from sizes alone
workloads, boundary_workloads   a call with preallocated outputs, as `bench` times it
"""
